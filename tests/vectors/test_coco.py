"""What the peers do to CLIP's own features of 500 COCO pairs (METHOD §4)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from clip_refine.evaluation import retrieval
from clip_refine.evaluation.geometry import centroid_squared_over_dim
from clip_refine.vectors.files import FeatureSet, read_features
from clip_refine.vectors.transforms import Peer, fit_peer
from tests.vectors.cases import unit

FEATURES = Path(__file__).parents[3] / "shared/golden/coco500_clip_features.npz"
FIRST, SECOND = slice(0, 250), slice(250, 500)

pytestmark = pytest.mark.skipif(
    not FEATURES.exists(),
    reason=f"{FEATURES} is not on this machine: data of this project that is not published",
)


@pytest.fixture(scope="module")
def features() -> FeatureSet:
    return read_features(FEATURES)


def moved(peer: Peer, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return peer.transform_image(image), peer.transform_text(text)


def gap(image: Tensor, text: Tensor) -> float:
    return 1e3 * centroid_squared_over_dim(unit(image), unit(text))


def recall_at_1(image: Tensor, text: Tensor, *, normalize: bool = False) -> tuple[float, float]:
    found = retrieval(image, text, ks=[1], normalize=normalize)
    return found["image_to_text_recall@1"], found["text_to_image_recall@1"]


@pytest.mark.parametrize(
    ("name", "expected_gap", "expected_recall"),
    [
        ("mean-centring", 0.0015, (0.542, 0.500)),
        ("modality-shift", 0.0001, (0.358, 0.366)),
        ("distribution-normalisation", 0.5983, (0.564, 0.546)),
        ("nnn", 1.4156, (0.562, 0.552)),
        ("mean-centring+nnn", 0.0015, (0.568, 0.536)),
        ("modality-shift+nnn", 0.0001, (0.566, 0.536)),
    ],
)
def test_fitted_on_the_pairs_evaluated(
    features: FeatureSet, name: str, expected_gap: float, expected_recall: tuple[float, float]
):
    """As METHOD's figures were taken; the untouched features have 1.4156 and .552 / .506."""
    image, text = features.image_features, features.text_features
    peer = fit_peer(name, image, text)
    image, text = moved(peer, image, text)
    assert recall_at_1(image, text) == pytest.approx(expected_recall, abs=1e-9)
    found = gap(image[:, : peer.dim], text[:, : peer.dim])
    assert found == pytest.approx(expected_gap, abs=1e-4)


def test_distribution_normalisation_as_method_has_it(features: FeatureSet):
    """METHOD's .570 / .522 are the cosine of DN's features, not the method's dot product."""
    image, text = features.image_features, features.text_features
    peer = fit_peer("distribution-normalisation", image, text)
    assert recall_at_1(*moved(peer, image, text), normalize=True) == pytest.approx((0.57, 0.522))


@pytest.mark.parametrize(
    ("name", "expected_gap", "expected_recall"),
    [
        ("mean-centring", 0.0294, (0.660, 0.632)),
        ("modality-shift", 0.0140, (0.464, 0.468)),
        ("distribution-normalisation", 0.6288, (0.656, 0.624)),
        ("nnn", 1.4340, (0.640, 0.624)),
        ("mean-centring+nnn", 0.0294, (0.680, 0.656)),
    ],
)
def test_fitted_on_other_pairs(
    features: FeatureSet, name: str, expected_gap: float, expected_recall: tuple[float, float]
):
    """First half fitted on, second evaluated; untouched it has 1.4340 and .660 / .608."""
    image, text = features.image_features, features.text_features
    peer = fit_peer(name, image[FIRST], text[FIRST])
    image, text = moved(peer, image[SECOND], text[SECOND])
    assert recall_at_1(image, text) == pytest.approx(expected_recall, abs=1e-9)
    found = gap(image[:, : peer.dim], text[:, : peer.dim])
    assert found == pytest.approx(expected_gap, abs=1e-4)


def test_nnn_ranks_as_its_own_scores_do(features: FeatureSet):
    """The two appended columns against the formula, in each direction, in float64."""
    image, text = features.image_features.double(), features.text_features.double()
    peer = fit_peer("nnn", image[FIRST], text[FIRST])
    found = peer.similarity(image[SECOND], text[SECOND])
    cosine = unit(image[SECOND]) @ unit(text[SECOND]).T

    def bias(items: Tensor, references: Tensor) -> Tensor:
        return 0.75 * (unit(items) @ unit(references).T).sort(dim=1).values[:, -128:].mean(dim=1)

    image_to_text = cosine - bias(text[SECOND], image[FIRST])
    text_to_image = cosine - bias(image[SECOND], text[FIRST])[:, None]
    assert torch.equal(found.argsort(dim=1), image_to_text.argsort(dim=1))
    assert torch.equal(found.argsort(dim=0), text_to_image.argsort(dim=0))
