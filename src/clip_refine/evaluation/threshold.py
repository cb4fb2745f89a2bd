"""From which cosine on does a pair fit: a calibrated probability, and thresholds that hold."""

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
from clip_refine.evaluation.similarity import measured, unit_sides
from clip_refine.results import Cutoff, FitProbability

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
