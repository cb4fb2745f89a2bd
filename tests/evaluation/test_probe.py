"""The linear probe on features that a line can and cannot tell apart."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.classify import STRENGTHS, linear_probe, stratified_halves
from clip_refine.evaluation.scores import ModelFeatures, TaskFeatures, probe_features
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.support.errors import DataError
from tests.evaluation.measured import task_on_classes


def clusters(count: int, classes: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    centres = torch.eye(classes, 8)
    return centres[labels] + noise * torch.randn(count, 8, generator=generator), labels


def test_separable_classes_are_all_found():
    features, labels = clusters(60, 5, 0.05)
    assert linear_probe(features, labels) == 1.0
    assert linear_probe(30 * features, labels) == 1.0


def test_labels_without_meaning_are_found_by_chance():
    features = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(4, (400,), generator=torch.Generator().manual_seed(2))
    assert linear_probe(features, labels) == pytest.approx(0.25, abs=0.1)


def test_neither_norms_nor_a_common_cone_matter():
    features, labels = clusters(80, 4, 0.6)
    norms = torch.rand(80, 1, generator=torch.Generator().manual_seed(5)) + 0.5
    assert linear_probe(features * norms, labels, seed=3) == linear_probe(features, labels, seed=3)
    assert linear_probe(features, labels, seed=3) == linear_probe(features, labels, seed=3)


def test_it_is_the_protocol_by_hand():
    features, labels = clusters(90, 3, 0.8)
    unit = (features / features.norm(dim=1, keepdim=True)).double().numpy()
    classes = labels.numpy()
    generator = np.random.default_rng(7)
    train, test = stratified_halves(classes, generator)
    fit, validation = (train[half] for half in stratified_halves(classes[train], generator))

    def accuracy(strength: float, on: np.ndarray, of: np.ndarray) -> float:
        scaler = StandardScaler().fit(unit[on])
        probe = LogisticRegression(C=strength, max_iter=5000, tol=1e-8)
        probe.fit(scaler.transform(unit[on]), classes[on])
        return float(probe.score(scaler.transform(unit[of]), classes[of]))

    best = max(STRENGTHS, key=lambda strength: accuracy(strength, fit, validation))
    assert linear_probe(features, labels, seed=7) == pytest.approx(accuracy(best, train, test))


def test_halves_keep_the_classes():
    classes = np.array([0] * 5 + [1] * 4 + [2])
    first, second = stratified_halves(classes, np.random.default_rng(0))
    assert sorted([*first, *second]) == list(range(10))
    assert np.bincount(classes[first]).tolist() == [3, 2, 1]
    assert np.bincount(classes[second]).tolist() == [2, 2]


def test_what_cannot_be_probed():
    features = torch.eye(4)
    with pytest.raises(ValueError, match="two classes or more"):
        linear_probe(features, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="two images of some class"):
        linear_probe(features, torch.arange(4))
    with pytest.raises(ValueError, match="labels must be"):
        linear_probe(features, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="row 2 is zero"):
        linear_probe(torch.tensor([[1.0], [1.0], [0.0], [1.0]]), torch.tensor([0, 0, 1, 1]))


def test_tasks_with_one_image_a_class_go_without(capsys: pytest.CaptureFixture[str]):
    features, labels = clusters(12, 3, 0.1)
    tasks = (
        TaskFeatures("many", features, features[:3], labels),
        TaskFeatures("single", features[:3], features[:3], labels[:3]),
    )
    pairs = EmbeddedPairs(features, features, torch.arange(12))
    found = probe_features(ModelFeatures(pairs, tasks, dim=8), seed=0)
    assert {task: hits.double().mean() for task, hits in found.items()} == {"many": 1.0}
    assert "single: no linear probe, which needs a class of two images" in capsys.readouterr().err
    with pytest.raises(DataError, match="needs two classes, one of them with two images"):
        task_on_classes("linear-probe", features[:3], labels[:3], Bootstrap(5))
