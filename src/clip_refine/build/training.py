"""Settings → objective, references and the steps."""

import math
from collections.abc import Iterator

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
from clip_refine.data import (
    EpochPlan,
    ImageCaptions,
    PairBatch,
    PairLoader,
    PixelReader,
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


def build_trainer(
    config: RefineConfig,
    student: nn.Module,
    teacher: Teacher,
    precision: TowerPrecision,
    prior: Prior,
    accelerator: Accelerator,
    *,
    steps: int,
    scale: FeatureScale | None = None,
) -> Trainer:
    """Everything that takes the steps."""
    train = config.train
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
        scale=scale or FeatureScale(),
    )


def count_steps(config: TrainConfig, pairs: ImageCaptions, processes: int) -> int:
    """Steps of all epochs; incomplete batches are left out.

    Raises:
        DataError: There are fewer pairs than a batch.
        ConfigError: The processes cannot share a batch evenly.
    """
    if config.batch_size % processes:
        raise ConfigError(
            f"train.batch_size {config.batch_size} cannot be shared by {processes} processes. "
            f"Use a multiple of {processes}."
        )
    if len(pairs) < config.batch_size:
        raise DataError(
            f"{pairs.name}: {len(pairs)} images, fewer than a batch of {config.batch_size}. Give "
            "more images or a smaller --train.batch-size; an epoch should have a few dozen steps."
        )
    steps = config.epochs * (len(pairs) // config.batch_size)
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"train.warmup_steps {config.warmup_steps} is not below the {steps} steps of this run, "
            "so the learning rate would never be reached. Use fewer."
        )
    return steps


def build_batches(
    config: RefineConfig,
    pairs: ImageCaptions,
    model: DualEncoder,
    accelerator: Accelerator,
    reader: PixelReader | None = None,
) -> Iterator[PairBatch]:
    """This process's batches of all epochs, each epoch newly shuffled with newly drawn captions."""
    generator = seeded_generator(config.seed, "order")
    loader = PairLoader(
        pairs,
        batch_size=config.train.batch_size,
        preprocess=reader or model.preprocess,
        tokenizer=model.tokenizer,
        workers=count_workers(config.train.workers, accelerator.device),
        pin_memory=accelerator.device.type == "cuda",
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    for _ in range(config.train.epochs):
        yield from loader.epoch(EpochPlan.draw(pairs, generator=generator))
