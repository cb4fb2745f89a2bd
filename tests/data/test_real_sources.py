"""Real photographs: the same pairs and the same losses from every layout they are written in.

What `refine` does between opening the source and saving, without the measuring around it, which
would take most of the time.
"""

import csv
from functools import partial
from pathlib import Path

import pytest

from clip_refine.config.runs import RefineConfig
from clip_refine.data.pairs import image_fingerprint
from clip_refine.models import Teacher, load_open_clip
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.train import StepLog, TowerPrecision
from tests.data.layouts import Pairs, write_parquet, write_shards

COUNT = 64
STEPS = 2


@pytest.fixture(scope="module")
def photo_clip(shared: Path) -> str:
    folder = shared / "models" / "photo-clip"
    if not folder.is_dir():
        pytest.skip("../shared/models/photo-clip is not on this machine: it is not published")
    return f"local-dir:{folder}"


def first_pairs(folder: Path) -> Pairs:
    """The first images of a Flickr8k folder, with all their captions."""
    captions: dict[str, list[str]] = {}
    with (folder / "captions.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["file_name"], []).append(row["caption"])
    chosen = list(captions.items())[:COUNT]
    return [(name, (folder / name).read_bytes(), texts) for name, texts in chosen]


class Runs:
    """Runs on the same photographs, read in one way and another."""

    def __init__(self, model: str, folder: Path, here: Path) -> None:
        self.model = model
        self.pairs = first_pairs(folder)
        self.names = here / "names.txt"
        self.names.write_text("".join(f"{name}\n" for name, _, _ in self.pairs))

    def train(self, train: str, **data) -> tuple[list, list[float]]:
        """The pairs, none of a stream, and the losses."""
        config = RefineConfig.model_validate(
            {
                "data": {"train": train, "val": "toy", **data},
                "train": {"batch_size": 8, "steps": STEPS},
                "seed": 3,
            }
        )
        pairs, _ = build.build_data(config.data, seed=config.seed)
        accelerator = build.build_accelerator("cpu")
        model = load_open_clip(self.model)
        student = build.build_student(model, config, accelerator.device)
        precision = TowerPrecision.from_name("fp32")
        teacher, prior = Teacher(student), StandardNormal()
        trainer = build.build_trainer(
            config, student, teacher, precision, prior, accelerator, steps=STEPS
        )
        batches = build.build_batches(config, pairs, model, accelerator)
        records: list[dict] = []
        log = StepLog(None)
        log.write = records.append  # pyright: ignore[reportAttributeAccessIssue]
        trainer.train(batches, steps=STEPS, log=log)
        assert len(records) == STEPS
        listed = [] if config.data.streaming else contents(pairs)
        return listed, [record["loss_total"] for record in records]


def contents(pairs) -> list:
    """What every image and its captions are."""
    return [(image_fingerprint(pairs, i), tuple(pairs.captions[i])) for i in range(len(pairs))]


def test_the_same_losses_from_csv_shards_and_parquet(shared: Path, photo_clip: str, tmp_path: Path):
    folder = shared / "data" / "flickr8k" / "refine"
    runs = Runs(photo_clip, folder, tmp_path)
    by_csv = runs.train(str(folder / "captions.csv"), split_file=runs.names)
    assert len(by_csv[0]) == COUNT
    for write in (write_shards, write_parquet):
        assert runs.train(write(tmp_path / write.__name__, runs.pairs)) == by_csv, write.__name__


def test_the_same_losses_from_csv_and_coco(shared: Path, photo_clip: str, tmp_path: Path):
    folder = shared / "data" / "flickr8k" / "dev"
    runs = Runs(photo_clip, folder, tmp_path)
    by_csv, by_coco = (
        runs.train(str(folder / name), split_file=runs.names)
        for name in ("captions.csv", "captions_coco.json")
    )
    assert by_csv == by_coco


def test_the_same_losses_from_every_stream(shared: Path, photo_clip: str, tmp_path: Path):
    runs = Runs(photo_clip, shared / "data" / "flickr8k" / "refine", tmp_path)
    one_shard = partial(write_shards, shards=1)
    first, second = (
        runs.train(write(tmp_path / name, runs.pairs), streaming=True, shuffle_buffer=20)
        for name, write in (("tar", one_shard), ("parquet", write_parquet))
    )
    assert first == second
