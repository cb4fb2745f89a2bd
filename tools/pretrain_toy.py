"""Pre-train the toy world's small CLIP: `python tools/pretrain_toy.py --out DIR`.

A symmetric contrastive loss on unit features, with the logit scale fixed at 100, on pairs like
those of the web: captions are terse, and 30 % belong to another image. That leaves what CLIP-Refine
is for: two modalities in separate cones, and something to learn from clean, detailed captions.
(Mismatches alone would leave nothing to learn: they flatten the scores but keep their order.)

After training each tower's last projection is multiplied by one number so that its raw features
have a mean norm of 10, about that of OpenAI's ViT-B/32: CLIP-Refine compares raw features at
temperature 1. Unit features, and with them every cosine, stay as they were.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import tyro
from open_clip.model import CLIP
from rich import print as show
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from clip_refine.evaluation import Embedder, score_model
from clip_refine.losses import contrastive_loss
from clip_refine.models import load_open_clip
from clip_refine.report.tables import scores_table
from clip_refine.support.console import Bar
from clip_refine.toy import (
    IMAGE_SIZE,
    ToyPairs,
    toy_tasks,
    toy_val,
)
from clip_refine.train import make_schedule

LOGIT_SCALE = 100.0
RAW_NORM = 10.0
"""Mean norm of the raw features of both towers in the saved model."""

CONTEXT_LENGTH = 32
PIXEL_MEAN = 0.5
PIXEL_STD = 0.5

TERSE_TEMPLATES = (
    "a {shape}",
    "a {colour} {shape}",
    "a drawing of a {colour} {shape}",
    "a picture of a {size} {shape}",
    "a {size} {colour} shape",
    "a {shape} {place}",
    "a {colour} shape {place}",
    "a {shape} on a {background} background",
    "a {colour} shape on a {background} background",
)
"""Captions as they are found on the web, short."""


@dataclass(frozen=True)
class PretrainConfig:
    """What the packaged weights were made with; they hold these settings as metadata."""

    pairs: int = 40_000  # images drawn once, each with one caption
    mismatched: float = 0.3  # share of the captions, 0-1, that describe another image
    steps: int = 2_500  # the pairs are passed in random order, again and again
    batch_size: int = 128  # pairs a step
    learning_rate: float = 1e-3  # peak of a schedule with 5 % warm-up and a cosine to zero
    weight_decay: float = 0.1  # AdamW's, on every weight
    embed_dim: int = 128  # width of the shared feature space
    seed: int = 0  # of the world, the initial weights and the order of the pairs
    threads: int = 2  # processor threads: another number sums in another order
    log_every: int = 250  # steps between two printed lines


def model_config(embed_dim: int) -> dict[str, Any]:
    """The content of `open_clip_config.json`: 4.2 million weights, 3.2 of them word vectors."""
    return {
        "model_cfg": {
            "embed_dim": embed_dim,
            "init_logit_scale": math.log(LOGIT_SCALE),
            "vision_cfg": {
                "image_size": IMAGE_SIZE,
                "patch_size": 12,
                "layers": 4,
                "width": 128,
                "head_width": 32,
            },
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": 49408,
                "layers": 3,
                "width": 64,
                "heads": 2,
            },
        },
        "preprocess_cfg": {
            "mean": [PIXEL_MEAN] * 3,
            "std": [PIXEL_STD] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def pretrain(out: Path, config: PretrainConfig) -> None:
    """Train, rescale and save to the folder `out`, then measure what was saved.

    Args:
        out: Folder for `open_clip_config.json` and `open_clip_model.safetensors`.
        config: Sizes and rates.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = CLIP(**model_config(config.embed_dim)["model_cfg"])
    model.logit_scale.requires_grad_(False)
    world = ToyPairs(
        "pretrain",
        config.pairs,
        config.seed,
        mismatched=config.mismatched,
        templates=TERSE_TEMPLATES,
    )
    train(model, images_of(world), tokens_of(world), config)
    rescale_raw_features(model.eval(), ToyPairs("rescale", 1000, config.seed))
    save_model(model, config, out)
    embedder = Embedder(load_open_clip(f"local-dir:{out}"), torch.device("cpu"), 256)
    show(scores_table(score_model(embedder, toy_val(), toy_tasks(), seed=config.seed)))


def train(model: CLIP, images: Tensor, tokens: Tensor, config: PretrainConfig) -> None:
    """Train `model` in place on `images` (N, 3, 48, 48), uint8, and `tokens` (N, 32)."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(
        weights,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.98),  # as CLIP was pre-trained; refinement takes PyTorch's defaults
        fused=True,
    )
    schedule = make_schedule(
        optimiser, schedule="cosine", warmup_steps=max(1, config.steps // 20), steps=config.steps
    )
    batches = _endless_batches(len(images), config.batch_size, config.seed)
    recent_losses: list[float] = []
    model.train()
    for step in Bar("Pre-training", config.steps).over(range(1, config.steps + 1)):
        rows = next(batches)
        image_unit = normalize(model.encode_image(pixels_of(images[rows])))
        text_unit = normalize(model.encode_text(tokens[rows]))
        # scaled before the product, as when the packaged weights were made; `logit_scale` would
        # scale after it, which rounds otherwise
        loss = contrastive_loss(
            LOGIT_SCALE * image_unit, text_unit, logit_scale=1.0, normalize=False
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        recent_losses.append(loss.item())
        if step % config.log_every == 0 or step == config.steps:
            show(f"step {step}  loss {sum(recent_losses) / len(recent_losses):.3f}")
            recent_losses.clear()


@torch.no_grad()
def rescale_raw_features(model: CLIP, pairs: ToyPairs) -> None:
    """Scale each tower's projection so that mean raw norms on `pairs` are `RAW_NORM`; in place."""
    features = {
        "visual.proj": model.encode_image(pixels_of(images_of(pairs))),
        "text_projection": model.encode_text(tokens_of(pairs)),
    }
    weights = model.state_dict()  # shares memory with the model
    for projection, raw in features.items():
        factor = RAW_NORM / raw.norm(dim=1).mean().item()
        weights[projection].mul_(factor)
        show(f"{projection} times {factor:.4f}: its features' mean norm is now {RAW_NORM:g}")


def save_model(model: CLIP, config: PretrainConfig, out: Path) -> None:
    """Write the folder that `open_clip.create_model_and_transforms("local-dir:…")` loads.

    Weights are float16 but for `logit_scale`, which float16 would round to 100.03.
    """
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (weight if name == "logit_scale" else weight.half()).contiguous()
        for name, weight in model.state_dict().items()
    }
    description = {
        "description": "Small CLIP of clip-refine's toy world, weights in float16",
        "made_by": "python tools/pretrain_toy.py",
        "config": json.dumps(dataclasses.asdict(config)),
    }
    save_file(weights, out / "open_clip_model.safetensors", metadata=description)
    text = json.dumps(model_config(config.embed_dim), indent=2)
    (out / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")


def images_of(pairs: ToyPairs) -> Tensor:
    """Every image, drawn once: (N, 3, 48, 48), uint8."""
    pixels = np.stack([np.asarray(pairs.load_image(index)) for index in range(len(pairs))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def pixels_of(images: Tensor) -> Tensor:
    """What the model's own preprocessing makes of uint8 `images` of its size."""
    return (images.float() / 255 - PIXEL_MEAN) / PIXEL_STD


def tokens_of(pairs: ToyPairs) -> Tensor:
    """Token ids of one caption an image, (N, 32)."""
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    return tokenizer([captions[0] for captions in pairs.captions])


def _endless_batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Rows of one batch after the other, every row once an epoch, reshuffled after each."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=order).split(batch_size)


def main() -> None:
    """The command line: every field of `PretrainConfig` is a flag."""

    def run(out: Path, config: tyro.conf.OmitArgPrefixes[PretrainConfig]) -> None:
        pretrain(out, config)

    tyro.cli(run, prog="python tools/pretrain_toy.py", description=__doc__)


if __name__ == "__main__":
    main()
