"""Our numbers against clip_benchmark's own functions on the same features: `make parity`.

clip_benchmark 1.6.2 makes a number of an array of one, which is an error in numpy 2.4 and later, so
it has an environment of its own.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from clip_refine.evaluation.classify import class_vectors, zero_shot_scores
from clip_refine.evaluation.retrieval import retrieval
from tests.reference.draws import normals

WHY = "clip_benchmark is not installed: make parity"
classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", reason=WHY)
theirs_retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason=WHY)

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


class Given(torch.nn.Module):
    """A model whose inputs are its features."""

    def encode_image(self, features: Tensor) -> Tensor:
        return features

    def encode_text(self, features: Tensor) -> Tensor:
        return features


class Labelled(TensorDataset):
    """Features with classes, and the attribute that clip_benchmark asks for."""

    def __init__(self, image: Tensor, labels: Tensor, classes: list[str]) -> None:
        super().__init__(image, labels)
        self.classes = classes


def drawn(kind: str, seed: int) -> Tensor:
    """float32 features; `trained` ones have a cone and a gap as CLIP's do."""
    features = normals(240, 32, seed=seed)
    if kind == "trained":
        features = features + 4 * normals(1, 32, seed=seed + 1)
    return 10 * features.float()


@pytest.mark.parametrize("kind", ["random", "trained"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_zero_shot(kind: str, seed: int):
    labels = torch.arange(240) % 12
    prompts = drawn(kind, seed)[:60].view(12, 5, 32)
    image = drawn("random", seed + 10) + prompts.mean(dim=1)[labels]
    names = [str(number) for number in range(12)]
    templates = [f"{number} {{c}}" for number in range(5)]

    def tokenizer(texts: list[str]) -> Tensor:
        return torch.stack([prompts[int(t.split()[1]), int(t.split()[0])] for t in texts])

    ours = class_vectors(prompts)
    classifier = classification.zero_shot_classifier(
        Given(), tokenizer, names, templates, "cpu", amp=False
    )
    torch.testing.assert_close(ours, classifier.T)
    theirs = classification.evaluate(
        Given(),
        DataLoader(Labelled(image, labels, names), batch_size=50),
        tokenizer,
        names,
        templates,
        "cpu",
        amp=False,
    )
    found = zero_shot_scores(image, ours, labels)
    assert 0.1 < found["top1"] < 1
    assert found["top1"] == pytest.approx(theirs["acc1"])
    assert found["top5"] == pytest.approx(theirs["acc5"])
    assert found["mean_per_class_recall"] == pytest.approx(theirs["mean_per_class_recall"])


@pytest.mark.parametrize("kind", ["random", "trained"])
@pytest.mark.parametrize("captions_per_image", [1, 5])
def test_retrieval(kind: str, captions_per_image: int):
    image = drawn(kind, 3)[:48]
    owners = torch.arange(48).repeat_interleave(captions_per_image)
    text = image[owners] + 8 * drawn("random", 4)[: len(owners)] / 4
    groups = text.view(48, captions_per_image, 32)
    batches = [
        (image[rows], [list(captions) for captions in groups[rows]])
        for rows in (slice(0, 20), slice(20, 40), slice(40, 48))
    ]
    theirs = theirs_retrieval.evaluate(
        Given(), batches, torch.stack, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    found = retrieval(image, text, owners)
    assert 0.02 < found["text_to_image_recall@1"] < 1
    for k in (1, 5, 10):
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(
            theirs[f"image_retrieval_recall@{k}"]
        )
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(
            theirs[f"text_retrieval_recall@{k}"]
        )


def test_the_environment_is_the_one_that_it_runs_in():
    assert tuple(map(int, np.__version__.split(".")[:2])) < (2, 4)
