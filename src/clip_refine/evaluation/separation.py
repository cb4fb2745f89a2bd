"""Score usefulness: what one threshold on cosines tells apart, and how sure a cosine makes one."""

import random
import string
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clip_refine.evaluation.bootstrap import (
    Bootstrap,
    Resampled,
    interval,
    means,
)
from clip_refine.evaluation.classify import calibration_bins, resampled_calibration_error
from clip_refine.evaluation.similarity import (
    CHUNK_SIZE,
    COLUMNS_AT_ONCE,
    checked_owners,
    measured,
    row_blocks,
    unit_sides,
)
from clip_refine.results import Cutoff, FitProbability

# cosines are rounded to multiples of 1/GRID, the width below which they tie everywhere else
GRID = 2**19
HISTOGRAM_BINS = 256  # of the histograms that are kept, from −1 to 1


class CosineDistribution(NamedTuple):
    """Cosines of one kind of pairs."""

    # (bins,) int64, pairs in each of equally wide bins from −1 to 1, the left edge included
    histogram: Tensor
    pairs: int
    mean: float
    deviation: float  # of all of them, not of a sample


class Separation(NamedTuple):
    """True pairs against wrong pairs."""

    true_pairs: CosineDistribution  # every caption with its own image
    wrong_pairs: CosineDistribution  # every caption with every other image
    # chance that a true pair scores above a wrong one, equals counting half; 0–1, higher is better
    auc: float
    # the lowest cosine at and above which at most `false_positive_rate` of wrong pairs are
    threshold: float
    false_positive_rate: float  # what was asked for
    recall: float  # share of true pairs at and above the threshold, 0–1, higher is better
    pair_auc: Tensor  # (M,) float64, wrong pairs that each caption's own beats; `auc` is its mean
    pair_found: Tensor  # (M,) bool, whether each caption's own pair is at or above the threshold


@measured
def separation(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor | None = None,
    *,
    false_positive_rate: float = 0.01,
    bins: int = HISTOGRAM_BINS,
    chunk_size: int = CHUNK_SIZE,
) -> Separation:
    """Distributions of the cosines of true and of wrong pairs, and what a threshold achieves.

    Cosines are rounded to the nearest multiple of 2⁻¹⁹ = 1.9e-6, so that all of them, 10¹⁰ for
    100,000 pairs, are kept as counts; everything is exact for the rounded ones. Source of AUC as a
    chance: Hanley and McNeil, Radiology 1982.

    Args:
        image_features: (N, d), raw or unit, at least two.
        text_features: (M, d), raw or unit.
        text_to_image: (M,), the image that each caption describes; None where caption i describes
            image i.
        false_positive_rate: Share of wrong pairs that the threshold may let through.
        bins: Of the histograms; a power of two up to 2²⁰.
        chunk_size: Captions compared at once; bounds the memory, not the result.

    Raises:
        ValueError: If shapes do not fit, a row is zero or not finite, there is one image only, an
            image has no caption, or an option is out of range.

    Example:
        True pairs have cosine 1, wrong ones 0.

        >>> found = separation(torch.eye(3), torch.eye(3))
        >>> found.true_pairs.mean, found.wrong_pairs.mean, found.auc, found.recall
        (1.0, 0.0, 1.0, 1.0)
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"false_positive_rate must be between 0 and 1, got {false_positive_rate}")
    if bins < 1 or 2 * GRID % bins:
        raise ValueError(f"bins must be a power of two up to {2 * GRID}, got {bins}")
    image_unit, text_unit = unit_sides(image_features, text_features)
    if len(image_unit) < 2:
        raise ValueError("one image alone has no wrong pair; pass two images or more")
    owners = checked_owners(text_to_image, len(image_unit), len(text_unit)).to(image_unit.device)
    every = torch.zeros(2 * GRID + 1, dtype=torch.int64, device=image_unit.device)
    true_places = []
    for rows in row_blocks(len(text_unit), chunk_size):
        similarity = text_unit[rows] @ image_unit.T
        true_places.append(_places(similarity.gather(1, owners[rows, None])[:, 0]))
        for columns in row_blocks(len(image_unit), 8 * COLUMNS_AT_ONCE):
            places = _places(similarity[:, columns]).flatten()
            every += places.bincount(minlength=len(every))
    own = torch.cat(true_places)
    true = own.bincount(minlength=len(every))
    wrong = every - true
    wrong_count = wrong.sum()
    below = wrong.cumsum(0) - wrong
    pair_auc = (below[own] + wrong[own].double() / 2) / wrong_count
    let_through = (wrong_count - below).double() / wrong_count
    threshold = int((let_through > false_positive_rate).sum())
    found = own >= threshold
    return Separation(
        true_pairs=_distribution(true, bins),
        wrong_pairs=_distribution(wrong, bins),
        auc=pair_auc.mean().item(),
        threshold=threshold / GRID - 1,
        false_positive_rate=false_positive_rate,
        recall=found.double().mean().item(),
        pair_auc=pair_auc.cpu(),
        pair_found=found.cpu(),
    )


def _places(cosines: Tensor) -> Tensor:
    """Cosine −1 … 1 → 0 … 2·GRID."""
    return ((cosines + 1) * GRID).round_().clamp_(0, 2 * GRID).long()


def _distribution(counts: Tensor, bins: int) -> CosineDistribution:
    count = int(counts.sum())
    cosines = torch.arange(len(counts), dtype=torch.float64, device=counts.device) / GRID - 1
    mean = (counts * cosines).sum() / count
    variance = (counts * (cosines - mean).square()).sum() / count
    histogram = counts[:-1].view(bins, -1).sum(dim=1)
    histogram[-1] += counts[-1]
    return CosineDistribution(histogram.cpu(), count, mean.item(), variance.sqrt().item())


# --------------------------------------------------------------------------------------------------
# From which cosine on does a pair fit: a calibrated probability, and thresholds that hold.


FEWEST = 40  # captions of images that a threshold is fitted and measured on
WRONG = 50  # images that a caption is set against, drawn anew for each
CERTAIN = 1e6  # C in scikit-learn: two numbers learnt from hundreds need no shrinking
BINS = 10

Floats = NDArray[np.float64]


class _Cosines(NamedTuple):
    """Of the captions of some images."""

    true: Floats  # (C,) with their own images
    wrong: Floats  # (C, W) with others of these
    owners: Tensor  # (C,) the place of each caption's image among these
    images: int  # how many these are


@measured
def fit_probability(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor,
    *,
    precision: float = 0.9,
    false_positive_rate: float = 0.01,
    seed: int = 0,
    nonsense_features: Tensor | None = None,
) -> FitProbability:
    """Fit a logistic on half of the images, and measure on the other half what it promises.

    p(fits | cosine) = 1 / (1 + exp(−(slope · cosine + intercept))), where a caption's own image is
    as likely as all wrong ones together: where fits are rarer, so is what it promises.
    Source: Platt, Advances in Large Margin Classifiers 1999; reliability and ECE as in Guo et al.,
    arXiv 1706.04599.

    Args:
        image_features: (N, d), raw or unit, at least `FEWEST`.
        text_features: (M, d), raw or unit.
        text_to_image: (M,), the image that each caption describes.
        precision: The share of true pairs wished for among those that a threshold lets through.
        false_positive_rate: The share of wrong pairs that another one may let through.
        seed: Of the halves, the wrong images and the bootstrap.
        nonsense_features: (Q, d) of texts that describe no image.

    Raises:
        ValueError: There are too few images, or a share is not between 0 and 1.
    """
    if len(image_features) < FEWEST:
        raise ValueError(f"{len(image_features)} images are too few; pass {FEWEST} or more")
    if not (0 < precision < 1 and 0 < false_positive_rate < 1):
        raise ValueError("precision and false_positive_rate must be between 0 and 1")
    fitted_on, others = _halves(image_features, text_features, text_to_image, seed)
    true, wrong = fitted_on.true, fitted_on.wrong.ravel()
    cosines = np.concatenate([true, wrong])[:, None]
    labels = np.repeat([1, 0], [len(true), len(wrong)])
    weights = np.where(labels == 1, 1.0, len(true) / len(wrong))
    model = LogisticRegression(C=CERTAIN).fit(cosines, labels, sample_weight=weights)
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    probability, fits, _ = _promises(slope, intercept, others)
    place = calibration_bins(probability, bins=BINS)
    error = _calibration_error(slope, intercept, others, Bootstrap(seed=seed))
    low, high = interval(error)
    wished = {
        "precision": Cutoff(wished=precision, cosine=_of_precision(true, wrong, precision)),
        "false_positive_rate": Cutoff(
            wished=false_positive_rate,
            cosine=float(np.nextafter(np.quantile(wrong, 1 - false_positive_rate), 2)),
        ),
    }
    found = FitProbability(
        slope=slope,
        intercept=intercept,
        calibration_error=error.value,
        calibration_interval=None if low is None or high is None else (low, high),
        reliability=tuple(
            (float(probability[place == at].mean()), float(fits[place == at].mean()), count)
            for at in range(BINS)
            if (count := int((place == at).sum()))
        ),
        cutoffs=wished,
        images=(fitted_on.images, others.images),
        nonsense=0 if nonsense_features is None else len(nonsense_features),
    )
    pairs = (image_features, text_features, text_to_image)
    more = {"seed": seed, "nonsense_features": nonsense_features}
    return found.model_copy(update={"cutoffs": measure_cutoffs(wished, *pairs, **more)})


@measured
def measure_cutoffs(
    cutoffs: Mapping[str, Cutoff],
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor,
    *,
    seed: int = 0,
    nonsense_features: Tensor | None = None,
) -> dict[str, Cutoff]:
    """What thresholds, which may be of another model, do on the half that `fit_probability` keeps.

    Arguments as there.
    """
    _, others = _halves(image_features, text_features, text_to_image, seed)
    true, wrong, best = others.true, others.wrong.ravel(), None
    if nonsense_features is not None:
        images, texts = unit_sides(image_features, nonsense_features.to(image_features))
        best = (texts @ images.T).amax(dim=1).double().cpu().numpy()
    found = {}
    for name, (wished, at) in {n: (c.wished, c.cosine) for n, c in cutoffs.items()}.items():
        found[name] = Cutoff(wished=wished)
        if at is not None:
            recall, passed = float((true >= at).mean()), float((wrong >= at).mean())
            found[name] = Cutoff(
                wished=wished,
                cosine=at,
                precision=recall / (recall + passed) if recall else 0.0,
                recall=recall,
                false_positive_rate=passed,
                nonsense_found=None if best is None else float((best >= at).mean()),
            )
    return found


@measured
def threshold_numbers(
    fit: FitProbability,
    first: FitProbability,
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor,
    bootstrap: Bootstrap,
) -> dict[str, Resampled]:
    """How far `fit` is off, and what the thresholds of `first`, another model's fit or this, do.

    On the images that neither was fitted on, which are drawn anew.
    """
    _, others = _halves(image_features, text_features, text_to_image, bootstrap.seed)
    numbers = {"calibration_error": _calibration_error(fit.slope, fit.intercept, others, bootstrap)}
    at = {name: cutoff.cosine for name, cutoff in first.cutoffs.items()}
    through = {
        f"{side}_{name}": torch.from_numpy((cosines >= cosine).mean(axis=1))
        for name, cosine in at.items()
        if cosine is not None
        for side, cosines in (("true", others.true[:, None]), ("wrong", others.wrong))
    }
    shares = means(through, others.owners)

    def of_thresholds(counts: Tensor) -> dict[str, Tensor]:
        share = shares(counts)
        found = {"false_positives@first_threshold": share["wrong_false_positive_rate"]}
        if at["precision"] is not None:
            true, wrong = share["true_precision"], share["wrong_precision"]
            # where nothing is let through nothing is right
            found["precision@first_threshold"] = (true / (true + wrong)).nan_to_num()
            found["recall@first_threshold"] = true
        return found

    return numbers | bootstrap.numbers(others.images, of_thresholds)


def nonsense(count: int = 50, *, seed: int = 0) -> list[str]:
    """Texts that describe no image: drawn letters in words.

    >>> len(set(nonsense(20)))
    20
    """
    draw = random.Random(seed)
    words = lambda: "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9)))  # noqa: E731
    return [" ".join(words() for _ in range(draw.randint(1, 6))) for _ in range(count)]


def _halves(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, seed: int
) -> tuple[_Cosines, _Cosines]:
    """The cosines to fit on, and those of other images to measure on."""
    image_unit, text_unit = unit_sides(image_features, text_features)
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randperm(len(image_unit), generator=generator).tensor_split(2)
    sides = (image_unit, text_unit, text_to_image.cpu())
    return _cosines(*sides, first, generator), _cosines(*sides, second, generator)


def _cosines(
    images: Tensor, texts: Tensor, owners: Tensor, part: Tensor, generator: torch.Generator
) -> _Cosines:
    """Of true pairs, and of each of their captions with wrong images, of some images."""
    rows = torch.isin(owners, part).nonzero()[:, 0]
    place = {int(image): at for at, image in enumerate(part)}
    own = torch.tensor([place[int(image)] for image in owners[rows]])
    count = min(WRONG, len(part) - 1)
    shifts = torch.randint(1, len(part), (len(rows), count), generator=generator)
    wrong = part[(own[:, None] + shifts) % len(part)]
    of_texts = texts[rows]
    true = (of_texts * images[part[own]]).sum(dim=1)
    # one wrong image of each at a time: all of them would be as large as 50 copies of the texts
    others = torch.stack([(of_texts * images[at]).sum(dim=1) for at in wrong.T], dim=1)
    return _Cosines(true.double().cpu().numpy(), others.double().cpu().numpy(), own, len(part))


def _promises(slope: float, intercept: float, pairs: _Cosines) -> tuple[Tensor, Tensor, Tensor]:
    """Of each caption with its own image and a wrong one what is promised and what is true; whose.

    One wrong pair a true one, so that both kinds weigh the same.
    """
    cosines = torch.from_numpy(np.concatenate([pairs.true, pairs.wrong[:, 0]]))
    fits = (torch.arange(len(cosines)) < len(pairs.true)).double()
    return (slope * cosines + intercept).sigmoid(), fits, pairs.owners.repeat(2)


def _calibration_error(
    slope: float, intercept: float, pairs: _Cosines, bootstrap: Bootstrap
) -> Resampled:
    probability, fits, owners = _promises(slope, intercept, pairs)
    return resampled_calibration_error(probability, fits, bootstrap, bins=BINS, owners=owners)


def _of_precision(true: Floats, wrong: Floats, wished: float) -> float | None:
    """The lowest cosine from which on the precision is as wished; None where it never is."""
    at = np.unique(true)
    recall, passed = (1 - np.searchsorted(np.sort(side), at) / len(side) for side in (true, wrong))
    found = at[recall / (recall + passed) >= wished]
    return float(found[0]) if len(found) else None
