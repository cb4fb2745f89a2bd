"""From which cosine on does a pair fit: a calibrated probability, and thresholds that hold."""

import random
import string

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clip_refine.evaluation.classify import calibration_bins, expected_calibration_error
from clip_refine.evaluation.similarity import measured, unit_sides
from clip_refine.results import Cutoff, FitProbability

FEWEST = 40  # captions of images that a threshold is fitted and measured on
WRONG = 50  # images that a caption is set against, drawn anew for each
CERTAIN = 1e6  # C in scikit-learn: two numbers learnt from hundreds need no shrinking
BINS = 10

Floats = NDArray[np.float64]


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
        seed: Of the halves and the wrong images.
        nonsense_features: (Q, d) of texts that describe no image.

    Raises:
        ValueError: There are too few images, or a share is not between 0 and 1.
    """
    if len(image_features) < FEWEST:
        raise ValueError(f"{len(image_features)} images are too few; pass {FEWEST} or more")
    if not (0 < precision < 1 and 0 < false_positive_rate < 1):
        raise ValueError("precision and false_positive_rate must be between 0 and 1")
    image_unit, text_unit = unit_sides(image_features, text_features)
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randperm(len(image_unit), generator=generator).tensor_split(2)
    true, wrong = _cosines(image_unit, text_unit, text_to_image.cpu(), first, generator)
    cosines = np.concatenate([true, wrong])[:, None]
    labels = np.repeat([1, 0], [len(true), len(wrong)])
    weights = np.where(labels == 1, 1.0, len(true) / len(wrong))
    model = LogisticRegression(C=CERTAIN).fit(cosines, labels, sample_weight=weights)
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])

    others = _cosines(image_unit, text_unit, text_to_image.cpu(), second, generator)
    # one wrong pair a true one, so that both kinds weigh the same in the diagram
    few = np.concatenate([others[0], others[1][:: max(1, len(others[1]) // len(others[0]))]])
    probability = torch.from_numpy(slope * few + intercept).sigmoid()
    fits = torch.arange(len(few)) < len(others[0])
    place = calibration_bins(probability, bins=BINS)
    reliability = [
        (float(probability[place == at].mean()), float(fits[place == at].double().mean()), count)
        for at in range(BINS)
        if (count := int((place == at).sum()))
    ]
    nonsense = nonsense_features
    best = None if nonsense is None else _best(image_unit, nonsense)
    cutoffs = {
        "precision": (precision, _of_precision(true, wrong, precision)),
        "false_positive_rate": (
            false_positive_rate,
            float(np.nextafter(np.quantile(wrong, 1 - false_positive_rate), 2)),
        ),
    }
    return FitProbability(
        slope=slope,
        intercept=intercept,
        calibration_error=expected_calibration_error(probability, fits, bins=BINS),
        reliability=tuple(reliability),
        cutoffs={
            name: _measured(wished, at, *others, best) for name, (wished, at) in cutoffs.items()
        },
        images=(len(first), len(second)),
        nonsense=0 if best is None else len(best),
    )


def nonsense(count: int = 50, *, seed: int = 0) -> list[str]:
    """Texts that describe no image: drawn letters in words.

    >>> len(set(nonsense(20)))
    20
    """
    draw = random.Random(seed)
    words = lambda: "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9)))  # noqa: E731
    return [" ".join(words() for _ in range(draw.randint(1, 6))) for _ in range(count)]


def _cosines(
    images: Tensor, texts: Tensor, owners: Tensor, part: Tensor, generator: torch.Generator
) -> tuple[Floats, Floats]:
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
    return true.double().cpu().numpy(), others.flatten().double().cpu().numpy()


def _of_precision(true: Floats, wrong: Floats, wished: float) -> float | None:
    """The lowest cosine from which on the precision is as wished; None where it never is."""
    at = np.unique(true)
    recall, passed = (1 - np.searchsorted(np.sort(side), at) / len(side) for side in (true, wrong))
    found = at[recall / (recall + passed) >= wished]
    return float(found[0]) if len(found) else None


def _precision(true: Floats, wrong: Floats, at: float) -> float:
    """Where true pairs are as many as wrong ones; 0 where none is let through."""
    recall, passed = float((true >= at).mean()), float((wrong >= at).mean())
    return recall / (recall + passed) if recall else 0.0


def _best(images: Tensor, texts: Tensor) -> Floats:
    unit = texts / texts.norm(dim=1, keepdim=True)
    return (unit.to(images) @ images.T).amax(dim=1).double().cpu().numpy()


def _measured(
    wished: float,
    at: float | None,
    true: Floats,
    wrong: Floats,
    best: Floats | None,
) -> Cutoff:
    if at is None:
        return Cutoff(wished=wished)
    return Cutoff(
        wished=wished,
        cosine=at,
        precision=_precision(true, wrong, at),
        recall=float((true >= at).mean()),
        false_positive_rate=float((wrong >= at).mean()),
        nonsense_found=None if best is None else float((best >= at).mean()),
    )
