import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from clip_refine.evaluation.separation import GRID, separation
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, rotation, seeds, shuffled

OWNERS = torch.tensor([2, 0, 1, 2, 3, 4, 4])


def cosines_by_kind(image, text, owners) -> tuple[list[float], list[float]]:
    """Rounded to the grid."""
    cosines = torch.nn.functional.cosine_similarity(text[:, None], image[None], dim=2)
    cosines = (cosines * GRID).round() / GRID
    own = owners[:, None] == torch.arange(len(image))
    return cosines[own].tolist(), cosines[~own].tolist()


@repeatable
@given(seed=seeds, chunk_size=st.sampled_from([1, 3, 100]))
def test_equals_the_naive_loop_and_scikit_learn(seed: int, chunk_size: int):
    image, text = normals(5, 4, seed=seed), normals(7, 4, seed=seed + 1)
    found = separation(image, text, OWNERS, bins=64, chunk_size=chunk_size)
    true, wrong = cosines_by_kind(image, text, OWNERS)
    assert (found.true_pairs.pairs, found.wrong_pairs.pairs) == (7, 28)
    assert found.auc == pytest.approx(loops.area_under_the_curve(true, wrong))
    assert found.auc == pytest.approx(roc_auc_score([1] * 7 + [0] * 28, true + wrong))
    for kind, cosines in ((found.true_pairs, true), (found.wrong_pairs, wrong)):
        assert kind.mean == pytest.approx(np.mean(cosines))
        assert kind.deviation == pytest.approx(np.std(cosines))
        assert kind.histogram.tolist() == np.histogram(cosines, 64, (-1, 1))[0].tolist()


@repeatable
@given(seed=seeds, rate=st.sampled_from([0.01, 0.1, 0.25, 0.5]))
def test_the_threshold_lets_through_what_it_may_and_finds_the_most(seed: int, rate: float):
    image, text = normals(12, 4, seed=seed), normals(12, 4, seed=seed + 1)
    found = separation(image, text + image, false_positive_rate=rate)
    true, wrong = map(np.array, cosines_by_kind(image, text + image, torch.arange(12)))
    assert (wrong >= found.threshold).mean() <= rate
    assert (wrong >= found.threshold - 1 / GRID).mean() > rate
    assert found.recall == pytest.approx((true >= found.threshold).mean())
    passed, recalls, _ = roc_curve([1] * 12 + [0] * 132, [*true, *wrong], drop_intermediate=False)
    assert found.recall == pytest.approx(recalls[passed <= rate].max())


def test_by_hand():
    # images at 0° and 90°; captions at 0° and 0°: true cosines 1, 0; wrong 0, 1
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = separation(image, text)
    assert found.auc == 0.5
    assert found.pair_auc.tolist() == [0.75, 0.25]
    assert (found.threshold, found.recall) == (1 + 1 / GRID, 0.0)
    half = separation(image, text, false_positive_rate=0.5)
    assert (half.threshold, half.recall) == (1 / GRID, 0.5)
    assert half.pair_found.tolist() == [True, False]


@repeatable
@given(seed=seeds)
def test_rotation_lengths_and_order_do_not_matter(seed: int):
    image, text = normals(9, 4, seed=seed), normals(9, 4, seed=seed + 1)
    plain = separation(image, text)
    turn, order = rotation(4, seed=seed), shuffled(9, seed=seed)
    moved = separation(3 * (image @ turn)[order], (text @ turn)[order])
    assert moved.auc == pytest.approx(plain.auc)
    assert moved.threshold == pytest.approx(plain.threshold, abs=2 / GRID)
    assert moved.true_pairs.mean == pytest.approx(plain.true_pairs.mean, abs=1e-6)


def test_shifting_all_true_pairs_up_raises_the_auc():
    image, noise = normals(50, 8, seed=0), normals(50, 8, seed=1)
    aucs = [separation(image, share * image + noise).auc for share in (0.0, 0.5, 1.0, 4.0)]
    assert aucs == sorted(aucs)
    assert abs(aucs[0] - 0.5) < 0.1 < aucs[-1] - 0.85


def test_bad_options_are_refused():
    pair = torch.eye(2)
    with pytest.raises(ValueError, match="one image alone has no wrong pair"):
        separation(pair[:1], pair[:1])
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        separation(pair, pair, false_positive_rate=1)
    with pytest.raises(ValueError, match="power of two up to 1048576, got 100"):
        separation(pair, pair, bins=100)
