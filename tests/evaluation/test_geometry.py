import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from clip_refine.evaluation.geometry import (
    geometry,
    hubness_skewness,
    linear_separability,
    relative_modality_gap,
    text_first_share,
    uniformity_mean,
)
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, rotation, seeds, shuffled

NAMES = (
    "centroid_distance",
    "centroid_squared_over_dim",
    "true_pair_cosine",
    "alignment",
    "residual_alignment",
    "uniformity_log",
    "uniformity_mean",
    "relative_modality_gap",
    "text_first_share",
    "linear_separability",
    "hubness_skewness",
    "effective_rank",
)


def made_pairs(
    count: int = 7, dim: int = 4, *, seed: int, gap: float = 0.5
) -> tuple[Tensor, Tensor]:
    image, text = normals(2, count, dim, seed=seed)
    text = text + image
    text[:, 0] += gap
    return image, text


def unit_pairs(count: int = 7, dim: int = 4, *, seed: int) -> tuple[Tensor, Tensor]:
    image, text = made_pairs(count, dim, seed=seed)
    return normalize(image, dim=1), normalize(text, dim=1)


def test_the_names_are_methods():
    assert tuple(geometry(*made_pairs(seed=0), k=2)) == NAMES


@repeatable
@given(seed=seeds, chunk_size=st.sampled_from([1, 2, 3, 5, 100]))
def test_equals_the_naive_loops(seed: int, chunk_size: int):
    image, text = made_pairs(seed=seed)
    found = geometry(image, text, k=3, chunk_size=chunk_size)
    unit = [normalize(rows, dim=1).tolist() for rows in (image, text)]
    for name in NAMES:
        if name == "linear_separability":
            continue
        if name == "uniformity_log":
            expected = math.log(loops.uniformity_mean(*unit))
        elif name == "hubness_skewness":
            expected = loops.hubness_skewness(*unit, k=3)
        else:
            expected = getattr(loops, name)(*unit)
        assert found[name] == pytest.approx(expected, rel=1e-10, abs=1e-12), name


@repeatable
@given(seed=seeds)
def test_the_order_of_pairs_does_not_matter(seed: int):
    image, text = made_pairs(seed=seed)
    order = shuffled(7, seed=seed)
    plain, reordered = geometry(image, text, k=3), geometry(image[order], text[order], k=3)
    # the split of the classifier goes by position
    same = [name for name in NAMES if name != "linear_separability"]
    assert [reordered[n] for n in same] == pytest.approx([plain[n] for n in same], rel=1e-9)


@repeatable
@given(seed=seeds, factor=st.floats(1e-3, 1e3))
def test_lengths_and_a_common_rotation_do_not_matter(seed: int, factor: float):
    image, text = made_pairs(seed=seed)
    turn = rotation(4, seed=seed)
    lengths = torch.linspace(0.5, factor, 7, dtype=torch.float64)[:, None]
    plain = geometry(image, text, k=3)
    moved = geometry(lengths * image @ turn, factor * text @ turn, k=3)
    assert moved == pytest.approx(plain, rel=1e-9, abs=1e-12)


@repeatable
@given(seed=seeds)
def test_exchanging_the_modalities_changes_only_the_directed_metrics(seed: int):
    image, text = made_pairs(seed=seed)
    forth, back = geometry(image, text, k=3), geometry(text, image, k=3)
    directed = {"text_first_share", "hubness_skewness", "linear_separability"}
    for name in set(NAMES) - directed:
        assert back[name] == pytest.approx(forth[name], rel=1e-10), name


@repeatable
@given(seed=seeds)
def test_alignment_splits_exactly_into_gap_and_residual(seed: int):
    found = geometry(*made_pairs(seed=seed), k=2)
    split = found["centroid_distance"] ** 2 + found["residual_alignment"]
    assert found["alignment"] == pytest.approx(split, rel=1e-12)
    assert found["alignment"] == pytest.approx(2 - 2 * found["true_pair_cosine"], rel=1e-12)
    squared = found["centroid_squared_over_dim"] * 4
    assert squared == pytest.approx(found["centroid_distance"] ** 2, rel=1e-12)


@repeatable
@given(seed=seeds)
def test_ranges(seed: int):
    found = geometry(*made_pairs(seed=seed), k=2)
    assert 0 <= found["centroid_distance"] <= 2
    assert -1 <= found["true_pair_cosine"] <= 1
    assert math.exp(-8) <= found["uniformity_mean"] <= 1
    assert found["uniformity_log"] == pytest.approx(math.log(found["uniformity_mean"]))
    assert 0 <= found["relative_modality_gap"] <= 1
    assert 0 <= found["linear_separability"] <= 1
    assert 1 <= found["effective_rank"] <= 4


def test_by_hand():
    # images e0 and e1; texts −e0 and e1: centroids (½, ½) and (−½, ½), cosines −1 and 1
    image = torch.eye(2, dtype=torch.float64)
    text = torch.tensor([[-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = geometry(image, text, k=1)
    assert found["centroid_distance"] == 1
    assert found["centroid_squared_over_dim"] == 0.5
    assert found["true_pair_cosine"] == 0
    assert found["alignment"] == 2
    assert found["residual_alignment"] == 1
    # squared distances: image-image 2, text-text 2, across 4, 2, 2, 0
    kernel = (4 * math.exp(-4) + math.exp(-8) + 1) / 6
    assert found["uniformity_mean"] == pytest.approx(kernel, rel=1e-14)
    # a = ½, b = ½ both, as strangers within a modality have cosine 0
    assert found["relative_modality_gap"] == 0.5
    # caption 0: image 1 ties with the other caption at 0 and counts first; caption 1: image 1 at 1
    assert found["text_first_share"] == 0
    # both images find text 1 nearest, counts (0, 2): symmetric around 1
    assert found["hubness_skewness"] == 0
    # joint covariance diag(½, ¼): entropy of the shares ⅔ and ⅓
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert found["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 13, 37, 1000])
def test_chunks_equal_the_full_matrix(chunk_size: int):
    image, text = unit_pairs(37, 6, seed=1)
    every = torch.cat([image, text])
    kernel = (-2 * torch.cdist(every, every).square()).exp()
    upper = torch.triu_indices(74, 74, offset=1)
    uniformity = uniformity_mean(image, text, chunk_size=chunk_size)
    assert uniformity == pytest.approx(kernel[upper[0], upper[1]].mean().item(), rel=1e-12)

    among = text @ text.T - 9 * torch.eye(37, dtype=torch.float64)
    is_text_first = among.amax(1) > (text @ image.T).amax(1)
    share = text_first_share(image, text, chunk_size=chunk_size)
    assert share == is_text_first.double().mean().item()

    nearest = (image @ text.T).argsort(dim=1, descending=True)[:, :5]
    counts = nearest.flatten().bincount(minlength=37).double()
    centred = counts - counts.mean()
    skewness = (centred.pow(3).mean() / centred.square().mean().pow(1.5)).item()
    found = hubness_skewness(image, text, k=5, chunk_size=chunk_size)
    assert found == pytest.approx(skewness, rel=1e-12)


def test_hubness_gives_ties_to_the_lower_index():
    # all texts alike: every image takes the first k, whatever topk would do
    image, _ = unit_pairs(6, 4, seed=2)
    text = torch.ones(6, 4, dtype=torch.float64) / 2
    expected = loops.hubness_skewness(image.tolist(), text.tolist(), k=2)
    assert hubness_skewness(image, text, k=2) == pytest.approx(expected)


def test_text_first_is_one_across_a_wide_gap_and_none_without():
    image, _ = unit_pairs(20, 8, seed=3)
    away = torch.zeros(8, dtype=torch.float64)
    away[0] = 5
    assert geometry(image + away, image - away)["text_first_share"] == 1
    assert geometry(image, image)["text_first_share"] == 0


def test_separability_of_separate_and_of_mixed_clouds():
    image, text = normals(2, 400, 3, seed=4)
    away = torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64)
    assert geometry(image + away, text - away)["linear_separability"] == 1
    assert geometry(image, text)["linear_separability"] == pytest.approx(0.5, abs=0.08)


def test_separability_is_tested_on_pairs_that_did_not_teach():
    # with fewer pairs than dimensions noise separates the taught half perfectly, not the rest
    image, text = (normalize(side, dim=1) for side in normals(2, 60, 200, seed=5))
    assert linear_separability(image, text) < 0.75


def test_separability_depends_on_its_seed_only():
    image, text = unit_pairs(50, 4, seed=6)
    found = [linear_separability(image, text, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_float32_is_near_float64_and_autocast_changes_nothing():
    image, text = made_pairs(30, 8, seed=7)
    exact = geometry(image, text)
    assert geometry(image.float(), text.float()) == pytest.approx(exact, rel=1e-5, abs=1e-6)
    rounded = geometry(image.float(), text.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert geometry(image.float(), text.float()) == rounded


def test_half_precision_features_are_widened():
    image, text = (side.bfloat16() for side in made_pairs(30, 8, seed=8))
    assert geometry(image, text) == geometry(image.float(), text.float())


def test_features_with_a_gradient_are_measured_without():
    image, text = made_pairs(seed=9)
    assert geometry(image.requires_grad_(), text, k=2)["alignment"] > 0


def test_the_features_are_left_as_they_were():
    image, text = made_pairs(seed=10)
    before = image.clone(), text.clone()
    geometry(image, text, k=2)
    assert torch.equal(image, before[0])
    assert torch.equal(text, before[1])


def test_a_collapsed_model_has_numbers_too():
    same = torch.ones(12, 4, dtype=torch.float64)
    found = geometry(same, same)
    assert found["effective_rank"] == 1
    assert found["relative_modality_gap"] == pytest.approx(0, abs=1e-9)
    assert found["uniformity_mean"] == pytest.approx(1)
    assert all(math.isfinite(value) for value in found.values())


def test_extreme_lengths_neither_overflow_nor_vanish():
    image, text = made_pairs(seed=11)
    plain = geometry(image.float(), text.float(), k=2)
    extreme = geometry(1e30 * image.float(), 1e-30 * text.float(), k=2)
    assert extreme == pytest.approx(plain, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("count", [1, 5, 10])
def test_too_few_pairs_are_refused(count: int):
    image, text = made_pairs(count, seed=12)
    with pytest.raises(ValueError, match=rf"more than k pairs, got {count}\. Pass more pairs"):
        geometry(image, text)


def test_shapes_that_are_no_pairs_are_refused():
    image, text = made_pairs(20, 4, seed=13)
    with pytest.raises(ValueError, match=r"one row a pair; got \(20, 4\) and \(19, 4\)"):
        geometry(image, text[:-1])
    with pytest.raises(ValueError, match="one row a pair"):
        geometry(image[0], text[0])


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "row 3 is not finite"), (math.inf, "row 3 is not finite"), (0.0, "row 3 is zero")],
)
def test_rows_without_a_direction_are_refused(value: float, message: str):
    image, text = made_pairs(20, 4, seed=14)
    text[3] = value
    with pytest.raises(ValueError, match=f"text features: {message}"):
        geometry(image, text)


def test_chunks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        geometry(*made_pairs(20, seed=15), chunk_size=0)


def test_single_rows_are_refused_where_two_are_needed():
    one = torch.tensor([[1.0, 0.0]])
    with pytest.raises(ValueError, match="at least 2 rows"):
        relative_modality_gap(one, one)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        linear_separability(one, one)
    with pytest.raises(ValueError, match="more than k texts"):
        hubness_skewness(one, one, k=1)
