"""Retrieval within one modality, and the vote of the nearest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch.nn.functional import normalize

from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.retrieval import group_hits, search_within, votes
from clip_refine.models.embed import EmbeddedPairs
from tests.evaluation.measured import task_on_classes, task_on_pairs
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, rotation, seeds, shuffled


@repeatable
@given(seed=seeds, chunk_size=st.sampled_from([1, 7, 100]))
def test_precision_and_recall_equal_the_naive_loop(seed: int, chunk_size: int):
    rows = normals(20, 5, seed=seed)
    groups = torch.randint(6, (20,), generator=torch.Generator().manual_seed(seed))
    unit = normalize(rows).tolist()
    found = search_within(rows, groups, k=10, chunk_size=chunk_size)
    precisions = loops.group_average_precision(unit, groups.tolist())
    assert found.average_precision.tolist() == pytest.approx(precisions)
    for k in (1, 5):
        for query, hit in zip(found.queries.tolist(), group_hits(found, groups, k), strict=True):
            scores = [loops.dot(unit[query], row) for row in unit]
            scores[query] = -2.0
            near = loops.ranking(scores)[:k]
            assert bool(hit) == any(groups[item] == groups[query] for item in near)


@repeatable
@given(seed=seeds, k=st.sampled_from([1, 3, 10]))
def test_the_vote_is_scikit_learns(seed: int, k: int):
    rows, groups = normals(30, 5, seed=seed), torch.arange(30) % 4
    unit = normalize(rows).numpy()
    theirs = []
    for out in range(30):
        kept = [row for row in range(30) if row != out]
        classifier = KNeighborsClassifier(k).fit(unit[kept], groups[kept].numpy())
        theirs.append(classifier.predict(unit[out : out + 1])[0] == groups[out].item())
    found = search_within(rows, groups, k=k)
    assert votes(found, groups).tolist() == theirs
    nearest = NearestNeighbors(n_neighbors=k).fit(unit).kneighbors(return_distance=False)
    assert found.neighbours.tolist() == nearest.tolist()


@repeatable
@given(seed=seeds)
def test_order_rotation_and_lengths_change_nothing(seed: int):
    rows, groups, order = normals(20, 5, seed=seed), torch.arange(20) % 3, shuffled(20, seed=seed)
    found = search_within(rows, groups)
    moved = search_within(4 * rows[order] @ rotation(5, seed=seed), groups[order])
    assert moved.average_precision.mean().item() == pytest.approx(
        found.average_precision.mean().item()
    )
    assert torch.equal(votes(moved, groups[order]), votes(found, groups)[order])


def test_equals_stand_in_the_order_of_their_index():
    found = search_within(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), k=3)
    assert found.neighbours.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_the_tasks_give_one_number_a_measure_and_leave_lonely_rows_out():
    image, labels = normals(21, 5, seed=0), torch.tensor([9, *(torch.arange(20) % 4).tolist()])
    found = task_on_classes("image-neighbours", image, labels, Bootstrap(10))
    assert found.counts == {"images": 21, "queries": 20}
    direct = search_within(image, labels)
    numbers = {name: number.value for name, number in found.numbers.items()}
    assert numbers["image_to_image_mAP"] == pytest.approx(direct.average_precision.mean().item())
    assert numbers["knn_accuracy@10"] == votes(direct, labels).double().mean().item()
    owners = torch.tensor([0, 1, 1, 2, 2])
    pairs = EmbeddedPairs(image[:3], normals(5, 5, seed=2), owners)
    texts = task_on_pairs("text-neighbours", pairs, Bootstrap(10))
    assert texts.counts == {"images": 3, "captions": 5, "queries": 4}
    assert texts.numbers["text_to_text_recall@5"].value == 1.0  # of five captions
    direct = search_within(pairs.text_features, owners)
    precision = direct.average_precision.mean().item()
    assert texts.numbers["text_to_text_mAP"].value == pytest.approx(precision)
    first = group_hits(direct, owners, 1).double().mean().item()
    assert texts.numbers["text_to_text_recall@1"].value == first
    assert first < precision < 1


def test_what_cannot_be_searched():
    with pytest.raises(ValueError, match="no two rows are of one group"):
        search_within(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match=r"groups must be \(3,\) whole numbers"):
        search_within(torch.eye(3), torch.arange(2))
