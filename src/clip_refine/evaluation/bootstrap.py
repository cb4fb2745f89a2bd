"""How much a number would move with other images of the same kind: the bootstrap.

Images are drawn anew with replacement, many times; an image brings its captions along, and what is
searched stays as it is. A number is a function of how often each image was drawn, so that its value
on the images that there are, each once, and its values on the resamples come from the same code.
`benchmarks/intervals.py` counts how often intervals hold the truth. Source: Efron, "Bootstrap
methods: another look at the jackknife", Annals of Statistics 1979.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from clip_refine.evaluation.similarity import measured

RESAMPLES = 1000
_COUNTS_AT_ONCE = 2**24  # counts held at a time, 128 MB

Statistics = Callable[[Tensor], Mapping[str, Tensor]]
"""(R, N) float64, how often each image is drawn, R times → name → (R,) the number then."""


@dataclass(frozen=True, eq=False)
class Resampled:
    """A number with what it may be on other images of the same kind; adds up like a number.

    Those of two models belong together draw by draw where image count and seed are the same.
    """

    value: float  # on the images that there are
    # (R,) float64, what it may be on all images of the kind: of a mean its resamples, of what is
    # biased, such as a distance, resamples without the bias; none where it is not resampled
    draws: Tensor = field(default_factory=lambda: torch.empty(0))
    least: float = -math.inf  # what the number cannot be below, though its draws may be
    # what its interval must reach, low and high, whatever the draws say
    reach: tuple[float, float] = (math.inf, -math.inf)

    def __add__(self, other: "Resampled") -> "Resampled":
        least = self.least + other.least
        return Resampled(self.value + other.value, self.draws + other.draws, least)

    def __sub__(self, other: "Resampled") -> "Resampled":
        change = Resampled(self.value - other.value, self.draws - other.draws)
        (low, high), (other_low, other_high) = interval(self), interval(other)
        if low is None or high is None or other_low is None or other_high is None:
            return change
        # two numbers that may both be the least: no draws are right for the change of those (see
        # `norm_of_mean`), so nothing narrower is said than what is known of each by itself
        if low == self.least and other_low == other.least and change.draws.any():
            change = replace(change, reach=(low - other_high, high - other_low))
        return change

    def __truediv__(self, divisor: float) -> "Resampled":
        return Resampled(self.value / divisor, self.draws / divisor, self.least / divisor)

    def squared(self) -> "Resampled":
        """Its square; a draw below zero keeps its sign, so that differences stay centred."""
        return Resampled(self.value**2, self.draws * self.draws.abs(), 0.0)

    def without_bias(self, *, least: float) -> "Resampled":
        """Of a number that resampling moves by as much on average as sampling did.

        The mean resample lies as far above the value as the value above the truth.

        >>> Resampled(0.5, torch.tensor([0.5, 0.75])).without_bias(least=0).draws.tolist()
        [0.25, 0.5]
        """
        shift = 2 * (self.draws.mean().item() - self.value)
        return Resampled(self.value, self.draws - shift, least)

    def centred(self, *, least: float) -> "Resampled":
        """Of a number that only resampling moves, as copies of a row do among pairs of rows.

        >>> Resampled(0.5, torch.tensor([0.5, 0.75])).centred(least=0).draws.tolist()
        [0.375, 0.625]
        """
        shift = self.draws.mean().item() - self.value
        return Resampled(self.value, self.draws - shift, least)


def interval(number: Resampled, *, level: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """Where a number lies on all images of the kind, lower and upper end; holds the value itself.

    Quantiles of the draws with half of what is left out on either side. The value on few images
    may be so biased that it lies beyond one of them, as a small distance does above: then that end
    moves out to the value, and what it does not leave out any more the other end does, so that as
    many intervals hold the truth as were to. None where the number is not resampled.

    >>> draws = torch.linspace(0, 1, 101, dtype=torch.float64)
    >>> interval(Resampled(0.5, draws), level=0.9), interval(Resampled(2.0, draws), level=0.9)
    ((0.05, 0.95), (0.1, 2.0))
    """
    if not len(number.draws):
        return None, None
    draws, tail = number.draws.double(), (1 - level) / 2
    below = min(tail, (draws < number.value).double().mean().item())
    above = min(tail, (draws > number.value).double().mean().item())
    ends = torch.tensor([2 * tail - above, 1 - 2 * tail + below], dtype=torch.float64)
    low, high = torch.quantile(draws, ends).tolist()
    low, high = min(low, number.value, number.reach[0]), max(high, number.value, number.reach[1])
    return max(low, number.least), high


@dataclass(frozen=True)
class Bootstrap:
    """The one driver: draws images, computes numbers on them."""

    resamples: int = RESAMPLES  # how often the images are drawn anew
    seed: int = 0  # with `source` of the images drawn
    # what the images are from: other sources, other draws, the same for all models
    source: str = ""

    @measured
    def numbers(self, image_count: int, *statistics: Statistics) -> dict[str, Resampled]:
        """Numbers of some images, with what they become when those are drawn anew.

        Two calls with one seed and one number of images draw the same images, so that results of
        two models can be compared pair by pair.
        """
        if image_count < 1 or self.resamples < 1:
            raise ValueError(
                f"{image_count} images and {self.resamples} resamples; both must be at least 1"
            )
        found: dict[str, list[Tensor]] = {}
        every = torch.ones(1, image_count, dtype=torch.float64)
        for counts in chain([every], self.counts(image_count)):
            for statistic in statistics:
                for name, values in statistic(counts).items():
                    found.setdefault(name, []).append(values)
        return {
            name: Resampled(value.item(), torch.cat(draws))
            for name, (value, *draws) in found.items()
        }

    def counts(self, image_count: int) -> Iterator[Tensor]:
        """How often each image was drawn, (rows, N) float64, some resamples at a time."""
        # one source's tasks share their draws; a name's checksum is the same on every machine
        seed = (self.seed + zlib.crc32(self.source.encode())) % 2**63
        generator = torch.Generator().manual_seed(seed)
        rows = max(1, _COUNTS_AT_ONCE // image_count)
        for start in range(0, self.resamples, rows):
            size = min(rows, self.resamples - start)
            drawn = torch.randint(image_count, (size, image_count), generator=generator)
            counts = torch.zeros(size, image_count, dtype=torch.float64)
            yield counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------
# Numbers as functions of the counts. `owners` (Q,) is the image of each query, every image with at
# least one; None where query i is image i.


def means(columns: Mapping[str, Tensor], owners: Tensor | None = None) -> Statistics:
    """Means over queries, (Q,) numbers each; a query is drawn with the image that it belongs to."""
    values = torch.stack([column.detach().cpu().double() for column in columns.values()], dim=1)
    counted = torch.cat([values, torch.ones(len(values), 1, dtype=torch.float64)], dim=1)
    owners = _owners(owners, len(values))
    by_image = torch.zeros(int(owners.max()) + 1, counted.shape[1], dtype=torch.float64)
    by_image.index_add_(0, owners, counted)

    def statistic(counts: Tensor) -> Mapping[str, Tensor]:
        sums = counts @ by_image
        return dict(zip(columns, (sums[:, :-1] / sums[:, -1:]).T, strict=True))

    return statistic


def median_ranks(name: str, ranks: Tensor, owners: Tensor | None = None) -> Statistics:
    """The median over queries of 0-based `ranks` (Q,), 1-based; of an even number the middle two's.

    >>> median = median_ranks("rank", torch.tensor([0, 9, 2, 3]))
    >>> median(torch.ones(1, 4).double())["rank"].tolist()
    [3.5]
    """
    distinct, places = ranks.detach().cpu().double().unique(return_inverse=True)
    sums = sums_in_groups(torch.ones(len(places)), places, owners)

    def statistic(counts: Tensor) -> Mapping[str, Tensor]:
        reached = sums(counts).cumsum(1).contiguous()
        total = reached[:, -1:]
        # the 0-based places of the middle two, as counts that must be passed to be there
        middle = torch.cat([((total - 1) / 2).floor(), (total / 2).floor()], dim=1) + 0.5
        return {name: distinct[torch.searchsorted(reached, middle)].mean(dim=1) + 1}

    return statistic


def sums_in_groups(
    values: Tensor, groups: Tensor, owners: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """(R, N) counts → (R, G) sums of `values` (Q,) over the queries of each of `groups` (Q,)."""
    owners = _owners(owners, len(values))
    groups = groups.cpu()
    sums = torch.sparse_coo_tensor(
        torch.stack([groups, owners]),
        values.detach().cpu().double(),
        (int(groups.max()) + 1, int(owners.max()) + 1),
        check_invariants=True,
    ).coalesce()
    return lambda counts: torch.sparse.mm(sums, counts.T).T


def _owners(owners: Tensor | None, count: int) -> Tensor:
    return torch.arange(count) if owners is None else owners.cpu()


# --------------------------------------------------------------------------------------------------
# A number that is no mean: resampled as it stands it would lie too high.


def norm_of_mean(rows: Tensor, bootstrap: Bootstrap) -> Resampled:
    """‖mean of rows‖, (N, d) one an image, with draws of what it is over all images of the kind.

    Not the norm of a resample's mean: of rows with mean μ and covariance Σ the squared norm is too
    large by tr Σ / N on average, that of a resample by as much again, and where μ is small this is
    more than either varies. Instead the test is inverted: if sampling erred by e, as a resample
    errs from these rows, the truth is the θ for which θ times the mean's direction + e has the norm
    that was found. Where none has, sampling alone exceeds it: the draw is below zero.

    Zero is the edge of what a norm can be, and near it, where ‖μ‖ is within √(tr Σ / N), there are
    limits. An interval that holds ‖mean‖, which lies above ‖μ‖ there, never ends below ‖μ‖, so that
    only its lower end can miss and 97 to 99 % of intervals hold the truth instead of 95. And the
    change between two such norms has no draws that are right for all truths (Andrews, Econometrica
    2000): `Resampled` then says [low − other's high, high − other's low], which is wide.
    """
    rows = rows.detach().cpu().double()
    count, free = len(rows), max(len(rows) - 1, 1)
    mean = rows.mean(dim=0)
    direction = mean / mean.norm().clamp(min=1e-30)
    expected, spread = _squared_errors(rows - mean)

    def statistic(counts: Tensor) -> Mapping[str, Tensor]:
        means = counts @ rows / count
        errors = (means - mean) * math.sqrt(count / free)  # resamples vary by 1 − 1/N too little
        return {
            "norm": torch.linalg.vector_norm(means, dim=1),
            "along": errors @ direction,
            "squared_error": errors.square().sum(dim=1),
        }

    found = bootstrap.numbers(count, statistic)
    norm, along = found["norm"].value, found["along"].draws
    squared_error = expected + spread * (found["squared_error"].draws - expected)
    left = norm**2 - squared_error
    # + along, not −, so that it goes with the resampled means of the same draws
    solution = along + (left + along.square()).clamp(min=0).sqrt()
    return Resampled(norm, torch.where(left > 0, solution, -left.abs().sqrt()), 0.0)


def _squared_errors(centred: Tensor) -> tuple[float, float]:
    """Mean of ‖e‖², tr Σ / N, and by how much resamples spread it too much.

    Its variance is 2 tr Σ² / N², and tr Σ² of N rows is too large by about (tr Σ)² / N, as much as
    itself at N = 100. Unbiased for normal rows: Bai and Saranadasa, Statistica Sinica 1996, (3.4).
    """
    count, free = len(centred), max(len(centred) - 1, 1)
    # both products have the same squares; the smaller one
    gram = centred @ centred.T if count < centred.shape[1] else centred.T @ centred
    trace, found = centred.square().sum().item() / free, gram.square().sum().item() / free**2
    unbiased = (found - trace**2 / free) * free**2 / (max(free - 1, 1) * (free + 2))
    return trace / count, math.sqrt(max(0.0, unbiased) / found) if found > 0 else 0.0
