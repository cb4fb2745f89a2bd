"""Several processes give the losses and gradients of one, whatever the loss uses."""

import copy
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import patch_environment
from torch import Tensor

from clip_refine.cli import _explain  # pyright: ignore[reportPrivateUsage]
from clip_refine.config import RefineConfig
from clip_refine.models import OpenClipEncoder, Teacher, load_open_clip
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.support.errors import TrainingError
from clip_refine.toy import ToyPairs
from clip_refine.train import StepLog, TowerPrecision, Trainer
from tests.conftest import TINY, write_model
from tests.several import in_processes
from tests.train.test_loop import with_plain_descent
from tests.train.test_micro_batch import (
    OBJECTIVES,
    SIZE,
    Dropping,
    out_of_memory,
    own_loss,
    random_batch,
    trainer_of,
)

# --------------------------------------------------------------------------------------------------
# One step of every objective in float64.


def gradients(settings: dict[str, Any], micro_batch: int | None) -> list[Tensor]:
    """The losses of one batch, and the gradient of every weight; of all processes together."""
    torch.manual_seed(0)
    config = RefineConfig.model_validate({"train": {"batch_size": SIZE}, **settings})
    student = Dropping().double().eval()
    own = own_loss if config.loss.own_weight else None
    trainer = trainer_of(config, student, micro_batch, own)
    batch = random_batch(student)
    tokens = torch.cat([batch.tokens[:-1], batch.tokens[:1]])  # two captions are one
    wrong = tokens.flip(1) if trainer.objective.needs_wrong_texts else None
    share = SIZE // trainer.accelerator.num_processes
    start = share * trainer.accelerator.process_index
    rows = slice(start, start + share)
    part = replace(
        batch,
        pixels=batch.pixels[rows],
        tokens=tokens[rows],
        indices=batch.indices[rows],
        wrong_tokens=None if wrong is None else wrong[rows],
    )
    losses, _ = trainer._gradient(2, part, 4)  # pyright: ignore[reportPrivateUsage]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
    return [torch.tensor(list(losses.values()), dtype=torch.float64), *found]


def one_step(folder: Path) -> None:
    group = build.build_accelerator("cpu")
    sizes = (None, SIZE // group.num_processes - 1)
    found = {name: [gradients(one, n) for n in sizes] for name, one in OBJECTIVES.items()}
    torch.save(found, folder / f"{group.process_index}.pt")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("processes", [2, 3])
def test_every_objective_gives_what_it_gives_in_one_process(processes: int, tmp_path: Path):
    in_processes(processes, one_step, tmp_path)
    everywhere = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for name, settings in OBJECTIVES.items():
        alone = gradients(settings, None)
        for found in everywhere:
            for together in found[name]:
                for one, other in zip(alone, together, strict=True):
                    assert torch.allclose(one, other, rtol=1e-10, atol=1e-10), name


# --------------------------------------------------------------------------------------------------
# Steps of a real architecture, behind which a few pairs are left over.


STEPS = 4  # a parameter without a gradient is waited for in the step after its first
TRAIN = {"batch_size": 8, "learning_rate": 1e-3, "logit_scale": "trained"}
# neither of the second and third looks at all that the model has of logit scale and bias
CASES: dict[str, dict[str, Any]] = {
    "every scale is used": {"loss": {"contrastive_weight": 0.5}},
    "no loss looks at the scale": {"recipe": "clip-refine"},
    "no loss looks at the bias": {"recipe": "contrastive"},
    "a loss of one's own looks at texts alone": {"recipe": "own"},
    "adapters alone are trained": {
        "train": {**TRAIN, "parameters": "lora", "learning_rate": 1e-2},
        "loss": {"contrastive_weight": 0.5},
    },
}


SHARED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def made_trainer(
    name: str, settings: dict[str, Any], stay: ExitStack | None = None
) -> tuple[Trainer, Callable[..., Any]]:
    """It, and its batches behind so many steps; of a part of the model for as long as `stay`."""
    config = RefineConfig.model_validate({"train": TRAIN, "seed": 5, **settings})
    accelerator = build.build_accelerator("cpu")
    model = load_open_clip(name)
    pairs = ToyPairs("processes", size=35)
    student = build.build_student(model, config, accelerator.device)
    teacher = Teacher(student)
    if stay:
        stay.enter_context(build.build_part(config, student, accelerator))
    trainer = build.build_trainer(
        config,
        student,
        teacher,
        TowerPrecision.from_name("fp32"),
        StandardNormal(),
        accelerator,
        steps=STEPS,
        objective=own_loss if config.loss.own_weight else None,
    )
    assert build.count_steps(config.train, pairs, accelerator.num_processes) == STEPS
    return trainer, partial(build.build_batches, config, pairs, model, accelerator)


def train(
    name: str, settings: dict[str, Any], result: Path, micro_batch: int | None = None
) -> None:
    with ExitStack() as stay, StepLog(None) as log:
        part = stay if "train" in settings else None
        trainer, batches = made_trainer(name, settings, part)
        assert (trainer.student is not None) == ("shared" in result.name)
        trainer = replace(with_plain_descent(trainer), micro_batch=micro_batch)
        trainer.train(batches(), steps=STEPS, log=log)
    student: Any = trainer.student or trainer.accelerator.unwrap_model(trainer.towers)
    if trainer.accelerator.is_main_process:
        torch.save([trainer.accelerator.num_processes, student.encoder.state_dict()], result)


def model_of(case: str, folder: Path) -> str:
    bias = {"init_logit_bias": -10.0} if "bias" in case else {}
    return write_model(folder / f"model{len(bias)}", {**TINY, **bias})


def several_steps(folder: Path) -> None:
    for case, settings in CASES.items():
        name = f"local-dir:{folder}/model{int('bias' in case)}"
        train(name, settings, folder / f"{case}, two")
        train(name, settings, folder / f"{case}, parts", micro_batch=3)  # of 4 pairs each
    case = "every scale is used"
    with patch_environment(**SHARED):
        train(f"local-dir:{folder}/model0", CASES[case], folder / f"{case}, shared")
        train(f"local-dir:{folder}/model0", CASES[case], folder / f"{case}, shared parts", 3)


@pytest.mark.timeout(300)
def test_two_processes_train_as_one(tmp_path: Path):
    """Also where they share the weights (FSDP2)."""
    names = {case: model_of(case, tmp_path) for case in CASES}
    in_processes(2, several_steps, tmp_path)
    for case, settings in CASES.items():
        train(names[case], settings, tmp_path / f"{case}, one")
        one, *others = (torch.load(path) for path in sorted(tmp_path.glob(f"{case}, *")))
        assert [one[0], *(other[0] for other in others)] == [1, *[2] * len(others)]
        assert any("logit_bias" in name for name in one[1]) == ("bias" in case)
        before = load_open_clip(names[case]).state_dict()
        moved = max(float((one[1][name] - value).abs().max()) for name, value in before.items())
        assert moved > 1e-4, case
        for name, weight in one[1].items():
            for _, together in others:
                assert torch.allclose(weight, together[name], atol=1e-6), (case, name)


# --------------------------------------------------------------------------------------------------
# States of a training whose weights are shared out, and of one whose weights are not.


def steps_of(shared: bool, name: str, taken: int, until: int, state: Any = None) -> Any:
    """The state behind so many steps, from one behind those that are taken."""
    with patch_environment(**SHARED if shared else {}):
        trainer, batches = made_trainer(name, CASES["every scale is used"])
    for group in trainer.schedule.optimizer.param_groups:
        group["eps"] = 1e-3  # else a gradient that is 0 but for rounding becomes a whole step
    if state:
        trainer.restore(*copy.deepcopy(state))
    with StepLog(None) as log:
        trainer.train(islice(batches(done=taken), until - taken), steps=STEPS, log=log)
    return trainer.state()


def exchange(name: str, folder: Path) -> None:
    kinds = (False, True)
    halves = [steps_of(shared, name, 0, 2) for shared in kinds]
    found = [steps_of(s, name, 2, STEPS, half)[0] for s in kinds for half in halves]
    torch.save([steps_of(False, name, 0, STEPS)[0], *found], folder / "states.pt")


@pytest.mark.timeout(300)
def test_states_go_from_one_kind_to_the_other(tiny_name: str, tmp_path: Path):
    in_processes(2, exchange, tiny_name, tmp_path)
    unbroken, *others = torch.load(tmp_path / "states.pt")
    assert len(others) == 4
    assert any(name.startswith("optimiser.") and v.ndim == 2 for name, v in unbroken.items())
    for other in others:
        assert other.keys() == unbroken.keys()
        for name, value in unbroken.items():
            if name == "random":  # of what else was drawn in these processes
                continue
            assert torch.allclose(value.double(), other[name].double(), atol=1e-6), name


# --------------------------------------------------------------------------------------------------
# Memory that runs out in one of them: all take smaller parts, or all end; none waits for ever.


def runs_short(name: str, folder: Path) -> None:
    """The second process has memory for the graph of one pair, then of none."""
    rank = build.build_accelerator("cpu").process_index
    encode, fits = OpenClipEncoder.encode_image, [1]

    def limited(self: OpenClipEncoder, pixels: Tensor) -> Tensor:
        if rank and torch.is_grad_enabled() and len(pixels) > fits[0]:
            out_of_memory("cpu")
        return encode(self, pixels)

    OpenClipEncoder.encode_image = limited
    # 4 pairs in one go, without a collective behind; 2 only where gradients are made
    train(name, CASES["every scale is used"], folder / "two")
    fits[0] = 0
    with pytest.raises(TrainingError, match="too little memory for 1 pairs at a time"):
        train(name, CASES["every scale is used"], folder / "none")
    (folder / f"{rank} said it").touch()


@pytest.mark.timeout(300)
def test_all_take_smaller_parts_where_one_runs_short(tiny_name: str, tmp_path: Path):
    in_processes(2, runs_short, tiny_name, tmp_path)
    train(tiny_name, CASES["every scale is used"], tmp_path / "one")
    one, two = (torch.load(tmp_path / name)[1] for name in ("one", "two"))
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], atol=1e-6), name
    assert len(list(tmp_path.glob("* said it"))) == 2


class Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("a lot")


def runs_short_amid(name: str, folder: Path) -> None:
    """The second process fails where data-parallel training exchanges gradients, and ends."""
    rank = build.build_accelerator("cpu").process_index
    encode = OpenClipEncoder.encode_text
    if rank:
        OpenClipEncoder.encode_text = lambda self, tokens: Short.apply(encode(self, tokens))
    try:
        train(name, CASES["every scale is used"], folder / "none")
    except Exception as error:
        (folder / f"{rank}").write_text(_explain(error, "refine")[0])
        os._exit(0)  # without a word to the other


@pytest.mark.timeout(300)
def test_all_end_where_one_runs_short_amid_an_exchange(tiny_name: str, tmp_path: Path):
    in_processes(2, runs_short_amid, tiny_name, tmp_path)
    first, second = ((tmp_path / rank).read_text() for rank in "01")
    assert "too little memory for 4 pairs at a time" in second
    assert first == "another process of this run has ended: see what that one says."
