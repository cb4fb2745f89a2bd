"""An index of documents that are an image, a text or both."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from clip_refine.data.labelled import Documents
from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.retrieval import (
    KINDS,
    Found,
    document_numbers,
    draw_documents,
    joined,
    search,
)
from clip_refine.evaluation.scores import Outcome
from clip_refine.models.embed import EmbeddedPairs
from tests.evaluation.measured import task_on_layout, task_on_pairs
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, rotation, seeds

BOOTSTRAP = Bootstrap(20, 3)
OWNERS = torch.arange(30).repeat_interleave(2)


def pairs_of(seed: int, gap: float = 0.0) -> EmbeddedPairs:
    """Thirty images with two captions each, and a gap between both kinds."""
    image = normals(30, 8, seed=seed)
    text = image[OWNERS] + 0.5 * normals(60, 8, seed=seed + 1)
    shift = gap * torch.eye(8, dtype=torch.float64)[0]
    return EmbeddedPairs(image + shift, text - shift, OWNERS)


def documents(pairs: EmbeddedPairs, *mixing: float, weight: float = 0.5) -> Outcome:
    settings = {"mixing": mixing, "image_weight": weight}
    return task_on_pairs("mixed-documents", pairs, BOOTSTRAP, **settings)


def values(found: Outcome) -> dict[str, float]:
    return {name: number.value for name, number in found.numbers.items()}


@repeatable
@given(seed=seeds, weight=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_the_task_equals_the_naive_loop(seed: int, weight: float):
    pairs = pairs_of(seed)
    found = values(documents(pairs, 2, 1, 1, weight=weight))
    image = normalize(pairs.image_features).tolist()
    text = normalize(pairs.text_features).tolist()
    drawn = draw_documents(OWNERS, 30, mixing=(2, 1, 1), seed=BOOTSTRAP.seed)
    kinds = [KINDS[kind] for kind in drawn.kinds.tolist()]
    index = [
        loops.joined(
            image[i] if kind != "text" else None, text[2 * i] if kind != "image" else None, weight
        )
        for i, kind in enumerate(kinds)
    ]
    # captions of an image's document are not queries, nor is the image
    asked = {
        "image": [(image[i], i) for i in range(30) if kinds[i] == "text"],
        "text": [(text[t], t // 2) for t in range(60) if t % 2 or kinds[t // 2] == "image"],
    }
    for kind, queries in asked.items():
        scores = [[loops.dot(query, item) for item in index] for query, _ in queries]
        own = [{i} for _, i in queries]
        gains = [loops.ndcg(s, o, 10) for s, o in zip(scores, own, strict=True)]
        assert found[f"{kind}_query_ndcg@10"] == pytest.approx(sum(gains) / len(gains))
        ranks = loops.best_ranks(scores, own)
        for k in (1, 10):
            assert found[f"{kind}_query_recall@{k}"] == loops.recall_at(ranks, k)
        first = [kinds[loops.ranking(row)[0]] == "text" for row in scores]
        if kind == "text":
            assert found["text_first_share"] == sum(first) / len(first)


@repeatable
@given(seed=seeds)
def test_a_rotation_and_other_lengths_change_nothing(seed: int):
    pairs = pairs_of(seed, gap=1.0)
    turned = EmbeddedPairs(
        3 * pairs.image_features @ rotation(8, seed=seed),
        7 * pairs.text_features @ rotation(8, seed=seed),
        OWNERS,
    )
    before, after = (values(documents(of, 1, 1, 1)) for of in (pairs, turned))
    assert before == pytest.approx(after)


def test_a_gap_puts_texts_first_and_images_out_of_reach():
    none, wide = (values(documents(pairs_of(0, gap), 1, 1, 0)) for gap in (0.0, 20.0))
    assert wide["text_first_share"] == 1.0
    assert none["text_first_share"] < 0.7
    assert wide["text_query_ndcg@10"] < none["text_query_ndcg@10"]


def test_every_mixing_has_as_many_documents_as_asked_for_and_never_fails():
    pairs = pairs_of(0)
    for mixing in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (4, 1, 0), (1, 4, 0), (1, 1, 1)]:
        found = documents(pairs, *mixing)
        count = [found.counts[f"{kind}_documents"] for kind in KINDS]
        assert count == [round(30 * share / sum(mixing)) for share in mixing]
        assert found.counts["image_queries"] == count[1]
        assert found.counts["text_queries"] == 30 + count[0]
        for number in found.numbers.values():
            assert not number.draws.isnan().any()


def test_one_caption_an_image_has_queries_for_documents_of_one_side():
    image = normals(12, 4, seed=0)
    pairs = EmbeddedPairs(image, image + 0.1 * normals(12, 4, seed=1), torch.arange(12))
    found = documents(pairs, 1, 1, 1)
    assert (found.counts["text_queries"], found.counts["image_queries"]) == (4, 4)
    assert values(found)["ndcg@10"] == pytest.approx(1.0)


def test_rows_with_one_side_are_that_side():
    missing = torch.full((2, 3), torch.nan)
    image, text = normals(2, 3, seed=0), normals(2, 3, seed=1)
    vectors, kinds = joined(
        torch.cat([image, missing]), torch.cat([missing, text]), image_weight=0.9
    )
    assert torch.allclose(vectors, normalize(torch.cat([image, text])))
    assert kinds.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="row 0 has neither an image nor a text"):
        joined(missing, missing)
    with pytest.raises(ValueError, match="image_weight must be from 0 to 1"):
        joined(image, text, image_weight=2)


@repeatable
@given(seed=seeds, chunk_size=st.sampled_from([1, 3, 100]))
def test_search_equals_sorting_whatever_the_block(seed: int, chunk_size: int):
    queries, items = normals(7, 4, seed=seed), normals(9, 4, seed=seed + 1)
    relevant = torch.tensor([[0, 1, -1]] * 3 + [[8, 2, 5]] * 4)
    hidden = torch.full((7,), 7)
    found = search(queries, items, relevant, hidden=hidden, chunk_size=chunk_size)
    for query, scores in enumerate((queries @ items.T).tolist()):
        scores[7] = -100.0
        order = loops.ranking(scores)
        own = [order.index(item) for item in relevant[query].tolist() if item >= 0]
        assert found.ranks[query][found.ranks[query] >= 0].tolist() == own
        assert int(found.first[query]) == order[0]


def test_a_benchmarks_documents_and_judgements():
    # documents: an image, a text, both; the text query asks for the first and the third
    layout = Documents(
        documents=[(0, -1), (-1, 0), (1, 1)],
        queries=[(-1, 2), (2, -1), (0, 0)],
        relevant=[[0, 2], [2], [1]],
    )
    image = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.2]])
    text = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.1], [1.0, 0.1, 0.0]])
    found = task_on_layout("mixbench", image, text, layout, BOOTSTRAP)
    # query 0 finds documents 0 and 2 first; query 1 finds 2; query 2 lies between 0 and 1
    assert values(found)["text_query_ndcg@10"] == pytest.approx(1.0)
    assert values(found)["image_query_recall@1"] == 1.0
    assert values(found)["both_query_ndcg@10"] == pytest.approx(1 / 1.5849625)
    assert values(found)["text_first_share"] == 0.0
    assert found.counts["both_documents"] == found.counts["both_queries"] == 1


def test_a_mixing_of_nothing_is_refused():
    with pytest.raises(ValueError, match="mixing must be three shares"):
        draw_documents(OWNERS, 30, mixing=(0, 0, 0), seed=0)
    with pytest.raises(ValueError, match="nothing is left to search with"):
        draw_documents(torch.arange(30), 30, mixing=(0, 0, 1), seed=0)


def test_an_image_is_drawn_with_all_its_queries():
    """Three texts of image 0 find it, three of image 1 nothing: a resample has 0, half or all."""
    found = Found(torch.tensor([[0], [0], [0], [90], [90], [90]]), torch.zeros(6).long())
    owners = torch.tensor([0, 0, 0, 1, 1, 1])
    numbers = document_numbers(
        found, torch.ones(6).long(), torch.zeros(1).long(), owners, Bootstrap(50)
    )
    for name in ("ndcg@10", "text_query_recall@1"):
        assert set(numbers[name].draws.tolist()) == {0.0, 0.5, 1.0}
