"""The whole road on a few drawn pairs: what is written, and what is left after an error."""

import contextlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file

import clip_refine
from clip_refine.config import load_config, override
from clip_refine.config.runs import CompareConfig, EvaluateConfig, RefineConfig
from clip_refine.data import hold_out
from clip_refine.data.pairs import EveryCaption
from clip_refine.evaluation import Embedder, score_model
from clip_refine.models import OpenClipEncoder, Teacher, load_open_clip
from clip_refine.results import Evidence, FitProbability, RunScores, read
from clip_refine.roads import build
from clip_refine.roads import refine as road
from clip_refine.roads.compare import compare
from clip_refine.roads.evaluate import evaluate
from clip_refine.roads.plan import keeps_teacher
from clip_refine.roads.refine import refine
from clip_refine.support.errors import (
    ConfigError,
    DataError,
    ModelError,
    OutputError,
    Planned,
    TrainingError,
)
from clip_refine.toy import ToyPairs
from clip_refine.train import StepLog, Trainer
from tests.conftest import TINY, write_model
from tests.several import in_processes

HELD_OUT = ToyPairs("auto-held-out", size=20)
WEIGHTS = "open_clip_model.safetensors"
RECALLS = {f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
GEOMETRY = {
    "centroid_distance",
    "centroid_squared_over_dim",
    "true_pair_cosine",
    "alignment",
    "residual_alignment",
    "uniformity_log",
    "uniformity_mean",
    "relative_modality_gap",
    "text_first_share",
    "linear_separability",
    "hubness_skewness",
    "effective_rank",
}


@pytest.fixture
def config(tiny_name: str, table: Path, tmp_path: Path) -> RefineConfig:
    return RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "data": {"train": str(table), "val": str(table)},
            "train": {"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"},
            "out": tmp_path / "run",
            "seed": 1,
        }
    )


def ours(config: RefineConfig) -> RefineConfig:
    """For pairs that are passed."""
    return override(config, data={"train": None, "val": None})


def test_everything_promised_is_written(config: RefineConfig):
    scores = refine(config)
    written = {path.relative_to(config.out).as_posix() for path in config.out.rglob("*.*")}
    assert written == {
        "scores.json",
        "config.yaml",
        "log.jsonl",
        "environment.json",
        "report.html",
        "report.json",
        "model/open_clip_config.json",
        "model/README.md",
        "model/provenance.json",
        "model/open_clip_model.safetensors",
        "model/threshold.json",
    }
    before, after = read(Evidence, config.out / "report.json").fits or (None, None)
    assert read(FitProbability, config.out / "model" / "threshold.json") == after != before
    assert after.nonsense == 50
    assert read(RunScores, config.out / "scores.json") == scores
    saved = json.loads((config.out / "scores.json").read_text())
    assert set(saved) == {"before", "after", "difference", "recipe", "seconds"}
    for side in (saved["before"], saved["after"]):
        assert set(side["geometry"]) == GEOMETRY
        assert set(side["retrieval"]) == RECALLS
        assert (side["pairs"], side["captions"]) == (64, 192)
    assert set(saved["seconds"]) >= {"load", "evaluate_before", "train", "evaluate_after", "total"}
    assert saved["recipe"]["steps"] == 4
    environment = json.loads((config.out / "environment.json").read_text())
    assert environment["packages"]["open_clip_torch"] == open_clip.__version__
    assert len((config.out / "log.jsonl").read_text().splitlines()) == 4
    assert not list(config.out.parent.glob(".run*"))


def test_a_dry_run_says_what_would_be_done(config: RefineConfig, capsys, tiny: OpenClipEncoder):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    with pytest.raises(Planned) as stop:
        refine(override(config, dry_run=True), model=tiny)
    assert stop.value.status == 0
    assert not config.out.exists()
    said = " ".join(capsys.readouterr().err.split())
    for part in (
        "pairs of",
        "steps of 16",
        "a step, from 16 pairs",
        "Weights, optimiser and graph:",
        "Trained are",
    ):
        assert part in said
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert all(weight.grad is None for weight in tiny.parameters())


def test_a_learning_rate_of_its_own(config: RefineConfig, tiny: OpenClipEncoder, capsys):
    config = override(ours(config), train={"learning_rate": "auto", "steps": 2})
    refine(config, model=tiny, train_pairs=ToyPairs("auto", size=220), held_out=HELD_OUT)
    said = " ".join(capsys.readouterr().err.split())
    chosen = load_config(RefineConfig, config.out / "config.yaml").train.learning_rate
    assert f"Learning rate {chosen:g}: 2 steps each, mean recall on 100 held-out" in said
    logged = json.loads((config.out / "log.jsonl").read_text().splitlines()[0])
    assert logged["learning_rate"] == chosen
    # the short runs leave nothing behind: the same as if the rate had been given
    again = override(config, train={"learning_rate": chosen}, out=config.out.parent / "again")
    pairs = hold_out(ToyPairs("auto", size=220), fraction=0.1, seed=config.seed)[0]
    refine(again, model=load_open_clip(config.model.name), train_pairs=pairs, held_out=HELD_OUT)
    one, two = (load_file(out / "model" / WEIGHTS) for out in (config.out, again.out))
    assert all(torch.equal(one[name], two[name]) for name in one)


def rates_of_two(settings: str) -> None:
    """Tries rates, by one of two processes that do not agree on which is the best."""
    rank = build.build_accelerator("cpu").process_index
    config = RefineConfig.model_validate_json(settings)
    score = road.selection_score
    pairs = {"train_pairs": ToyPairs("auto", size=220), "held_out": HELD_OUT}
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(road, "selection_score", lambda of: (-1) ** rank * score(of))
        scores = refine(config, **pairs)
    rate = str(scores.recipe["train"]["learning_rate"])
    config.out.with_name(f"rate-{rank}").write_text(rate)


@pytest.mark.timeout(300)
def test_two_processes_try_and_choose_the_same_rates(config: RefineConfig):
    """Else they would train at two rates, or one would wait for ever for a run of the other."""
    config = override(ours(config), train={"learning_rate": "auto", "steps": 1, "warmup_steps": 0})
    in_processes(2, rates_of_two, config.model_dump_json())
    one, other = (config.out.with_name(f"rate-{rank}").read_text() for rank in (0, 1))
    assert one == other


def test_a_run_is_kept_where_its_report_fails(
    config: RefineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: object, **__: object) -> None:
        raise KeyError("no plane")

    monkeypatch.setattr("clip_refine.roads.refine.gather_evidence", fail)
    refine(config)
    assert "No report: 'no plane'" in capsys.readouterr().err
    assert (config.out / "model" / "open_clip_model.safetensors").is_file()


def test_the_report_can_be_left_out(config: RefineConfig):
    refine(override(config, report=False))
    assert not list(config.out.glob("report.*"))


def test_the_saved_model_scores_what_the_run_said(config: RefineConfig, tmp_path: Path):
    scores = refine(config)
    again = evaluate(
        EvaluateConfig.model_validate(
            {
                "model": {"name": f"local-dir:{config.out / 'model'}"},
                "data": {"val": config.data.val},
                "out": tmp_path / "again.json",
                "seed": config.seed,
            }
        )
    )
    assert again.geometry == pytest.approx(scores.after.geometry, abs=1e-5)
    assert again.retrieval == pytest.approx(scores.after.retrieval)
    assert json.loads((tmp_path / "again.json").read_text())["pairs"] == 64
    before = evaluate(EvaluateConfig(model=config.model, data=config.data, seed=config.seed))
    assert before.geometry == pytest.approx(scores.before.geometry, abs=1e-6)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_scores_that_cannot_be_written(config: RefineConfig):
    settings = EvaluateConfig(
        model=config.model, data=config.data, out=Path("/proc/clip-refine.json")
    )
    with pytest.raises(OutputError, match="cannot be written"):
        evaluate(settings)


def test_the_written_configuration_repeats_the_run(config: RefineConfig, tmp_path: Path):
    first = refine(config)
    settings = load_config(RefineConfig, config.out / "config.yaml")
    second = refine(override(settings, out=tmp_path / "again"))
    assert second.after == first.after
    weights, same = (
        load_file(path / "model" / "open_clip_model.safetensors")
        for path in (config.out, tmp_path / "again")
    )
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())


def test_a_repeated_run_writes_the_same_bytes_whatever_decodes_and_draws(
    config: RefineConfig, tmp_path: Path
):
    config = override(config, train={"precision": "auto"}, report=False)
    runs = {"once": {}, "again": {}, "workers": {"workers": 2}, "states": {"save_every": "1"}}
    written = []
    for name, train in runs.items():
        torch.manual_seed(len(written))  # what others drew in this process plays no part
        refine(override(config, out=tmp_path / name, train=train))
        written.append((tmp_path / name / "model" / "open_clip_model.safetensors").read_bytes())
    assert all(other == written[0] for other in written[1:])


def test_the_written_configuration_works_from_another_folder(
    config: RefineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    refine(override(config, out=Path("run"), data={"train": "captions.csv", "val": "captions.csv"}))
    written = load_config(RefineConfig, tmp_path / "run" / "config.yaml")
    assert written.data.train == written.data.val == str(tmp_path / "captions.csv")
    assert written.out == tmp_path / "run"
    assert written.model.name == config.model.name


def test_precision_auto_is_resolved_in_the_written_configuration(config: RefineConfig):
    refine(override(config, train={"precision": "auto"}))
    written = load_config(RefineConfig, config.out / "config.yaml")
    assert written.train.precision in ("fp32", "bf16", "bf16-image", "bf16-text")


def test_a_model_and_pairs_of_ones_own(
    config: RefineConfig, tiny: OpenClipEncoder, pairs: ToyPairs, held_out: ToyPairs
):
    before = tiny.clip.visual.proj.clone()
    scores = refine(ours(config), model=tiny, train_pairs=pairs, held_out=held_out)
    assert not torch.equal(before, tiny.clip.visual.proj)
    assert scores.after.pairs == 24


class PlainEncoder(torch.nn.Module):
    """The least that can be refined: nothing of open_clip, no save()."""

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Linear(3, 4)
        self.text = torch.nn.Embedding(128, 4)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def preprocess(self, image) -> torch.Tensor:
        return torch.tensor(list(image.getpixel((20, 20)))) / 255

    def tokenizer(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[ord(text[0]), ord(text[-1])] for text in texts])

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.scale.exp()

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.image(pixels)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.text(tokens).mean(dim=1)


def test_any_object_that_fits_can_be_refined(
    config: RefineConfig, pairs: ToyPairs, held_out: ToyPairs
):
    refine(ours(config), model=PlainEncoder(), train_pairs=pairs, held_out=held_out)
    assert (config.out / "model" / "model.safetensors").is_file()


def test_an_existing_folder_is_kept_unless_overwritten(config: RefineConfig):
    config.out.mkdir()
    (config.out / "precious.txt").write_text("keep me")
    (config.out / "config.yaml").write_text("many programs have such a file")
    with pytest.raises(OutputError, match="exists already and holds no results"):
        refine(config)
    assert (config.out / "precious.txt").read_text() == "keep me"
    with pytest.raises(OutputError, match="holds no results of an earlier run"):
        refine(override(config, overwrite=True))
    assert (config.out / "precious.txt").read_text() == "keep me"
    (config.out / "scores.json").write_text("{}")
    refine(override(config, overwrite=True))
    assert not (config.out / "precious.txt").exists()
    assert (config.out / "scores.json").exists()
    assert load_config(RefineConfig, config.out / "config.yaml").overwrite is False


def test_an_error_leaves_nothing_and_loses_nothing(config: RefineConfig, monkeypatch):
    config.out.mkdir()
    (config.out / "precious.txt").write_text("keep me")
    (config.out / "scores.json").write_text("{}")

    def fail(self: StepLog, record: object) -> None:
        raise TrainingError("step 1: the loss is not finite")

    monkeypatch.setattr(StepLog, "write", fail)
    with pytest.raises(TrainingError):
        refine(override(config, overwrite=True))
    assert {path.name for path in config.out.iterdir()} == {"precious.txt", "scores.json"}
    assert not list(config.out.parent.glob(".run*"))


def test_nan_weights_are_found_before_training(config: RefineConfig, tiny: OpenClipEncoder):
    with torch.no_grad():
        tiny.clip.visual.proj[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        refine(config, model=tiny)
    assert not config.out.exists()


def test_weights_that_are_all_zero_are_found_before_training(
    config: RefineConfig, tiny: OpenClipEncoder
):
    for weight in tiny.clip.parameters():
        weight.detach().mul_(0 if weight.ndim else 1)
    with pytest.raises(ModelError, match=r"features are all 0, those of .*000.png too"):
        refine(config, model=tiny)


def test_only_one_side_of_the_data_may_be_passed(config: RefineConfig, tiny: OpenClipEncoder):
    many = ToyPairs("many", size=240)
    scores = refine(
        override(config, data={"train": None, "val": None}), model=tiny, train_pairs=many
    )
    assert scores.after.pairs == 100
    assert scores.recipe["pairs"] == 140
    assert scores.recipe["model"] == "python:OpenClipEncoder"


def test_held_out_images_that_are_trained_on_are_reported(config: RefineConfig, capsys):
    refine(config)
    assert "64 of the 64 held-out images are trained on" in capsys.readouterr().err


def test_the_toy_worlds_validation_pairs_are_others():
    train, held_out = build.build_data(
        RefineConfig.model_validate({"data": {"train": "toy", "val": "toy"}}).data, seed=0
    )
    assert (train.name, held_out.name) == ("toy-train", "toy-val")


def test_pairs_are_named_or_passed(config: RefineConfig, pairs: ToyPairs, held_out: ToyPairs):
    with pytest.raises(ConfigError, match=r"data.train: train_pairs were passed, too"):
        refine(config, train_pairs=pairs)
    with pytest.raises(ConfigError, match=r"data.val: held_out were passed, too"):
        refine(override(config, data={"train": None}), train_pairs=pairs, held_out=held_out)


def test_too_few_held_out_images(config: RefineConfig, tiny: OpenClipEncoder, pairs: ToyPairs):
    with pytest.raises(DataError, match="5 held-out images are too few"):
        refine(ours(config), model=tiny, train_pairs=pairs, held_out=ToyPairs("few", size=5))


def test_the_folder_one_is_in_is_not_overwritten(config: RefineConfig, tmp_path: Path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "scores.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="is the folder you are in"):
        refine(override(config, out=Path("."), overwrite=True))


def test_updated_statistics_are_only_updated_in_training(
    config: RefineConfig, tmp_path: Path, pairs: ToyPairs, held_out: ToyPairs
):
    resnet = {
        **TINY,
        "vision_cfg": {
            "image_size": 48,
            "layers": [1, 1, 1, 1],
            "width": 16,
            "head_width": 16,
            "patch_size": None,
        },
    }
    model = load_open_clip(write_model(tmp_path / "resnet", resnet))
    before = evaluate_unit(model, held_out)
    settings = override(ours(config), train={"normalization_statistics": "updated"})
    scores = refine(settings, model=model, train_pairs=pairs, held_out=held_out)
    assert scores.before.geometry == pytest.approx(before, abs=1e-5)
    assert not any(module.training for module in model.modules())


def evaluate_unit(model: OpenClipEncoder, held_out: ToyPairs):
    embedder = Embedder(model, torch.device("cpu"), 7, visible=False)
    return score_model(embedder, held_out, [], seed=1).geometry


def test_warm_up_longer_than_the_run(config: RefineConfig):
    with pytest.raises(ConfigError, match="not below the 4 steps"):
        refine(override(config, train={"warmup_steps": 4}))


def test_who_calls_from_python_is_told_of_settings_not_of_flags():
    with pytest.raises(ConfigError, match=r"Give captioned images: data.train captions.csv$"):
        clip_refine.refine(RefineConfig())
    with pytest.raises(ConfigError, match=r"Give captioned images: data.val captions.csv$"):
        clip_refine.evaluate(EvaluateConfig())
    settings: Any = {"seed": 1}
    for call, kind in ((clip_refine.refine, "Refine"), (clip_refine.compare, "Compare")):
        told = rf"are of type dict; .* takes a {kind}Config. Call .*{kind}Config\(\*\*settings"
        with pytest.raises(ConfigError, match=told):
            call(settings)


@pytest.mark.parametrize("road", [refine, evaluate, compare])
def test_a_tag_that_is_none_is_said_before_data_are_read(road: Any):
    kinds = {"refine": RefineConfig, "evaluate": EvaluateConfig, "compare": CompareConfig}
    data = {"train": "photos.xlsx", "val": "photos.xlsx"}
    config = {"model": {"name": "ViT-B-32", "pretrained": "opnai"}, "data": data}
    with pytest.raises(ModelError, match="opnai': neither a file nor a tag .* Did you mean openai"):
        road(kinds[road.__name__].model_validate(config))


def test_missing_sources_say_what_to_pass():
    with pytest.raises(ConfigError, match="--data.train captions.csv"):
        refine(RefineConfig())
    with pytest.raises(ConfigError, match="--data.val captions.csv"):
        evaluate(EvaluateConfig())
    with pytest.raises(DataError, match=r"photos.xlsx: not a kind of source"):
        refine(RefineConfig.model_validate({"data": {"train": "photos.xlsx"}}))


def test_a_device_that_is_not_there(config: RefineConfig):
    with pytest.raises(ConfigError, match="device 'cuda:7': not usable here"):
        refine(override(config, train={"device": "cuda:7"}))


def test_a_learning_rate_that_no_model_bears_is_said(
    config: RefineConfig, capsys: pytest.CaptureFixture[str]
):
    high = override(config, train={"learning_rate": 10.0, "steps": 1}, report=False)
    with contextlib.suppress(TrainingError):
        refine(high)
    assert "train.learning_rate 10 is far above" in " ".join(capsys.readouterr().err.split())


# --------------------------------------------------------------------------------------------------
# The teacher's features once, where pairs come again.


def test_a_teacher_that_is_asked_once_gives_what_one_in_every_step_gives(
    tiny_name: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {
        "model": {"name": tiny_name},
        "data": {"train": str(table), "val": str(table), "cache_folder": tmp_path / "cache"},
        "train": {"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32", "epochs": 2},
        "recipe": "centred",  # whose teacher is not folded
        "report": False,
    }
    asked = []
    encode = Teacher.encode_image

    def count(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        asked.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Teacher, "encode_image", count)
    refine(RefineConfig.model_validate({**settings, "out": tmp_path / "once"}))
    assert not asked
    with monkeypatch.context() as patch:
        patch.setattr(road, "keeps_teacher", lambda *_: False)
        refine(RefineConfig.model_validate({**settings, "out": tmp_path / "live"}))
    assert sum(asked) == 2 * 64
    # not weights: keys' biases have no gradient but rounding, which AdamW makes steps of
    once, live = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("once", "live")
    )
    for one, other in zip(once, live, strict=True):
        for name in ("loss_total", "gradient_norm", "image_norm", "centroid_distance"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.parametrize(
    ("parameters", "recipe"),
    [("projections", "centred"), ("projections", "contrastive"), ("text-tower", "clip-refine")],
)
def test_images_that_are_looked_up_are_not_read_again(
    parameters: str, recipe: str, tiny_name: str, table: Path, tmp_path: Path
):
    """A frozen tower or trunk is asked once for all epochs; the steps are the same."""
    settings = {
        "model": {"name": tiny_name},
        "data": {"train": str(table), "val": str(table), "cache_folder": tmp_path / "cache"},
        "train": {"batch_size": 16, "precision": "fp32", "epochs": 2, "parameters": parameters},
        "recipe": recipe,
        "loss": {"feature_scale": "canonical"},
        "report": False,
    }
    step, encode, logs = Trainer.step, OpenClipEncoder.encode_image, []
    for name in ("once", "live"):
        read, asked = [], []

        def watched(
            self: Trainer, number: int, batch: Any, steps: int, read: Any = read, asked: Any = asked
        ) -> Any:
            def ask(model: OpenClipEncoder, pixels: torch.Tensor) -> torch.Tensor:
                asked.append(len(pixels))
                return encode(model, pixels)

            read.append(batch.pixels[0].numel())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(OpenClipEncoder, "encode_image", ask)
                return step(self, number, batch, steps=steps)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "step", watched)
            if name == "live":
                patch.setattr(road, "keeps_teacher", lambda *_: False)
                patch.setattr(build, "heads_on_frozen", lambda *_: None)
            refine(RefineConfig.model_validate({**settings, "out": tmp_path / name}))
        assert (sum(asked), max(read)) == (0, 0) if name == "once" else sum(asked) >= 2 * 64
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for one, other in zip(*logs, strict=True):
        for name in ("loss_total", "gradient_norm", "image_norm", "centroid_distance"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),  # one epoch
        ({"train": {"epochs": 2}}, True),
        ({"train": {"epochs": 2}, "recipe": "contrastive"}, False),  # needs no teacher
        ({"train": {"epochs": 2, "parameters": "projections"}, "recipe": "contrastive"}, True),
        ({"train": {"learning_rate": "auto"}}, True),
        ({"prior": {"kind": "gaussian_both"}}, True),  # all are measured
        ({"data": {"captions": "all"}}, True),  # images come again
    ],
)
def test_a_teacher_is_asked_once_where_pairs_come_again(
    tiny: OpenClipEncoder,
    pairs: ToyPairs,
    settings: dict[str, Any],
    expected: bool,
):
    train = {"batch_size": 16, **settings.get("train", {})}
    config = RefineConfig.model_validate({**settings, "train": train})
    chosen = EveryCaption(pairs) if config.data.captions == "all" else pairs
    accelerator = build.build_accelerator("cpu")
    assert keeps_teacher(config, tiny, chosen, accelerator) is expected


def test_a_teacher_is_asked_in_every_step_where_images_are_not_the_same_twice(
    tiny: OpenClipEncoder, pairs: ToyPairs
):
    config = RefineConfig.model_validate({"train": {"batch_size": 16, "epochs": 2}})
    usual = tiny.preprocess
    tiny.preprocess = lambda image: usual(image) + torch.rand(1)
    assert not keeps_teacher(config, tiny, pairs, build.build_accelerator("cpu"))
