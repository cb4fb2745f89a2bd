"""Settings → objective, references and the steps."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from clip_refine.build.devices import count_workers, seeded_generator
from clip_refine.config import (
    LossConfig,
    PriorConfig,
    RefineConfig,
    TrainConfig,
)
from clip_refine.console import remark
from clip_refine.data import (
    EpochPlan,
    ImageCaptions,
    PairBatch,
    PairLoader,
    PixelReader,
    Stream,
    stream_batches,
)
from clip_refine.errors import ConfigError, DataError
from clip_refine.losses import Objective, PairFeatures
from clip_refine.models import DualEncoder, FeatureScale, Teacher
from clip_refine.priors import Fixed, Gaussian, NormMatched, Prior, StandardNormal, Uniform
from clip_refine.train import (
    StudentTowers,
    TowerPrecision,
    Trainer,
    make_optimiser,
    make_schedule,
    trained_part,
)


def build_objective(config: LossConfig) -> Objective:
    """The weighted sum of losses."""
    settings = config.model_dump(exclude={"rafa_decay", "references", "feature_scale"})
    return Objective(**settings)


def build_prior(config: PriorConfig, features: PairFeatures, scale: FeatureScale) -> Prior:
    """The distribution of the references.

    Args:
        config: Which one.
        features: (N, d) raw features of training pairs, for the priors that are fitted to them.
        scale: What the features are multiplied by in training.
    """
    image = scale.image_factor * features.image_features
    text = scale.text_factor * features.text_features
    match config.kind:
        case "standard_normal":
            return StandardNormal(scale=config.scale)
        case "uniform":
            half = math.sqrt(3 * config.scale)
            return Uniform(low=-half, high=half) if half else StandardNormal(scale=0.0)
        case "gaussian_image":
            return Gaussian(image.mean(0), image.std(0))
        case "gaussian_text":
            return Gaussian(text.mean(0), text.std(0))
        case "gaussian_both":
            both = torch.cat([image, text])
            return Gaussian(both.mean(0), both.std(0))
        case "fixed":
            return Fixed(torch.cat([image, text]).mean(0))
        case "norm_matched":
            return NormMatched(float(torch.cat([image, text]).norm(dim=-1).mean()))


@contextmanager
def build_part(
    config: RefineConfig, student: nn.Module, accelerator: Accelerator
) -> Iterator[None]:
    """Train only what the settings ask for within the block; the student is whole after it.

    What is random in a model, such as dropout and new adapters, follows the seed in here.

    Raises:
        ModelError: The student has no such part.
    """
    train = config.train
    seed = seeded_generator(config.seed, "training").initial_seed() + accelerator.process_index
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        with trained_part(
            student,
            train.parameters,
            blocks=train.blocks,
            lora_rank=train.lora_rank,
            lora_alpha=train.lora_alpha,
            gradient_checkpointing=train.gradient_checkpointing,
        ) as part:
            remark(str(part))
            yield


def build_trainer(
    config: RefineConfig,
    student: nn.Module,
    teacher: Teacher,
    precision: TowerPrecision,
    prior: Prior,
    accelerator: Accelerator,
    *,
    steps: int,
    features: PairFeatures | None = None,
    scale: FeatureScale | None = None,
) -> Trainer:
    """Everything that takes the steps.

    `features` are raw ones of training pairs, as the model gave them; objectives that know the
    teacher's centroids need them.
    """
    train, loss = config.train, config.loss
    scale = scale or FeatureScale()
    sigmoid = loss.contrastive_weight and loss.contrastive_form == "sigmoid"
    if sigmoid and getattr(student, "logit_bias", None) is None:
        raise ConfigError(
            "loss.contrastive_form sigmoid needs a model with a logit bias, as SigLIP's have; this "
            "one has none. Use softmax."
        )
    optimiser = make_optimiser(
        student.named_parameters(),
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        decay=train.decay,
        device=accelerator.device,
    )
    schedule = make_schedule(
        optimiser, schedule=train.schedule, warmup_steps=train.warmup_steps, steps=steps
    )
    return Trainer(
        accelerator=accelerator,
        towers=accelerator.prepare_model(StudentTowers(student, precision)),
        teacher=teacher,
        objective=build_objective(config.loss),
        precision=precision,
        prior=prior,
        generator=seeded_generator(config.seed, "references"),
        independent_references=config.loss.references == "independent",
        rafa_decay_steps=steps if config.loss.rafa_decay == "linear" else None,
        schedule=schedule,
        clip_norm=train.clip_norm,
        updates_statistics=train.normalization_statistics == "updated",
        dropout=train.dropout == "on",
        scale=scale,
        centroid_gap=None if features is None else scale.gap(features).to(accelerator.device),
    )


def count_steps(config: TrainConfig, pairs: ImageCaptions | Stream, processes: int) -> int:
    """Steps of all epochs, or as many as were asked for; incomplete batches are left out.

    Raises:
        DataError: There are fewer pairs than a batch.
        ConfigError: The processes cannot share a batch evenly, or a stream does not tell its
            length.
    """
    if config.batch_size % processes:
        raise ConfigError(
            f"train.batch_size {config.batch_size} cannot be shared by {processes} processes. "
            f"Use a multiple of {processes}."
        )
    steps = config.steps or config.epochs * _steps_of_an_epoch(config, pairs)
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"train.warmup_steps {config.warmup_steps} is not below the {steps} steps of this run, "
            "so the learning rate would never be reached. Use fewer."
        )
    return steps


def _steps_of_an_epoch(config: TrainConfig, pairs: ImageCaptions | Stream) -> int:
    length = pairs.length if isinstance(pairs, Stream) else len(pairs)
    if length is None:
        raise ConfigError(
            f"train.steps is missing: {pairs.name} does not tell how many pairs it has. Say how "
            f"many steps of {config.batch_size} pairs to take, as in --train.steps 200."
        )
    if length < config.batch_size:
        raise DataError(
            f"{pairs.name}: {length} images, fewer than a batch of {config.batch_size}. Give "
            "more images or a smaller --train.batch-size; an epoch should have a few dozen steps."
        )
    return length // config.batch_size


def epoch_plans(config: RefineConfig, pairs: ImageCaptions) -> Iterator[EpochPlan]:
    """One plan after another, each newly shuffled with newly drawn captions, without end."""
    generator = seeded_generator(config.seed, "order")
    while True:
        yield EpochPlan.draw(pairs, generator=generator)


def count_pairs(config: TrainConfig, pairs: ImageCaptions | Stream, steps: int) -> int:
    """Training pairs; of a stream those that are used."""
    return steps * config.batch_size if isinstance(pairs, Stream) else len(pairs)


def build_batches(
    config: RefineConfig,
    pairs: ImageCaptions | Stream,
    model: DualEncoder,
    accelerator: Accelerator,
    reader: PixelReader | None = None,
) -> Iterator[PairBatch]:
    """This process's batches of all steps, each epoch newly shuffled with newly drawn captions."""
    steps = count_steps(config.train, pairs, accelerator.num_processes)
    settings: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "preprocess": reader or model.preprocess,
        "tokenizer": model.tokenizer,
        "workers": count_workers(config.train.workers, accelerator.device),
        "pin_memory": accelerator.device.type == "cuda",
        "rank": accelerator.process_index,
        "processes": accelerator.num_processes,
    }
    if isinstance(pairs, Stream):
        return stream_batches(pairs, seed=config.seed, steps=steps, **settings)
    loader = PairLoader(pairs, **settings)
    epochs = (loader.epoch(plan) for plan in epoch_plans(config, pairs))
    return islice(chain.from_iterable(epochs), steps)
