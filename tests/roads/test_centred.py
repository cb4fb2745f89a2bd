"""The recipe `centred`: means folded out first, then the paper's objective at a fitted scale."""

import copy
import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from clip_refine.cli import main
from clip_refine.config import LossConfig, RefineConfig, override
from clip_refine.losses import hycd_loss
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.models.embed import Embedder
from clip_refine.roads import build
from clip_refine.roads.refine import fold_student, measure_features, refine, train_student
from clip_refine.support.errors import ClipRefineError, ConfigError, ModelError, TrainingError
from clip_refine.toy import ToyPairs
from clip_refine.train import StepLog, Trainer
from tests.models.test_families import SIGLIP, write_family


@pytest.fixture
def config(tmp_path) -> RefineConfig:
    return RefineConfig.model_validate(
        {
            "recipe": "centred",
            "train": {"batch_size": 16, "learning_rate": 1e-9, "precision": "fp32"},
            "report": False,
            "out": tmp_path / "run",
        }
    )


def folded(model: OpenClipEncoder, pairs: ToyPairs, config: RefineConfig):
    embedder = Embedder(model, torch.device("cpu"), 32, visible=False)
    features = measure_features(config, embedder, pairs)
    return fold_student(config, model, features, pairs)


def test_without_a_step_worth_the_name_it_is_the_fold(
    tiny_name: str, pairs: ToyPairs, held_out: ToyPairs, config: RefineConfig
):
    alone = load_open_clip(tiny_name)
    scale = folded(alone, pairs, config).logit_scale
    model = load_open_clip(tiny_name)
    scores = refine(config, model=model, train_pairs=pairs, held_out=held_out)
    assert scores.recipe["logit_scale"] == pytest.approx(scale)
    saved = load_open_clip(f"local-dir:{config.out / 'model'}")
    assert float(saved.logit_scale.detach()) == pytest.approx(scale, rel=1e-6)
    texts = saved.tokenizer([captions[0] for captions in held_out.captions])
    with torch.no_grad():
        one, two = saved.encode_text(texts), alone.encode_text(texts)
    assert (one - two).norm() <= 1e-5 * two.norm()
    assert scores.after.geometry["centroid_distance"] < 0.5
    assert scores.before.geometry["centroid_distance"] > 0.8


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, False),
        ({"loss": {"rafa_weight": 1}}, True),
        ({"train": {"parameters": "projections"}}, False),
    ],
)
def test_where_rafa_reopens_the_gap_is_said(
    changed: dict, said: bool, tiny_name: str, config: RefineConfig, capsys
):
    config = override(config, model={"name": tiny_name}, dry_run=True, **changed)
    with suppress(ClipRefineError):  # there are no pairs; what is said comes before
        refine(config)
    assert ("--loss.rafa-weight 0" in capsys.readouterr().err) == said


def test_the_teacher_keeps_its_means_and_its_scale(
    tiny: OpenClipEncoder,
    pairs: ToyPairs,
    config: RefineConfig,
    monkeypatch: pytest.MonkeyPatch,
):
    before = copy.deepcopy(tiny.state_dict())
    seen: list[Trainer] = []
    monkeypatch.setattr(Trainer, "train", lambda self, *_, **__: seen.append(self))
    embedder = Embedder(tiny, torch.device("cpu"), 32, visible=False)
    student = build.build_student(tiny, config, torch.device("cpu"))
    own = float(tiny.logit_scale.detach())
    accelerator = build.build_accelerator("cpu")
    train_student(config, student, pairs, embedder, accelerator, log=StepLog(None))
    [trainer] = seen
    assert trainer.teacher_scale == own
    kept = trainer.teacher.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in before.items())


def test_a_share_for_each_tower(tiny_name: str, pairs: ToyPairs, config: RefineConfig):
    model, whole = load_open_clip(tiny_name), load_open_clip(tiny_name)
    untouched = load_open_clip(tiny_name)
    folded(model, pairs, override(config, loss={"fold_text": 0.0}))
    folded(whole, pairs, config)
    tokens = model.tokenizer(["a red circle"])
    pixels = model.preprocess(pairs.load_image(0))[None]
    with torch.no_grad():
        assert torch.equal(model.encode_image(pixels), whole.encode_image(pixels))
        same = model.encode_text(tokens), untouched.encode_text(tokens)
        torch.testing.assert_close(*same, rtol=1e-6, atol=1e-6)


def test_a_model_that_was_handed_in_has_its_own_scale_when_training_fails(
    tiny: OpenClipEncoder, pairs: ToyPairs, held_out: ToyPairs, config: RefineConfig
):
    """At canonical scale the mean norm would be the root of the logit scale, 3.8 here."""
    balanced = override(config, recipe="balanced", loss={"fold": 0.0, "anchor_weight": 1.0})
    with torch.no_grad():
        pixels = tiny.preprocess(pairs.load_image(0))[None]
        before = tiny.encode_image(pixels)

    def fail(*_: object, **__: object) -> None:
        raise TrainingError("stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", fail)
        with pytest.raises(TrainingError):
            refine(balanced, model=tiny, train_pairs=pairs, held_out=held_out)
    with torch.no_grad():
        torch.testing.assert_close(tiny.encode_image(pixels), before, rtol=1e-5, atol=1e-6)


def test_what_does_not_go_with_a_fold_is_refused():
    with pytest.raises(ConfigError, match="fold needs unit features"):
        LossConfig(fold=1.0)
    with pytest.raises(ConfigError, match="fold does not go with anchor_weight"):
        LossConfig(fold=1.0, normalize=True, anchor_weight=1.0)
    with pytest.raises(ConfigError, match="fold does not go with logit_distillation_weight"):
        LossConfig(fold=1.0, normalize=True, logit_distillation_weight=1.0)
    assert LossConfig(fold=0.5, normalize=True, temperature=None).fold == 0.5


def test_student_and_teacher_each_have_their_temperature():
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    image, text, teacher_image, teacher_text = sides
    found = hycd_loss(*sides, alpha=0.3, temperature=0.05, teacher_temperature=0.5)
    total = 0.0
    for student, teacher in (
        (image @ text.T / 0.05, teacher_image @ teacher_text.T / 0.5),
        (text @ image.T / 0.05, teacher_text @ teacher_image.T / 0.5),
    ):
        for row in range(6):
            target = 0.7 * teacher[row].softmax(0)
            target[row] += 0.3
            total += float((target * (target.log() - student[row].log_softmax(0))).sum()) / 12
    assert float(found) == pytest.approx(total, rel=1e-9)
    same = hycd_loss(*sides, temperature=0.05, teacher_temperature=0.05)
    assert float(same) == float(hycd_loss(*sides, temperature=0.05))


def test_a_fold_says_what_it_did_to_the_gap(tiny_name: str, table: Path, tmp_path: Path, capsys):
    main(["fold", tiny_name, "--data.train", str(table), "--out", str(tmp_path / "folded")])
    said = capsys.readouterr().out
    found = re.search(
        r"On 16 pairs that the means .* goes from (\S+) to (\S+), few to rest on;", said
    )
    assert found
    before, after = map(float, found.groups())
    main(["evaluate", "--model.name", tiny_name, "--data.val", str(table), "--json"])
    measured = json.loads(capsys.readouterr().out)["geometry"]["centroid_distance"]
    assert before == pytest.approx(measured, abs=0.1)
    assert after < before / 2


def test_siglips_towers_get_a_layer_first_as_the_refusal_says(
    config: RefineConfig, table: Path, pairs: ToyPairs, tmp_path: Path
):
    """The image tower's attention pooling ends in a residual, which no weight can fold."""
    siglip = load_open_clip(write_family(tmp_path / "siglip", SIGLIP))
    with pytest.raises(ModelError, match="`fold` and `vectors fold` add a layer"):
        refine(config, model=siglip, train_pairs=pairs, held_out=pairs)
    name = f"local-dir:{tmp_path / 'siglip'}"
    main(["fold", name, "--data.train", str(table), "--out", str(tmp_path / "folded")])
    model = load_open_clip(f"local-dir:{tmp_path / 'folded'}")
    config = override(config, train={"learning_rate": 1e-4})
    refine(config, model=model, train_pairs=pairs, held_out=pairs)
    saved = load_open_clip(f"local-dir:{config.out / 'model'}")
    projection = saved.clip.visual.head.proj.weight
    assert torch.equal(projection, model.clip.visual.head.proj.weight)
    assert not torch.equal(projection, torch.eye(len(projection)))
