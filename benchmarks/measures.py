"""What a small gap is good for, on stored features of two real sets: five splits.

`python benchmarks/measures.py SHARED > TABLE.md`, where SHARED holds what vectors_study.py needs;
`docs/results/measures.csv` gets a row a split. Maps are learnt on 70 % of the pairs as there, all
numbers are of the other 30 %; churn is against the untouched vectors.
"""

import csv
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch
from pydantic import TypeAdapter
from vectors_study import RUNS, SETS, SPLITS, peers

from clip_refine.config.suites import Task
from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.scores import Outcome, against
from clip_refine.evaluation.tasks import FORMS, SourceFeatures, measure_task
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.vectors.stored import read_pairs
from clip_refine.vectors.transforms import Peer

KEPT = ("clip-refine", "balanced", "contrastive", "**centred**")
MIXINGS = {"1:1:1": (1, 1, 1), "1:1:0": (1, 1, 0), "1:4:0": (1, 4, 0), "4:1:0": (4, 1, 0)}
TASKS: dict[str, dict[str, object]] = {
    "retrieval": {"kind": "retrieval"},
    "pair-clustering": {"kind": "pair-clustering"},
    "storage": {"kind": "storage"},
    **{name: {"kind": "mixed-documents", "mixing": mix} for name, mix in MIXINGS.items()},
}
Tables = dict[str, list[tuple[str, str, str]]]
"""Title → column, task and number."""
TABLES: Tables = {
    "Mixed documents (image : text : both), NDCG@10 of text queries / of image queries": [
        (f"{mixing}, {kind}", mixing, f"{kind}_query_ndcg@10")
        for mixing in MIXINGS
        for kind in ("text", "image")
    ],
    "Who stands first for a text query: share of top hits that are a text alone": [
        (mixing, mixing, "text_first_share") for mixing in MIXINGS
    ],
    "20 clusters of images and texts together; top answers changed; hubness": [
        ("modality V", "pair-clustering", "modality_v_measure"),
        ("modality ARI", "pair-clustering", "modality_adjusted_rand"),
        ("pairs together", "pair-clustering", "pairs_together"),
        ("churn i→t", "retrieval", "image_to_text_churn"),
        ("churn t→i", "retrieval", "text_to_image_churn"),
        ("hubs i→t", "retrieval", "image_to_text_hubness@10"),
        ("hubs t→i", "retrieval", "text_to_image_hubness@10"),
    ],
    "Stored vectors, R@1 image to text / text to image": [
        (f"{form}, {short}", "storage", f"{long}_recall@1,{form}")
        for form in FORMS
        for short, long in (("i→t", "image_to_text"), ("t→i", "text_to_image"))
    ],
    "Stored vectors, centroid distance": [
        (form, "storage", f"centroid_distance@{form}") for form in FORMS
    ],
}
COLUMNS = [column for columns in TABLES.values() for column in columns]


def outcomes(peer: Peer | None, pairs: EmbeddedPairs, seed: int) -> dict[str, Outcome]:
    image, text = pairs.image_features, pairs.text_features
    if peer is not None:
        image, text = peer.transform_image(image), peer.transform_text(text)
    found = SourceFeatures(image, text, pairs.text_to_image, torch.zeros(0))
    return {
        name: measure_task(
            TypeAdapter(Task).validate_python({"source": "", **settings}),
            found,
            bootstrap=Bootstrap(1, seed),
        )
        for name, settings in TASKS.items()
    }


def main(shared: Path) -> None:
    lines: list[list[object]] = []
    for name, path in SETS.items():
        for seed in SPLITS:
            rows, held_out = peers(
                read_pairs(str(shared / path)), seed, {run: RUNS[run] for run in KEPT}
            )
            first: dict[str, Outcome] = {}
            for row, peer in rows.items():
                own = outcomes(peer, held_out, seed)
                first = first or own
                compared = {task: against(first[task], own[task], Bootstrap(1)) for task in own}
                numbers = [compared[task].numbers[number].value for _, task, number in COLUMNS]
                lines.append([name, row, seed, *numbers])
            print(name, seed, file=sys.stderr)
    with Path("docs/results/measures.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        heads = [f"{task} {number}" for _, task, number in COLUMNS]
        writer.writerows([["set", "row", "split", *heads], *lines])
    for title, columns in TABLES.items():
        print(f"\n{title}:\n\n| | | {' | '.join(column for column, *_ in columns)} |")
        print("|---" * (2 + len(columns)) + "|")
        places = [3 + COLUMNS.index(column) for column in columns]
        for name, row in dict.fromkeys((line[0], line[1]) for line in lines):
            values = [
                [float(str(line[p])) for line in lines if line[:2] == [name, row]] for p in places
            ]
            cells = (
                f"{fmean(value):.3f} ± {stdev(value):.3f}".replace(" 0.", " .").removeprefix("0")
                for value in values
            )
            print(f"| {name} | {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
