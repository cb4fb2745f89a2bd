"""The loop: batches → losses → steps."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from clip_refine.config import TrainConfig
from clip_refine.data import PairBatch
from clip_refine.losses import LossTerms, Objective, PairFeatures
from clip_refine.models import FeatureScale, Teacher
from clip_refine.models.encoder import CountingTokenizer
from clip_refine.priors import Prior
from clip_refine.support.console import Bar, remark
from clip_refine.support.errors import TrainingError, ran_out
from clip_refine.support.process import patient
from clip_refine.train.log import StepLog
from clip_refine.train.part import Frozen, compiled_blocks
from clip_refine.train.state import States, fitting
from clip_refine.train.towers import (
    EncodedParts,
    Known,
    Parts,
    StudentTowers,
    TowerOutput,
    TowerPrecision,
    batch_statistics,
    encode_in_parts,
    encode_pairs,
    parts_by_length,
    put_together,
    shared_as,
    training_mode,
    weights_cast_once,
    whole,
)

EXPLODED = 100.0  # times the first norms; at rate 10 the toy model's grow 2,000-fold in 4 steps
_DIVERGED = 1e6  # times the first loss
_AT_CHANCE = 0.005  # relative distance from ln B

# --------------------------------------------------------------------------------------------------
# Features of all processes in one batch, so that the loss sees every pair of the step.


def gather_features(features: PairFeatures, accelerator: Any) -> PairFeatures:
    """Concatenate the rows of all processes in rank order.

    Every process then computes its part of the loss, its own rows against all columns; the gradient
    of a row is what all parts together have found.
    """
    if accelerator.num_processes == 1:
        return features
    sides = [side.flatten(1) for side in features]
    rows: Any = _Gathered.apply(torch.cat(sides, dim=1), accelerator)
    image, text = rows.split([side.shape[1] for side in sides], dim=1)
    return PairFeatures(image, text.unflatten(1, features.text_features.shape[1:]))


class _Gathered(torch.autograd.Function):
    """PyTorch's gathering with a gradient is deprecated, and what takes its place is private."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, accelerator: Any) -> Tensor:
        ctx.accelerator = accelerator
        return accelerator.gather(own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        found: Tensor = ctx.accelerator.reduce(gradients[0].contiguous())
        return found.chunk(ctx.accelerator.num_processes)[ctx.accelerator.process_index], None


# --------------------------------------------------------------------------------------------------
# AdamW and its learning rate.


def make_optimiser(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    decay: Literal["all", "matrices"],
    device: torch.device,
    rates: Mapping[int, float] | None = None,
) -> AdamW:
    """AdamW over the parameters that require gradients, fused where PyTorch has a fused kernel.

    Args:
        named_parameters: The model's parameters with their names.
        learning_rate: Of every parameter that `rates` does not name.
        weight_decay: Decoupled decay.
        decay: `all` decays every parameter; `matrices` spares biases, norm weights and the logit
            scale, which have fewer than two dimensions.
        device: Where the parameters are.
        rates: Learning rates of parameters by their `id`.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            rate = (rates or {}).get(id(parameter), learning_rate)
            decayed = weight_decay if decay == "all" or parameter.ndim >= 2 else 0.0
            # what is one number is never shared out, and no kernel takes both
            groups.setdefault((rate, decayed, parameter.ndim == 0), []).append(parameter)
    return AdamW(
        [{"params": g, "lr": r, "weight_decay": d} for (r, d, _), g in groups.items()],
        lr=learning_rate,
        fused=device.type in ("cuda", "cpu"),
    )


def make_schedule(
    optimiser: AdamW, *, schedule: Literal["constant", "cosine"], warmup_steps: int, steps: int
) -> LambdaLR:
    """The learning rate of each of `steps` steps as a share of the optimiser's own."""
    return LambdaLR(optimiser, lambda step: rate_share(step, schedule, warmup_steps, steps))


def rate_share(
    step: int, schedule: Literal["constant", "cosine"], warmup_steps: int, steps: int
) -> float:
    """Share of the full learning rate at a step counted from 0.

    >>> [rate_share(step, "constant", 4, 10) for step in (0, 3, 9)]
    [0.25, 1.0, 1.0]
    >>> [round(rate_share(step, "cosine", 0, 10), 3) for step in (0, 5)]
    [1.0, 0.5]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# --------------------------------------------------------------------------------------------------
# The training loop: every step of every epoch, top to bottom.


@dataclass
class Trainer:
    """Everything a step needs besides its batch.

    Attributes:
        accelerator: Accelerate's, for device, processes and gradient synchronisation.
        towers: The student as prepared by the accelerator, callable on (pixels, tokens).
        teacher: A frozen dual encoder on the same device.
        objective: Features → weighted loss terms.
        precision: Which tower of the teacher runs under bf16 autocast, the student's too.
        prior: Distribution of the references.
        generator: Source of the references and of m²-mix's shares; the same on every process.
        schedule: The optimiser's learning rate, which also holds the optimiser.
        config: How steps are taken.
        scale: What the towers are multiplied by in training; the log shows norms without it.
        teacher_scale: The teacher's logit scale where the student has another one.
        frozen: Of images and of texts whether the tower stays as it is. Then its features are the
            teacher's, where that has the same scale.
        micro_batch: Pairs of a process that are encoded with a graph at a time; None for all. It
            is halved where memory turns out too little.
        student: The model that gets the weights where `towers` is a copy that is shared out among
            processes; None where it is trained itself.
        centroid_gap: (d,) on the device, the teacher's mean text feature less its mean image
            feature, at the scale of training; None where the objective does not need it.
    """

    accelerator: Any
    towers: Callable[[Tensor, Tensor, Known], TowerOutput]
    teacher: Teacher
    objective: Objective
    precision: TowerPrecision
    prior: Prior
    generator: torch.Generator
    schedule: LambdaLR
    config: TrainConfig
    scale: FeatureScale = field(default_factory=FeatureScale)
    centroid_gap: Tensor | None = None
    teacher_scale: float | None = None
    frozen: Frozen = (False, False)
    micro_batch: int | None = None
    student: StudentTowers | None = None
    first: dict[str, float] = field(default_factory=dict)  # the first step's record
    best: dict[str, Tensor] = field(default_factory=dict)  # weights, on the CPU
    best_step: int = 0
    best_score: float = -math.inf
    at_chance: bool = False  # which has been said

    def train(
        self,
        batches: Iterable[PairBatch],
        *,
        steps: int,
        log: StepLog,
        states: States | None = None,
        guard: Callable[[int, "Trainer"], bool] | None = None,
    ) -> None:
        """Take one step a batch.

        Args:
            batches: The batches of all epochs, one after another, from `states.start` on.
            steps: Steps of the whole run.
            log: Receives one record a step.
            states: Where to begin, and where what is needed to go on is saved.
            guard: Told of every step; training ends where it says so.

        Raises:
            TrainingError: A loss or gradient is not finite (weights are those before that step),
                features or loss explode, or the device has too little memory even for one pair.
            Stopped: A signal came; the state is saved.
        """
        towers = self.accelerator.unwrap_model(self.towers)
        statistics = self.config.normalization_statistics == "updated"
        bar = Bar("Refining", steps, visible=self.accelerator.is_main_process)
        start = 0
        if states and states.saved:
            start = states.start
            with fitting(states.saved):
                self.restore(states.saved.tensors(), states.saved.plain)
            bar.progress.update(bar.task, completed=start)
        begin = last = time.perf_counter()
        with (
            patient() if states else nullcontext(),
            training_mode(towers, statistics=statistics, dropout=self.config.dropout == "on"),
            self._compiled() if self.config.compile else nullcontext(),
        ):
            for number, batch in enumerate(bar.over(batches), start=start + 1):
                record = self.step(number, batch.to(self.accelerator.device), steps=steps)
                now = time.perf_counter()
                seconds, last = now - last, now
                pairs = len(batch.indices) * self.accelerator.num_processes
                speed = {"step_seconds": seconds, "pairs_per_second": pairs / seconds}
                log.write({"step": number, **speed, **record})
                bar.remark(f"loss {record['loss_total']:.4f}, {pairs / seconds:.0f} pairs/s")
                self._check_health(number, record, pairs)
                if guard and guard(number, self):
                    break
                if states:
                    states.after(number, steps, self, log.flush)
        self.hand_back()
        if states:
            states.say_cost(time.perf_counter() - begin)

    @property
    def needs_pixels(self) -> bool:
        """Whether steps look at images: not where all that is asked of these is looked up."""
        tower = self.frozen[0] and self.objective.needs_teacher and self.teacher_scale is None
        known = self.teacher.heads or (tower and not self.objective.needs_wrong_texts)
        return self.teacher.runs or not known

    def _compiled(self) -> AbstractContextManager[None]:
        own = self.accelerator.unwrap_model(self.towers).encoder
        return compiled_blocks(own, *([self.teacher.encoder] if self.teacher.runs else []))

    def keep_best(self, step: int, score: float) -> None:
        """Keep the weights as they are, where the score is higher than any before."""
        if score > self.best_score:
            for name, weight in self._weights().items():  # in place of the old, not beside them
                self.best[name] = weight.detach().to("cpu", copy=True)
            self.best_step, self.best_score = step, score

    def go_back(self) -> int:
        """Take the best weights that were kept; the step that they are of."""
        self._load(self.best)
        return self.best_step

    def hand_back(self) -> None:
        """Let the student have the weights; every process has to ask."""
        if self.student is not None:
            self.student.load_state_dict(self._weights())

    def _weights(self) -> dict[str, Tensor]:
        weights = self.accelerator.unwrap_model(self.towers).state_dict()
        return {name: whole(value) for name, value in weights.items()}

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        towers = self.accelerator.unwrap_model(self.towers)
        own = towers.state_dict()
        towers.load_state_dict({n: shared_as(own[n], value) for n, value in weights.items()})

    def _check_health(self, number: int, record: dict[str, float], pairs: int) -> None:
        """Stop where training destroys the model; say where it can tell nothing apart."""
        was = self.first = self.first or record
        loss = record["loss_total"]
        grown = [n for n in ("image_norm", "text_norm") if record[n] > EXPLODED * was[n]]
        if grown or loss > _DIVERGED * max(1.0, was["loss_total"]):
            what = f"{grown[0]} {record[grown[0]]:.3g}" if grown else f"loss {loss:.3g}"
            before = was[grown[0]] if grown else was["loss_total"]
            raise TrainingError(
                f"step {number}: {what}, at first it was {before:.3g}: training destroys the model "
                "and stopped without saving it. Try a lower --train.learning-rate."
            )
        weight, chance = self.objective.loss.contrastive_weight, math.log(pairs)
        if not weight or self.at_chance or not self.objective.tells_pairs_apart:
            return
        if abs(record["loss_contrastive"] / weight / chance - 1) < _AT_CHANCE:
            self.at_chance = True
            remark(
                f"Step {number}: the contrastive loss is ln {pairs} = {chance:.2f}: chance level, "
                "nothing is told apart. Lower --train.learning-rate, or look at the pairs.",
                "yellow",
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on besides its batch: tensors by name, and plain data.

        Every process has to ask, since each has a generator for dropout of its own.
        """
        kept = self.schedule.optimizer.state_dict()
        device = self.accelerator.device
        tensors = {f"weights.{name}": value for name, value in self._weights().items()}
        for number, moments in kept["state"].items():
            tensors |= {f"optimiser.{number}.{name}": whole(m) for name, m in moments.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors["references"] = self.generator.get_state()
        tensors["random"] = self.accelerator.gather(torch.get_rng_state().to(device)[None])
        if device.type == "cuda":
            own = torch.cuda.get_rng_state(device).to(device)[None]
            tensors["random_cuda"] = self.accelerator.gather(own)
        return tensors, {
            "groups": kept["param_groups"],
            "schedule": self.schedule.state_dict(),
            "micro_batch": self.micro_batch,
            "first": self.first,
            "best": [self.best_step, self.best_score] if self.best else None,
        }

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        named = {"weights": {}, "optimiser": {}, "best": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            if rest:
                named[group][rest] = value
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = self._parameters()
        for name, value in named["optimiser"].items():
            number, _, what = name.partition(".")
            part = shared_as(parameters[int(number)], value)
            moments.setdefault(int(number), {})[what] = part
        self._load(named["weights"])
        self.first, self.best = dict(plain["first"]), named["best"]
        if plain["best"]:
            self.best_step, self.best_score = plain["best"]
        optimiser = {"state": moments, "param_groups": plain["groups"]}
        self.schedule.optimizer.load_state_dict(optimiser)
        known = self.schedule.state_dict()  # a schedule takes any other name, too
        self.schedule.load_state_dict({n: v for n, v in plain["schedule"].items() if n in known})
        self.generator.set_state(tensors["references"])
        rank, device = self.accelerator.process_index, self.accelerator.device
        if len(tensors["random"]) == self.accelerator.num_processes:
            # copies, since PyTorch takes a view's bytes from where the whole tensor begins
            torch.set_rng_state(tensors["random"][rank].clone())
            if device.type == "cuda" and "random_cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random_cuda"][rank].clone(), device)

    def agree(self, *numbers: int) -> list[int]:
        """The largest that any process has of each."""
        if self.accelerator.num_processes == 1:
            return list(numbers)
        own = torch.tensor([numbers], device=self.accelerator.device)
        return self.accelerator.gather(own).amax(dim=0).tolist()

    def step(self, number: int, batch: PairBatch, *, steps: int) -> dict[str, float]:
        """Forward, loss, backward, update; what happened as numbers for the log."""
        losses, student = self._fitting_gradient(number, batch, steps)
        gradient_norm = self._clip(number)
        optimiser = self.schedule.optimizer
        learning_rate = max(group["lr"] for group in optimiser.param_groups)
        optimiser.step()
        self.schedule.step()
        optimiser.zero_grad(set_to_none=True)
        return {
            **{f"loss_{name}": value for name, value in losses.items()},
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            **self._statistics(student),
        }

    def _fitting_gradient(
        self, number: int, batch: PairBatch, steps: int
    ) -> tuple[dict[str, float], PairFeatures]:
        """The gradient, in parts half as large where memory was too little for it."""
        while True:
            drawn = self.generator.get_state()
            size = min(self.micro_batch or len(batch.indices), len(batch.indices))
            try:
                return self._gradient(number, batch, steps)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                # amid an exchange the others wait: what ends this process lets them end, too
                agreed = self.accelerator.num_processes == 1 or isinstance(error, _EverywhereError)
                # statistics would count a pair twice
                statistics = self.config.normalization_statistics == "updated"
                if size == 1 or statistics or not agreed:
                    raise TrainingError(
                        f"{self.accelerator.device} has too little memory for {size:,} pairs at a "
                        "time. Pass a smaller --train.micro-batch or --train.batch-size, or "
                        "--train.precision bf16."
                    ) from error
            # only now, as the error holds on to what the step had in memory
            self.schedule.optimizer.zero_grad(set_to_none=True)
            self.generator.set_state(drawn)
            self.micro_batch = size // 2
            # where others went through it, it waits for a backward pass that never comes
            self.towers = self.accelerator.unwrap_model(self.towers)
            self.accelerator.free_memory()
            gc.collect()
            remark(
                f"{self.accelerator.device} has too little memory for {size:,} pairs at a time: "
                f"going on with --train.micro-batch {self.micro_batch}.",
                "yellow",
            )

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Memory that runs out in here has run out everywhere; nothing here may wait for others."""
        short = False
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            # shared weights are gathered in here, so that the others may be waiting already
            alone = self.accelerator.num_processes == 1 or self.student is not None
            if alone or not ran_out(error):
                raise
            short = True
        if self.student is None and self.agree(int(short))[0]:
            raise _EverywhereError

    def _gradient(
        self, number: int, batch: PairBatch, steps: int
    ) -> tuple[dict[str, float], PairFeatures]:
        """Losses of a batch and its features, of all processes; gradients are in the weights."""
        own, wrong = batch.tokens, batch.wrong_tokens
        tokens = own if wrong is None else torch.stack([own, wrong], dim=1)
        known: Known = (None, None)
        with self._together():
            taught = self._teacher_features(batch)
            if taught and self.teacher.heads:
                known = taught.image_features, taught.text_features if wrong is None else None
                to_heads = batch.pixels, own, self.precision, taught, self.teacher.heads
                needed = self.objective.needs_teacher
                taught = encode_pairs(self.teacher, *to_heads) if needed else None
            elif taught and wrong is None and self.teacher_scale is None:
                images, texts = self.frozen
                image, text = taught
                known = image if images else None, text if texts else None
            parts = self._in_parts(batch.pixels, tokens, known)
            output = parts.output if parts else self.towers(batch.pixels, tokens, known)
        student, wrong_texts = gather_features(output.features, self.accelerator), None
        if wrong is not None:
            texts, wrong_texts = student.text_features.unbind(dim=1)
            student = student._replace(text_features=texts)
            # else nothing could be exchanged, or only behind what is read, or an image has it
            captions, twins = self._text_ids(tokens).unbind(dim=1)
            wrong_texts = wrong_texts[~torch.isin(twins, captions)]
        teacher = taught and gather_features(taught, self.accelerator)
        references, text_references = self._references(student)
        terms = self.objective(
            student,
            teacher,
            references,
            text_references=text_references,
            logit_scale=output.logit_scale,
            logit_bias=output.logit_bias,
            mix=self._mix(student),
            caption_ids=self._caption_ids(batch),
            wrong_text_features=wrong_texts,
            centroid_gap=self.centroid_gap,
            teacher_scale=self.teacher_scale,
            progress=(number - 1) / steps,
            rows=self._own_rows(batch),
        )
        losses = check_finite(number, terms, self.accelerator.reduce)
        # data-parallel training takes the mean over processes, whose parts add up
        self.accelerator.backward(self.accelerator.num_processes * terms.total)
        if parts:
            with self._together():
                parts.backward()
        if parts or not isinstance(self.towers, DistributedDataParallel):
            self._average_gradients()
        return losses, student

    def _in_parts(self, pixels: Tensor, tokens: Tensor, known: Known) -> EncodedParts | None:
        """The batch encoded without a graph; None where it is encoded in one go."""
        size = self.micro_batch or len(pixels)
        # data-parallel training would wait for what a loss of one's own does not look at
        unsure = self.objective.loss.own_weight and self.accelerator.num_processes > 1
        if size >= len(pixels) and not unsure:
            return None
        towers = self.accelerator.unwrap_model(self.towers)
        parts = self._parts(tokens, size)
        return encode_in_parts(towers, pixels, parts, self.frozen, known)

    def _parts(self, tokens: Tensor, size: int) -> Parts:
        tokenizer = self.accelerator.unwrap_model(self.towers).encoder.tokenizer
        known = isinstance(tokenizer, CountingTokenizer)
        lengths = tokenizer.lengths(tokens.flatten(0, -2)) if known else None
        return parts_by_length(tokens, lengths, size)

    def _average_gradients(self) -> None:
        """Over processes, once for all parts; of what is shared out that has been done."""
        if (processes := self.accelerator.num_processes) == 1:
            return
        for parameter in self._parameters():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= processes

    def _own_rows(self, batch: PairBatch) -> slice:
        """Where this process's pairs are among those of all."""
        count = len(batch.indices)
        start = self.accelerator.process_index * count
        return slice(start, start + count)

    def _statistics(self, student: PairFeatures) -> dict[str, float]:
        values = batch_statistics(student)
        values["image_norm"] /= self.scale.image_factor
        values["text_norm"] /= self.scale.text_factor
        return values

    def _teacher_features(self, batch: PairBatch) -> PairFeatures | None:
        """Of this process's pairs, before the heads of a teacher that has some."""
        if not (self.objective.needs_teacher or self.teacher.heads):
            return None
        size = self.micro_batch or len(batch.indices)
        if size < len(batch.indices) and self.teacher.runs:
            parts = self._parts(batch.tokens, size)
            with weights_cast_once(batch.pixels, self.teacher.encoder):
                found = [
                    encode_pairs(self.teacher, batch.pixels[rows], tokens, self.precision)
                    for rows, tokens in parts
                ]
            return put_together(found, parts)
        return encode_pairs(self.teacher, batch.pixels, batch.tokens, self.precision)

    def _references(self, student: PairFeatures) -> tuple[Tensor | None, Tensor | None]:
        """One reference a pair, the same on every process because the generator is.

        The second is the texts' own where references are independent, None where they are shared.
        """
        if not self.objective.needs_references:
            return None, None
        count, dim = student.image_features.shape
        where = {"generator": self.generator, "device": student.image_features.device}
        references = self.prior.sample(count, dim, **where)
        if self.objective.loss.references == "shared":
            return references, None
        return references, self.prior.sample(count, dim, **where)

    def _mix(self, student: PairFeatures) -> Tensor | None:
        """The image's share of each mixed pair, uniform in 0-1."""
        if not self.objective.needs_mix:
            return None
        shares = torch.rand(len(student.image_features), generator=self.generator)
        return shares.to(student.image_features.device)

    def _caption_ids(self, batch: PairBatch) -> Tensor | None:
        return self._text_ids(batch.tokens) if self.objective.needs_caption_ids else None

    def _text_ids(self, tokens: Tensor) -> Tensor:
        """A number for each text of all processes, told apart by what the model reads of it."""
        last = tokens.ndim - 1
        tokens = self.accelerator.pad_across_processes(tokens, dim=last, pad_index=-1)
        tokens = self.accelerator.gather(tokens)
        ids = tokens.flatten(0, -2).unique(dim=0, return_inverse=True)[1]
        return ids.view(tokens.shape[:-1])

    def _clip(self, number: int) -> float:
        # apart, as no kernel takes both, what is shared out and what is not
        kinds: dict[bool, list[nn.Parameter]] = {}
        for parameter in self._parameters():
            if parameter.grad is not None:
                kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
        norms = [
            whole(get_total_norm([p.grad for p in kind if p.grad is not None]))
            for kind in kinds.values()
        ]
        norm = math.hypot(*map(float, norms))
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {number}: the gradient's norm is {norm}, so the weights were left as they "
                "are. Try a lower learning rate, --train.clip-norm 1, or --train.precision fp32."
            )
        if (limit := self.config.clip_norm) is not None:
            for kind in kinds.values():
                clip_grads_with_norm_(kind, limit, norms[0].new_tensor(norm))
        return norm

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.schedule.optimizer.param_groups for p in group["params"]]


class _EverywhereError(MemoryError):
    """Memory ran out in one process, and all of them know."""


def check_finite(
    number: int, terms: LossTerms, added_up: Callable[[Tensor], Tensor] = torch.clone
) -> dict[str, float]:
    """The terms as numbers, `added_up` over processes."""
    losses = terms.as_floats(added_up)
    if not math.isfinite(losses["total"]):
        listed = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        raise TrainingError(
            f"step {number}: the loss is not finite ({listed}), so training stopped before it "
            "could spoil the weights. Try a lower learning rate, --train.precision fp32, or look "
            "for NaN in the model's weights."
        )
    return losses
