"""Seconds that a run's intervals and report take, and its size: `python benchmarks/report.py`.

Random features of dimension 512 for drawn pairs; what is timed does not depend on their values.
"""

import json
import tempfile
import time
from pathlib import Path

import torch

from clip_refine.config import RefineConfig, dump_config
from clip_refine.evaluation.evidence import gather_evidence
from clip_refine.evaluation.scores import ModelFeatures, measure, paired_differences, score_features
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.report.run_page import write_run_report
from clip_refine.results import RunScores
from clip_refine.toy import ToyPairs

STEPS = 46


def features(pairs: int, seed: int) -> ModelFeatures:
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, pairs, 512, generator=generator)
    return ModelFeatures(EmbeddedPairs(image, image + noise, torch.arange(pairs)), [])


def write_rest(folder: Path, scores: RunScores) -> None:
    scores.write(folder / "scores.json")
    (folder / "config.yaml").write_text(dump_config(RefineConfig()))
    (folder / "environment.json").write_text("{}")
    lines = [json.dumps({"step": n, "loss_total": 1.0, "image_norm": 9.0}) for n in range(STEPS)]
    (folder / "log.jsonl").write_text("\n".join(lines))


def main() -> None:
    for count in (1000, 5000):
        pairs = ToyPairs("bench", count)
        sides = features(count, 0), features(count, 1)
        before, after = (score_features(side, seed=0) for side in sides)
        with tempfile.TemporaryDirectory() as name:
            folder, start = Path(name), time.perf_counter()
            was, now = (measure(side) for side in sides)
            difference = paired_differences(was, now, seed=0)
            intervals = time.perf_counter() - start
            recipe = {"model": "toy", "pairs": count, "steps": STEPS}
            write_rest(
                folder,
                RunScores(
                    before=before, after=after, difference=difference, recipe=recipe, seconds={}
                ),
            )
            start = time.perf_counter()
            gather_evidence(was, now, pairs, [], seed=0).write(folder / "report.json")
            evidence = time.perf_counter() - start
            start = time.perf_counter()
            size = write_run_report(folder).stat().st_size / 1e6
            page = time.perf_counter() - start
        print(
            f"{count:,} pairs: intervals {intervals:.2f} s, evidence {evidence:.2f} s, "
            f"page {page:.2f} s, {size:.1f} MB"
        )


if __name__ == "__main__":
    main()
