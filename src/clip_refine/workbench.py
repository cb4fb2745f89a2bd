"""What all runs of a comparison share, and one run on it: train, score, fit peers, score."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from clip_refine import build
from clip_refine.clock import Clock
from clip_refine.config import RefineConfig
from clip_refine.console import console
from clip_refine.data import (
    ImageCaptions,
    LabelledImages,
    PairBatch,
    PairLoader,
    Subset,
)
from clip_refine.errors import DataError
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.embed import EmbeddedPairs, embed_pairs
from clip_refine.evaluation.headline import resampled_headline
from clip_refine.evaluation.scores import (
    ModelFeatures,
    TaskFeatures,
    embed_model,
    probe_features,
    score_features,
)
from clip_refine.peak_memory import PeakMemory
from clip_refine.posthoc import Peer, fit_peer
from clip_refine.results import ComparisonRow
from clip_refine.train import StepLog, TowerPrecision
from clip_refine.train.teacher_cache import CachedTeacher, TeacherFeatures


@dataclass(frozen=True, eq=False)
class Training:
    """What was done to the model before it is scored.

    Attributes:
        seed: Of the run.
        learning_rate: None for the untouched model.
        steps: Taken.
        pairs: Training images.
        seconds: Of training.
        peak_memory: GB while it trained.
    """

    seed: int
    learning_rate: float | None = None
    steps: int = 0
    pairs: int = 0
    seconds: float = 0.0
    peak_memory: float = 0.0


@dataclass(frozen=True, eq=False)
class Workbench:
    """One model and one set of pairs, on which recipe after recipe is tried.

    Attributes:
        encoder: The model; every training begins from `weights`.
        weights: Its weights as they came, on the CPU.
        training: What every recipe is trained on.
        selection: Held-out training pairs: peers are fitted and learning rates chosen on them.
        held_out: What everything is scored on.
        tasks: Zero-shot tasks, also for linear probes.
        teacher: Features of `training` from the untouched model.
        accelerator: Accelerate's.
        embedder: The way to feed the model, without progress bars.
        precision: Of every run.
        seed: Of splits in the evaluation and of the bootstrap; one for all runs.
        resamples: Of the bootstrap.
    """

    encoder: Any
    weights: Mapping[str, Tensor]
    training: ImageCaptions
    selection: ImageCaptions
    held_out: ImageCaptions
    tasks: Sequence[LabelledImages]
    teacher: TeacherFeatures
    accelerator: Accelerator
    embedder: Embedder
    precision: TowerPrecision
    seed: int
    resamples: int

    def restore(self, config: RefineConfig) -> nn.Module:
        """The untouched model, ready to be trained with these settings."""
        student = build.build_student(self.encoder, config.train, self.accelerator.device)
        student.load_state_dict(self.weights)
        return student

    def train(self, config: RefineConfig, *, fraction: float) -> Training:
        """Refine the model in place, from its untouched weights.

        The same steps as `refine` takes with these settings, but for the teacher, which is read
        from `teacher`.

        Args:
            config: Of this run.
            fraction: Share of the training pairs to use; the same ones for every recipe and seed.

        Raises:
            TrainingError: A loss or gradient is not finite.
            DataError: There are fewer pairs than a batch.
        """
        clock, memory = Clock(), PeakMemory(self.accelerator.device)
        student = self.restore(config)
        pairs = self.part(fraction)
        steps = build.count_steps(config.train, pairs, 1)
        with quiet(), clock("train"):
            features = build.measure_features(config, self.embedder, pairs)
            config, scale = build.build_scale(config, student, features, pairs)
            prior = build.build_prior(config.prior, features, scale)
            teacher = CachedTeacher(
                self.teacher.part(pairs.indices),
                image_factor=scale.image_factor,
                text_factor=scale.text_factor,
            )
            with build.build_part(config, student, self.accelerator):
                trainer = build.build_trainer(
                    config,
                    student,
                    teacher,
                    self.precision,
                    prior,
                    self.accelerator,
                    steps=steps,
                    features=features,
                    scale=scale,
                )
                batches = islice(self._batches(config, pairs, teacher), steps)
                trainer.train(batches, steps=steps, log=StepLog(None))
            scale.undo()
        self.accelerator.free_memory()
        return Training(
            seed=config.seed,
            learning_rate=config.train.learning_rate,
            steps=steps,
            pairs=len(pairs),
            seconds=clock.seconds["train"],
            peak_memory=memory.gigabytes,
        )

    def part(self, fraction: float) -> Subset:
        """A share of the training pairs, the same ones for every recipe and seed."""
        return Subset(self.training, self._chosen(fraction), self.training.name)

    def embed(self) -> tuple[ModelFeatures, EmbeddedPairs]:
        """What the model as it now is makes of all it is scored on, and of the selection pairs."""
        self.encoder.eval()
        return (
            embed_model(self.embedder, self.held_out, self.tasks),
            embed_pairs(self.embedder, self.selection),
        )

    def score(
        self, name: str, training: Training, features: ModelFeatures, *, selection: float | None
    ) -> tuple[ComparisonRow, dict[str, list[float]]]:
        """A row of the table, and its headline resampled."""
        scores = score_features(features, seed=self.seed)
        row = ComparisonRow(
            recipe=name,
            seed=training.seed,
            learning_rate=training.learning_rate,
            steps=training.steps,
            pairs=training.pairs,
            geometry=scores.geometry,
            retrieval=scores.retrieval,
            zero_shot=scores.zero_shot,
            linear_probe=probe_features(features, seed=self.seed),
            selection=selection,
            seconds=training.seconds,
            peak_memory=training.peak_memory,
        )
        return row, resampled_headline(features, resamples=self.resamples, seed=self.seed)

    def apply_peer(
        self, peer_name: str, training: Training, features: ModelFeatures, fitted_on: EmbeddedPairs
    ) -> tuple[Training, ModelFeatures]:
        """Fit a peer on the selection pairs and put it behind the model."""
        clock, memory = Clock(), PeakMemory(self.accelerator.device)
        try:
            with clock("peer"):
                peer = fit_peer(peer_name, fitted_on.image_features, fitted_on.text_features)
                moved = transformed(features, peer)
        except ValueError as error:
            raise DataError(
                f"{self.selection.name}: {peer_name} cannot be fitted. {error}."
            ) from error
        seconds = training.seconds + clock.seconds["peer"]
        peak = max(training.peak_memory, memory.gigabytes)
        return replace(training, seconds=seconds, peak_memory=peak), moved

    def _chosen(self, fraction: float) -> list[int]:
        """Positions of the training pairs that a run uses; a smaller part lies in a larger one."""
        count = len(self.training)
        generator = build.seeded_generator(self.seed, "fraction")
        order = torch.randperm(count, generator=generator).tolist()
        return sorted(order[: max(1, round(fraction * count))])

    def _batches(
        self, config: RefineConfig, pairs: ImageCaptions, teacher: CachedTeacher
    ) -> Iterator[PairBatch]:
        """The batches of `build_batches`, with the teacher told which they are."""
        loader = PairLoader(
            pairs,
            batch_size=config.train.batch_size,
            preprocess=self.embedder.reader or self.encoder.preprocess,
            tokenizer=self.encoder.tokenizer,
            workers=self.embedder.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        for plan in build.epoch_plans(config, pairs):
            yield from teacher.follow(loader.epoch(plan), plan)


def transformed(features: ModelFeatures, peer: Peer) -> ModelFeatures:
    """The features behind a peer; a class is a text, its vector the mean over its prompts.

    Raises:
        ValueError: As the peer's transforms.
    """
    pairs = EmbeddedPairs(
        peer.transform_image(features.pairs.image_features),
        peer.transform_text(features.pairs.text_features),
        features.pairs.text_to_image,
    )
    tasks = [
        TaskFeatures(
            task.name,
            peer.transform_image(task.image_features),
            peer.transform_text(task.class_features),
            task.labels,
        )
        for task in features.tasks
    ]
    return ModelFeatures(pairs, tasks, normalize=False, dim=peer.dim)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and remarks of single runs, of which a comparison has many."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
