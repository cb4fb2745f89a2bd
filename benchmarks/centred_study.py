"""`centred` beside `balanced` and CLIP-Refine on real photographs: gap, retrieval, mixed search.

Reads the research-only model and photographs of the folder `../shared`. As in `photo_study.py` what
comes before the first trained block of the image trunk is computed once. One line of JSON a run is
appended to `--out`; runs that stand there are not made again, so that a study can go on.

    python benchmarks/centred_study.py --runs centred:1e-4 centred:1e-4:rafa_weight=0 balanced:1e-4
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from photo_study import towers_and_sources
from torch import nn

from clip_refine.config import RefineConfig
from clip_refine.evaluation.geometry import agreement, find_clusters
from clip_refine.evaluation.retrieval import mixed_search, search_within
from clip_refine.evaluation.scores import embed_model, score_features
from clip_refine.losses import Objective
from clip_refine.models.embed import Embedder
from clip_refine.models.weights import fitted_logit_scale
from clip_refine.roads import build
from clip_refine.roads.compare import transformed
from clip_refine.roads.refine import fold_student, measure_features, train_student
from clip_refine.train import StepLog
from clip_refine.vectors.transforms import fit_peer


def numbers(features: Any) -> dict[str, float]:
    """What the study looks at; mixed search over one caption an image, clusters as many as classes.

    `modality_v` is of 20 clusters of images and first captions together.
    """
    scores = score_features(features, seed=0)
    recall = {k: v for k, v in scores.retrieval.items() if "recall" in k}
    mean = {
        k: sum(v for name, v in recall.items() if name.endswith(f"@{k}")) / 2 for k in (1, 5, 10)
    }
    pairs = features.pairs
    mixed = mixed_search(pairs.image_features, pairs.first_caption_features)
    tasks = [task["top1"] for task in scores.zero_shot.values()]
    sides = pairs.image_features, pairs.first_caption_features
    kind = torch.arange(2).repeat_interleave(len(sides[0]))
    found = find_clusters(torch.cat([nn.functional.normalize(side, dim=1) for side in sides]), 20)
    within, clusters = [], []
    for task in features.tasks:
        own = search_within(task.image_features, task.labels).average_precision
        within.append(own.mean().item())
        found_classes = find_clusters(task.image_features, len(task.class_features))
        clusters.append(agreement(found_classes, task.labels)["v_measure"])
    return {
        "gap": scores.geometry["centroid_distance"],
        **{f"mean_recall@{k}": value for k, value in mean.items()},
        "zero_shot": sum(tasks) / len(tasks),
        "ndcg@10": mixed["ndcg@10"],
        "text_first_share": mixed["text_first_share"],
        "image_map": fmean(within),
        "text_map": search_within(pairs.text_features, pairs.text_to_image)
        .average_precision.mean()
        .item(),
        "image_v": fmean(clusters),
        "modality_v": agreement(found, kind)["v_measure"],
        "image_norm": sides[0].norm(dim=1).mean().item(),
        "text_norm": sides[1].norm(dim=1).mean().item(),
    }


def follow_the_scale() -> None:
    """From here on the student's scale in HyCD is fitted anew to every batch, not once before."""
    terms = Objective._teacher_terms

    def at_fitted_scale(self, student, teacher, shared, scale, gap, teacher_scale):
        sides = tuple(side.detach() for side in student)
        fitted = scale.new_tensor(fitted_logit_scale(sides, teacher, teacher_scale))
        return terms(self, student, teacher, shared, fitted, gap, teacher_scale)

    Objective._teacher_terms = at_fitted_scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path("runs/centred-study.jsonl"))
    parser.add_argument(
        "--runs",
        nargs="*",
        default=["centred:1e-4"],
        help="recipe:rate[:setting=value,...], settings of the loss or, with 'train.', of training",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trained-blocks", type=int, default=0, help="-1: all")
    parser.add_argument("--parameters", default="all")
    parser.add_argument(
        "--follow-scale", action="store_true", help="fit the logit scale to every batch"
    )
    options = parser.parse_args()

    towers, sources = towers_and_sources(options.shared, options.trained_blocks)
    train, held_out, *zero_shot = sources
    untouched = copy.deepcopy(towers.state_dict())
    teacher_scale = float(towers.logit_scale)
    accelerator = build.build_accelerator("cpu")
    embedder = Embedder(towers, accelerator.device, 256, visible=False)  # pyright: ignore
    done = {}
    if options.out.is_file():
        lines = options.out.read_text().splitlines()
        done = {line["run"]: line for line in map(json.loads, lines)}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(run: str, found: dict[str, float]) -> None:
        if run in done:
            return
        print(run, {name: round(value, 4) for name, value in found.items()}, flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps({"run": run, **found}) + "\n")

    where = f"blocks {options.trained_blocks} {options.parameters}"
    if options.follow_scale:
        follow_the_scale()
        where += " scale followed"
    if not {"untouched", "mean-centring", "fold alone"} <= done.keys():
        features = embed_model(embedder, held_out, zero_shot)
        keep("untouched", numbers(features))
        config = RefineConfig.model_validate({"recipe": "centred", "seed": 1})
        fitted = measure_features(config, embedder, train)
        peer = fit_peer("mean-centring", fitted.image_features, fitted.text_features)
        keep("mean-centring", numbers(replace(transformed(features, peer), normalize=True)))
        fold_student(config, towers, fitted, train)
        keep("fold alone", numbers(embed_model(embedder, held_out, zero_shot)))
    for asked in options.runs:
        recipe, rate, *more = asked.split(":")
        given = dict(part.split("=") for part in more[0].split(",")) if more else {}
        settings: dict[str, dict[str, Any]] = {"loss": {}, "train": {}}
        for name, value in given.items():
            group, _, key = name.rpartition(".")
            settings[group or "loss"][key] = yaml.safe_load(value)
        for seed in range(1, options.seeds + 1):
            run = f"{asked} seed {seed} {where}"
            if run in done:
                continue
            config = RefineConfig.model_validate(
                {
                    "recipe": recipe,
                    "seed": seed,
                    "loss": settings["loss"],
                    "train": {
                        "batch_size": 100,
                        "precision": "fp32",
                        "learning_rate": float(rate),
                        "parameters": options.parameters,
                        "device": "cpu",
                        **settings["train"],
                    },
                }
            )
            student = build.build_student(towers, config, accelerator.device)  # pyright: ignore
            student.load_state_dict(untouched)
            known = measure_features(config, embedder, train)
            trained = train_student(
                config, student, train, embedder, accelerator, log=StepLog(None)
            )
            features = embed_model(embedder, held_out, zero_shot)
            fitted = measure_features(config, embedder, train)
            found = numbers(features) | {
                "logit_scale": trained.logit_scale or 0.0,
                "fitted_behind": fitted_logit_scale(
                    (fitted.image_features, fitted.text_features),
                    (known.image_features, known.text_features),
                    teacher_scale,
                ),
            }
            peer = fit_peer("fold", fitted.image_features, fitted.text_features)
            again = numbers(transformed(features, peer))
            keep(run, found | {f"folded_again_{name}": value for name, value in again.items()})


if __name__ == "__main__":
    main()
