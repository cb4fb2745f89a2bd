"""Geometry and retrieval against the golden numbers, on made features and on CLIP's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clip_refine.evaluation.geometry import geometry
from clip_refine.evaluation.retrieval import retrieval

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests/golden"
COCO_FEATURES = REPOSITORY.parent / "shared/golden/coco500_clip_features.npz"


def measured(image: Tensor, text: Tensor, *, k: int, ks: tuple[int, ...]) -> dict[str, float]:
    shape = geometry(image, text, k=k)
    shape[f"hubness_skewness_k{k}_image_queries"] = shape.pop("hubness_skewness")
    return shape | retrieval(image, text, ks=ks)


def test_made_features():
    inputs = json.loads((GOLDEN / "losses.json").read_text())["inputs"]
    image, text = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("image", "text"))
    expected = json.loads((GOLDEN / "metrics.json").read_text())["metrics"]
    found = measured(image, text, k=2, ks=(1, 2, 5))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12, rel=0)


@pytest.mark.skipif(
    not COCO_FEATURES.exists(),
    reason=f"{COCO_FEATURES} is not on this machine: data of this project that is not published",
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["64", "32"]
)
def test_clip_features_of_500_coco_pairs(dtype: torch.dtype, tolerance: float):
    features = np.load(COCO_FEATURES)
    image, text = (torch.from_numpy(features[name]).to(dtype) for name in ("image", "text"))
    expected = json.loads((GOLDEN / "coco500_metrics.json").read_text())["metrics"]
    found = measured(image, text, k=10, ks=(1, 2, 5, 10))
    assert found["linear_separability"] == 1
    named = {name: found[name] for name in expected}
    assert named == pytest.approx(expected, abs=tolerance, rel=0)
