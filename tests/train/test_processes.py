"""Two processes give the gradients of one, in parts of a batch, too, whatever the loss uses."""

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from clip_refine.config import RefineConfig
from clip_refine.losses import PairFeatures
from clip_refine.models import Teacher, load_open_clip
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.toy import ToyPairs
from clip_refine.train import StepLog, TowerPrecision
from tests.conftest import TINY, write_model
from tests.train.test_loop import with_plain_descent

TRAIN = {"batch_size": 8, "learning_rate": 1e-3, "logit_scale": "trained"}
SCALE_AND_TEACHER = {"loss": {"contrastive_weight": 0.5}}
# neither looks at all that the model has of logit scale and bias
SCALE_UNUSED, BIAS_UNUSED = {"recipe": "clip-refine"}, {"recipe": "contrastive"}

OTHER_NEGATIVES = {
    "recipe": "contrastive",
    "loss": {"negatives": "swapped-words", "false_negatives": "masked"},
}
# a function that looks at neither the scale nor the image tower
OWN = {"recipe": "own"}


def own_loss(student: PairFeatures, teacher: PairFeatures, logit_scale: torch.Tensor):
    return (student.text_features - teacher.text_features.flip(0)).square().mean()


def train(
    name: str, settings: dict[str, Any], result: Path, micro_batch: int | None = None
) -> None:
    config = RefineConfig.model_validate({"train": TRAIN, "seed": 5, **settings})
    accelerator = build.build_accelerator("cpu")
    model = load_open_clip(name)
    pairs = ToyPairs("processes", size=32)
    student = build.build_student(model, config, accelerator.device)
    steps = build.count_steps(config.train, pairs, accelerator.num_processes)
    assert steps > 3  # a parameter without a gradient is waited for in the step after its first
    trainer = build.build_trainer(
        config,
        student,
        Teacher(student),
        TowerPrecision.from_name("fp32"),
        StandardNormal(),
        accelerator,
        steps=steps,
        objective=own_loss if config.loss.own_weight else None,
    )
    trainer = replace(with_plain_descent(trainer), micro_batch=micro_batch)
    batches = build.build_batches(config, pairs, model, accelerator)
    with StepLog(None) as log:
        trainer.train(batches, steps=steps, log=log)
    if accelerator.is_main_process:
        torch.save([accelerator.num_processes, student.state_dict()], result)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def join_two(rank: int, port: int) -> None:
    """Be one of two processes, as a launcher would say it."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def one_of_two(rank: int, port: int, name: str, settings: dict[str, Any], result: Path) -> None:
    torch.set_num_threads(1)
    join_two(rank, port)
    train(name, settings, result)
    train(name, settings, result.with_name("parts.pt"), micro_batch=3)  # of 4 pairs each
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("settings", "bias"),
    [
        (SCALE_AND_TEACHER, False),
        (SCALE_UNUSED, False),
        (BIAS_UNUSED, True),
        (OTHER_NEGATIVES, False),
        (OWN, False),
    ],
    ids=[
        "every scale is used",
        "no loss looks at the scale",
        "no loss looks at the bias",
        "wrong captions and masks",
        "a loss of one's own looks at texts alone",
    ],
)
def test_two_processes_train_as_one(settings: dict[str, Any], bias: bool, tmp_path: Path):
    name = write_model(tmp_path / "model", {**TINY, "init_logit_bias": -10.0} if bias else TINY)
    assert any("logit_bias" in one for one in load_open_clip(name).state_dict()) == bias
    train(name, settings, tmp_path / "one.pt")
    multiprocessing.spawn(one_of_two, (free_port(), name, settings, tmp_path / "two.pt"), nprocs=2)
    files = ("one.pt", "two.pt", "parts.pt")
    counts, weights = zip(
        *(torch.load(tmp_path / file, weights_only=True) for file in files), strict=True
    )
    assert counts == (1, 2, 2)
    for name, weight in weights[0].items():
        for together in weights[1:]:
            assert torch.allclose(weight, together[name], atol=1e-6), name
