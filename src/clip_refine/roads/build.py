"""Names in the configuration → objects. The only file that knows both."""

import math
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, compress, islice, repeat
from pathlib import Path
from typing import Any

import open_clip
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, patch_environment
from torch import Tensor, nn

from clip_refine.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PriorConfig,
    RefineConfig,
    TrainConfig,
    named_model,
)
from clip_refine.config.settings import SCHEMAS, no_end
from clip_refine.data import (
    EpochPlan,
    EveryCaption,
    ImageCaptions,
    LabelledImages,
    PairBatch,
    PairLoader,
    PixelReader,
    Stream,
    hold_out,
    open_pairs,
    read_class_folders,
    stream_batches,
    with_cached_pixels,
)
from clip_refine.data.loader import side_to_keep, swap_words
from clip_refine.data.pairs import (
    TRAINING,
    GivenPairs,
    Images,
    PairSource,
    as_pairs,
    has_columns,
    image_groups,
    warn_of_shared,
)
from clip_refine.data.sources import TOY, open_training
from clip_refine.data.streams import WatchedStream
from clip_refine.losses import Objective, PairFeatures
from clip_refine.losses.objective import OwnLoss, check_objective
from clip_refine.models import (
    DualEncoder,
    FeatureScale,
    Teacher,
    call_factory,
    check_dual_encoder,
    load_open_clip,
    load_transformers,
    load_weights_file,
)
from clip_refine.models.checkpoints import is_run, load_own_weights, made_by, recognise_folder
from clip_refine.models.embed import Embedder
from clip_refine.models.encoder import OWN, CountingTokenizer, files_of
from clip_refine.models.open_clip import OpenClipTokenizer, quiet_open_clip, resolve_pretrained
from clip_refine.models.weights import Heads
from clip_refine.priors import Fixed, Gaussian, NormMatched, Prior, StandardNormal, Uniform
from clip_refine.support.console import remark
from clip_refine.support.errors import ConfigError, DataError, ModelError
from clip_refine.support.folder import SUMS, check_sums, default_cache
from clip_refine.toy import model_directory, toy_tasks, toy_val
from clip_refine.train import (
    StudentTowers,
    TowerPrecision,
    Trainer,
    learning_rates,
    make_optimiser,
    make_schedule,
    prepare_student,
    share_out,
    trained_part,
)
from clip_refine.train.part import TrainedPart, frozen_towers, heads_on_frozen

# --------------------------------------------------------------------------------------------------
# Settings → device, processes and generators.


def build_accelerator(device: str) -> Accelerator:
    """Accelerate's view of devices and processes."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device != "auto":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"device {device!r}: not usable here ({str(error).splitlines()[0]}). "
                "Use auto or cpu."
            ) from error
    if several and ":" in device:
        raise ConfigError(f"device {device!r}: several processes need one each. Use auto.")
    if not several:
        # Accelerate keeps the first device of a process for good; a later run may ask for another
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        if device != "auto":
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
    offload = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    if shares_weights() and (offload or os.environ.get("FSDP_VERSION") != "2"):
        raise ConfigError(
            "accelerate launch --use_fsdp: weights are shared out as version 2 does it, and stay "
            "on their device. Give --fsdp_version 2 and no --fsdp_offload_params, or leave "
            "--use_fsdp out: then each process has all of the weights."
        )
    unheeded = sorted(
        {name for name in os.environ if name.startswith("FSDP_")}
        - {"FSDP_VERSION", "FSDP_OFFLOAD_PARAMS"}
    )
    if shares_weights() and unheeded:  # accelerate sets some by itself
        remark(f"Of FSDP's options {', '.join(unheeded)} change nothing here (docs/scale.md).")
    # what is float32 is so on every device, products as convolutions, which PyTorch lets have TF32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch 2.9 says that these will have other names
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    # every step has one graph; saying so lets models have parts that no feature depends on (CoCa)
    handler = DistributedDataParallelKwargs(static_graph=True)
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # `share_out` does it, on a CPU, too
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision="no",  # each tower has its own autocast
            gradient_accumulation_steps=1,
            kwargs_handlers=[handler],
        )


def shares_weights() -> bool:
    """Whether `accelerate launch --use_fsdp` started this."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sharing_processes(accelerator: Accelerator) -> int:
    """How many of them share the weights; 1 where each has all."""
    return accelerator.num_processes if shares_weights() else 1


def count_workers(workers: int | None, device: torch.device) -> int:
    """Decoding processes where nobody measured: as asked for, else none on a CPU, which is busy."""
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else count_free_workers(None)


def workers_for(load: float, busy: float, device: torch.device) -> int:
    """Decoding processes that read 1.5 times as fast as a model trains: half again in reserve.

    `load` and `busy` are seconds that a pair is read and trained on. Where this process is as fast
    by itself there are none on a CPU, and one beside a GPU, which need not wait for it. Those on a
    CPU take seconds to start and then share its cores (docs/log.md has what they win).
    """
    most = count_free_workers(None)
    needed = min(most, math.ceil(1.5 * load / busy)) if busy else most
    return 0 if needed <= 1 and device.type == "cpu" else max(1, needed)


def count_free_workers(workers: int | None) -> int:
    """Decoding processes while nothing is trained: as asked for, else one a core, up to 8.

    Processes of one training share the cores; more than 8 would hold too many images ready.
    """
    share = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min(8, max(1, (os.cpu_count() or 1) // share)) if workers is None else workers


def device_name(device: torch.device) -> str:
    """What the device calls itself, for the record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that none depends on another's draws."""
    return torch.Generator().manual_seed((seed + zlib.crc32(purpose.encode())) % 2**63)


# --------------------------------------------------------------------------------------------------
# A model's name → the model.


def label_models(names: Sequence[str]) -> dict[str, ModelConfig]:
    """A short word for each → the model; of folders the last part of the path, where these differ.

    >>> list(label_models(["local-dir:runs/cats", "ViT-B-32@openai"]))
    ['cats', 'ViT-B-32@openai']
    """
    models = [named_model(name) for name in names]
    titles = [model.title for model in models]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ConfigError(f"models: {twice[0]} comes twice. Name each once.")
    short = [Path(title).name if "/" in title else title for title in titles]
    labels = short if len(set(short)) == len(short) else titles
    return dict(zip(labels, models, strict=True))


def check_model(config: ModelConfig, given: DualEncoder | None = None) -> None:
    """Refuse a name or tag that is none, before data are read, which may take long."""
    if given is not None:
        return
    kind, identifier = model_source(config.name)
    if kind == "factory" and not config.factory:  # a file named it
        raise ModelError(f"{config.name}: {made_by(identifier, config.pretrained)}")
    if kind == "folder":
        recognise_folder(Path(identifier))
    if kind == "open_clip" and ":" not in config.name:
        resolve_pretrained(config.name, config.pretrained)
    elif kind not in ("open_clip", "local-dir", "toy", "factory") and config.pretrained:
        raise ModelError(
            f"model.pretrained {config.pretrained!r} does not go with {config.name!r}, which "
            "names its own weights. Leave --model.pretrained out."
        )


def build_model(config: ModelConfig, given: DualEncoder | None = None) -> DualEncoder:
    """The model to start from, float32, in evaluation mode; or the one that was given, checked."""
    if given is not None:
        return check_dual_encoder(given)
    check_model(config)
    kind, identifier = model_source(config.name)
    if kind in ("folder", "local-dir", "transformers"):
        for pattern in (SUMS, f"*/{SUMS}", f"model/*/{SUMS}"):
            for sums in Path(identifier).glob(pattern):
                check_sums(sums.parent)
    match kind:
        case "factory":
            made: Any = call_factory(config.factory or "")
            if config.pretrained is None:
                return made
            if files_of(made).format != OWN:  # its folder says how it is built
                return build_model(ModelConfig(name=config.pretrained))
            load_own_weights(made, Path(config.pretrained))
            return made
        case "toy":
            return load_open_clip(f"local-dir:{model_directory()}", config.pretrained)
        case "transformers":
            folder = Path(identifier)
            return load_transformers(str(folder / "model") if is_run(folder) else identifier)
        case "folder":
            found = recognise_folder(Path(identifier))
            remark(f"{identifier}: {found.remark}.")
            if found.kind == "open_clip":
                return load_open_clip(f"local-dir:{found.path}")
            return load_transformers(str(found.path))
        case "file":
            model, recognised = load_weights_file(Path(identifier))
            remark(f"{identifier}: {recognised}.")
            return model
        case _:
            return load_open_clip(config.name, config.pretrained)


def model_source(name: str) -> tuple[str, str]:
    """What kind of thing `model.name` names, and the folder or name in it.

    >>> model_source("transformers:openai/clip-vit-base-patch32"), model_source("ViT-B-32")
    (('transformers', 'openai/clip-vit-base-patch32'), ('open_clip', 'ViT-B-32'))
    """
    if name == "toy":
        return "toy", name
    for schema in SCHEMAS:
        if name.startswith(f"{schema}:"):
            return schema, name.removeprefix(f"{schema}:")
    is_architecture = name.replace("/", "-") in open_clip.list_models()
    if Path(name).exists() and not is_architecture:
        return "folder" if Path(name).is_dir() else "file", name
    return "open_clip", name


# --------------------------------------------------------------------------------------------------
# A model's name → its tokenizer, without its weights where that is possible.


def build_tokenizer(config: ModelConfig) -> Any:
    """What turns texts into tokens for this model."""
    architecture = config.name.replace("/", "-")
    is_open_clip = model_source(config.name)[0] == "open_clip"
    if not is_open_clip or architecture not in open_clip.list_models():
        return build_model(config).tokenizer
    try:
        with quiet_open_clip():
            return OpenClipTokenizer(open_clip.get_tokenizer(architecture))
    except (OSError, ImportError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{config.name}: its tokenizer could not be loaded: {reason} Name another model, or "
            "leave --model.name out to count as OpenAI's CLIP does."
        ) from error


# --------------------------------------------------------------------------------------------------
# Settings → the way from images to pixels.


def build_reader(
    config: DataConfig,
    model: DualEncoder,
    sources: Sequence[Images | Stream],
    *,
    workers: int | None = None,
    visible: bool = True,
    folder: Path | None = None,
) -> PixelReader:
    """What decodes and preprocesses images for a model, or reads them from the cache."""
    preprocess = model.preprocess
    reader = PixelReader(preprocess, side_to_keep(preprocess) if config.draft else None)
    if not config.cache_images:
        return reader
    folder = config.cache_folder or folder or default_cache()
    workers = count_free_workers(workers)
    images = [
        one.source if isinstance(one, EveryCaption) else one
        for one in sources
        if not isinstance(one, Stream)  # which is read once
    ]
    return with_cached_pixels(reader, images, folder / "pixels", workers=workers, visible=visible)


# --------------------------------------------------------------------------------------------------
# Settings → images and captions.


MINIMUM_PAIRS = 11
"""Held-out images that the geometry's 10 nearest neighbours need."""


def build_data(
    config: DataConfig,
    *,
    seed: int,
    train_pairs: GivenPairs | Stream | None = None,
    held_out: GivenPairs | None = None,
) -> tuple[PairSource | Stream, PairSource]:
    """Training pairs and held-out pairs; a warning where both have an image.

    Of a stream that shows as it is read, so it comes when it has been.
    """
    passed = train_pairs is not None
    _check_once("train", config.train, train_pairs, "train_pairs")
    _check_once("val", config.val, held_out, "held_out")
    given = [p for p in (train_pairs, held_out) if p is not None and not isinstance(p, Stream)]
    for name in ("image_column", "caption_column"):
        if passed and getattr(config, name) and not any(map(has_columns, given)):
            raise ConfigError(
                f"data.{name}: the pairs that were passed have no named values. Leave it out."
            )
    if held_out is not None:
        held_out = as_pairs(held_out, config)
    if train_pairs is None:
        if not config.sources:
            raise ConfigError(
                "data.train is missing. Give captioned images: --data.train captions.csv"
            )
        if config.streaming and config.val is None and held_out is None:
            raise ConfigError(
                "data.val is missing: nothing can be held out of a stream. Give the pairs for the "
                "before/after numbers: --data.val captions.csv"
            )
        train_pairs = open_training(config)
        if held_out is None and config.val is None and config.sources == (TOY,):
            held_out = toy_val()
    if not isinstance(train_pairs, Stream):
        train_pairs = as_pairs(train_pairs, config)
        if config.captions == "all" and not isinstance(train_pairs, EveryCaption):
            train_pairs = EveryCaption(train_pairs)
    if held_out is None and config.val is not None:
        held_out = as_pairs(open_pairs(config.val, config.for_val(passed=passed), training=False))
    if held_out is not None:
        check_enough(held_out)
        if isinstance(train_pairs, Stream):
            return WatchedStream(train_pairs, held_out), held_out
        held, trained = image_groups(held_out, train_pairs)
        known = set(trained)
        warn_of_shared(held_out, [index for index, group in enumerate(held) if group in known])
        return train_pairs, held_out
    if isinstance(train_pairs, Stream):
        raise ConfigError("nothing can be held out of a stream. Pass held_out, or data.val.")
    train_pairs, held_out = hold_out(train_pairs, fraction=config.val_fraction, seed=seed)
    return train_pairs, held_out


def _check_once(setting: str, named: object, passed: object, argument: str) -> None:
    """Refuse two answers to one question, of which one would not be heard."""
    if named and passed is not None:
        raise ConfigError(
            f"data.{setting}: {argument} were passed, too, and only one can be used. Leave one out."
        )


def warn_of_marks(model: DualEncoder, *sources: ImageCaptions | Stream) -> None:
    """Say where captions hold marks that the model's tokenizer takes for its own."""
    tokenizer: Any = model.tokenizer
    for pairs in sources if isinstance(tokenizer, CountingTokenizer) else ():
        if isinstance(pairs, Stream):
            continue  # `data check` reads it through
        # whatever such marks are called, they have brackets; looking closer takes longer
        texts = [text for own in pairs.captions for text in own if set("<[&").intersection(text)]
        if marked := [*compress(texts, tokenizer.are_special(texts))]:
            remark(
                f"{pairs.name}: {len(marked)} captions hold a mark of the tokenizer, such as an "
                f"end of text, behind which nothing is read: {marked[0]!r:.80}. Take it out "
                "if it is not meant; `clip-refine data check` lists them.",
                style="yellow",
            )


def check_swaps(pairs: ImageCaptions | Stream, seed: int) -> None:
    """Say how many captions of some have no wrong twin; refuse where none has."""
    first = pairs.prefix(100) if isinstance(pairs, Stream) else pairs
    texts = [own[0] for own in islice(first.captions, 1000)]
    stay = [text for text in texts if swap_words(text, seed) is None]
    if len(stay) == len(texts):
        raise ConfigError(
            f"loss.negatives swapped-words: {pairs.name} has no captions in which two words can "
            f"change places, such as {stay[0]!r:.80}. It takes English captions of two phrases or "
            "more. Use in-batch."
        )
    if stay:
        remark(
            f"{pairs.name}: in {len(stay):,} of {len(texts):,} captions no two words can change "
            f"places, such as {stay[0]!r:.80}, so that these bring no wrong caption along.",
            style="yellow",
        )


def build_held_out(
    config: DataConfig, *, seed: int, given: GivenPairs | None = None
) -> ImageCaptions:
    """The pairs that `refine` with these settings takes its before/after numbers from."""
    _check_once("val", config.val, given, "held_out")
    if given is None and config.val is not None:
        given = open_pairs(config.val, config.for_val(), training=False)
    if given is not None:
        held_out = as_pairs(given, config)
        check_enough(held_out)
        return held_out
    if not config.sources:
        raise ConfigError("data.val is missing. Give captioned images: --data.val captions.csv")
    return build_data(config, seed=seed)[1]


def check_enough(held_out: ImageCaptions, setting: str = "--data.val") -> None:
    """Refuse too few pairs to measure on, which `setting` names."""
    if len(held_out) < MINIMUM_PAIRS:
        raise DataError(
            f"{held_out.name}: {len(held_out)} held-out images are too few to measure anything. "
            f"Give {MINIMUM_PAIRS} or more, better some hundreds, with {setting}."
        )


def build_tasks(config: EvaluationConfig, *, links: bool = False) -> list[LabelledImages]:
    """The zero-shot tasks; `links` of images that lead out of their folders are followed."""
    tasks: list[LabelledImages] = []
    for name in config.zero_shot:
        if name == TOY:
            tasks += toy_tasks()
        else:
            tasks.append(read_class_folders(Path(name), templates=config.templates, links=links))
    check_names(tasks)
    return tasks


def check_names(tasks: Sequence[LabelledImages]) -> None:
    """Refuse two zero-shot tasks of one name, by which their scores are kept."""
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"evaluation.zero_shot: two tasks have one name among {', '.join(names)}. "
            "Rename a folder, or leave one out; bystanders count, too."
        )


# --------------------------------------------------------------------------------------------------
# Settings → a model ready to be measured and trained.


def build_student(model: DualEncoder, config: RefineConfig, device: torch.device) -> nn.Module:
    """The model ready to be trained, on `device`."""
    student: Any = model
    objective = Objective(config.loss)
    asked = config.train.logit_scale == "trained"
    # a parameter that no loss looks at would still decay, and data-parallel training waits for it
    prepare_student(
        student,
        logit_scale=asked and objective.uses_logit_scale,
        logit_bias=asked and objective.uses_logit_bias,
    )
    return student.to(device)


def build_embedder(
    model: DualEncoder,
    accelerator: Accelerator,
    config: EvaluationConfig,
    workers: int | None,
    reader: PixelReader | None = None,
) -> Embedder:
    """The way to feed a model for measuring, for which it is in float32 and evaluation mode."""
    device = accelerator.device
    if isinstance(model, nn.Module):
        model.float().eval().to(device)
    # on a CPU photo-clip's images took 1.3 times as long by 128 as by 32, and 2.2 GB instead of .5
    usual = 32 if device.type == "cpu" else 256
    return Embedder(
        model,
        device,
        config.batch_size or usual,
        count_workers(workers, device),
        visible=accelerator.is_main_process,
        reader=reader,
        group=accelerator,
    )


# --------------------------------------------------------------------------------------------------
# Settings → objective, references and the steps.


def build_prior(config: PriorConfig, features: PairFeatures, scale: FeatureScale) -> Prior:
    """The distribution of the references, some fitted to raw (N, d) features of training pairs."""
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
) -> Iterator[TrainedPart]:
    """Train only what the settings ask for within the block; the student is whole after it.

    What is random in a model, such as dropout and new adapters, follows the seed in here.
    """
    seed = seeded_generator(config.seed, "training").initial_seed() + accelerator.process_index
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        with trained_part(student, config.train) as part:
            yield part


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
    teacher_scale: float | None = None,
    objective: OwnLoss | None = None,
) -> Trainer:
    """Everything that takes the steps; raw `features` of pairs are for the teacher's centroids."""
    train, loss = config.train, config.loss
    scale = scale or FeatureScale()
    check_objective(loss, objective)
    sigmoid = loss.contrastive_weight and loss.contrastive_form == "sigmoid"
    if sigmoid and getattr(student, "logit_bias", None) is None:
        raise ConfigError(
            "loss.contrastive_form sigmoid needs a model with a logit bias, as SigLIP's have; this "
            "one has none. Use softmax."
        )
    heads = find_heads(student, train, accelerator) if teacher.heads else None
    towers = own = StudentTowers(student, precision, heads)
    rates = learning_rates(student, train)
    shared = sharing_processes(accelerator) > 1
    if shared:
        towers = share_out(own, accelerator.device)
        both = zip(own.parameters(), towers.parameters(), strict=True)
        rates = {id(new): rates[id(old)] for old, new in both if id(old) in rates}
    optimiser = make_optimiser(
        towers.named_parameters(),
        learning_rate=train.rate,
        weight_decay=train.weight_decay,
        decay=train.decay,
        device=accelerator.device,
        rates=rates,
    )
    schedule = make_schedule(
        optimiser, schedule=train.schedule, warmup_steps=train.warmup_steps, steps=steps
    )
    return Trainer(
        accelerator=accelerator,
        towers=towers if shared else accelerator.prepare_model(towers),
        student=own if shared else None,
        teacher=teacher,
        objective=Objective(loss, objective),
        precision=precision,
        prior=prior,
        generator=seeded_generator(config.seed, "references"),
        schedule=schedule,
        config=train,
        scale=scale,
        teacher_scale=teacher_scale,
        frozen=frozen_towers(student, train),
        micro_batch=None if train.micro_batch == "auto" else train.micro_batch,
        centroid_gap=None if features is None else scale.gap(features).to(accelerator.device),
    )


def find_heads(
    student: Any,
    config: TrainConfig,
    accelerator: Accelerator,
    pairs: ImageCaptions | Stream | None = None,
) -> Heads | None:
    """The layers that alone are trained, above what then is computed once for all who need it."""
    if sharing_processes(accelerator) > 1 or not (heads := heads_on_frozen(student, config)):
        return None
    return heads if pairs is None or reads_alike(student, pairs) else None


def reads_alike(model: Any, pairs: ImageCaptions | Stream) -> bool:
    """Whether an image's pixels are the same each time."""
    first, second = (sample_pairs(model, pairs, 2)[0] for _ in range(2))
    return torch.equal(first, second)


def count_steps(config: TrainConfig, pairs: ImageCaptions | Stream, processes: int) -> int:
    """Steps of all epochs, or as many as were asked for; incomplete batches are left out."""
    if config.batch_size % processes:
        raise ConfigError(
            f"train.batch_size {config.batch_size} cannot be shared by {processes} processes. "
            f"Use a multiple of {processes}."
        )
    if config.normalization_statistics == "updated" and processes > 1:
        raise ConfigError(
            "train.normalization_statistics updated: each process would count its own share of a "
            "batch, so the model would depend on how many there are. Train in one process, or "
            "leave them frozen."
        )
    if config.parameters == "lora" and processes > 1 and shares_weights():
        raise ConfigError(
            "train.parameters lora: PEFT's layers cannot be shared out. Leave --use_fsdp out: "
            "gradients and moments of adapters, which every process then has, are small."
        )
    if config.compile and processes > 1 and shares_weights():
        raise ConfigError(
            "train.compile: not with weights that are shared out, which hooks of a block gather: "
            "compiled blocks were not tried with those. Leave it or --use_fsdp out."
        )
    length = pairs.length if isinstance(pairs, Stream) else len(pairs)
    if length is not None and length < config.batch_size:  # no epoch would have a batch
        rest = " that are not held out" if pairs.name.endswith(TRAINING) else ""
        raise DataError(
            f"{pairs.name}: {length} images{rest}, fewer than a batch of {config.batch_size}. Give "
            "more images or a smaller --train.batch-size; an epoch should have a few dozen steps."
        )
    if length is None and config.steps is None:
        raise no_end(pairs.name, config.batch_size)
    steps = config.steps or config.epochs * ((length or 0) // config.batch_size)
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"train.warmup_steps {config.warmup_steps} is not below the {steps} steps of this run, "
            "so the learning rate would never be reached. Use fewer."
        )
    return steps


def sample_pairs(
    model: Any, pairs: ImageCaptions | Stream, count: int, reader: PixelReader | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels, as the reader makes them where there is one, and tokens of the first few pairs."""
    if isinstance(pairs, Stream):
        pairs = pairs.prefix(count)
    sample = range(min(count, len(pairs)))
    reader = reader or PixelReader(model.preprocess)
    pixels = torch.stack([reader(pairs, index) for index in sample])
    return pixels, model.tokenizer([pairs.captions[index][0] for index in sample])


def count_pairs(config: TrainConfig, pairs: ImageCaptions | Stream, steps: int) -> int:
    """Training pairs; of a stream those that are used."""
    return steps * config.batch_size if isinstance(pairs, Stream) else len(pairs)


def build_batches(
    config: RefineConfig,
    pairs: ImageCaptions | Stream,
    model: DualEncoder,
    accelerator: Accelerator,
    reader: PixelReader | None = None,
    teacher: Teacher | None = None,
    done: int = 0,
    *,
    pixels: bool = True,
) -> Iterator[PairBatch]:
    """This process's batches of all steps, each epoch newly shuffled with newly drawn captions.

    A teacher that looks its features up is told which pairs come. Images are read for `pixels`.
    Behind `done` steps nothing is read that was seen before, but for what a stream's buffer held.
    """
    steps = count_steps(config.train, pairs, accelerator.num_processes)
    if reader and accelerator.device.type == "cuda":
        reader = replace(reader, as_levels=True)
    settings: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "preprocess": (reader or model.preprocess) if pixels else None,
        "tokenizer": model.tokenizer,
        "workers": count_workers(config.train.workers, accelerator.device),
        "pin_memory": accelerator.device.type == "cuda",
        "rank": accelerator.process_index,
        "processes": accelerator.num_processes,
        "swap_seed": config.seed if Objective(config.loss).needs_wrong_texts else None,
    }
    if settings["swap_seed"] is not None:
        check_swaps(pairs, config.seed)
    if isinstance(pairs, Stream):
        settings |= {"done": done, "own_files": config.data.own_files}
        return stream_batches(pairs, seed=config.seed, steps=steps, **settings)
    loader = PairLoader(pairs, **settings)
    generator = seeded_generator(config.seed, "order")
    plans = (EpochPlan.draw(pairs, generator=generator) for _ in repeat(None))
    passed, inside = divmod(done, max(1, len(pairs) // config.train.batch_size))

    def epochs() -> Iterator[Iterable[PairBatch]]:
        for number, plan in enumerate(islice(plans, passed, None)):
            batches = loader.epoch(plan, skip=0 if number else inside)
            yield batches if teacher is None else teacher.follow(batches, plan)

    return islice(chain.from_iterable(epochs()), steps - done)
