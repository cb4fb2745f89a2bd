"""Comparing recipes on a few drawn pairs: fair, resumable, the same twice."""

import csv
import json
import multiprocessing
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_refine.cli import main
from clip_refine.config import load_config, override
from clip_refine.config.runs import CompareConfig
from clip_refine.data import EpochPlan, PairLoader, Subset, hold_out
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.results import Comparison, read
from clip_refine.roads import build
from clip_refine.roads import compare as road
from clip_refine.roads.compare import Runs, Training, compare, score_row
from clip_refine.roads.plan import MOST_RATES
from clip_refine.roads.refine import refine
from clip_refine.saving import saved_size
from clip_refine.support.errors import (
    ConfigError,
    DataError,
    ModelError,
    OutputError,
    Planned,
    TrainingError,
)
from clip_refine.support.folder import alone
from clip_refine.toy import ToyClasses, ToyPairs
from tests.conftest import TINY, write_model
from tests.data.files import Files, drawn_files

TRAIN = ToyPairs("compare", size=220, captions_per_image=2)
HELD_OUT = ToyPairs("compare-held-out", size=30, captions_per_image=2)
TASKS = [ToyClasses("toy_shape", size=48)]
RATES = (1e-4, 3e-3)


def settings(model: str, folder: Path) -> CompareConfig:
    return CompareConfig.model_validate(
        {
            "recipes": ("clip-refine", "contrastive"),
            "seeds": 2,
            "combine": ("clip-refine+mean-centring",),
            "learning_rates": RATES,
            "model": {"name": model},
            "train": {"batch_size": 24, "epochs": 2, "precision": "fp32", "device": "cpu"},
            "resamples": 50,
            "out": folder / "compared",
            "cache": folder / "cache",
            "seed": 3,
        }
    )


@pytest.fixture
def config(tiny_name: str, tmp_path: Path) -> CompareConfig:
    return settings(tiny_name, tmp_path)


def run(config: CompareConfig, model: OpenClipEncoder | None = None) -> Comparison:
    return compare(config, model=model, train_pairs=TRAIN, held_out=HELD_OUT, tasks=TASKS)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Recipe, seed and learning rate of every training that is really done."""
    done: list[str] = []
    train = Runs.train

    def counted(self: Runs, config: Any, *, fraction: float) -> Training:
        done.append(f"{config.recipe} {config.seed} {config.train.learning_rate:g}")
        return train(self, config, fraction=fraction)

    monkeypatch.setattr(Runs, "train", counted)
    return done


@dataclass
class Watched:
    """One comparison that several tests look at.

    Attributes:
        config: Its settings.
        result: What came out.
        batches: Recipe, seed and learning rate → the images and captions of every batch.
    """

    config: CompareConfig
    result: Comparison
    batches: dict[str, list[list[tuple[str, str]]]]


@pytest.fixture(scope="module")
def watched(tiny_name: str, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    config = settings(tiny_name, tmp_path_factory.mktemp("watched"))
    seen: dict[str, list[list[tuple[str, str]]]] = {}
    train = Runs.train
    current: list[str] = []

    def named(self: Runs, config: Any, *, fraction: float) -> Training:
        current[:] = [f"{config.recipe} {config.seed} {config.train.learning_rate:g}"]
        return train(self, config, fraction=fraction)

    class Recorded(PairLoader):
        def __init__(self, pairs: Any, **more: Any) -> None:
            super().__init__(pairs, **more)
            self.pairs = pairs

        def epoch(self, plan: EpochPlan, *, skip: int = 0):
            for batch in super().epoch(plan, skip=skip):
                chosen = [(i, plan.caption_choice[i]) for i in batch.indices]
                shown = [(self.pairs.image_name(i), self.pairs.captions[i][k]) for i, k in chosen]
                seen.setdefault(current[0], []).append(shown)
                yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runs, "train", named)
        patch.setattr("clip_refine.roads.build.PairLoader", Recorded)
        result = run(config)
    return Watched(config, result, seen)


def without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        timed = ("seconds", "peak_memory")
        return {name: without_measurements(v) for name, v in value.items() if name not in timed}
    return [without_measurements(v) for v in value] if isinstance(value, list) else value


def test_everything_promised_is_written(watched: Watched):
    config, result = watched.config, watched.result
    saved = json.loads((config.out / "comparison.json").read_text())
    assert Comparison.model_validate(saved) == result
    assert [(row["recipe"], row["seed"]) for row in saved["rows"]] == [
        *((name, 3) for name in ("pre-trained", *config.peers)),
        *(("clip-refine", 3), ("clip-refine+mean-centring", 3)),
        *(("clip-refine", 4), ("clip-refine+mean-centring", 4)),
        *(("contrastive", 3), ("contrastive", 4)),
    ]
    for row in saved["rows"]:
        assert set(row) >= {"geometry", "retrieval", "zero_shot", "linear_probe", "learning_rate"}
        assert set(row["linear_probe"]) == set(row["zero_shot"]) == {"toy_shape"}
        assert (row["learning_rate"] is None) == (row["steps"] == 0)
        assert (row["seconds"] > 0) == (row["recipe"] != "pre-trained")
    trained = saved["rows"][5]
    assert (trained["steps"], trained["pairs"]) == (2 * (120 // 24), 120)
    assert trained["peak_memory"] > 0.05
    assert [line["recipe"] for line in saved["summary"]] == [
        *("pre-trained", *config.peers),
        *("clip-refine", "clip-refine+mean-centring", "contrastive"),
    ]
    assert [line["runs"] for line in saved["summary"]] == [1] * 5 + [2] * 3
    with (config.out / "comparison.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(saved["rows"])
    assert float(table[5]["zero_shot.toy_shape.top1"]) == trained["zero_shot"]["toy_shape"]["top1"]
    shown = (config.out / "comparison.md").read_text()
    assert "clip-refine+mean-centring" in shown
    assert " ± " in shown
    assert "clip-refine+mean-centring" in (config.out / "report.html").read_text(encoding="utf-8")


def test_the_learning_rate_is_chosen_on_the_selection_pairs(watched: Watched):
    result = watched.result
    for choice in result.learning_rates:
        assert set(choice.tried) == {"0.0001", "0.003"}
        assert choice.tried[f"{choice.chosen:g}"] == max(s for s in choice.tried.values() if s)
        assert choice.at_edge
        rows = [row for row in result.rows if row.recipe == choice.recipe]
        assert {row.learning_rate for row in rows} == {choice.chosen}
        assert rows[0].selection == choice.tried[f"{choice.chosen:g}"]


def test_peers_and_untouched_model_are_what_they_are_called(config: CompareConfig):
    result = run(override(config, recipes=("hycd",), combine=(), seeds=1, learning_rates=(1e-4,)))
    rows = {row.recipe: row for row in result.rows}
    untouched, nnn = rows["pre-trained"], rows["nnn"]
    # nnn moves nobody, it only changes the ranking
    assert nnn.geometry == pytest.approx(untouched.geometry, abs=1e-6)
    assert nnn.retrieval != untouched.retrieval
    centred = rows["mean-centring"].geometry["centroid_distance"]
    assert centred < untouched.geometry["centroid_distance"]
    assert {row.selection is None for row in result.rows if row.recipe in config.peers} == {True}


def test_all_recipes_see_the_same_batches(watched: Watched):
    seen = watched.batches
    assert len(seen) == 6
    by_seed: dict[str, list[Any]] = {"3": [], "4": []}
    for name, batches in seen.items():
        by_seed[name.split()[1]].append(batches)
    assert all(batches == by_seed["3"][0] for batches in by_seed["3"])
    assert all(batches == by_seed["4"][0] for batches in by_seed["4"])
    assert by_seed["3"][0] != by_seed["4"][0]
    training, selection = hold_out(TRAIN, fraction=0.1, seed=3)
    used = {image for batch in by_seed["3"][0] for image, _ in batch}
    assert used == {training.image_name(index) for index in range(len(training))}
    assert not used & {selection.image_name(index) for index in range(len(selection))}
    assert [len(batch) for batch in by_seed["3"][0]] == [24] * 10


@pytest.mark.parametrize(
    ("parameters", "swept"), [("all", ""), ("projections", ""), ("projections", "all,")]
)
def test_a_row_is_what_refine_gives_with_a_live_teacher(
    parameters: str, swept: str, config: CompareConfig, tmp_path: Path
):
    """Also where only projections are trained, on what the trunk gives, which is looked up.

    Where other parts are trained beside them, that is not enough.
    """
    config = override(config, recipes=("clip-refine",), combine=(), seeds=1, learning_rates=(1e-3,))
    name, train = "clip-refine", {"parameters": parameters}
    if swept:
        config = override(config, sweep=(f"train.parameters={swept}{parameters}",))
        name += f"[train.parameters={parameters}]"
    else:
        config = override(config, train=train)
    [row] = [row for row in run(config).rows if row.recipe == name]
    training, _ = hold_out(TRAIN, fraction=0.1, seed=3)
    train["learning_rate"] = 1e-3
    settings = override(config.refinement(), out=tmp_path / "run", train=train)
    after = refine(settings, train_pairs=training, held_out=HELD_OUT).after
    assert row.geometry == pytest.approx(after.geometry, abs=1e-4)
    assert row.retrieval == pytest.approx(after.retrieval, abs=0.04)


def test_twice_is_the_same(watched: Watched, tmp_path: Path):
    # the second time the teacher's features are read from the cache
    again = run(override(watched.config, out=tmp_path / "again"))
    first, second = (
        without_measurements(json.loads((folder / "comparison.json").read_text()))
        for folder in (watched.config.out, tmp_path / "again")
    )
    assert first == second
    assert again.rows != watched.result.rows  # seconds do differ


def test_it_goes_on_where_it_stopped(
    config: CompareConfig,
    trainings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    config = override(config, learning_rates=RATES[:1], peers=("nnn",))

    def stop(name: str, training: Training, *rest: Any, **more: Any):
        if (name, training.seed) == ("contrastive", 4):
            raise KeyboardInterrupt
        return score_row(name, training, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr("clip_refine.roads.compare.score_row", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert not (config.out / "comparison.json").exists()
    assert len(trainings) == 4
    last = trainings[-1]
    trainings.clear()
    result = run(config)
    assert trainings == [last]
    trainings.clear()
    assert run(config) == result
    assert trainings == []
    # another recipe, seed or peer is added to what is there
    more = run(override(config, recipes=(*config.recipes, "hycd"), peers=("nnn", "mean-centring")))
    assert [name.split()[0] for name in trainings] == ["hycd", "hycd"]
    assert all(row in more.rows for row in result.rows if row.learning_rate)
    # and what is named no more is not passed over in silence
    capsys.readouterr()
    run(override(config, recipes=config.recipes[:1]))
    said = " ".join(capsys.readouterr().err.split())
    assert "does not name them: mean-centring, contrastive, hycd." in said
    # of a version with other numbers nothing is taken over
    trainings.clear()
    monkeypatch.setattr("clip_refine.roads.compare.NUMBERS", 0)
    assert run(override(config, recipes=config.recipes[:1], seeds=1)).rows
    assert len(trainings) == 1


def test_other_settings_or_data_are_not_mixed(config: CompareConfig, trainings: list[str]):
    config = override(config, recipes=("hycd",), combine=(), seeds=1, learning_rates=(1e-4,))
    run(config)
    other = override(config, train={"epochs": 1})
    with pytest.raises(OutputError, match=r"other settings \(train.epochs was 2, is 1\)"):
        run(other)
    trainings.clear()
    compare(config, train_pairs=TRAIN, held_out=ToyPairs("others", 30), tasks=TASKS)
    assert trainings == ["hycd 3 0.0001"]
    run(override(other, overwrite=True))
    assert len(list((config.out / "rows").glob("hycd-*"))) == 1


def test_a_sweep_and_a_part_of_the_data(config: CompareConfig):
    sweep = ("loss.alpha=0,1", "data.fraction=0.5")
    config = override(config, recipes=("clip-refine",), seeds=1, peers=(), learning_rates=RATES[:1])
    result = run(override(config, sweep=sweep))
    assert [line.recipe for line in result.summary] == [
        "pre-trained",
        "clip-refine[loss.alpha=0]",
        "clip-refine[loss.alpha=0]+mean-centring",
        "clip-refine[loss.alpha=1]",
        "clip-refine[loss.alpha=1]+mean-centring",
        "clip-refine[data.fraction=0.5]",
        "clip-refine[data.fraction=0.5]+mean-centring",
    ]
    rows = {row.recipe: row for row in result.rows}
    half = rows["clip-refine[data.fraction=0.5]"]
    assert (half.pairs, half.steps) == (60, 4)
    assert rows["clip-refine[loss.alpha=0]"].geometry != rows["clip-refine[loss.alpha=1]"].geometry


def test_a_learning_rate_that_fails_is_passed_over(config: CompareConfig):
    config = override(config, recipes=("clip-refine",), combine=(), seeds=1, peers=())
    result = run(override(config, learning_rates=(1e-4, 1e30)))
    [choice] = result.learning_rates
    assert (choice.chosen, choice.tried["1e+30"]) == (1e-4, None)
    with pytest.raises(TrainingError, match="training failed at every learning rate tried"):
        run(override(config, learning_rates=(1e30,)))


def test_auto_goes_on_until_the_best_rate_lies_inside(config: CompareConfig, trainings: list[str]):
    searched = override(
        config, recipes=("contrastive",), combine=(), seeds=1, peers=(), learning_rates="auto"
    )
    [choice] = run(searched).learning_rates
    rates = sorted(float(rate) for rate in choice.tried)
    assert 5 <= len(rates) <= MOST_RATES
    assert {1e-7, 1e-6, 1e-5} <= set(rates)
    assert len(trainings) == len(rates)
    assert choice.tried[f"{choice.chosen:g}"] == max(s for s in choice.tried.values() if s)


def test_models_are_kept_on_request(config: CompareConfig, trainings: list[str]):
    config = override(
        config, recipes=("contrastive",), combine=(), peers=(), learning_rates=RATES[:1]
    )
    run(override(config, seeds=1))
    config = override(config, save_models=True)
    trainings.clear()
    result = run(config)
    # the finished run's weights were not kept, so it is done once more
    assert [name.split()[1] for name in trainings] == ["3", "4"]
    folders = sorted(path.name for path in (config.out / "models").iterdir())
    assert folders == ["contrastive-3", "contrastive-4"]
    model = load_open_clip(f"local-dir:{config.out}/models/contrastive-4")
    chosen = result.learning_rates[0].chosen
    one = override(config, seeds=1, seed=4, learning_rates=(chosen,), out=config.out / "x")
    # the untouched model of this comparison is the saved one
    other = compare(
        override(one, recipes=("hycd",), save_models=False),
        model=model,
        train_pairs=TRAIN,
        held_out=HELD_OUT,
        tasks=TASKS,
    )
    saved, row = other.rows[0], result.rows[-1]
    assert saved.retrieval == pytest.approx(row.retrieval)
    trainings.clear()
    run(config)
    assert trainings == []


def test_room_for_all_kept_models_is_looked_at_first(
    config: CompareConfig, trainings: list[str], tiny: OpenClipEncoder, monkeypatch
):
    """Two seeds of one recipe; a comparison that goes on needs no room for what is there."""
    config = override(
        config, recipes=("contrastive",), combine=(), peers=(), learning_rates=RATES[:1]
    )
    kept, usage = override(config, save_models=True), shutil.disk_usage(config.out.parent)
    free = 2**28 + 2 * saved_size(tiny)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free - 1))
    with pytest.raises(
        OutputError, match=r"the 2 models that --save-models keeps take 6.8 MB, but"
    ):
        run(kept)
    assert trainings == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    run(kept)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**28))
    run(kept)


def test_a_kept_model_is_made_again_of_other_data(config: CompareConfig):
    config = override(
        config,
        recipes=("contrastive",),
        combine=(),
        peers=(),
        seeds=1,
        learning_rates=RATES[:1],
        save_models=True,
    )
    weights = config.out / "models" / "contrastive-3" / "open_clip_model.safetensors"
    run(config)
    first = weights.read_bytes()
    fewer = Subset(TRAIN, range(len(TRAIN) - 8), TRAIN.name)
    compare(config, train_pairs=fewer, held_out=HELD_OUT, tasks=TASKS)
    assert weights.read_bytes() != first
    again = weights.stat().st_mtime_ns
    compare(config, train_pairs=fewer, held_out=HELD_OUT, tasks=TASKS)
    assert weights.stat().st_mtime_ns == again


def test_a_model_of_ones_own_is_given_back_untouched(config: CompareConfig, tiny: OpenClipEncoder):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    run(override(config, recipes=("rafa",), combine=(), seeds=1, learning_rates=(1e-3,)), tiny)
    assert all(torch.equal(before[name], value) for name, value in tiny.state_dict().items())


def test_as_many_processes_decode_as_the_plan_says(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
):
    """As settings ask for, all the same: what was measured is not kept."""
    monkeypatch.setattr(road, "say_plan", lambda *_, **__: 1)
    used: list[int] = []
    loader = build.PairLoader

    def noted(*args: Any, **settings: Any) -> Any:
        used.append(settings["workers"])
        return loader(*args, **{**settings, "workers": 0})

    monkeypatch.setattr(build, "PairLoader", noted)
    run(override(config, recipes=("hycd",), combine=(), seeds=1, learning_rates=(1e-3,)))
    assert set(used) == {1}
    assert load_config(CompareConfig, config.out / "config.yaml").train.workers is None


def test_two_at_once_do_not_mix(config: CompareConfig):
    with alone(config.out), pytest.raises(OutputError, match="another run is writing it"):
        run(override(config, seed=5))


def compare_at_once(config: CompareConfig, start: Any, found: Any) -> None:
    """One of two processes that begin together: its seed, and why it was refused."""
    torch.set_num_threads(1)  # which a fork of a process with several can do
    start.wait()
    try:
        run(config)
        found.put((config.seed, ""))
    except OutputError as error:
        found.put((config.seed, str(error)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_two_processes_with_other_settings_one_is_refused(config: CompareConfig):
    config = override(
        config,
        recipes=("hycd",),
        combine=(),
        peers=(),
        seeds=1,
        learning_rates=RATES[:1],
        resamples=2,
        train={"epochs": 1, "batch_size": 60},
    )
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(2), context.SimpleQueue()
    both = [
        context.Process(target=compare_at_once, args=(override(config, seed=seed), start, found))
        for seed in (5, 6)
    ]
    for process in both:
        process.start()
    (won, nothing), (_, refusal) = sorted((found.get() for _ in both), key=lambda one: one[1])
    for process in both:
        process.join()
    assert nothing == ""
    assert "another run is writing it" in refusal or "with other settings (seed" in refusal
    assert json.loads((config.out / "state.json").read_text())["settings"]["seed"] == won
    rows = [json.loads(path.read_text())["row"] for path in (config.out / "rows").glob("*.json")]
    assert {row["seed"] for row in rows} == {won}
    assert {row.seed for row in read(Comparison, config.out / "comparison.json").rows} == {won}


def test_a_mistake_costs_no_earlier_comparison(config: CompareConfig):
    (config.out / "rows").mkdir(parents=True)
    (config.out / "config.yaml").write_text("seed: 1")
    (config.out / "comparison.json").write_text("precious")
    again = override(config, overwrite=True)
    with pytest.raises(DataError, match=r"gone\.csv"):
        compare(override(again, data={"train": "gone.csv", "val": "gone.csv"}))
    with pytest.raises(DataError, match="fewer than a batch"):
        run(override(again, train={"batch_size": 121}))
    assert (config.out / "comparison.json").read_text() == "precious"


def test_mistakes_are_found_before_anything_is_trained(config: CompareConfig, trainings: list[str]):
    for changes, message in (
        ({"recipes": ("hicd",)}, "Did you mean hycd"),
        ({"peers": ("mean-centering",)}, "Did you mean mean-centring"),
        ({"peers": ("nnn", "nnn")}, "comes twice"),
        ({"combine": ("hycd+nnn",)}, "does not begin with a recipe that is compared"),
        ({"sweep": ("loss.alfa=1",)}, "Did you mean loss.alpha"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(override(config, **changes))
    with pytest.raises(DataError, match="100 aside for choosing learning rates"):
        compare(config, train_pairs=ToyPairs("few", 150), held_out=HELD_OUT, tasks=TASKS)
    with pytest.raises(DataError, match="not held out, fewer than a batch of 121"):
        run(override(config, train={"batch_size": 121}))
    assert trainings == []


def test_from_the_command_line(
    tiny_name: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for index in range(len(TRAIN)):
        TRAIN.load_image(index).save(tmp_path / f"{index}.png")
    lines = [f'{index}.png,"{texts[0]}"' for index, texts in enumerate(TRAIN.captions)]
    pairs = tmp_path / "train.csv"
    pairs.write_text("\n".join(["image,caption", *lines]) + "\n", encoding="utf-8")
    out = tmp_path / "compared"
    arguments = [
        *("compare", "--recipes", "hycd,contrastive+anchor", "--seeds", "1"),
        *("--peers=mean-centring,mean-centring+nnn", "--combine", "hycd+mean-centring"),
        *("--learning-rates", "1e-5,1e-4", "--model.name", tiny_name, "--resamples", "20"),
        *("--data.train", str(pairs), "--data.val", str(table), "--train.batch-size", "40"),
        *("--train.precision", "fp32", "--cache", str(tmp_path / "cache"), "--out", str(out)),
    ]
    main(arguments)
    shown = capsys.readouterr()
    assert "contrastive+anchor" in shown.out
    assert "Less the untouched model" in shown.out
    assert "hycd, seed 42, learning rate 1e-05: gap" in shown.err
    assert "hycd: learning rate" in shown.err
    saved = json.loads((out / "comparison.json").read_text())
    assert len(saved["rows"]) == 6
    assert saved["rows"][0]["linear_probe"] == {}
    assert (out / "report.html").is_file()
    main([*arguments, "--json"])
    shown = capsys.readouterr()
    assert "gap" not in shown.err
    assert json.loads(shown.out) == saved
    with pytest.raises(SystemExit):
        main([*arguments, "--train.epochs", "2"])
    assert "Pass --overwrite to start again, or another --out" in capsys.readouterr().err


def test_cached_pixels_change_no_number(config: CompareConfig, tmp_path: Path):
    files = drawn_files(tmp_path / "images", 210)
    held_out = Files(files.paths[:20])
    small = {"recipes": ("clip-refine",), "seeds": 1, "combine": (), "peers": ()}
    small |= {"learning_rates": (1e-3,), "train": {"epochs": 1}}

    def rows(name: str, **data: Any) -> list[Any]:
        chosen = override(config, **small, data=data, out=tmp_path / name, cache=tmp_path / name)
        found = compare(chosen, train_pairs=files, held_out=held_out, tasks=[])
        return [(row.geometry, row.retrieval, row.selection) for row in found.rows]

    assert rows("cached", cache_images=True) == rows("plain")
    (pixels,) = (tmp_path / "cached" / "pixels").glob("*/rows")
    assert pixels.stat().st_size == 210 * 3 * 48 * 48
    unwritten = tmp_path / "planned"
    elsewhere: Any = {"out": unwritten, "cache": tmp_path / "plain", "dry_run": True}
    planned = override(config, **small, **elsewhere, data={"cache_images": True})
    with pytest.raises(Planned, match="only pixels were cached"):
        compare(planned, train_pairs=files, held_out=held_out, tasks=[])
    assert not unwritten.exists()
    # a cache is no reason to begin again
    with_another = override(config, **small, out=tmp_path / "plain", data={"cache_images": True})
    assert len(compare(with_another, train_pairs=files, held_out=held_out, tasks=[]).rows) == 2


def test_captions_without_wrong_twins_are_said_before_anything_is_trained(
    config: CompareConfig, trainings: list[str]
):
    german = [(TRAIN.load_image(at), "ein Hund auf der Wiese") for at in range(len(TRAIN))]
    config = override(config, loss={"negatives": "swapped-words"})
    with pytest.raises(ConfigError, match="no captions in which two words can change places"):
        compare(config, train_pairs=german, held_out=HELD_OUT, tasks=TASKS)
    assert not trainings


class TestSeveralModels:
    def test_each_stands_as_it_came_and_refined_and_one_more_trains_only_itself(
        self, config: CompareConfig, trainings: list[str], tmp_path: Path
    ):
        other = write_model(tmp_path / "other", {**TINY, "embed_dim": 8}, seed=1)
        less = {"recipes": ("clip-refine",), "peers": ("nnn",), "seeds": 1}
        config = override(config, **less, learning_rates=(1e-3,))
        alone = run(config)
        both = run(override(config, models=(other,)))
        assert trainings == ["clip-refine 3 0.001"] * 2
        assert both.models == {"other": other}
        names = [row.recipe for row in alone.rows]
        assert [row.recipe for row in both.rows] == names + [f"other: {name}" for name in names]
        assert both.rows[: len(names)] == alone.rows
        turned = run(override(config, out=tmp_path / "turned", model={"name": other}))
        assert [row.headline for row in both.rows[len(names) :]] == [
            row.headline for row in turned.rows
        ]
        assert [choice.recipe for choice in both.learning_rates] == [
            *("clip-refine", "other: clip-refine"),
        ]
        assert "other: clip-refine" in (config.out / "comparison.md").read_text()

    def test_named_once(self, config: CompareConfig):
        with pytest.raises(ConfigError, match="models: a comes twice"):
            run(override(config, models=("a", "a")))
        with pytest.raises(ConfigError, match="models: .* is model.name, compared in any case"):
            run(override(config, models=(config.model.name,)))

    def test_one_that_cannot_be_loaded_is_said_before_anything_is_trained(
        self, config: CompareConfig, trainings: list[str]
    ):
        with pytest.raises(ModelError, match="RN5O"):
            run(override(config, models=("RN5O@openai",), recipes=("clip-refine",), seeds=1))
        assert not trainings

    def test_the_plan_says_whose_it_is(self, config: CompareConfig, tmp_path: Path, capsys):
        other = write_model(tmp_path / "other", TINY, seed=1)
        with pytest.raises(Planned):
            run(override(config, models=(other,), dry_run=True))
        assert "the same follows for other." in " ".join(capsys.readouterr().err.split())


def test_training_pairs_that_are_passed_alone_are_used(config: CompareConfig, table: Path, capsys):
    asked = override(config, data={"val": str(table)}, dry_run=True)
    with pytest.raises(Planned):
        compare(asked, train_pairs=TRAIN, tasks=[])
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "pairs of toy-compare (training part) in 10 steps of 24; scored on 64 held-out" in said
    ), said
