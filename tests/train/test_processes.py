"""Two processes give the gradients, and so the weights, of one, also in parts of a batch."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from clip_refine.config import RefineConfig
from clip_refine.models import Teacher, load_open_clip
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.toy import ToyPairs
from clip_refine.train import StepLog, TowerPrecision
from tests.train.test_loop import with_plain_descent

CONFIG = RefineConfig.model_validate(
    {
        "train": {"batch_size": 16, "learning_rate": 1e-3, "logit_scale": "trained"},
        "loss": {"contrastive_weight": 0.5},
        "seed": 5,
    }
)


def train(name: str, result: Path, micro_batch: int | None = None) -> None:
    accelerator = build.build_accelerator("cpu")
    model = load_open_clip(name)
    pairs = ToyPairs("processes", size=32)
    student = build.build_student(model, CONFIG, accelerator.device)
    steps = build.count_steps(CONFIG.train, pairs, accelerator.num_processes)
    trainer = build.build_trainer(
        CONFIG,
        student,
        Teacher(student),
        TowerPrecision.from_name("fp32"),
        StandardNormal(),
        accelerator,
        steps=steps,
    )
    trainer = replace(with_plain_descent(trainer), micro_batch=micro_batch)
    batches = build.build_batches(CONFIG, pairs, model, accelerator)
    with StepLog(None) as log:
        trainer.train(batches, steps=steps, log=log)
    if accelerator.is_main_process:
        torch.save([accelerator.num_processes, student.state_dict()], result)


def one_of_two(rank: int, port: int, name: str, result: Path) -> None:
    import os

    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    train(name, result)
    train(name, result.with_name("parts.pt"), micro_batch=3)  # of 8 pairs each
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_train_as_one(tiny_name: str, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    train(tiny_name, tmp_path / "one.pt")
    multiprocessing.spawn(one_of_two, (port, tiny_name, tmp_path / "two.pt"), nprocs=2)
    files = ("one.pt", "two.pt", "parts.pt")
    counts, weights = zip(
        *(torch.load(tmp_path / file, weights_only=True) for file in files), strict=True
    )
    assert counts == (1, 2, 2)
    for name, weight in weights[0].items():
        for together in weights[1:]:
            assert torch.allclose(weight, together[name], atol=1e-6), name
