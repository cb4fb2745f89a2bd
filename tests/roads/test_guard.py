"""Training that harms the model stops; what was better is kept; what is worse is said."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clip_refine import cli
from clip_refine.config import RefineConfig, load_config, override
from clip_refine.data.streams import StreamMixture
from clip_refine.evaluation.scores import embed_model, measure
from clip_refine.losses import PairFeatures
from clip_refine.models.embed import Embedder
from clip_refine.report.tables import answer, worse
from clip_refine.results import RunScores, read
from clip_refine.roads import build
from clip_refine.roads import refine as road
from clip_refine.roads.guard import build_guard, spread_left, warn_of_collapse
from clip_refine.roads.refine import refine, set_aside, warn_of_one
from clip_refine.support.errors import ConfigError, DataError, TrainingError
from clip_refine.toy import ToyPairs
from clip_refine.train import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> RefineConfig:
    train = {"batch_size": 64, "learning_rate": 3e-3, "steps": 3, "precision": "fp32"}
    return RefineConfig.model_validate(
        {
            "model": {"name": "toy"},
            "data": {"train": "toy"},
            "train": {**train, "save_every": "1"},
            "guard": {"every": 1, "images": 100, "bound": 3},
            "report": False,
            "out": tmp_path / "run",
        }
    )


def untouched() -> dict[str, torch.Tensor]:
    return build.build_model(build.named_model("toy")).clip.state_dict()  # pyright: ignore


def saved(config: RefineConfig) -> dict[str, torch.Tensor]:
    return load_file(config.out / "model" / "open_clip_model.safetensors")


def test_it_goes_back_to_what_was_within_the_bound(config: RefineConfig, capsys):
    scores = refine(config)
    assert scores.recipe["guard"] == {"step": 1, "kept": 0}
    before = untouched()
    assert all(torch.allclose(w, before[name], atol=1e-6) for name, w in saved(config).items())
    assert "The guard stopped training after step 1: mean R@1 -" in said(capsys)
    assert not worse(scores)
    refused = "The guard refused the training at step 1: this is the model as it was."
    assert answer(scores) == f"{refused} Nothing clearly changed."
    assert refused in (config.out / "model" / "README.md").read_text()


def test_it_stops_where_asked_to_and_the_verdict_is_plain(config: RefineConfig):
    scores = refine(override(config, guard={"then": "stop"}))
    assert scores.recipe["guard"] == {"step": 1, "kept": 1}
    assert worse(scores) == ["mean R@1"]
    assert answer(scores) == "Worse in the gap and mean R@1."


def test_within_the_bound_it_changes_nothing(config: RefineConfig, tmp_path: Path):
    config = override(config, train={"learning_rate": 1e-6})
    scores = refine(config)
    assert scores.recipe["guard"] is None
    probed = override(config, guard={"every": 100}, out=tmp_path / "unprobed")
    refine(probed)
    other = saved(probed)
    assert all(torch.equal(weight, other[name]) for name, weight in saved(config).items())


def test_the_weights_that_are_saved_are_probed_in_any_case(config: RefineConfig):
    """However few steps there are; and the record has those behind the weights that are kept."""
    scores = refine(override(config, guard={"every": 100, "then": "stop"}))
    assert scores.recipe["guard"] == {"step": 3, "kept": 3}
    scores = refine(override(config, guard={"every": 2}, overwrite=True))
    assert scores.recipe["guard"] == {"step": 2, "kept": 0}
    assert scores.recipe["steps"] == 0
    assert scores.recipe["provenance"]["settings"]["steps"] == 0


def test_bystanders_with_captions_are_watched(config: RefineConfig, table: Path, capsys):
    refine(override(config, guard={"bystanders": str(table), "bound": 0, "then": "stop"}))
    assert "bystanders' mean R@1 -" in said(capsys)


def test_bystanders_with_classes_are_a_task_more(
    config: RefineConfig, tmp_path: Path, table: Path, pairs: ToyPairs
):
    for name in ("collie", "poodle"):
        (tmp_path / "dogs" / name).mkdir(parents=True)
        pairs.load_image(0).save(tmp_path / "dogs" / name / "0.png")
    embedder: Any = None
    config = override(config, guard={"bystanders": str(tmp_path / "dogs")})
    guard = build_guard(config, embedder, pairs, [])
    assert guard is not None
    assert [list(task.class_names) for task in guard.tasks] == [["collie", "poodle"]]
    assert guard.bystanders is None
    with pytest.raises(ConfigError, match="two tasks have one name among dogs, dogs"):
        build_guard(config, embedder, pairs, guard.tasks)


def test_a_bound_within_the_noise_of_so_few_images_is_said(config: RefineConfig, capsys):
    embedder: Any = None
    pairs = ToyPairs("few", 300)
    for count in (100, 200):
        build_guard(
            override(config, guard={"bound": 1, "images": count}),
            embedder,
            pairs,
            [],
        )
        assert ("it may stop for noise" in said(capsys)) == (count == 100)


def test_what_explodes_is_not_saved(config: RefineConfig):
    with pytest.raises(TrainingError, match=r"norm .* training destroys the model"):
        refine(override(config, guard={"every": None}, train={"learning_rate": 10.0}))
    assert not config.out.exists()


def test_nor_is_what_the_last_step_destroyed(config: RefineConfig):
    with pytest.raises(TrainingError, match=r"norms .* training destroyed the model, .*not saved"):
        refine(override(config, guard={"every": None}, train={"learning_rate": 10.0, "steps": 1}))
    assert not config.out.exists()


def test_a_loss_that_runs_away_stops():
    norms = {"image_norm": 1.0, "text_norm": 1.0}
    trainer = SimpleNamespace(first={"loss_total": 2.0, **norms})
    with pytest.raises(TrainingError, match="step 7: loss 4e.06, at first it was 2: training"):
        Trainer._check_health(trainer, 7, {"loss_total": 4e6, **norms}, 64)  # pyright: ignore


@pytest.mark.parametrize("lost", ["nothing", "text norm", "variance", "effective rank"])
def test_features_that_collapse_are_said(lost: str, held_out: ToyPairs, capsys):
    embedder = Embedder(build.build_model(build.named_model("toy")), CPU, 64, visible=False)
    before = embed_model(embedder, held_out, ())
    image, text = before.pairs.image_features, before.pairs.text_features
    if lost == "text norm":
        text = text / 50
    elif lost == "variance":  # of as many directions as before, about one point
        image, text = (side / 100 + image[0] for side in (image, text))
    elif lost == "effective rank":
        flat = torch.diag((torch.arange(image.shape[1]) < 2).float())
        image, text = image @ flat, text @ flat
    pairs = replace(before.pairs, image_features=image, text_features=text)
    shares = spread_left(measure(before), measure(replace(before, pairs=pairs)))
    found = [name for name, share in shares.items() if share < 0.1]
    names = ["image variance", "text variance"] if lost == "variance" else [lost]
    assert found == names if lost != "nothing" else not found
    assert warn_of_collapse(shares) == bool(found)
    what = said(capsys)
    assert (f"{lost} is left" in what) if found else not what


def test_chance_level_is_said(config: RefineConfig, capsys):
    loss = {"contrastive_weight": 1.0, "contrastive_scale": 1e-3}
    refine(override(config, guard={"every": None}, loss=loss))
    assert said(capsys).count("the contrastive loss is ln 64 = 4.16: chance level") == 1


def test_nothing_is_held_out_of_a_stream(config: RefineConfig):
    with pytest.raises(ConfigError, match=r"guard.every holds a part.* Give --guard.pairs"):
        set_aside(config, StreamMixture([], []))


def test_a_stream_is_watched_on_pairs_of_its_own(config: RefineConfig, table: Path, capsys):
    rows = list(csv.DictReader(table.read_text().splitlines()))
    stream = table.with_suffix(".jsonl")
    stream.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(stream), "streaming": True, "val": str(table), "shuffle_buffer": 64}
    guard = {"pairs": str(table), "bound": 0, "then": "stop"}
    scores = refine(override(config, data=data, guard=guard, train={"batch_size": 32}))
    assert scores.recipe["guard"] == {"step": 1, "kept": 1}
    assert "The guard stopped training after step 1: mean R@1 -" in said(capsys)


def test_what_is_watched_is_looked_at_before_anything_is_measured(
    config: RefineConfig, table: Path, monkeypatch: pytest.MonkeyPatch
):
    few = table.with_name("few.csv")
    few.write_text("\n".join(table.read_text().splitlines()[:16]))
    monkeypatch.setattr(road, "embed_model", None)
    for name in ("pairs", "bystanders"):
        with pytest.raises(DataError, match="5 held-out images are too few .* --guard.pairs or"):
            refine(override(config, guard={name: str(few)}))
    idle: Any = None  # nothing is opened for a guard that is off
    assert (
        build_guard(override(config, guard={"every": None, "pairs": "no"}), idle, None, []) is None
    )


def test_what_is_watched_may_lie_elsewhere_and_is_found_from_anywhere(
    config: RefineConfig, table: Path, monkeypatch: pytest.MonkeyPatch
):
    inner = table.parent / "inner"
    inner.mkdir()
    rows = table.read_text().replace("images/", "../images/")
    (inner / "captions.csv").write_text(rows)
    monkeypatch.chdir(inner)
    config = override(config, guard={"pairs": "captions.csv", "then": "stop"})
    refine(override(config, data={"allow_outside": True}))
    written = load_config(RefineConfig, config.out / "config.yaml").guard
    assert written.pairs == str(inner / "captions.csv")


def test_a_comparison_has_no_guard(capsys: pytest.CaptureFixture[str]):
    for words in (["--guard"], ["--guard.every", "5"]):
        with pytest.raises(SystemExit) as status:
            cli.main(["compare", *words, "--data.train", "toy"])
        assert status.value.code == 2
        assert "--guard belongs to refine" in said(capsys)


def test_one_image_or_one_caption_is_said_before_training(capsys):
    warn_of_one(PairFeatures(torch.randn(5, 3), torch.ones(5, 3)), "mine.csv")
    found = said(capsys)
    assert "mine.csv: the model makes the same of all 5 captions" in found
    assert "images" not in found


def test_fail_if_worse_exits_with_3(config: RefineConfig, monkeypatch: pytest.MonkeyPatch):
    bad = refine(override(config, guard={"then": "stop"}))
    monkeypatch.setattr(road, "refine", lambda config: bad)
    with pytest.raises(SystemExit) as status:
        cli.main(["refine", "--fail-if-worse", "--guard", "--data.train", "toy"])
    assert status.value.code == 3
    cli.main(["refine", "--data.train", "toy"])
    assert read(RunScores, config.out / "scores.json") == bad


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())
