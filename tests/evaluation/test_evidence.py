"""What the report's charts are drawn from, against numpy and by hand."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from clip_refine.evaluation.evidence import (
    cosine_histograms,
    fits,
    gather_evidence,
    joint_plane,
    spectra,
    thumbnail,
)
from clip_refine.evaluation.scores import Measured, ModelFeatures, measure
from clip_refine.evaluation.separation import fit_probability
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.results import Evidence, read
from clip_refine.support.errors import DataError
from clip_refine.toy import ToyPairs


def side(seed: int, count: int = 24) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, count, 6, generator=generator)
    return measure(ModelFeatures(EmbeddedPairs(image, image + noise, torch.arange(count)), []))


def test_the_plane_is_that_of_numpys_singular_vectors():
    before, after = side(0), side(1)
    points, explained, fitted = joint_plane(before, after, torch.arange(24), seed=0)
    together = torch.cat(
        [before.image_unit, before.text_unit, after.image_unit, after.text_unit]
    ).double()
    centred = (together - together.mean(dim=0)).numpy()
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(
        np.abs(torch.cat(points).numpy()), np.abs(centred @ directions[:2].T), atol=1e-9
    )
    assert explained == pytest.approx((values[:2] ** 2 / (values**2).sum()).tolist())
    assert fitted == 24


def test_histograms_by_a_loop():
    before, after = side(0), side(1)
    found = cosine_histograms(before, after, seed=0)
    similarity = (after.image_unit @ after.text_unit.T).numpy()
    true = np.diagonal(similarity)
    wrong = similarity[~np.eye(24, dtype=bool)]
    for values, shares in ((true, found.true_after), (wrong, found.wrong_after)):
        expected = np.histogram(values, found.edges)[0] / len(values)
        assert np.allclose(shares, expected, atol=1e-3)
        assert sum(shares) == pytest.approx(1, abs=1e-2)
    assert found.auc[1] == pytest.approx((true[:, None] > wrong).mean(), abs=1e-6)
    assert len(found.edges) == len(found.true_before) + 1


def test_spectra_are_singular_values():
    before, after = side(0), side(1)
    unit = after.text_unit.double().numpy()
    expected = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False) / np.sqrt(len(unit))
    assert spectra(before, after).text_after == pytest.approx(expected.tolist(), rel=1e-3)


def test_evidence_is_read_back_as_it_was_written(tmp_path):
    pairs = ToyPairs("evidence", size=24)
    evidence = gather_evidence(side(0), side(1), pairs, [], seed=0)
    evidence.write(tmp_path / "report.json")
    assert read(Evidence, tmp_path / "report.json") == evidence
    assert [pair.caption for pair in evidence.clouds.pairs] == [c[0] for c in pairs.captions]
    assert evidence.clouds.pairs[5].rank_after == int(side(1).ranks.image_to_text[5]) + 1
    assert set(evidence.thumbnails) == set(range(24))
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(DataError, match="no report.json of this version"):
        read(Evidence, tmp_path / "report.json")


def test_fits_of_both_models_and_what_the_first_ones_threshold_does_after():
    before, after = side(0, 60), side(1, 60)
    texts = torch.eye(6), -torch.eye(6)
    found = fits(before, after, seed=2, nonsense=texts)
    for fit, own, nonsense in zip(found["fits"], (before, after), texts, strict=True):
        pairs = own.features.pairs
        sides = (pairs.image_features, pairs.text_features, pairs.text_to_image)
        assert fit == fit_probability(*sides, seed=2, nonsense_features=nonsense)
    was, now = (fit.cutoffs["false_positive_rate"] for fit in found["fits"])
    assert found["kept"]["false_positive_rate"].cosine == was.cosine
    assert found["kept"]["false_positive_rate"].recall != was.recall
    assert now.cosine != was.cosine
    assert fits(side(0), side(1), seed=2, nonsense=None) == {}  # of 24 images


def test_thumbnails_are_small_jpegs_of_any_image():
    for mode in ("RGB", "L", "RGBA", "P"):
        data = base64.b64decode(thumbnail(Image.new(mode, (400, 200))))
        assert Image.open(io.BytesIO(data)).size == (96, 48)
