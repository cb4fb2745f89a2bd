"""A search over recipes, rates and weights: refuses what the guard forbids, goes on, the same."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clip_refine.config import RefineConfig, load_config, override
from clip_refine.config.runs import TuneConfig
from clip_refine.roads import tune as road
from clip_refine.roads.compare import FinishedRun, Runs, Training, open_runs
from clip_refine.roads.plan import list_variants
from clip_refine.roads.tune import tune
from clip_refine.support.errors import Planned, TrainingError
from tests.conftest import needs
from tests.report.test_comparison import COMPARISON
from tests.roads.test_compare import HELD_OUT, TASKS, TRAIN

needs("optuna", "tune")


ROW = COMPARISON.rows[0]
DATA: Any = {"train_pairs": TRAIN, "held_out": HELD_OUT, "tasks": TASKS}


def test_the_best_is_one_of_those_that_saw_all_pairs(
    tiny_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second trial ends after a quarter, with more than the first has in the end."""
    values = iter([0.5, 0.5, 0.1, 0.4] * 2)
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
    assert (found.selection, len(found.trials)) == (0.1, 2)
    table = found.to_pandas()
    assert table[["part", "selection"]].values.tolist() == [[1.0, 0.1], [0.25, 0.4]]
    assert {"recipe", "learning_rate"} <= set(table.columns)
    tune(override(config, overwrite=True), **DATA)
    assert not list(tmp_path.glob(".tuned.*"))  # what was overwritten is gone


@pytest.mark.parametrize(
    ("task", "bystanders", "value"),
    [(0.6, 0.5, 0.4), (0.595, 0.495, 0.4), (0.58, 0.5, road.REFUSED), (0.7, 0.48, road.REFUSED)],
)
def test_what_is_guarded_is_not_lost(task: float, bystanders: float, value: float):
    """Of any task more than .01, whatever is gained elsewhere, or of the bystanders."""

    def run(task: float, kept: float | None) -> FinishedRun:
        shown = {"shapes": {"top1": task}, "colours": {"top1": 0.9 if task < 0.6 else 0.3}}
        row = ROW.model_copy(update={"selection": 0.4, "zero_shot": shown})
        return FinishedRun(depends_on="", row=row, resampled={}, bystanders=kept)

    config = TuneConfig()
    [variant] = list_variants(config.refinement(), recipes=["hycd"], sweeps=())
    tried: list[Any] = []

    def trained(*given: Any) -> FinishedRun:
        tried.append(given)
        return run(task, bystanders)

    runs: Any = SimpleNamespace(tried=trained)
    found = road._value(runs, variant, 1.23456e-5, 0.5, run(0.6, 0.5), config)
    assert found == value
    [(named, seed, rate)] = tried
    assert (named.name, named.fraction, seed, rate) == ("hycd 0.5", 0.5, config.seed, 1.23e-5)


def test_a_training_that_failed_is_refused():
    failed = FinishedRun(depends_on="", row=None, resampled={})
    runs: Any = SimpleNamespace(tried=lambda *_: failed)
    variant: Any = SimpleNamespace(name="a", recipe="a", config=None)
    assert road._value(runs, variant, 1.0, 1.0, failed, TuneConfig()) == road.REFUSED


def test_what_guards_a_search_is_said(tiny_name: str, tmp_path: Path, table: Path, capsys):
    config = TuneConfig.model_validate(
        {
            "trials": 1,
            "recipes": ("clip-refine",),
            "model": {"name": tiny_name},
            "train": {"batch_size": 24, "precision": "fp32", "device": "cpu"},
            "out": tmp_path / "tuned",
            "cache": tmp_path / "cache",
            "dry_run": True,
        }
    )
    for bystanders, tasks, message in (
        (None, [], "Nothing guards this search"),
        (str(table), TASKS, f"Guarded by toy_shape, {table}: what loses more than 0.01 of"),
    ):
        with pytest.raises(Planned):
            tune(override(config, bystanders=bystanders), **{**DATA, "tasks": tasks})
        said = " ".join(capsys.readouterr().err.split())
        assert message in said
        assert ("64 bystanders" in said) == bool(bystanders)


def test_a_search(tiny_name: str, tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch):
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
    config = override(config, bystanders=str(table))
    found = tune(config, **DATA)
    [shown] = opened[0].bar.progress.tasks
    assert (shown.completed, shown.total) == (len(parts) + 1, len(parts) + 1)  # one is untouched
    # the first goes all the way; halving ends one of the others before
    assert parts[:3] == [0.25, 0.5, 1.0]
    assert 3 + 2 <= len(parts) < 3 * 3
    written = load_config(RefineConfig, config.out / "tuned.yaml")
    assert (written.recipe, written.train.learning_rate) == (
        found.recipe,
        found.learning_rate,
    )
    assert {name: getattr(written.loss, name) for name in found.loss} == found.loss
    assert all(1e-5 <= rate <= 1e-3 for rate in found.to_pandas()["learning_rate"])
    kept = [json.loads(at.read_text())["bystanders"] for at in config.out.glob("rows/*.json")]
    assert len(kept) == len(parts) + 1
    assert all(0 <= share <= 1 for share in kept)
    # again: all is read; more trials add to it
    done = len(parts)
    assert tune(config, **DATA) == found
    assert len(parts) == done
    more = tune(override(config, trials=4), **DATA)
    assert (len(more.trials), more.selection >= found.selection) == (4, True)
    assert len(parts) > done
    # a guard that forbids everything
    monkeypatch.setattr(road, "_value", lambda *_: road.REFUSED)
    with pytest.raises(TrainingError, match="none of 3 trials kept what is guarded within 1"):
        tune(config, **DATA)
