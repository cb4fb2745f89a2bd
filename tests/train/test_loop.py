"""The trainer against the method written out by hand, and its promises."""

import copy
import json
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR

from clip_refine.config import ModelConfig, RefineConfig, override
from clip_refine.data.loader import swap_words
from clip_refine.data.pairs import as_pairs
from clip_refine.losses import LossTerms, Objective, hycd_loss, rafa_loss
from clip_refine.models import OpenClipEncoder, Teacher
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.support.errors import ConfigError, DataError, ModelError, TrainingError
from clip_refine.toy import ToyPairs
from clip_refine.train import StepLog, TowerPrecision, Trainer
from clip_refine.train.loop import check_finite

CONFIG = RefineConfig.model_validate(
    {
        "train": {"batch_size": 16, "learning_rate": 1e-3, "epochs": 2, "device": "cpu"},
        "seed": 5,
    }
)
FP32 = TowerPrecision.from_name("fp32")


def with_plain_descent(trainer: Trainer) -> Trainer:
    """Adam turns a gradient that is zero but for rounding into a full step; this one does not."""
    groups = trainer.schedule.optimizer.param_groups
    descent = torch.optim.SGD([{"params": g["params"], "lr": g["lr"]} for g in groups])
    return replace(trainer, schedule=LambdaLR(descent, lambda _: 1.0))


def train(
    model: OpenClipEncoder,
    pairs: ToyPairs,
    config: RefineConfig,
    folder: Path,
    *,
    plain: bool = False,
) -> Teacher:
    accelerator = build.build_accelerator("cpu")
    student = build.build_student(model, config, accelerator.device)
    teacher = Teacher(student)
    steps = build.count_steps(config.train, pairs, 1)
    trainer = build.build_trainer(
        config, student, teacher, FP32, StandardNormal(), accelerator, steps=steps
    )
    if plain:
        trainer = with_plain_descent(trainer)
    batches = build.build_batches(config, pairs, model, accelerator)
    with StepLog(folder / "log.jsonl") as log:
        trainer.train(batches, steps=steps, log=log)
    return teacher


def by_hand(model: OpenClipEncoder, pairs: ToyPairs, config: RefineConfig) -> list[float]:
    """CLIP-Refine as METHOD §1 has it, without any of the trainer's parts."""
    teacher = copy.deepcopy(model)
    model.clip.logit_scale.requires_grad_(False)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = build.seeded_generator(config.seed, "references")
    losses = []
    for batch in build.build_batches(config, pairs, model, Accelerator(cpu=True)):
        image, text = model.encode_image(batch.pixels), model.encode_text(batch.tokens)
        with torch.no_grad():
            teacher_image = teacher.encode_image(batch.pixels)
            teacher_text = teacher.encode_text(batch.tokens)
        references = StandardNormal().sample(*image.shape, generator=generator, device="cpu")
        loss = rafa_loss(image, text, references)
        loss = loss + hycd_loss(image, text, teacher_image, teacher_text, alpha=0.5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def test_it_is_the_method_by_hand(tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path):
    other = copy.deepcopy(tiny)
    expected = by_hand(other, pairs, CONFIG)
    train(tiny, pairs, CONFIG, tmp_path, plain=True)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["loss_total"] for record in records] == pytest.approx(expected, rel=1e-6)
    for name, weight in tiny.state_dict().items():
        assert torch.allclose(weight, other.state_dict()[name], atol=1e-6), name


def test_log_has_every_promised_number(tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path):
    train(tiny, pairs, CONFIG, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert set(records[0]) == {
        "step",
        "step_seconds",
        "pairs_per_second",
        "loss_rafa",
        "loss_hycd",
        "loss_total",
        "learning_rate",
        "gradient_norm",
        "image_norm",
        "text_norm",
        "centroid_distance",
    }
    assert records[0]["loss_total"] == pytest.approx(
        records[0]["loss_rafa"] + records[0]["loss_hycd"], rel=1e-6
    )


def test_the_teacher_is_bitwise_untouched(tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    teacher = train(tiny, pairs, CONFIG, tmp_path)
    assert all(torch.equal(before[name], frozen) for name, frozen in teacher.state_dict().items())
    changed = [
        name for name, tensor in tiny.state_dict().items() if not torch.equal(before[name], tensor)
    ]
    assert "clip.logit_scale" not in changed
    assert "clip.text_projection" in changed
    assert "clip.visual.proj" in changed


def test_one_seed_one_result(tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path):
    twin, other = copy.deepcopy(tiny), copy.deepcopy(tiny)
    train(tiny, pairs, CONFIG, tmp_path)
    train(twin, pairs, CONFIG, tmp_path)
    train(other, pairs, override(CONFIG, seed=6), tmp_path)
    same, different = tiny.clip.visual.proj, other.clip.visual.proj
    assert torch.equal(same, twin.clip.visual.proj)
    assert not torch.equal(same, different)


def test_gradients_are_clipped(tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path):
    config = override(CONFIG, train={"clip_norm": 1e-9, "learning_rate": 1e-12})
    before = tiny.clip.visual.proj.clone()
    train(tiny, pairs, config, tmp_path)
    assert torch.allclose(before, tiny.clip.visual.proj, atol=1e-6)
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert record["gradient_norm"] > 1e-3


def test_a_loss_that_is_not_finite_names_step_and_terms():
    terms = LossTerms(rafa=torch.tensor(1.5), hycd=torch.tensor(torch.nan))
    with pytest.raises(TrainingError, match=r"step 7: .*rafa 1.5, hycd nan, total nan"):
        check_finite(7, terms)


def test_weights_that_turn_nan_stop_the_run(tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path):
    with torch.no_grad():
        tiny.clip.visual.proj[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="step 1: the loss is not finite"):
        train(tiny, pairs, CONFIG, tmp_path)


def test_fewer_pairs_than_a_batch(pairs: ToyPairs):
    with pytest.raises(DataError, match="64 images, fewer than a batch of 512"):
        build.count_steps(RefineConfig().train, pairs, 1)
    with pytest.raises(ConfigError, match="16 cannot be shared by 3 processes"):
        build.count_steps(CONFIG.train, pairs, 3)


def test_what_is_no_dual_encoder_is_refused():
    with pytest.raises(ModelError, match="Linear cannot be refined: it has no encode_image"):
        build.build_model(ModelConfig(), torch.nn.Linear(1, 1))  # pyright: ignore


def test_updated_statistics_need_one_process(pairs: ToyPairs):
    """Each process would count its own share of a batch."""
    config = override(CONFIG, train={"normalization_statistics": "updated"})
    assert build.count_steps(config.train, pairs, 1)
    with pytest.raises(ConfigError, match="Train in one process, or leave them frozen"):
        build.count_steps(config.train, pairs, 2)


def test_pairs_with_one_caption_are_partners(tiny: OpenClipEncoder, pairs: ToyPairs):
    loss = {"positives": "same-caption"}
    trainer = build.build_trainer(
        override(CONFIG, loss=loss),
        build.build_student(tiny, CONFIG, torch.device("cpu")),
        Teacher(tiny),
        FP32,
        StandardNormal(),
        build.build_accelerator("cpu"),
        steps=1,
    )
    batch = next(build.build_batches(CONFIG, pairs, tiny, trainer.accelerator))
    texts = [pairs.captions[index] for index in batch.indices]
    tokens = tiny.tokenizer([texts[0][0], texts[1][0], texts[0][0]])
    ids = trainer._caption_ids(replace(batch, tokens=tokens)).tolist()
    assert ids[0] == ids[2] != ids[1]
    assert replace(trainer, objective=Objective(CONFIG.loss))._caption_ids(batch) is None


@pytest.mark.parametrize(
    ("loss", "is_said"),
    [
        ({}, True),
        ({"contrastive_form": "sigmoid"}, False),
        ({"negatives": "swapped-words"}, False),
        ({"false_negatives": "masked"}, False),
    ],
)
def test_chance_is_the_size_of_the_batch_where_it_is_told_apart(
    loss: dict[str, str], is_said: bool, tiny: OpenClipEncoder, capsys: pytest.CaptureFixture[str]
):
    trainer = build.build_trainer(
        CONFIG, tiny, Teacher(tiny), FP32, StandardNormal(), build.build_accelerator("cpu"), steps=1
    )
    config = override(CONFIG, loss={"contrastive_weight": 1.0, **loss})
    record = dict.fromkeys(("loss_total", "loss_contrastive", "image_norm", "text_norm"), log(16))
    replace(trainer, objective=Objective(config.loss))._check_health(1, record, 16)
    assert ("chance level" in capsys.readouterr().err) == is_said


def test_captions_without_a_wrong_twin_are_said_and_refused(
    pairs: ToyPairs, tiny: OpenClipEncoder, capsys: pytest.CaptureFixture[str]
):
    config = override(CONFIG, loss={"contrastive_weight": 1.0, "negatives": "swapped-words"})
    accelerator = build.build_accelerator("cpu")
    batch = next(build.build_batches(config, pairs, tiny, accelerator))
    assert batch.wrong_tokens is not None
    stay = sum(swap_words(own[0], config.seed) is None for own in pairs.captions)
    assert 0 < stay < len(pairs)
    said = " ".join(capsys.readouterr().err.split())
    assert f"in {stay} of {len(pairs)} captions no two words can change places" in said
    german = [(pairs.load_image(index), "ein Hund auf der Wiese") for index in range(16)]
    with pytest.raises(ConfigError, match="has no captions in which two words can change places"):
        build.build_batches(config, as_pairs(german), tiny, accelerator)
    idle = override(CONFIG, loss={"negatives": "swapped-words"})
    assert next(build.build_batches(idle, pairs, tiny, accelerator)).wrong_tokens is None
