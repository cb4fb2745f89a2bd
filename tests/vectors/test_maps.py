"""Linear maps against plain NumPy in float64, and what must hold for any."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch.nn.functional import normalize
from torch.testing import assert_close

from clip_refine.vectors.files import load_peer, save_peer
from clip_refine.vectors.transforms import Fold, IsoClip, LinearMaps, Procrustes
from tests.vectors.cases import DIM, drawn, rotation, unit

GENERATOR = np.random.default_rng(0)


def test_a_fold_as_maps():
    fold, shown = Fold.fit(*drawn(2, 8, 9)), drawn(3, 4, 5)
    maps = LinearMaps.of(fold)
    assert maps.fitted_on == (8, 9)
    assert_close(maps.similarity(*shown), fold.similarity(*shown))


@pytest.mark.parametrize(("top", "bottom"), [(0, 0), (1, 0), (1, 2)])
def test_isoclip_is_the_projector_with_directions_dropped(top: int, bottom: int):
    """Of what goes into the projections, which stored vectors no longer show."""
    image_projection, text_projection = GENERATOR.normal(size=(6, 9)), GENERATOR.normal(size=(6, 7))
    hidden = GENERATOR.normal(size=(5, 9))
    psi = image_projection.T @ text_projection
    values, vectors = np.linalg.eigh(psi @ psi.T)
    kept = vectors[:, np.argsort(-values)][:, top : 6 - bottom]
    expected = torch.from_numpy(hidden @ kept @ kept.T @ image_projection.T)
    maps = IsoClip.from_projections(
        *map(torch.from_numpy, (image_projection, text_projection)), top=top, bottom=bottom
    )
    stored = torch.from_numpy(hidden @ image_projection.T)
    assert_close(maps.transform_image(unit(stored)), unit(expected), rtol=0, atol=1e-10)
    assert torch.linalg.matrix_rank(maps.text_map, rtol=1e-9) == 6 - top - bottom


def test_isoclip_refuses_what_leaves_nothing():
    square = torch.eye(4)
    with pytest.raises(ValueError, match="top 2 and bottom 2 must leave some of 4 directions"):
        IsoClip.from_projections(square, square, top=2, bottom=2)
    with pytest.raises(ValueError, match="one dimension, got 4 and 3"):
        IsoClip.from_projections(square, torch.eye(3), top=0, bottom=0)


def test_procrustes_against_scipy():
    old, new = drawn(0, 30, 30)
    expected, _ = orthogonal_procrustes(unit(new).numpy(), unit(old).numpy())
    found = Procrustes.align(old, new)
    assert_close(found.image_map.T, torch.from_numpy(expected), rtol=0, atol=1e-12)
    assert torch.equal(found.image_map, found.text_map)


@pytest.mark.parametrize("old_dim", [4, 6, 8])
def test_procrustes_keeps_lengths_where_dimensions_differ(old_dim: int):
    new = drawn(0, 30, 1)[0]
    old = new @ torch.randn(DIM, old_dim, dtype=torch.float64)
    found = Procrustes.align(old, new).image_map
    small = found @ found.T if old_dim <= DIM else found.T @ found
    assert found.shape == (old_dim, DIM)
    assert_close(small, torch.eye(min(old_dim, DIM), dtype=torch.float64))


def test_procrustes_finds_a_rotation_of_the_space():
    image, text = drawn(0, 30, 30)
    turn = rotation(1)
    found = Procrustes.align(image, image @ turn)
    assert_close(found.transform_text(text @ turn), normalize(text, dim=1))


def test_procrustes_refuses_other_items():
    with pytest.raises(ValueError, match="of the same items, got 3 and 2 rows"):
        Procrustes.align(torch.eye(3), torch.eye(3)[:2])


@pytest.mark.parametrize(
    "maps",
    [
        LinearMaps.of(Fold.fit(*drawn(2, 8, 9))),
        IsoClip.from_projections(torch.eye(6), rotation(2), top=1, bottom=1),
        Procrustes.align(*drawn(2, 8, 8)),
    ],
    ids=lambda maps: maps.kind,
)
def test_saved_and_loaded(maps: LinearMaps, tmp_path: Path):
    save_peer(maps, tmp_path / "maps")
    again = load_peer(tmp_path / "maps")
    assert type(again) is type(maps)
    assert torch.equal(again.similarity(*drawn(3, 4, 5)), maps.similarity(*drawn(3, 4, 5)))


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (torch.eye(3), torch.eye(4), "must have one shape"),
        (torch.eye(3) / 0, torch.eye(3), "image_map is not finite"),
        (torch.ones(3), torch.eye(3), r"image_map must be \(rows, dim\)"),
    ],
)
def test_what_is_no_pair_of_maps(image: torch.Tensor, text: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        LinearMaps(image, text, 1, 1)
