"""How the two clouds of features lie: gap, alignment, uniformity, hubs, clusters."""

import math
from typing import Any, NamedTuple

import torch
from scipy.stats import skew
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, v_measure_score
from torch import Tensor

from clip_refine.evaluation.bootstrap import Bootstrap, Resampled, means, norm_of_mean
from clip_refine.evaluation.similarity import (
    CHUNK_SIZE,
    ROWS_AT_ONCE,
    check_chunk_size,
    measured,
    row_blocks,
    tie_width,
    unit_rows,
    unit_sides,
)

# --------------------------------------------------------------------------------------------------
# How far apart images and texts lie: distances between the two clouds and within pairs.
#
# All functions take unit features, (N, d) rows of norm 1, row i of both a pair, and accumulate in
# float64.


# that the logistic regression sees at most; more would cost memory and change nothing
SEPARABILITY_PAIRS = 10_000


@measured
def mean_row(unit: Tensor) -> Tensor:
    """Centroid of the rows, (d,) in float64, without a float64 copy of them all."""
    total = torch.zeros(unit.shape[1], dtype=torch.float64, device=unit.device)
    for rows in row_blocks(len(unit), ROWS_AT_ONCE):
        total += unit[rows].double().sum(dim=0)
    return total / len(unit)


@measured
def centroid_distance(image_unit: Tensor, text_unit: Tensor) -> float:
    """‖μ_image − μ_text‖, 0–2, lower is a smaller gap (Liang et al., NeurIPS 2022, section 2)."""
    return torch.linalg.vector_norm(mean_row(image_unit) - mean_row(text_unit)).item()


@measured
def centroid_squared_over_dim(image_unit: Tensor, text_unit: Tensor) -> float:
    """‖μ_image − μ_text‖² / d, 0–4/d, lower is a smaller gap; the paper prints it × 10³."""
    return (mean_row(image_unit) - mean_row(text_unit)).square().mean().item()


@measured
def true_pair_cosine(image_unit: Tensor, text_unit: Tensor) -> float:
    """E x·y over pairs, −1 to 1, higher is nearer."""
    total = 0.0
    for rows in row_blocks(len(image_unit), ROWS_AT_ONCE):
        total += (image_unit[rows].double() * text_unit[rows].double()).sum().item()
    return total / len(image_unit)


@measured
def alignment(image_unit: Tensor, text_unit: Tensor) -> float:
    """E ‖x − y‖² over pairs (Wang and Isola, ICML 2020, section 4), 0–4, lower is nearer.

    Equal to 2 − 2 · `true_pair_cosine`, and to `residual_alignment` + `centroid_distance`².
    """
    return _mean_squared_distance(image_unit, text_unit, torch.zeros(image_unit.shape[1]))


@measured
def residual_alignment(image_unit: Tensor, text_unit: Tensor) -> float:
    """E ‖(x − μ_image) − (y − μ_text)‖², 0–4, lower is nearer: `alignment` without the gap."""
    gap = mean_row(image_unit) - mean_row(text_unit)
    return _mean_squared_distance(image_unit, text_unit, gap)


def _mean_squared_distance(image_unit: Tensor, text_unit: Tensor, shift: Tensor) -> float:
    shift = shift.to(image_unit.device, torch.float64)
    total = 0.0
    for rows in row_blocks(len(image_unit), ROWS_AT_ONCE):
        difference = image_unit[rows].double() - text_unit[rows].double() - shift
        total += difference.square().sum().item()
    return total / len(image_unit)


@measured
def relative_modality_gap(image_unit: Tensor, text_unit: Tensor) -> float:
    """Distance within pairs as a share of it plus that within a modality, 0–1, lower is nearer.

    a / (a + ½ (b_image + b_text)), with a = (1 − E x·y)/2 over true pairs and
    b = (1 − mean cosine of two different rows)/2 within one modality. 0 where pairs coincide, ½
    where a pair is as far apart as two strangers of one modality. Source: METHOD §3.
    """
    pair_distance = (1 - true_pair_cosine(image_unit, text_unit)) / 2
    image_distance = (1 - mean_cosine_of_strangers(image_unit)) / 2
    text_distance = (1 - mean_cosine_of_strangers(text_unit)) / 2
    whole = pair_distance + (image_distance + text_distance) / 2
    return pair_distance / whole if whole > 0 else 0.0


@measured
def mean_cosine_of_strangers(unit: Tensor) -> float:
    """Mean off-diagonal cosine: (‖Σ x_i‖² − Σ ‖x_i‖²) / (N (N − 1)), in O(N·d), N ≥ 2.

    >>> mean_cosine_of_strangers(torch.eye(3))
    0.0
    """
    count = len(unit)
    if count < 2:
        raise ValueError("the mean cosine of two different rows needs at least 2 rows, got 1")
    own = sum(unit[rows].double().square().sum().item() for rows in row_blocks(count, ROWS_AT_ONCE))
    every = (count * mean_row(unit)).square().sum().item()
    return (every - own) / (count * (count - 1))


@measured
def linear_separability(image_unit: Tensor, text_unit: Tensor, *, seed: int = 0) -> float:
    """Held-out accuracy of a logistic regression that tells images from texts, N ≥ 2.

    0–1: 1 where a plane separates the modalities, ½ where nothing does. Half of the pairs, drawn
    by `seed`, teach it and both sides of the other half test it, so no pair is on both sides of
    the split. Features are scaled by √d, which makes an average coordinate about 1 and leaves the
    answer independent of a rotation; the L2 penalty is scikit-learn's default C = 1.
    """
    count, dim = image_unit.shape
    if count < 2:
        raise ValueError("linear separability needs at least 2 pairs to split, got 1")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order = order[:SEPARABILITY_PAIRS]
    taught, tested = order[: len(order) // 2], order[len(order) // 2 :]

    def labelled_rows(pairs: Tensor) -> tuple[Tensor, Tensor]:
        pairs = pairs.to(image_unit.device)
        rows = torch.cat([image_unit[pairs], text_unit[pairs]]).cpu() * math.sqrt(dim)
        return rows, torch.arange(2).repeat_interleave(len(pairs))

    rows, is_text = labelled_rows(taught)
    classifier = LogisticRegression(max_iter=1000).fit(rows.numpy(), is_text.numpy())
    rows, is_text = labelled_rows(tested)
    return float(classifier.score(rows.numpy(), is_text.numpy()))


# --------------------------------------------------------------------------------------------------
# How the features fill the sphere, and who crowds whom out of a nearest-neighbour list.
#
# All functions take unit features, (N, d) rows of norm 1, row i of both a pair. Those that need
# every similarity walk over `chunk_size` rows at a time, which bounds the memory, not the result.


class _Crowds(NamedTuple):
    """What all similarities are good for, each of which is computed once."""

    kernel: float  # Σ exp(−2 ‖z_i − z_j‖²) over all i < j of both; 0 where nobody asks
    nearest_image: Tensor  # (M,) cosine of each text with the nearest image
    nearest_text: Tensor  # (M,) and with the nearest other text
    occurrences: Tensor  # (M,) how many images have a text among their k nearest; of k = 0 none


def _crowds(
    image_unit: Tensor, text_unit: Tensor, *, chunk_size: int, kernel: bool = True, k: int = 0
) -> _Crowds:
    """Walk over the blocks of texts, of both, and where the kernel is asked for of images."""
    total = torch.zeros((), dtype=torch.float64, device=image_unit.device)
    nearest_image, nearest_text = text_unit.new_full((2, len(text_unit)), -torch.inf)
    occurrences = torch.zeros(len(text_unit), dtype=torch.int64, device=text_unit.device)
    for within, unit, others in (
        (True, text_unit, text_unit),
        (False, image_unit, text_unit),
        *([(True, image_unit, image_unit)] if kernel else []),
    ):
        for rows in row_blocks(len(unit), chunk_size):
            start = rows.start if within else 0
            similarity = unit[rows] @ others[start:].T
            if within:  # rows against themselves count above the diagonal only
                square = similarity[:, : len(similarity)]
                square.masked_fill_(torch.ones_like(square, dtype=torch.bool).tril(), -torch.inf)
            if within and others is text_unit:
                mine, theirs = nearest_text[rows], nearest_text[start:]
                torch.maximum(mine, similarity.amax(dim=1), out=mine)
                torch.maximum(theirs, similarity.amax(dim=0), out=theirs)
            elif not within:
                torch.maximum(nearest_image, similarity.amax(dim=0), out=nearest_image)
                if k:
                    occurrences += _found(similarity, k)
            # ‖u − v‖² = 2 − 2 u·v for unit vectors; over a few rows float32 loses nothing
            for few in similarity.sub_(1).mul_(4).exp_().split(CHUNK_SIZE) if kernel else ():
                total += few.sum(dim=0).sum(dtype=torch.float64)
    return _Crowds(total.item(), nearest_image, nearest_text, occurrences)


@measured
def uniformity_mean(
    image_unit: Tensor, text_unit: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> float:
    """E exp(−2 ‖z_i − z_j‖²) over all i < j of both, e⁻⁸ to 1, lower is more evenly spread.

    Source: Wang and Isola, ICML 2020, arXiv 2005.10242, section 4 with t = 2; their uniformity is
    the logarithm of this, the CLIP-Refine paper prints it without.
    """
    return _mean_kernel(
        _crowds(image_unit, text_unit, chunk_size=chunk_size), image_unit, text_unit
    )


def _mean_kernel(found: _Crowds, *units: Tensor) -> float:
    count = sum(map(len, units))
    return found.kernel / (count * (count - 1) / 2)


@measured
def text_first_share(
    image_unit: Tensor, text_unit: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> float:
    """Share of caption queries, 0–1, whose top hit is a caption, in an index of both modalities.

    The index of query i holds all images and all captions but i itself; where an image and a
    caption are equally near, the image counts as first. A single space of meaning would give about
    ½ or less, CLIP models give 1.
    """
    return float(text_first(image_unit, text_unit, chunk_size=chunk_size).double().mean())


@measured
def text_first(image_unit: Tensor, text_unit: Tensor, *, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """(N,) truth values whose mean is `text_first_share`; arguments as there."""
    return _is_text_first(_crowds(image_unit, text_unit, chunk_size=chunk_size, kernel=False))


def _is_text_first(found: _Crowds) -> Tensor:
    return found.nearest_text > found.nearest_image + tie_width(found.nearest_text.dtype)


@measured
def hubness_skewness(
    image_unit: Tensor, text_unit: Tensor, *, k: int = 10, chunk_size: int = CHUNK_SIZE
) -> float:
    """Skewness of how often a text is among the k nearest of an image; lower is fewer hubs.

    With n_j the number of images that have text j among their k nearest (equally near texts by
    lower index): E (n − μ)³ / (E (n − μ)²)^{3/2}, 0 where all are found equally often. Source:
    Radovanović et al., "Hubs in Space", JMLR 2010, section 2.
    """
    if not 1 <= k < len(text_unit):
        raise ValueError(
            f"hubness with k = {k} needs k of at least 1 and more than k texts, "
            f"got {len(text_unit)} texts"
        )
    occurrences = torch.zeros(len(text_unit), dtype=torch.int64, device=text_unit.device)
    for rows in row_blocks(len(image_unit), chunk_size):
        occurrences += _found(image_unit[rows] @ text_unit.T, k)
    return _skewness(occurrences)


def _skewness(occurrences: Tensor) -> float:
    # where all are equal, skew warns of 0 / 0
    equal = bool((occurrences == occurrences[0]).all())
    return 0.0 if equal else float(skew(occurrences.cpu().numpy()))


def _found(similarity: Tensor, k: int) -> Tensor:
    """(M,) how many rows have each column among their k nearest."""
    return _nearest(similarity, k).reshape(-1).bincount(minlength=similarity.shape[1])


def _nearest(similarity: Tensor, k: int) -> Tensor:
    """(Q, k) indices of the k largest a row, the lower index first among equals."""
    tie = tie_width(similarity.dtype)
    scores, nearest = similarity.topk(k + 1, dim=1)
    # which of several equals topk takes is not defined, so those rows are filled by index
    at_edge = (scores[:, k - 1] - scores[:, k] <= tie).nonzero()[:, 0]
    nearest = nearest[:, :k]
    for query in at_edge.tolist():
        row, last = similarity[query], scores[query, k - 1]
        above, equal = row > last + tie, (row - last).abs() <= tie
        in_order = torch.cat([above.nonzero()[:, 0], equal.nonzero()[:, 0]])
        nearest[query] = in_order[:k]
    return nearest


@measured
def variances(*units: Tensor) -> Tensor:
    """(d,) float64, variances along the principal axes of all rows of all `units`, rising."""
    count = sum(len(unit) for unit in units)
    mean = torch.stack([mean_row(unit) * (len(unit) / count) for unit in units]).sum(dim=0)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for unit in units:
        for rows in row_blocks(len(unit), ROWS_AT_ONCE):
            centred = unit[rows].double() - mean
            covariance += centred.T @ centred / count
    return torch.linalg.eigvalsh(covariance).clamp(min=0)


@measured
def effective_rank(image_unit: Tensor, text_unit: Tensor) -> float:
    """How many directions the features of both modalities together fill, 1 to d.

    exp(−Σ p log p), with p the eigenvalues of their joint covariance over its trace; 1 where all
    features coincide. Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    eigenvalues = variances(image_unit, text_unit)
    # the variance of unit vectors is at most 1; below this it is rounding
    if eigenvalues.sum() < 1e-12:
        return 1.0
    probabilities = eigenvalues / eigenvalues.sum()
    return torch.special.entr(probabilities).sum().exp().item()


# --------------------------------------------------------------------------------------------------
# The shape of the shared space in twelve numbers; no single one predicts retrieval.


@measured
def geometry(
    image_features: Tensor,
    text_features: Tensor,
    *,
    k: int = 10,
    chunk_size: int = CHUNK_SIZE,
    seed: int = 0,
) -> dict[str, float]:
    """All geometry metrics of METHOD §3 on pairs of features.

    Features are scaled to norm 1 first. Similarities are computed in float32, or in float64 if
    the features are; sums are in float64. 100,000 pairs of dimension 512 fit in 2 GB.

    Args:
        image_features: (N, d), raw or unit.
        text_features: (N, d), raw or unit; row i is the partner of image i.
        k: Neighbours a query for `hubness_skewness`.
        chunk_size: Rows compared at once; bounds the memory, not the result.
        seed: Of the split of `linear_separability`.

    Returns:
        `centroid_distance`, `centroid_squared_over_dim`, `true_pair_cosine`, `alignment`,
        `residual_alignment`, `uniformity_log`, `uniformity_mean`, `relative_modality_gap`,
        `text_first_share`, `linear_separability`, `hubness_skewness`, `effective_rank`; each
        defined and with its unit and direction at the function of its name.

    Raises:
        ValueError: If shapes differ, there are not more than k pairs, or a row is zero or not
            finite.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> image, text = torch.randn(2, 20, 4, generator=generator)
        >>> round(geometry(image, image + 0.01 * text)["true_pair_cosine"], 3)
        1.0
    """
    image_shape, text_shape = tuple(image_features.shape), tuple(text_features.shape)
    if len(image_shape) != 2 or image_shape != text_shape:
        raise ValueError(
            "image and text features must both be (pairs, dim), one row a pair; "
            f"got {image_shape} and {text_shape}"
        )
    if not 1 <= k < image_shape[0]:
        raise ValueError(
            f"geometry with k = {k} neighbours needs k of at least 1 and more than k pairs, "
            f"got {image_shape[0]}. Pass more pairs or a smaller k"
        )
    check_chunk_size(chunk_size)
    sides = unit_sides(image_features, text_features)
    crowds = _crowds(*sides, chunk_size=chunk_size, k=k)
    uniformity = _mean_kernel(crowds, *sides)
    return {
        "centroid_distance": centroid_distance(*sides),
        "centroid_squared_over_dim": centroid_squared_over_dim(*sides),
        "true_pair_cosine": true_pair_cosine(*sides),
        "alignment": alignment(*sides),
        "residual_alignment": residual_alignment(*sides),
        "uniformity_log": math.log(uniformity),
        "uniformity_mean": uniformity,
        "relative_modality_gap": relative_modality_gap(*sides),
        "text_first_share": float(_is_text_first(crowds).double().mean()),
        "linear_separability": linear_separability(*sides, seed=seed),
        "hubness_skewness": _skewness(crowds.occurrences),
        "effective_rank": effective_rank(*sides),
    }


@measured
def resampled_pairs(
    image_unit: Tensor, text_unit: Tensor, bootstrap: Bootstrap
) -> dict[str, Resampled]:
    """What follows from means over pairs, with its draws; arguments as in `alignment`."""
    image, text = image_unit.detach().cpu().double(), text_unit.detach().cpu().double()
    statistic = means({"true_pair_cosine": (image * text).sum(dim=1)})
    cosine = bootstrap.numbers(len(image), statistic)["true_pair_cosine"]
    distance = norm_of_mean(image - text, bootstrap)
    alignment = Resampled(2 - 2 * cosine.value, 2 - 2 * cosine.draws)
    return {
        "centroid_distance": distance,
        "centroid_squared_over_dim": distance.squared() / image.shape[1],
        "true_pair_cosine": cosine,
        "alignment": alignment,
        "residual_alignment": alignment - distance.squared(),
    }


# --------------------------------------------------------------------------------------------------
# k-means on images, on texts and on both: do clusters follow meaning, or modality?
#
# Closing the gap helps clustering of mixed sets more than retrieval: "ModGap", ICLR 2026,
# arXiv 2601.18525.


STARTS = 10  # of k-means; the tightest of so many solutions counts


@measured
def find_clusters(features: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """(N,) int64, the cluster of each row: scikit-learn's k-means on unit rows, `STARTS` starts."""
    unit = unit_rows("features", features)
    if not 2 <= count <= len(unit):
        raise ValueError(f"k-means needs 2 to {len(unit)} clusters, one a row; got {count}")
    starts: Any = STARTS  # sklearn's default gives its type, which is not all that it takes
    kmeans = KMeans(count, n_init=starts, random_state=seed)
    return torch.from_numpy(kmeans.fit_predict(unit.cpu().double().numpy())).long()


@measured
def agreement(found: Tensor, truth: Tensor) -> dict[str, float]:
    """How far clusters agree with a known grouping, both (N,) whole numbers; higher is more.

    `v_measure`, 0–1, the harmonic mean of homogeneity and completeness, which is the mutual
    information over the mean entropy, NMI (Rosenberg and Hirschberg, EMNLP 2007), and
    `adjusted_rand`, −½–1, 0 for chance (Hubert and Arabie, Journal of Classification 1985).
    """
    sides = truth.cpu().numpy(), found.cpu().numpy()
    return {
        "v_measure": float(v_measure_score(*sides)),
        "adjusted_rand": float(adjusted_rand_score(*sides)),
    }


def agreement_numbers(
    prefix: str, found: Tensor, truth: Tensor, owners: Tensor, bootstrap: Bootstrap
) -> dict[str, Resampled]:
    """`agreement` with draws: clusters stay, (N,) `owners` are drawn, −1 for a row that stays."""
    rows, places = torch.arange(len(owners)), owners.cpu()

    def statistic(counts: Tensor) -> dict[str, Tensor]:
        drawn: dict[str, list[float]] = {}
        for row in counts.long():
            # behind the last stands how often a row that stays counts
            times = torch.cat([row, row.new_ones(1)])[places]
            chosen = rows.repeat_interleave(times)
            for name, value in agreement(found[chosen], truth[chosen]).items():
                drawn.setdefault(f"{prefix}_{name}", []).append(value)
        return {name: torch.tensor(values).double() for name, values in drawn.items()}

    numbers = bootstrap.numbers(int(places.max()) + 1, statistic)
    v_measure, rand = (numbers[f"{prefix}_{name}"] for name in ("v_measure", "adjusted_rand"))
    return {
        # mutual information is too large on few rows, and on a resample's fewer again
        f"{prefix}_v_measure": v_measure.without_bias(least=0.0),
        f"{prefix}_adjusted_rand": rand.centred(least=-0.5),
    }
