"""Trackers: what is sent arrives, and what cannot be sent is said at once."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from clip_refine.config import override
from clip_refine.config.runs import RefineConfig
from clip_refine.models import OpenClipEncoder
from clip_refine.roads import build
from clip_refine.roads.refine import refine
from clip_refine.support.errors import ConfigError
from clip_refine.toy import ToyPairs
from clip_refine.train.log import StepLog, check_tracker, track_run


@pytest.fixture
def config(tiny_name: str, tmp_path: Path) -> RefineConfig:
    return RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "train": {"batch_size": 32, "learning_rate": 1e-3, "precision": "fp32"},
            "out": tmp_path / "run",
            "report": False,
        }
    )


def test_what_was_logged_is_there_before_the_next_step(tmp_path: Path):
    """A run that goes on may be killed before it, and then goes on once more."""
    path = tmp_path / "log.jsonl"
    with StepLog(path) as log:
        for step in range(1, 9):
            log.write({"step": step})
    expected = path.read_text().splitlines()[:6]
    killed = [StepLog(path, earlier=path, steps=6) for _ in range(2)]  # never closed
    assert path.read_text().splitlines() == expected
    with StepLog(path, earlier=path, steps=6) as log:
        log.write({"step": 7})
    assert path.read_text().splitlines() == [*expected, '{"step": 7}']
    for log in killed:
        log.__exit__()


def test_tensorboard_files_hold_steps_and_scores(
    config: RefineConfig, tiny: OpenClipEncoder, pairs: ToyPairs, held_out: ToyPairs
):
    config = override(config, log="tensorboard")
    scores = refine(config, model=tiny, train_pairs=pairs, held_out=held_out)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss_total")
    assert [event.step for event in losses] == [1, 2]
    gap = events.Scalars("scores/geometry.centroid_distance")
    assert [event.step for event in gap] == [0, 2]
    assert [event.value for event in gap] == pytest.approx(
        [side.geometry["centroid_distance"] for side in (scores.before, scores.after)]
    )
    assert len(events.Scalars("scores/retrieval.image_to_text_recall_at_1")) == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_the_same(name: str, config: RefineConfig, monkeypatch):
    """Their clients are replaced by a list: no server, no account, no network."""
    sent: list[object] = []
    run = SimpleNamespace(
        log=lambda values, step=None, **_: sent.append((step, values)),
        finish=lambda: sent.append("finished"),
        config=SimpleNamespace(update=lambda values, **_: sent.append(values)),
    )
    client = SimpleNamespace(
        __spec__=object(),
        init=lambda **options: sent.append(options) or run,
        config=run.config,
        finish=run.finish,
    )
    monkeypatch.setitem(sys.modules, name, client)
    build.build_accelerator("cpu")
    check_tracker(name)
    with track_run(override(config, log=name), config.out) as tracking:
        tracking.step({"step": 3, "loss_total": 0.5})
    assert sent[0] == {"project": "clip-refine", "name": "run"}
    assert sent[1]["train.batch_size"] == 32  # pyright: ignore
    assert sent[2:] == [(3, {"train/loss_total": 0.5}), "finished"]


def test_a_missing_package_is_named_before_anything_is_done(
    config: RefineConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("clip_refine.train.log.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="log 'wandb': the package wandb is not installed. Run"):
        refine(override(config, log="wandb"))
    assert not config.out.exists()
