"""Recipes on stored features of two real sets: five splits, forgetting measured on the other set.

`python benchmarks/vectors_study.py SHARED > TABLE.md`, where SHARED holds
`data/real_clip/shop1126.npz` and `golden/coco500_clip_features.npz`; `docs/results/vectors.csv`
gets a row a split. Every recipe takes the same steps on the same 70 % of the pairs.
"""

import csv
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from clip_refine.config.runs import VectorsConfig
from clip_refine.config.settings import RECIPES
from clip_refine.evaluation import mixed_search, retrieval
from clip_refine.evaluation.geometry import centroid_distance
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.roads.vector_maps import hold_out_pairs, refine_vectors
from clip_refine.roads.vectors import unit_pairs
from clip_refine.vectors.files import FeatureSet
from clip_refine.vectors.stored import read_pairs
from clip_refine.vectors.transforms import (
    Chain,
    LinearMaps,
    MeanCentring,
    Peer,
    Procrustes,
    fit_peer,
)

SETS = {"shop": "data/real_clip/shop1126.npz", "COCO": "golden/coco500_clip_features.npz"}
SPLITS = range(5)
# HyCD on unit features at the logit scale: what the first numbers on these sets were taken with
RECIPES["clip-refine-unit"] = {"normalize": True, "temperature": None}
RECIPES["contrastive-masked"] = {**RECIPES["contrastive"], "false_negatives": "masked"}
RUNS: dict[str, dict[str, object]] = {
    "clip-refine": {"recipe": "clip-refine"},
    "clip-refine, HyCD on unit features": {"recipe": "clip-refine-unit"},
    "balanced": {"recipe": "balanced"},
    "contrastive": {"recipe": "contrastive"},
    "contrastive, false negatives masked": {"recipe": "contrastive-masked"},
    "contrastive+covariance": {"recipe": "contrastive+covariance"},
    "rising-temperature": {"recipe": "rising-temperature"},
    "modgap": {"recipe": "modgap"},
    "centred-contrastive": {"recipe": "centred-contrastive"},
    "centred, no RaFA": {"recipe": "centred", "rafa_weight": 0.0},
    "**centred**": {"recipe": "centred"},
    "centred, RaFA × 3": {"recipe": "centred", "rafa_weight": 3.0},
    "centred, RaFA × 8": {"recipe": "centred", "rafa_weight": 8.0},
    "centred, rank 32": {"recipe": "centred", "rank": 32},
    "centred, lr 1e-3": {"recipe": "centred", "learning_rate": 1e-3},
}
PROCRUSTES = "Procrustes, texts onto images"
CENTRED_AFTER = ("clip-refine", "contrastive")
COLUMNS = ("gap", "R@1 i→t", "R@1 t→i", "NDCG@10", "other i→t", "other t→i")
CHANGES = ("gap", "mean R@1", "NDCG@10", "other mean R@1")


def measured(peer: Peer | None, held_out: EmbeddedPairs, other: EmbeddedPairs) -> list[float]:
    sides = []
    for pairs in (held_out, other):
        image, text = pairs.image_features, pairs.text_features
        if peer is not None:
            image, text = peer.transform_image(image), peer.transform_text(text)
        sides.append((image, text))
    own, others = (list(retrieval(*side, ks=[1]).values()) for side in sides)
    return [centroid_distance(*sides[0]), *own, mixed_search(*sides[0])["ndcg@10"], *others]


def peers(
    found: FeatureSet, seed: int, runs: dict[str, dict[str, object]] = RUNS
) -> tuple[dict[str, Peer | None], EmbeddedPairs]:
    """Every row's transform, and the pairs to measure it on."""
    train, held_out = hold_out_pairs(unit_pairs(found), VectorsConfig(seed=seed))
    fitted_on = train.image_features, train.text_features
    rows: dict[str, Peer | None] = {"untouched": None}
    for name in ("mean-centring", "standardise", "realign", "fold"):
        rows["fold alone" if name == "fold" else name] = fit_peer(name, *fitted_on)
    # what `vectors align` fits, here between the two modalities of one model
    turned = Procrustes.align(fitted_on[0], train.first_caption_features).text_map
    count = len(fitted_on[0])
    rows[PROCRUSTES] = LinearMaps(torch.eye(len(turned)), turned.float(), count, count)
    for name, settings in runs.items():
        maps, _ = refine_vectors(found, VectorsConfig(seed=seed, resamples=1, **settings), None)
        rows[name] = maps
        if name in CENTRED_AFTER:
            moved = maps.transform_image(fitted_on[0]), maps.transform_text(fitted_on[1])
            rows[f"{name}, then mean-centring"] = Chain((maps, MeanCentring.fit(*moved)))
    return rows, held_out


def main(shared: Path) -> None:
    loaded = {name: read_pairs(str(shared / path)) for name, path in SETS.items()}
    lines = []
    for name, other in (("shop", "COCO"), ("COCO", "shop")):
        for seed in SPLITS:
            rows, held_out = peers(loaded[name], seed)
            for row, peer in rows.items():
                numbers = measured(peer, held_out, unit_pairs(loaded[other]))
                lines.append([name, row, seed, *numbers])
            print(name, seed, file=sys.stderr)
    with Path("docs/results/vectors.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["trained on", "row", "split", *COLUMNS], *lines])
    show(COLUMNS, lines)
    print("\nLess the untouched vectors, split by split:\n")
    untouched = {(line[0], line[2]): line[3:] for line in lines if line[1] == "untouched"}
    changes = []
    for name, row, seed, *numbers in lines:
        less = [a - b for a, b in zip(numbers, untouched[name, seed], strict=True)]
        if row != "untouched":
            means = less[0], fmean(less[1:3]), less[3], fmean(less[4:])
            changes.append([name, row, seed, *means])
    show(CHANGES, changes, sign="+")


def show(heads: tuple[str, ...], lines: list[list[Any]], sign: str = "") -> None:
    """Mean and deviation over splits."""
    print(f"| trained on | | {' | '.join(heads)} |\n{'|---' * (2 + len(heads))}|")
    for name, row in dict.fromkeys((line[0], line[1]) for line in lines):
        columns = zip(*(line[3:] for line in lines if line[:2] == [name, row]), strict=True)
        cells = (f"{fmean(values):{sign}.3f} ± {stdev(values):.3f}" for values in columns)
        shown = (cell.replace("0.", ".").replace("-", "−") for cell in cells)
        print(f"| {name} | {row} | {' | '.join(shown)} |")


def many_splits(shared: Path, splits: int) -> None:
    """What `centred` does to mean R@1, on more splits than the table has."""
    loaded = {name: read_pairs(str(shared / path)) for name, path in SETS.items()}
    for name, found in loaded.items():
        for weight in (1.0, 3.0):
            changes = []
            for seed in range(splits):
                config = VectorsConfig(seed=seed, resamples=1, rafa_weight=weight)
                maps, _ = refine_vectors(found, config, None)
                _, held_out = hold_out_pairs(unit_pairs(found), config)
                before, after = (measured(peer, held_out, held_out) for peer in (None, maps))
                changes.append((after[1] + after[2] - before[1] - before[2]) / 2)
            up = sum(change > 0 for change in changes)
            change = f"{fmean(changes):+.4f} ± {stdev(changes):.4f}"
            print(f"{name}, RaFA × {weight:g}: {change}, up in {up}")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        many_splits(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
