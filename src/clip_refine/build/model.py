"""Settings → a model ready to be measured and trained."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from clip_refine.build.devices import count_workers, seeded_generator
from clip_refine.config import (
    RefineConfig,
    TrainConfig,
    override,
)
from clip_refine.console import console
from clip_refine.data import (
    ImageCaptions,
    PixelReader,
    Stream,
    Subset,
)
from clip_refine.errors import ModelError
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.embed import embed_pairs
from clip_refine.losses import PairFeatures
from clip_refine.models import DualEncoder, FeatureScale, RawNorms, check_dual_encoder
from clip_refine.train import (
    TowerPrecision,
    measure_precision,
    prepare_student,
)

NORM_SAMPLE = 512
"""Training pairs that raw norms are measured on."""
MOMENT_SAMPLE = 4096
"""Pairs of a stream that moments of its features are measured on; their images are in memory."""


def build_student(model: DualEncoder, config: TrainConfig, device: torch.device) -> nn.Module:
    """The model ready to be trained, on `device`.

    Raises:
        ModelError: The object is no dual encoder or no module.
    """
    student: nn.Module = check_dual_encoder(model)
    prepare_student(student, logit_scale=config.logit_scale)
    return student.to(device)


def build_embedder(
    config: RefineConfig,
    model: DualEncoder,
    accelerator: Accelerator,
    reader: PixelReader | None = None,
) -> Embedder:
    """The way to feed a model for measuring."""
    return Embedder(
        model,
        accelerator.device,
        config.evaluation.batch_size,
        count_workers(config.train.workers, accelerator.device),
        visible=accelerator.is_main_process,
        reader=reader,
    )


def measure_features(
    config: RefineConfig, embedder: Embedder, pairs: ImageCaptions | Stream
) -> PairFeatures:
    """Raw features of training pairs: of all for a prior with their moments, else of a sample.

    Of a stream the first few thousand stand for all.
    """
    fitted = config.prior.kind.startswith("gaussian") or config.prior.kind == "fixed"
    if isinstance(pairs, Stream):
        pairs = pairs.prefix(MOMENT_SAMPLE if fitted else NORM_SAMPLE)
    order = torch.randperm(len(pairs), generator=seeded_generator(config.seed, "norms")).tolist()
    chosen = order if fitted else order[:NORM_SAMPLE]
    one_caption = Subset(pairs, chosen, "pairs to measure")
    embedded = embed_pairs(embedder, one_caption)
    return PairFeatures(embedded.image_features, embedded.first_caption_features)


def build_scale(
    config: RefineConfig, student: Any, features: PairFeatures, pairs: ImageCaptions | Stream
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
    why = "therefore runs" if loss.feature_scale == "auto" else "runs, as asked for,"
    others = (
        " The published form is --recipe clip-refine-paper; --recipe balanced closes more of the "
        "gap on such models."
    )
    console.print(
        f"Raw norms are {norms.image:.1f} (image) and {norms.text:.1f} (text) at logit scale "
        f"{norms.logit_scale:.0f}; the paper's settings belong to {norms.canonical:.1f}. Training "
        f"{why} at that scale, HyCD on unit features (docs/method.md)."
        f"{others if loss.feature_scale == 'auto' else ''}"
    )
    return override(config, loss=canonical), scale


def build_precision(
    config: TrainConfig, model: Any, pairs: ImageCaptions | Stream, accelerator: Accelerator
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


def _sample(
    model: Any, pairs: ImageCaptions | Stream, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and tokens of the first few pairs."""
    if isinstance(pairs, Stream):
        pairs = pairs.prefix(count)
    sample = range(min(count, len(pairs)))
    pixels = torch.stack([model.preprocess(pairs.load_image(index)) for index in sample])
    return pixels, model.tokenizer([pairs.captions[index][0] for index in sample])
