"""Suites: from a YAML file to a table of models side by side."""

import io
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from clip_refine.cli import main
from clip_refine.config import (
    DataConfig,
    EvaluateConfig,
    EvaluationConfig,
    ModelConfig,
    RefineConfig,
    dump_config,
    load_suite,
)
from clip_refine.config.suites import SHIPPED, ZeroShotTask
from clip_refine.models import OpenClipEncoder
from clip_refine.report.tables import suite_tables
from clip_refine.results import FitProbability, SuiteScores, read
from clip_refine.roads.evaluate import evaluate
from clip_refine.roads.suites import (
    MEAN,
    SuitePlaces,
    build_templates,
    evaluate_suite,
    expand_models,
)
from clip_refine.support.errors import ConfigError, DataError, OutputError
from clip_refine.toy import ToyPairs
from tests.conftest import TINY, write_model
from tests.data.test_benchmarks import mixbench
from tests.several import in_processes

SUITE = {
    "about": "two small sources",
    "sources": {
        "pairs": {"at": {"kind": "captions", "path": "captions.csv"}},
        "kinds": {
            "at": [{"kind": "folder", "path": "gone"}, {"kind": "folder", "path": "kinds"}],
            "class_names": {"a_one": "one [bold]thing[/]", "b_two": "another thing"},
            "note": "drawn",
        },
    },
    "tasks": [
        {"kind": "zero-shot", "source": "kinds", "prompts": ["a {}", "the {}"]},
        {"kind": "zero-shot", "source": "kinds", "name": "kinds, single prompt"},
        {"kind": "retrieval", "source": "pairs"},
        {"kind": "retrieval", "source": "pairs", "name": "single", "protocol": "first-caption"},
        {"kind": "mixed-search", "source": "pairs"},
        {"kind": "separation", "source": "pairs"},
        {"kind": "geometry", "source": "pairs"},
        {"kind": "linear-probe", "source": "kinds"},
        {"kind": "few-shot-probe", "source": "kinds", "shots": [1, 2], "draws": 2},
        {"kind": "mixed-documents", "source": "pairs", "mixing": [2, 1, 1]},
        {"kind": "text-neighbours", "source": "pairs"},
        {"kind": "pair-clustering", "source": "pairs", "clusters": 5},
        {"kind": "storage", "source": "pairs"},
        {"kind": "image-neighbours", "source": "kinds"},
        {"kind": "clustering", "source": "kinds", "prompts": ["a {}", "the {}"]},
    ],
    "resamples": 20,
}


@pytest.fixture
def suite(tmp_path: Path, table: Path, held_out: ToyPairs) -> Path:
    """A YAML file beside its images: 64 captioned ones and 2 classes of 12."""
    for index in range(24):
        folder = tmp_path / "kinds" / ("a_one", "b_two")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        held_out.load_image(index).save(folder / f"{index}.png")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SUITE, sort_keys=False))
    return path


@pytest.fixture
def config(suite: Path, tiny_name: str, tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "suite": str(suite),
            "models": [tiny_name],
            "cache": tmp_path / "cache",
            "out": tmp_path / "scores.json",
            "device": "cpu",
        }
    )


def run(config: EvaluateConfig, **changes: object) -> SuiteScores:
    scores = evaluate_suite(config.model_copy(update=changes))
    assert scores is not None
    return scores


def test_every_kind_of_task_with_all_that_it_depends_on(config: EvaluateConfig, tiny_name: str):
    scores = run(config)
    assert config.out is not None
    assert read(SuiteScores, config.out) == scores
    assert scores.suite == "mine"
    assert [found.task for found in scores.measured] == [
        *("kinds zero-shot", "kinds, single prompt", "pairs retrieval", "single"),
        *("pairs mixed-search", "pairs separation", "pairs geometry", "kinds linear-probe"),
        *("kinds few-shot-probe", "pairs mixed-documents", "pairs text-neighbours"),
        *("pairs pair-clustering", "pairs storage", "kinds image-neighbours", "kinds clustering"),
        MEAN,
    ]
    by_task = {found.task: found for found in scores.measured}
    zero_shot = by_task["kinds zero-shot"]
    assert zero_shot.counts == {"images": 24, "classes": 2, "prompts_a_class": 2}
    assert zero_shot.prompts == "the suite's"
    assert zero_shot.templates == ("a {}", "the {}")
    assert zero_shot.class_names == "the suite's"
    assert zero_shot.source.endswith("kinds")
    assert zero_shot.note == "drawn"
    assert zero_shot.details["per_class"][0]["class"] == "one [bold]thing[/]"
    single = by_task["kinds, single prompt"]
    assert single.prompts == "paper"
    assert single.data_fingerprint != zero_shot.data_fingerprint
    assert by_task["pairs retrieval"].counts["captions"] == 192
    assert by_task["single"].counts["captions"] == 64
    for found in scores.measured:
        assert found.model_fingerprint == scores.models[0].fingerprint
        assert found.counts["images"] > 0
        for score in found.scores.values():
            assert score.low is None or score.high is not None
    top1 = [zero_shot.scores["top1"].value, single.scores["top1"].value]
    assert by_task[MEAN].scores["top1"].value == pytest.approx(sum(top1) / 2)


def test_the_numbers_are_those_of_a_plain_evaluation(
    config: EvaluateConfig, suite: Path, tiny_name: str
):
    by_task = {found.task: found.scores for found in run(config).measured}
    plain = evaluate(
        EvaluateConfig.model_validate(
            {
                "model": {"name": tiny_name},
                "data": {"val": str(suite.parent / "captions.csv")},
                "seed": config.seed,
                "device": "cpu",
            }
        )
    )
    for name, value in plain.retrieval.items():
        assert by_task["pairs retrieval"][name].value == pytest.approx(value)
    for name, value in plain.geometry.items():
        assert by_task["pairs geometry"][name].value == pytest.approx(value, abs=1e-5)


def test_features_are_computed_once_and_reused(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
):
    first = run(config)

    def refuse(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("clip_refine.models.OpenClipEncoder.encode_image", refuse)
    monkeypatch.setattr("clip_refine.models.OpenClipEncoder.encode_text", refuse)
    again = run(config, out=None)
    assert again.measured == first.measured


def by_several(settings: str, threshold: str) -> None:
    """A suite and a plain evaluation, by each of several processes."""
    config = EvaluateConfig.model_validate_json(settings)
    evaluate_suite(config)
    assert config.out
    pairs = {"data": DataConfig(val=threshold), "model": ModelConfig(name=config.models[0])}
    more = {"suite": None, "models": (), "cache": None, "out": config.out.with_name("plain.json")}
    saved = {"save_threshold": config.out.with_name("threshold.json")}
    evaluate(config.model_copy(update={**pairs, **more, **saved}))


@pytest.mark.timeout(300)
def test_two_processes_find_the_numbers_of_one(
    config: EvaluateConfig, suite: Path, table: Path, tmp_path: Path
):
    few = [SUITE["tasks"][number] for number in (0, 2, 5)]
    suite.write_text(yaml.safe_dump({**SUITE, "tasks": few}))
    outs = []
    for count in (1, 2):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        outs.append(folder)
        one = config.model_copy(update={"cache": folder / "cache", "out": folder / "suite.json"})
        given = one.model_dump_json(), str(table)
        by_several(*given) if count == 1 else in_processes(count, by_several, *given)
    alone, together = (read(SuiteScores, at / "suite.json") for at in outs)
    assert alone.measured == together.measured
    for name in ("plain.json", "threshold.json"):
        assert len({(at / name).read_text() for at in outs}) == 1


def watch_images(patch: pytest.MonkeyPatch, killed_at: int | None = None) -> list[int]:
    """How many images each batch has; the process is killed when it comes to that one."""
    usual, encoded = OpenClipEncoder.encode_image, list[int]()

    def encode(self: OpenClipEncoder, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        if len(encoded) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, pixels)

    patch.setattr(OpenClipEncoder, "encode_image", encode)
    return encoded


def run_until_killed(config: EvaluateConfig) -> None:
    torch.set_num_threads(1)  # which a fork of a process with several can do
    with pytest.MonkeyPatch().context() as patch:
        watch_images(patch, killed_at=3)
        run(config)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_suite_that_was_killed_goes_on(
    config: EvaluateConfig, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    suite.write_text(yaml.safe_dump({**SUITE, "tasks": [SUITE["tasks"][i] for i in (0, 2)]}))
    config = config.model_copy(update={"evaluation": EvaluationConfig(batch_size=16)})
    context = multiprocessing.get_context("fork")
    child = context.Process(target=run_until_killed, args=(config,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert config.out is not None
    assert not config.out.exists()
    encoded = watch_images(monkeypatch)
    scores = run(config)
    assert len(encoded) == 4 + 2 - 2  # batches
    assert run(config, cache=tmp_path / "fresh", out=None).measured == scores.measured


def test_two_models_side_by_side(config: EvaluateConfig, tiny_name: str, tmp_path: Path):
    other = write_model(tmp_path / "other", TINY, seed=1)
    scores = run(config, models=(tiny_name, other))
    assert [model.label for model in scores.models] == [tiny_name, other]
    values = {
        (found.model, found.task, name): score.value
        for found in scores.measured
        for name, score in found.scores.items()
    }
    assert scores.differences
    for found in scores.differences:
        pair = (values[model, found.task, found.score] for model in (other, tiny_name))
        assert found.mean == pytest.approx(next(pair) - next(pair))
        assert found.low is None or found.high is not None
    page = Path(config.out or "").with_suffix(".html").read_text(encoding="utf-8")
    assert f"other against {Path(tiny_name).name}: better in " in page
    moved = next(d for d in scores.differences if d.score == "true_pair_cosine")
    assert moved.low is not None
    assert moved.high is not None
    assert moved.low <= moved.mean <= moved.high
    # the first model's thresholds are those that both are measured at
    apart = {found.model: found for found in scores.measured if found.kind == "separation"}
    fits = [FitProbability.model_validate(apart[m].details["fit"]) for m in (tiny_name, other)]
    passed = [apart[m].scores["false_positives@first_threshold"].value for m in (tiny_name, other)]
    rare = [fit.cutoffs["false_positive_rate"].false_positive_rate for fit in fits]
    assert passed[0] == pytest.approx(rare[0])
    assert passed[1] != pytest.approx(rare[1])
    assert fits[1].nonsense == 50
    assert apart[other].scores["calibration_error"].low is not None
    assert 'id="thresholds"' in page


def test_equal_models_do_not_differ(config: EvaluateConfig, tmp_path: Path, tiny_name: str):
    same = write_model(tmp_path / "same", TINY)
    scores = run(config, models=(tiny_name, same))
    for found in scores.differences:
        assert found.mean == 0
        assert found.low in (0, None)
        assert found.high in (0, None)


def test_a_runs_folder_is_its_base_and_its_model(tmp_path: Path, tiny_name: str):
    folder = tmp_path / "runs" / "mine"
    write_model(folder / "model", TINY)
    base = ModelConfig(name="ViT-B-32", pretrained="openai")
    (folder / "config.yaml").write_text(dump_config(RefineConfig(model=base)))
    models = (str(folder), "ViT-B-16@laion2b", "ViT-B-32@openai", tiny_name)
    found = expand_models(EvaluateConfig(suite="toy", models=models))
    assert found == {
        "ViT-B-32@openai": base,
        str(folder): ModelConfig(name=str(folder)),
        "ViT-B-16@laion2b": ModelConfig(name="ViT-B-16", pretrained="laion2b"),
        tiny_name: ModelConfig(name=tiny_name),
    }


def test_what_is_missing_is_listed_before_anything_runs(
    config: EvaluateConfig, suite: Path, monkeypatch: pytest.MonkeyPatch
):
    values = yaml.safe_load(suite.read_text())
    values["sources"]["pairs"]["at"]["path"] = "nowhere.csv"
    values["sources"]["pairs"]["how_to_get"] = "Ask for it."
    suite.write_text(yaml.safe_dump(values))
    with monkeypatch.context() as patched:
        patched.setattr("clip_refine.roads.build.build_model", None)
        with pytest.raises(DataError) as refusal:
            run(config)
    message = str(refusal.value)
    assert "1 of 2 sources are not there" in message
    assert f"pairs: looked for {suite.parent / 'nowhere.csv'}. Ask for it." in message
    scores = run(config, missing="skip")
    assert set(scores.missing) == {"pairs"}
    assert {found.kind for found in scores.measured} == {
        *("zero-shot", "linear-probe", "few-shot-probe", "image-neighbours", "clustering")
    }


def test_what_is_on_the_hub_may_be_out_of_reach(
    config: EvaluateConfig, suite: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    values = yaml.safe_load(suite.read_text())
    values["sources"]["far"] = {"at": {"kind": "rows", "path": "hf:nobody/nothing"}}
    values["tasks"] = [
        {"kind": "zero-shot", "source": "far"},
        {"kind": "geometry", "source": "pairs"},
    ]
    suite.write_text(yaml.safe_dump(values))
    with pytest.raises(DataError, match=r"far: looked for hf:nobody/nothing \(.*no network"):
        run(config)
    assert set(run(config, missing="skip").missing) == {"far"}


def test_images_elsewhere_and_files_beside_the_suite(
    config: EvaluateConfig, suite: Path, tmp_path: Path
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    values = yaml.safe_load(suite.read_text())
    values["tasks"] = [{"kind": "zero-shot", "source": "kinds", "prompts": "mine.txt"}]
    del values["sources"]["pairs"]
    (elsewhere / "other.yaml").write_text(yaml.safe_dump(values))
    (elsewhere / "mine.txt").write_text("a picture of {}\n")
    scores = run(config, suite=str(elsewhere / "other.yaml"), data_root=suite.parent)
    assert scores.measured[0].templates == ("a picture of {}",)
    assert scores.measured[0].prompts == "mine.txt"
    again = run(
        config,
        suite=str(elsewhere / "other.yaml"),
        data_root=suite.parent,
        prompts="paper",
        overwrite=True,
    )
    assert again.measured[0].templates == ("a photo of a {}",)


def test_prompt_sets(tmp_path: Path):
    places = SuitePlaces(tmp_path, (tmp_path,), download=False)

    def templates(prompts: str, source: str = "dtd") -> tuple[str, ...]:
        task = ZeroShotTask(kind="zero-shot", source=source, prompts=prompts)
        return build_templates(task, None, places)[1]

    assert templates("paper") == ("a photo of a {}",)
    assert len(templates("openai-imagenet")) == 80
    assert len(templates("simple-imagenet")) == 7
    assert all("{}" in template for template in templates("openai-imagenet"))
    assert templates("short")[0] == "a {} texture"
    assert templates("short", "unknown") == templates("short", "any")
    with pytest.raises(ConfigError, match="there is no set 'papre'"):
        templates("papre")
    (tmp_path / "bad.txt").write_text("a photo\n")
    with pytest.raises(ConfigError, match="'a photo' has no {} for the class name"):
        templates("bad.txt")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites_hold_together(name: str):
    suite = load_suite(name)
    assert suite.name == name
    assert suite.about
    used = {source for task in suite.tasks for source in task.sources().values()}
    assert used == set(suite.sources)
    assert name == "toy" or all(source.how_to_get for source in suite.sources.values())


def test_the_papers_suite_has_the_papers_sets():
    tasks = [task for task in load_suite("paper").tasks if task.kind == "zero-shot"]
    assert len(tasks) == 12
    assert {task.prompts for task in tasks} == {"paper"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "tasks: needs at least one"),
        ({"tasks": [{"kind": "zeroshot", "source": "kinds"}]}, "tasks.0: .*'zero-shot'"),
        ({"tasks": [{"kind": "zero-shot", "source": "kind"}]}, "there is no source 'kind'"),
        (
            {"tasks": [{"kind": "retrieval", "source": "kinds"}]},
            "retrieval needs a source with captions, 'kinds' has none",
        ),
        (
            {"tasks": [{"kind": "geometry", "source": "pairs"}] * 2},
            "two are called 'pairs geometry'",
        ),
        ({"sources": {"kinds": {"at": []}}}, "needs at least one place"),
        (
            {"tasks": [{"kind": "zero-shot", "source": "kinds", "prompts": ["a photo"]}]},
            "'a photo' has no {} for the class name",
        ),
        ({"task": []}, "task: there is no such setting"),
        (
            {"tasks": [{"kind": "mixed-documents", "source": "pairs", "mixing": [1, -1, 0]}]},
            "mixing.1: .* greater than or equal to 0",
        ),
        (
            {"tasks": [{"kind": "few-shot-probe", "source": "kinds", "shots": []}]},
            "shots: .* at least 1 item",
        ),
        (
            {"sources": {"pairs": {"at": {"kind": "toy"}, "class_names": "names.txt"}}},
            "sources.pairs: .*class_names is for classes, and it holds captions",
        ),
    ],
)
def test_what_a_suite_must_not_be(suite: Path, changes: dict, message: str):
    suite.write_text(yaml.safe_dump(SUITE | changes))
    with pytest.raises(ConfigError, match=message):
        load_suite(str(suite))


def test_suites_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"papers: no suite of this name \(paper, quick, toy\)"):
        load_suite("papers")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected name, sources and tasks"):
        load_suite(str(tmp_path / "list.yaml"))


def test_a_source_that_is_too_small_for_a_task(config: EvaluateConfig, suite: Path):
    few = "\n".join((suite.parent / "captions.csv").read_text().splitlines()[:10])
    (suite.parent / "captions.csv").write_text(few)
    with pytest.raises(DataError, match="task pairs geometry: geometry with k = 10"):
        run(config)
    assert config.out is not None
    assert not config.out.exists()


def test_settings_that_belong_together(config: EvaluateConfig):
    with pytest.raises(ConfigError, match="--models belongs to a suite"):
        evaluate(EvaluateConfig(models=("toy",)))
    with pytest.raises(ConfigError, match="call evaluate_suite"):
        evaluate(EvaluateConfig(suite="toy"))
    with pytest.raises(ConfigError, match="--save-features does not go with --suite"):
        run(config, save_features=Path("f.safetensors"))
    for changes, message in (
        ({"data": DataConfig(val="toy")}, "--data does not go with --suite"),
        ({"evaluation": EvaluationConfig(zero_shot=("toy",))}, "--evaluation.zero-shot does not"),
        ({"model": ModelConfig(name="toy")}, "--model does not go with --models"),
        ({"precision": 0.95}, "--precision belongs to --save-threshold"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(config, **changes)
    with pytest.raises(ConfigError, match="--false-positive-rate belongs to --save-threshold"):
        evaluate(EvaluateConfig(false_positive_rate=0.1))
    assert config.out is not None
    config.out.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run(config)


def test_the_verb_prints_tables_or_json(
    config: EvaluateConfig, tiny_name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    arguments = ["evaluate", "--suite", str(config.suite), "--models", tiny_name, tiny_name]
    arguments += ["--cache", str(config.cache), "--device", "cpu"]
    main([*arguments, "--json"])
    assert SuiteScores.model_validate(json.loads(capsys.readouterr().out)).suite == "mine"
    main(arguments)
    shown = capsys.readouterr().out
    assert "zero-shot" in shown
    assert "95 % bootstrap interval" in shown


def test_text_from_data_is_shown_as_it_is(config: EvaluateConfig):
    scores = run(config)
    odd = "[red]odd[/] <script>"
    changed = scores.model_dump()
    changed["models"][0]["label"] = odd
    for found in changed["measured"]:
        found["model"] = odd
        found["task"] = f"{odd} {found['task']}"
    terminal = Console(width=200, file=io.StringIO())
    terminal.print(*suite_tables(SuiteScores.model_validate(changed)))
    shown = terminal.file.getvalue()  # pyright: ignore
    assert f"{odd} kinds zero-shot" in shown
    assert shown.count(odd) > len(scores.measured)


def test_benchmarks_with_texts_of_their_own(
    config: EvaluateConfig, tmp_path: Path, held_out: ToyPairs
):
    subset = mixbench(tmp_path / "MSCOCO")
    for index, path in enumerate(sorted((subset / "images").iterdir())):
        held_out.load_image(index).save(path)
    values = {
        "sources": {
            "coco": {"at": {"kind": "mixbench", "path": "MSCOCO"}},
            "words": {"at": {"kind": "toy", "task": "toy_composition"}},
        },
        "tasks": [
            {"kind": "mixbench", "source": "coco", "image_weight": 0.3},
            {"kind": "composition", "source": "words"},
        ],
        "resamples": 5,
    }
    assert config.suite is not None
    Path(config.suite).write_text(yaml.safe_dump(values))
    documents, words = run(config).measured
    assert documents.counts["both_documents"] == documents.counts["image_queries"] == 1
    assert set(documents.scores) == {
        "ndcg@10",
        "text_first_share",
        *(f"{kind}_query_ndcg@10" for kind in ("image", "text", "both")),
        *(f"{kind}_query_recall@{k}" for kind in ("image", "text", "both") for k in (1, 10)),
    }
    assert words.counts == {"images": 800, "items": 400}
    assert set(words.scores) == {"text_score", "image_score", "group_score"}


def test_a_source_holds_one_kind_of_thing(suite: Path):
    values = yaml.safe_load(suite.read_text())
    values["sources"]["kinds"]["at"].append({"kind": "captions", "path": "captions.csv"})
    suite.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="its places hold classes and captions"):
        load_suite(str(suite))
