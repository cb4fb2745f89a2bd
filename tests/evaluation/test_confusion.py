import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, recall_score

from clip_refine.evaluation.classify import (
    Confusion,
    confusion_pairs,
    expected_calibration_error,
    per_class_recall,
    zero_shot_predictions,
    zero_shot_scores,
)
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, seeds


def drawn_classes(count: int, class_count: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(class_count, (count,), generator=generator)


@repeatable
@given(seed=seeds, chunk_size=st.sampled_from([1, 7, 100]))
def test_predictions_equal_the_naive_softmax(seed: int, chunk_size: int):
    image, classes = normals(20, 4, seed=seed), normals(6, 4, seed=seed + 1)
    found = zero_shot_predictions(image, classes, logit_scale=7.0, chunk_size=chunk_size)
    cosines = torch.nn.functional.cosine_similarity(image[:, None], classes[None], dim=2).tolist()
    for row, predicted, confidence in zip(cosines, found.predicted, found.confidence, strict=True):
        assert int(predicted) == loops.ranking(row)[0]
        parts = [math.exp(7 * value) for value in row]
        assert confidence.item() == pytest.approx(max(parts) / sum(parts))


def test_predictions_are_the_hits_of_the_scores():
    image, classes = normals(200, 8, seed=0), normals(10, 8, seed=1)
    labels = drawn_classes(200, 10, seed=2)
    predicted = zero_shot_predictions(image, classes).predicted
    scores = zero_shot_scores(image, classes, labels)
    assert (predicted == labels).double().mean().item() == pytest.approx(scores["top1"])
    recall = per_class_recall(predicted, labels, 10)
    assert recall.nanmean().item() == pytest.approx(scores["mean_per_class_recall"])


def test_equal_classes_go_to_the_lower_one_as_in_the_scores():
    same = torch.ones(4, 3)
    assert zero_shot_predictions(same, same).predicted.tolist() == [0, 0, 0, 0]


def test_lengths_count_where_features_are_not_normalised():
    image, classes = torch.tensor([[1.0, 0.2]]), torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    assert zero_shot_predictions(image, classes).predicted.tolist() == [0]
    assert zero_shot_predictions(image, classes, normalize=False).predicted.tolist() == [1]


@repeatable
@given(seed=seeds)
def test_recalls_and_confusions_equal_scikit_learns(seed: int):
    labels, predicted = drawn_classes(60, 5, seed=seed), drawn_classes(60, 5, seed=seed + 1)
    recall = per_class_recall(predicted, labels, 5)
    assert recall.numpy() == pytest.approx(recall_score(labels, predicted, average=None))
    matrix = confusion_matrix(labels, predicted, labels=range(5))
    found = confusion_pairs(predicted, labels, 5, limit=None)
    for pair in found:
        assert matrix[pair.label, pair.predicted] == pair.images
        assert pair.share == pytest.approx(pair.images / matrix[pair.label].sum())
    assert sum(pair.images for pair in found) == matrix.sum() - np.trace(matrix)
    assert [pair.images for pair in found] == sorted((p.images for p in found), reverse=True)
    assert confusion_pairs(predicted, labels, 5, limit=2) == found[:2]


def test_confusions_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([1, 1, 0, 0, 1, 0])
    assert confusion_pairs(predicted, labels, 3) == [
        Confusion(0, 1, 2, 2 / 3),
        Confusion(1, 0, 1, 1 / 2),
        Confusion(2, 0, 1, 1.0),
    ]
    assert confusion_pairs(labels, labels, 3) == []


def test_calibration_by_hand():
    # (0.6, 2/3]: two images at 0.65, one right: |0.5 − 0.65|; (14/15, 1]: one at 1, right
    confidence = torch.tensor([0.65, 0.65, 1.0], dtype=torch.float64)
    error = expected_calibration_error(confidence, torch.tensor([True, False, True]))
    assert error == pytest.approx(2 / 3 * 0.15)
    # one bin: mean confidence against accuracy
    whole = expected_calibration_error(confidence, torch.tensor([True, False, True]), bins=1)
    assert whole == pytest.approx(abs(2 / 3 - 2.3 / 3))


@repeatable
@given(seed=seeds, bins=st.sampled_from([1, 2, 10, 15]))
def test_calibration_equals_the_naive_loop(seed: int, bins: int):
    confidence = torch.rand(50, generator=torch.Generator().manual_seed(seed)).double()
    correct = torch.rand(50, generator=torch.Generator().manual_seed(seed + 1)) < confidence
    expected = loops.expected_calibration_error(confidence.tolist(), correct.tolist(), bins)
    assert expected_calibration_error(confidence, correct, bins=bins) == pytest.approx(expected)


def test_what_is_no_probability_or_class_is_refused():
    with pytest.raises(ValueError, match="not a probability"):
        expected_calibration_error(torch.tensor([1.5]), torch.tensor([True]))
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        expected_calibration_error(torch.ones(2), torch.tensor([True]))
    with pytest.raises(ValueError, match="predicted must be from 0 to 1, got 0 to 2"):
        per_class_recall(torch.tensor([0, 2]), torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="whole numbers"):
        confusion_pairs(torch.ones(2), torch.tensor([0, 1]), 2)
