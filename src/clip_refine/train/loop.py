"""The training loop: every step of every epoch, top to bottom."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from clip_refine.console import Bar
from clip_refine.data import PairBatch
from clip_refine.errors import TrainingError
from clip_refine.losses import LossTerms, Objective, PairFeatures
from clip_refine.models import Teacher
from clip_refine.priors import Prior
from clip_refine.train.gather import gather_features
from clip_refine.train.log import StepLog
from clip_refine.train.precision import TowerPrecision
from clip_refine.train.student import batch_statistics, encode_pairs


@dataclass(frozen=True)
class Trainer:
    """Everything a step needs besides its batch.

    Attributes:
        accelerator: Accelerate's, for device, processes and gradient synchronisation.
        towers: The student as prepared by the accelerator, callable on (pixels, tokens).
        teacher: A frozen dual encoder on the same device.
        objective: Features → weighted loss terms.
        precision: Which tower of the teacher runs under bf16 autocast, the student's too.
        prior: Distribution of the references.
        generator: Source of the references; the same on every process.
        schedule: The optimiser's learning rate, which also holds the optimiser.
        clip_norm: Largest total gradient norm, None for no limit.
    """

    accelerator: Any
    towers: Callable[[Tensor, Tensor], tuple[PairFeatures, Tensor]]
    teacher: Teacher
    objective: Objective
    precision: TowerPrecision
    prior: Prior
    generator: torch.Generator
    schedule: LambdaLR
    clip_norm: float | None

    def train(self, batches: Iterable[PairBatch], *, steps: int, log: StepLog) -> None:
        """Take one step a batch.

        Args:
            batches: The batches of all epochs, one after another.
            steps: How many there are, for the progress bar.
            log: Receives one record a step.

        Raises:
            TrainingError: A loss or gradient is not finite. Weights are those before that step.
        """
        bar = Bar("Refining", steps, visible=self.accelerator.is_main_process)
        last = time.perf_counter()
        for number, batch in enumerate(bar.over(batches), start=1):
            record = self.step(number, batch.to(self.accelerator.device))
            now = time.perf_counter()
            seconds, last = now - last, now
            pairs = len(batch.indices) * self.accelerator.num_processes
            log.write(
                {
                    "step": number,
                    "step_seconds": seconds,
                    "pairs_per_second": pairs / seconds,
                    **record,
                }
            )
            bar.remark(f"loss {record['loss_total']:.4f}, {pairs / seconds:.0f} pairs/s")

    def step(self, number: int, batch: PairBatch) -> dict[str, float]:
        """Forward, loss, backward, update; what happened as numbers for the log."""
        features, logit_scale = self.towers(batch.pixels, batch.tokens)
        student = gather_features(features, self.accelerator)
        teacher = self._teacher_features(batch)
        terms = self.objective(student, teacher, self._references(student), logit_scale=logit_scale)
        losses = check_finite(number, terms)
        self.accelerator.backward(terms.total)
        gradient_norm = self._clip(number)
        optimiser = self.schedule.optimizer
        learning_rate = optimiser.param_groups[0]["lr"]
        optimiser.step()
        self.schedule.step()
        optimiser.zero_grad(set_to_none=True)
        return {
            **{f"loss_{name}": value for name, value in losses.items()},
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            **batch_statistics(student),
        }

    def _teacher_features(self, batch: PairBatch) -> PairFeatures | None:
        if not self.objective.needs_teacher:
            return None
        features = encode_pairs(self.teacher, batch.pixels, batch.tokens, self.precision)
        return gather_features(features, self.accelerator)

    def _references(self, student: PairFeatures) -> Tensor | None:
        """One reference a pair, the same on every process because the generator is."""
        if not self.objective.needs_references:
            return None
        count, dim = student.image_features.shape
        device = student.image_features.device
        return self.prior.sample(count, dim, generator=self.generator, device=device)

    def _clip(self, number: int) -> float:
        limit = math.inf if self.clip_norm is None else self.clip_norm
        parameters = [p for group in self.schedule.optimizer.param_groups for p in group["params"]]
        norm = float(self.accelerator.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {number}: the gradient's norm is {norm}, so the weights were left as they "
                "are. Try a lower learning rate, --train.clip-norm 1, or --train.precision fp32."
            )
        return norm


def check_finite(number: int, terms: LossTerms) -> dict[str, float]:
    """The terms as numbers.

    Raises:
        TrainingError: One of them is not finite; the message names step and terms.
    """
    losses = terms.as_floats()
    if not math.isfinite(losses["total"]):
        listed = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        raise TrainingError(
            f"step {number}: the loss is not finite ({listed}), so training stopped before it "
            "could spoil the weights. Try a lower learning rate, --train.precision fp32, or look "
            "for NaN in the model's weights."
        )
    return losses
