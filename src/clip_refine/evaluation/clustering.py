"""k-means on images, on texts and on both: do clusters follow meaning, or modality?

Closing the gap helps clustering of mixed sets more than retrieval: "ModGap", ICLR 2026,
arXiv 2601.18525.
"""

from typing import Any

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, v_measure_score
from torch import Tensor

from clip_refine.evaluation.bootstrap import Bootstrap, Resampled
from clip_refine.evaluation.similarity import measured, unit_rows

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
