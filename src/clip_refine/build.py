"""Configuration → objects. The only file that knows both."""

import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import nn

from clip_refine.config import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    PriorConfig,
    RefineConfig,
    TrainConfig,
    override,
)
from clip_refine.console import console
from clip_refine.data import (
    EpochPlan,
    ImageCaptions,
    LabelledImages,
    PairBatch,
    Subset,
    hold_out,
    pair_batches,
    read_class_folders,
    read_table,
)
from clip_refine.errors import ConfigError, DataError, ModelError
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.embed import embed_pairs
from clip_refine.losses import Objective, PairFeatures
from clip_refine.models import DualEncoder, FeatureScale, RawNorms, Teacher, load_open_clip
from clip_refine.priors import Fixed, Gaussian, NormMatched, Prior, StandardNormal, Uniform
from clip_refine.toy import model_directory, toy_tasks, toy_train, toy_val
from clip_refine.train import (
    StudentTowers,
    TowerPrecision,
    Trainer,
    make_optimiser,
    make_schedule,
    measure_precision,
    prepare_student,
)

TOY = "toy"
NORM_SAMPLE = 512
"""Training pairs that raw norms are measured on."""


def build_accelerator(device: str) -> Accelerator:
    """Accelerate's view of devices and processes.

    Raises:
        ConfigError: There is no such device here.
    """
    if device != "auto":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"device {device!r}: not usable here ({str(error).splitlines()[0]}). "
                "Pass --train.device auto or cpu."
            ) from error
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    # every step has one graph; saying so lets models have parts that no feature depends on (CoCa)
    handler = DistributedDataParallelKwargs(static_graph=True)
    return Accelerator(cpu=device == "cpu", kwargs_handlers=[handler])


def build_data(config: DataConfig, *, seed: int) -> tuple[ImageCaptions, ImageCaptions]:
    """Training pairs and held-out pairs.

    Raises:
        ConfigError: No training source is named.
        DataError: A source cannot be read, or is too small to hold a part out.
    """
    if config.train is None:
        raise ConfigError("data.train is missing. Give captioned images: --data.train captions.csv")
    if config.val is not None:
        return open_source(config.train, config), open_source(config.val, config)
    if config.train == TOY:
        return toy_train(), toy_val()
    source = open_source(config.train, config)
    return hold_out(source, fraction=config.val_fraction, seed=seed)


def build_held_out(config: DataConfig, *, seed: int) -> ImageCaptions:
    """The pairs that `refine` with these settings takes its before/after numbers from."""
    if config.val is not None:
        return toy_val() if config.val == TOY else open_source(config.val, config)
    if config.train is None:
        raise ConfigError("data.val is missing. Give captioned images: --data.val captions.csv")
    return build_data(config, seed=seed)[1]


def open_source(name: str, config: DataConfig) -> ImageCaptions:
    """Recognise a source of captioned images and open it.

    Raises:
        DataError: The kind is not known, or the source is bad.
    """
    path = Path(name)
    match path.suffix.lower():
        case "" if name == TOY:
            return toy_train()
        case ".csv" | ".tsv":
            return read_table(
                path, image_column=config.image_column, caption_column=config.caption_column
            )
    raise DataError(
        f"{name}: not a kind of source that can be read. Give a .csv or .tsv file with an image "
        f"and a caption column, or {TOY!r}."
    )


def build_tasks(config: EvaluationConfig) -> list[LabelledImages]:
    """The zero-shot tasks.

    Raises:
        DataError: A folder is missing or has no classes.
        ConfigError: Two tasks have one name.
    """
    tasks: list[LabelledImages] = []
    for name in config.zero_shot:
        if name == TOY:
            tasks += toy_tasks()
        else:
            tasks.append(read_class_folders(Path(name), templates=(config.template,)))
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"evaluation.zero_shot: two tasks have one name among {', '.join(names)}. "
            "Rename a folder, or leave one out."
        )
    return tasks


def build_model(config: ModelConfig) -> DualEncoder:
    """The model to start from, float32, in evaluation mode.

    Raises:
        ModelError: It cannot be found or loaded.
    """
    if config.name == TOY:
        return load_open_clip(f"local-dir:{model_directory()}")
    return load_open_clip(config.name, config.pretrained)


def build_student(model: DualEncoder, config: TrainConfig, device: torch.device) -> nn.Module:
    """The model ready to be trained, on `device`.

    Raises:
        ModelError: The object is no dual encoder or no module.
    """
    if not isinstance(model, nn.Module) or not isinstance(model, DualEncoder):
        raise ModelError(
            f"{type(model).__name__} cannot be refined: it must be a torch.nn.Module with "
            "encode_image, encode_text, preprocess, tokenizer and logit_scale."
        )
    prepare_student(
        model,
        logit_scale=config.logit_scale,
        normalization_statistics=config.normalization_statistics,
    )
    return model.to(device)


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
            return Uniform(low=-half, high=half)
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


def build_embedder(config: RefineConfig, model: DualEncoder, accelerator: Accelerator) -> Embedder:
    """The way to feed a model for measuring."""
    return Embedder(
        model,
        accelerator.device,
        config.evaluation.batch_size,
        count_workers(config.train.workers, accelerator.device),
        visible=accelerator.is_main_process,
    )


def measure_features(
    config: RefineConfig, embedder: Embedder, pairs: ImageCaptions
) -> PairFeatures:
    """Raw features of training pairs: of all for a prior with their moments, else of a sample."""
    order = torch.randperm(len(pairs), generator=seeded_generator(config.seed, "norms")).tolist()
    fitted = config.prior.kind.startswith("gaussian") or config.prior.kind == "fixed"
    chosen = order if fitted else order[:NORM_SAMPLE]
    one_caption = Subset(pairs, chosen, "pairs to measure")
    embedded = embed_pairs(embedder, one_caption)
    return PairFeatures(embedded.image_features, embedded.first_caption_features)


def build_scale(
    config: RefineConfig, student: Any, features: PairFeatures, pairs: ImageCaptions
) -> tuple[RefineConfig, FeatureScale]:
    """Bring the student's raw features to the paper's scale where the settings ask for it.

    Returns:
        The settings with `auto` decided, and what was changed, to undo it after training.

    Raises:
        ModelError: `canonical` was asked for and a tower has no layer to rescale.
    """
    loss = config.loss
    norms = RawNorms(
        image=float(features.image_features.norm(dim=-1).mean()),
        text=float(features.text_features.norm(dim=-1).mean()),
        logit_scale=float(student.logit_scale.detach()),
    )
    compares_raw = bool(loss.rafa_weight or loss.hycd_weight) and not loss.normalize
    if loss.feature_scale == "as-is" or (
        loss.feature_scale == "auto" and (norms.near_the_papers or not compares_raw)
    ):
        return override(config, loss={"feature_scale": "as-is"}), FeatureScale()
    pixels, tokens = _sample(student, pairs, 2)
    device = next(student.parameters()).device
    canonical = {"feature_scale": "canonical", "normalize": True, "temperature": None}
    try:
        scale = FeatureScale.canonical(student, pixels.to(device), tokens.to(device), norms)
    except ModelError as error:
        if loss.feature_scale == "canonical":
            raise
        console.print(f"{error} HyCD runs on unit features, RaFA on raw ones as they are.")
        return override(config, loss={**canonical, "feature_scale": "as-is"}), FeatureScale()
    console.print(
        f"Raw norms are {norms.image:.1f} (image) and {norms.text:.1f} (text) at logit scale "
        f"{norms.logit_scale:.0f}; the paper's settings belong to {norms.canonical:.1f}. Training "
        "therefore runs at that scale, HyCD on unit features (docs/method.md); the published form "
        "is --recipe clip-refine-paper."
    )
    return override(config, loss=canonical), scale


def _sample(model: Any, pairs: ImageCaptions, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and tokens of the first few pairs."""
    sample = range(min(count, len(pairs)))
    pixels = torch.stack([model.preprocess(pairs.load_image(index)) for index in sample])
    return pixels, model.tokenizer([pairs.captions[index][0] for index in sample])


def build_precision(
    config: TrainConfig, model: Any, pairs: ImageCaptions, accelerator: Accelerator
) -> TowerPrecision:
    """The precision asked for, or the faster one of each tower, measured by the first process."""
    if config.precision != "auto":
        return TowerPrecision.from_name(config.precision)
    pixels, tokens = _sample(model, pairs, 16)
    measured = measure_precision(model, pixels, tokens, accelerator.device)
    chosen = [measured.choice]
    broadcast_object_list(chosen)
    if accelerator.is_main_process:
        console.print(
            f"Precision {chosen[0].name}: bf16 is {measured.image_speedup:.1f} times as fast as "
            f"fp32 for the image tower, {measured.text_speedup:.1f} times for the text tower."
        )
    return chosen[0]


def build_trainer(
    config: RefineConfig,
    student: nn.Module,
    teacher: Teacher,
    precision: TowerPrecision,
    prior: Prior,
    accelerator: Accelerator,
    *,
    steps: int,
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
    return config.epochs * (len(pairs) // config.batch_size)


def build_batches(
    config: RefineConfig, pairs: ImageCaptions, model: DualEncoder, accelerator: Accelerator
) -> Iterator[PairBatch]:
    """This process's batches of all epochs, each epoch newly shuffled with newly drawn captions."""
    generator = seeded_generator(config.seed, "order")
    for _ in range(config.train.epochs):
        yield from pair_batches(
            pairs,
            EpochPlan.draw(pairs, generator=generator),
            batch_size=config.train.batch_size,
            preprocess=model.preprocess,
            tokenizer=model.tokenizer,
            workers=count_workers(config.train.workers, accelerator.device),
            pin_memory=accelerator.device.type == "cuda",
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
        )


def count_workers(workers: int | None, device: torch.device) -> int:
    """Decoding processes: as asked for, else none on a CPU, which is busy training anyway."""
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that none depends on another's draws."""
    return torch.Generator().manual_seed((seed + zlib.crc32(purpose.encode())) % 2**63)
