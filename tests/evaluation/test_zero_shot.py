import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_refine.evaluation.classify import class_vectors, zero_shot_ranks, zero_shot_scores
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, seeds, shuffled


def test_class_vectors_by_hand():
    # 0° and 60°, one of them long: the mean of the directions is 30°
    prompts = torch.tensor([[[9.0, 0.0], [0.5, math.sqrt(3) / 2]]], dtype=torch.float64)
    vector = class_vectors(prompts)[0].tolist()
    assert vector == pytest.approx([math.sqrt(3) / 2, 0.5])


@repeatable
@given(seed=seeds, factor=st.floats(1e-3, 1e3))
def test_class_vectors_are_unit_and_forget_lengths_and_order(seed: int, factor: float):
    prompts = normals(3, 5, 4, seed=seed)
    vectors = class_vectors(prompts)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3, dtype=torch.float64))
    lengths = torch.linspace(0.1, factor, 5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(class_vectors(lengths * prompts), vectors)
    torch.testing.assert_close(class_vectors(prompts[:, shuffled(5, seed=seed)]), vectors)


def test_class_vectors_refuse_what_has_no_direction():
    with pytest.raises(ValueError, match=r"\(classes, templates, dim\), got \(3, 4\)"):
        class_vectors(torch.ones(3, 4))
    with pytest.raises(ValueError, match="mean of a class's prompts: row 0 is zero"):
        class_vectors(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]))
    with pytest.raises(ValueError, match="prompt features: row 1 is not finite"):
        class_vectors(torch.tensor([[[1.0, 0.0], [math.nan, 0.0]]]))


@repeatable
@given(seed=seeds, chunk_size=st.sampled_from([1, 3, 7, 100]))
def test_scores_equal_the_naive_loop(seed: int, chunk_size: int):
    image, classes = normals(20, 4, seed=seed), normals(8, 4, seed=seed + 1)
    labels = torch.randint(8, (20,), generator=torch.Generator().manual_seed(seed))
    found = zero_shot_scores(image, classes, labels, chunk_size=chunk_size)
    cosines = torch.nn.functional.cosine_similarity(image[:, None], classes[None], dim=2).tolist()
    ranks = loops.best_ranks(cosines, [{int(label)} for label in labels])
    predicted = [loops.ranking(row)[0] for row in cosines]
    assert found["top1"] == pytest.approx(loops.recall_at(ranks, 1))
    assert found["top5"] == pytest.approx(loops.recall_at(ranks, 5))
    assert found["mean_per_class_recall"] == pytest.approx(
        loops.mean_per_class_recall(predicted, labels.tolist())
    )


def test_scores_by_hand():
    # classes at 0°, 90°, 180°; images at 10°, 80°, 100°, 170° of classes 0, 0, 1, 1
    classes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    angles = torch.tensor([10.0, 80.0, 100.0, 170.0]).deg2rad()
    image = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = zero_shot_scores(image, classes, torch.tensor([0, 0, 1, 1]))
    assert found == {"top1": 0.5, "top5": 1.0, "mean_per_class_recall": 0.5}


def test_rare_classes_count_as_much_as_common_ones():
    image = torch.tensor([[1.0, 0.0]] * 9 + [[1.0, 0.1]])
    found = zero_shot_scores(image, torch.eye(2), torch.tensor([0] * 9 + [1]))
    assert found["top1"] == pytest.approx(0.9)
    assert found["mean_per_class_recall"] == 0.5


def test_ties_go_to_the_lower_class():
    same = torch.ones(6, 2)
    found = zero_shot_scores(same, same, torch.arange(6))
    assert found["top1"] == pytest.approx(1 / 6)
    assert found["top5"] == pytest.approx(5 / 6)


@repeatable
@given(seed=seeds)
def test_the_order_of_images_and_of_classes_does_not_matter(seed: int):
    image, classes = normals(20, 4, seed=seed), normals(8, 4, seed=seed + 1)
    labels = torch.randint(8, (20,), generator=torch.Generator().manual_seed(seed))
    plain = zero_shot_scores(image, classes, labels)
    rows, new_order = shuffled(20, seed=seed), shuffled(8, seed=seed)
    place_of_class = new_order.argsort()
    moved = zero_shot_scores(image[rows], classes[new_order], place_of_class[labels[rows]])
    assert moved == pytest.approx(plain)


def test_labels_that_name_no_class_are_refused():
    image, classes = normals(4, 3, seed=0), normals(2, 3, seed=1)
    with pytest.raises(ValueError, match="labels must be from 0 to 1, got 0 to 2"):
        zero_shot_scores(image, classes, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"\(4,\) whole numbers, one an image; got \(3,\)"):
        zero_shot_scores(image, classes, torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"whole numbers.*float32"):
        zero_shot_scores(image, classes, torch.zeros(4))
    with pytest.raises(ValueError, match="image and class features must have one dimension"):
        zero_shot_scores(image, normals(2, 5, seed=2), torch.zeros(4, dtype=torch.int64))


def test_lengths_count_where_features_are_not_normalised():
    image = torch.tensor([[1.0, 0.2]])
    classes = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    label = torch.tensor([0])
    assert zero_shot_scores(image, classes, label)["top1"] == 1.0
    assert zero_shot_scores(image, classes, label, normalize=False)["top1"] == 0.0
    assert zero_shot_ranks(image, classes, label, normalize=False).tolist() == [1]
