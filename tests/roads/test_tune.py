"""A search over recipes, rates and weights: refuses what the guard forbids, goes on, the same."""

from pathlib import Path
from typing import Any

import pytest

from clip_refine.config import RefineConfig, load_config, override
from clip_refine.config.runs import TuneConfig
from clip_refine.roads import tune as road
from clip_refine.roads.compare import Runs, Training, open_runs
from clip_refine.roads.tune import tune
from clip_refine.support.errors import TrainingError
from tests.conftest import needs
from tests.roads.test_compare import HELD_OUT, TASKS, TRAIN

needs("optuna", "tune")


DATA: Any = {"train_pairs": TRAIN, "held_out": HELD_OUT, "tasks": TASKS}


def test_the_best_is_one_of_those_that_saw_all_pairs(
    tiny_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second trial ends after a quarter, with more than the first has in the end."""
    values = iter([0.5, 0.5, 0.1, 0.4])
    monkeypatch.setattr(road, "_value", lambda *_: next(values))
    config = TuneConfig.model_validate(
        {
            "trials": 2,
            "model": {"name": tiny_name},
            "train": {"batch_size": 24, "precision": "fp32", "device": "cpu"},
            "out": tmp_path / "tuned",
            "cache": tmp_path / "cache",
        }
    )
    found = tune(config, **DATA)
    assert (found["selection"], found["tried"]) == (0.1, 2)


def test_a_search(tiny_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = TuneConfig.model_validate(
        {
            "recipes": ("clip-refine", "balanced"),
            "trials": 3,
            "rates": (1e-5, 1e-3),
            "guard": 1.0,
            "model": {"name": tiny_name},
            "train": {"batch_size": 24, "precision": "fp32", "device": "cpu"},
            "out": tmp_path / "tuned",
            "cache": tmp_path / "cache",
        }
    )
    parts: list[float] = []
    train = Runs.train

    def counted(self: Runs, config: Any, *, fraction: float) -> Training:
        parts.append(fraction)
        return train(self, config, fraction=fraction)

    monkeypatch.setattr(Runs, "train", counted)
    opened: list[Runs] = []

    def opening(*given: Any, **named: Any) -> Runs:
        opened.append(open_runs(*given, **named))
        return opened[-1]

    monkeypatch.setattr(road, "open_runs", opening)
    found = tune(config, **DATA)
    [shown] = opened[0].bar.progress.tasks
    assert (shown.completed, shown.total) == (len(parts) + 1, len(parts) + 1)  # one is untouched
    # the first goes all the way; halving ends one of the others before
    assert parts[:3] == [0.25, 0.5, 1.0]
    assert 3 + 2 <= len(parts) < 3 * 3
    written = load_config(RefineConfig, config.out / "tuned.yaml")
    assert (written.recipe, written.train.learning_rate) == (
        found["recipe"],
        found["learning_rate"],
    )
    assert {name: getattr(written.loss, name) for name in found["loss"]} == found["loss"]
    assert all(1e-5 <= rate <= 1e-3 for rate in (found["learning_rate"],))
    # again: all is read; more trials add to it
    done = len(parts)
    assert tune(config, **DATA) == found
    assert len(parts) == done
    more = tune(override(config, trials=4), **DATA)
    assert (more["tried"], more["selection"] >= found["selection"]) == (4, True)
    assert len(parts) > done
    # a guard that forbids everything
    monkeypatch.setattr(road, "_value", lambda *_: road.REFUSED)
    with pytest.raises(TrainingError, match="none of 3 trials kept zero-shot within 1"):
        tune(config, **DATA)
