"""What the models of a suite are measured on: sources that were looked at, and their tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from clip_refine import build
from clip_refine.build.suite_parts import build_templates
from clip_refine.build.suites import OpenedSource, SuitePlaces, open_sources
from clip_refine.config import EvaluateConfig, ModelConfig, Suite
from clip_refine.config.tasks import FewShotTask, LinearProbeTask, Task, ZeroShotTask
from clip_refine.console import console
from clip_refine.data.content import fingerprint
from clip_refine.data.images import DECODING
from clip_refine.data.levels import preprocess_fingerprint
from clip_refine.errors import DataError
from clip_refine.evaluation import Embedder, class_vectors
from clip_refine.evaluation.caption_tasks import (
    geometry_task,
    mixed_search_task,
    retrieval_task,
    separation_task,
)
from clip_refine.evaluation.class_tasks import few_shot_task, linear_probe_task, zero_shot_task
from clip_refine.evaluation.embed import EmbeddedPairs
from clip_refine.evaluation.feature_store import FeatureStore, Filler, image_fingerprints
from clip_refine.evaluation.outcome import Bootstrap, Outcome
from clip_refine.models.identity import identity


@dataclass(frozen=True)
class Content:
    """An opened source with what is in its images."""

    source: OpenedSource
    fingerprints: Sequence[str]

    @property
    def texts(self) -> list[str]:
        """All captions, image by image."""
        return [text for texts in self.source.captions or () for text in texts]

    @property
    def owners(self) -> Tensor:
        """(M,) the image of each caption."""
        counts = torch.tensor([len(texts) for texts in self.source.captions or ()])
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    @property
    def labels(self) -> Tensor:
        """(N,) the class of each image."""
        return torch.tensor(list(self.source.labels))

    def fingerprint(self, *more: str) -> str:
        """Of images with captions or classes, and what else counts."""
        described = self.source.captions or [(str(label),) for label in self.source.labels]
        parts = [
            "\0".join((name, *texts))
            for name, texts in zip(self.fingerprints, described, strict=True)
        ]
        return fingerprint(*(part.encode() for part in (*parts, *more)))


def read_sources(
    config: EvaluateConfig, suite: Suite, accelerator: Accelerator
) -> tuple[dict[str, Content], dict[str, str]]:
    """Open all sources before anything is computed, and look at every image.

    Returns:
        The sources that are there, and why others are not.

    Raises:
        DataError: One is not there and none may be missing, no task is left, or one is bad.
    """
    opened, missing = open_sources(suite, SuitePlaces.of(config))
    if missing:
        listed = "\n".join(f"  {name}: {why}" for name, why in missing.items())
        none_left = all(set(task.sources().values()) & set(missing) for task in suite.tasks)
        if config.missing == "stop" or none_left:
            raise DataError(
                f"suite {suite.name}: {len(missing)} of {len(missing) + len(opened)} sources are "
                f"not there.\n{listed}\nLay them out (docs/evaluation.md), say where they are with "
                "--data-root, or pass --missing skip to measure on the others."
            )
        if accelerator.is_main_process:
            console.print(f"Left out, not there:\n{listed}", style="yellow", markup=False)
    visible = accelerator.is_main_process
    return {
        name: Content(source, image_fingerprints(source.images, f"Reading {name}", visible=visible))
        for name, source in opened.items()
    }, missing


@dataclass(frozen=True)
class EncodedModel:
    """A model's features, when the model itself is gone.

    Attributes:
        fingerprint: Of the model.
        features: On disk.
        logit_scale: The model's.
    """

    fingerprint: str
    features: FeatureStore
    logit_scale: float


@dataclass(frozen=True)
class SuiteBench:
    """What all models are measured on.

    Attributes:
        config: Every setting.
        suite: Sources and tasks.
        contents: The sources that are there.
        accelerator: Which process this is.
    """

    config: EvaluateConfig
    suite: Suite
    contents: Mapping[str, Content]
    accelerator: Accelerator

    @property
    def tasks(self) -> list[Task]:
        """Those whose sources are there."""
        return [
            task
            for task in self.suite.tasks
            if all(name in self.contents for name in task.sources().values())
        ]

    def encode(self, label: str, model: ModelConfig) -> EncodedModel:
        """Put all features of a model into the cache."""
        device = self.accelerator.device
        encoder = build.build_model(model)
        embedder = Embedder(
            encoder,
            device,
            self.config.evaluation.batch_size,
            build.count_workers(self.config.workers, device),
            visible=self.accelerator.is_main_process,
        )
        if isinstance(encoder, nn.Module):
            encoder.float().eval().to(device)
        pixels = preprocess_fingerprint(encoder.preprocess).encode()
        name = fingerprint(str(DECODING).encode(), pixels, *identity(encoder, "fp32", device))
        store = FeatureStore((self.config.cache or build.default_cache()) / "features" / name)
        filler = Filler(store, embedder, self.accelerator)
        for source, content in self.contents.items():
            filler.images(content.source.images, content.fingerprints, f"{label}: {source}")
            if content.source.captions is not None:
                filler.texts(content.texts, f"{label}: {source} captions")
        for task in self.tasks:
            if task.kind == "zero-shot":
                filler.texts(self._prompts(task), f"{label}: {task.source} prompts")
        scale = float(torch.as_tensor(embedder.model.logit_scale).detach())
        return EncodedModel(name, store, scale)

    def measure(self, task: Task, model: EncodedModel) -> Outcome:
        """One task from the features in the cache.

        Raises:
            DataError: The source is too small for the task, or does not fit it.
        """
        try:
            if self.contents[task.source].source.captions is None:
                return self._measure_classes(task, model)
            return self._measure_captions(task, model)
        except ValueError as error:
            raise DataError(f"task {task.title}: {error}.") from error

    def _measure_classes(self, task: Task, model: EncodedModel) -> Outcome:
        content, bootstrap = self.contents[task.source], self._bootstrap(task)
        images, labels = model.features.images(content.fingerprints), content.labels
        match task.kind:
            case "zero-shot":
                names = content.source.class_names
                prompts = model.features.texts(self._prompts(task))
                classes = class_vectors(prompts.view(len(names), -1, prompts.shape[1]))
                return zero_shot_task(
                    images,
                    classes,
                    labels,
                    class_names=names,
                    logit_scale=model.logit_scale,
                    bootstrap=bootstrap,
                )
            case "linear-probe":
                training = self._training(task, model)
                return linear_probe_task(images, labels, training, bootstrap=bootstrap)
            case "few-shot-probe":
                return few_shot_task(
                    images,
                    labels,
                    self._training(task, model),
                    shots=task.shots,
                    draws=task.draws,
                    bootstrap=bootstrap,
                )
        raise ValueError(f"{task.kind} is not measured on classes")

    def _measure_captions(self, task: Task, model: EncodedModel) -> Outcome:
        content, bootstrap = self.contents[task.source], self._bootstrap(task)
        pairs = EmbeddedPairs(
            model.features.images(content.fingerprints),
            model.features.texts(content.texts),
            content.owners,
        )
        match task.kind:
            case "retrieval":
                return retrieval_task(pairs, protocol=task.protocol, bootstrap=bootstrap)
            case "mixed-search":
                return mixed_search_task(pairs, protocol=task.protocol, bootstrap=bootstrap)
            case "separation":
                return separation_task(
                    pairs,
                    protocol=task.protocol,
                    false_positive_rate=task.false_positive_rate,
                    bootstrap=bootstrap,
                )
            case "geometry":
                return geometry_task(pairs, bootstrap=bootstrap)
        raise ValueError(f"{task.kind} is not measured on captions")

    def templates(self, task: ZeroShotTask) -> tuple[str, tuple[str, ...]]:
        """The name of a task's prompt set, and the set."""
        return build_templates(task, self.config.prompts, SuitePlaces.of(self.config))

    def data_fingerprint(self, task: Task) -> str:
        """Of images with captions or classes, of class names, prompts and training images."""
        content, more = self.contents[task.source], []
        if task.kind == "zero-shot":
            more = [*content.source.class_names, *self.templates(task)[1]]
        train = task.sources().get("train")
        return content.fingerprint(*more, *([self.contents[train].fingerprint()] if train else []))

    def _bootstrap(self, task: Task) -> Bootstrap:
        return Bootstrap(self.suite.resamples, self.config.seed, task.source)

    def _training(
        self, task: LinearProbeTask | FewShotTask, model: EncodedModel
    ) -> tuple[Tensor, Tensor] | None:
        if task.train is None:
            return None
        content = self.contents[task.train]
        if content.source.class_names != self.contents[task.source].source.class_names:
            raise ValueError(f"{task.train} and {task.source} have other classes")
        return model.features.images(content.fingerprints), content.labels

    def _prompts(self, task: ZeroShotTask) -> list[str]:
        """Every class name in every template, class by class."""
        names = self.contents[task.source].source.class_names
        return [t.replace("{}", name) for name in names for t in self.templates(task)[1]]
