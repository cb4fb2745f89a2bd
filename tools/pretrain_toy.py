"""Pre-train the toy world's small CLIP: `python tools/pretrain_toy.py --out DIR`.

A symmetric contrastive loss on unit features, with the logit scale fixed at 100, on pairs like
those of the web: captions are terse, and 30 % belong to another image. That leaves what CLIP-Refine
is for: two modalities in separate cones, and something to learn from clean, detailed captions.
(Mismatches alone would leave nothing to learn: they flatten the scores but keep their order.)

After training each tower's last projection is multiplied by one number so that its raw features
have a mean norm of 10, about that of OpenAI's ViT-B/32: CLIP-Refine compares raw features at
temperature 1. Unit features, and with them every cosine, stay as they were.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from clip_refine.data.toy import (
    IMAGE_SIZE,
    TERSE_TEMPLATES,
    ToyClasses,
    ToyPairs,
    toy_tasks,
    toy_val,
)

LOGIT_SCALE = 100.0
RAW_NORM = 10.0
"""Mean norm of the raw features of both towers in the saved model."""

CONTEXT_LENGTH = 32
_TOKENIZER = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
PIXEL_MEAN = 0.5
PIXEL_STD = 0.5


@dataclass(frozen=True)
class PretrainConfig:
    """What the packaged weights were made with.

    Attributes:
        pairs: Images drawn once, each with one caption.
        mismatched: Share of the captions, 0-1, that describe another image.
        steps: Optimiser steps; the pairs are passed in random order, again and again.
        batch_size: Pairs a step.
        learning_rate: Peak of a schedule with 5 % warm-up and a cosine to zero.
        weight_decay: AdamW's, on matrices alone.
        embed_dim: Width of the shared feature space.
        seed: Of the world, the initial weights and the order of the pairs.
        threads: Processor threads.
        log_every: Steps between two printed lines.
    """

    pairs: int = 40_000
    mismatched: float = 0.3
    steps: int = 2_500
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    embed_dim: int = 128
    seed: int = 0
    threads: int = 2
    log_every: int = 250


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


def pretrain(config: PretrainConfig, out: Path) -> dict[str, float]:
    """Train, rescale, save and measure; prints its progress.

    Args:
        config: Sizes and rates.
        out: Folder for `open_clip_config.json` and `open_clip_model.safetensors`.

    Returns:
        The numbers of `measure` for the saved folder.
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
    train(model, images_of(world), tokens_of(first_captions(world)), config)
    rescale_raw_features(model.eval(), ToyPairs("rescale", 1000, config.seed))
    save_model(model, config, out)
    return measure(out)


def train(model: CLIP, images: Tensor, tokens: Tensor, config: PretrainConfig) -> None:
    """Train `model` in place on `images` (N, 3, 48, 48), uint8, and `tokens` (N, 32)."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate_share(step, config.steps)
    )
    order = torch.Generator().manual_seed(config.seed)
    batches = _endless_batches(len(images), config.batch_size, order)
    started = time.perf_counter()
    recent_losses: list[float] = []
    model.train()
    with Progress() as progress:
        for step in progress.track(range(1, config.steps + 1), description="pre-training"):
            rows = next(batches)
            image_features = model.encode_image(pixels_of(images[rows]))
            text_features = model.encode_text(tokens[rows])
            loss = _contrastive_loss(image_features, text_features)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            recent_losses.append(loss.item())
            if step % config.log_every == 0 or step == config.steps:
                mean_loss = sum(recent_losses) / len(recent_losses)
                minutes = (time.perf_counter() - started) / 60
                progress.console.print(f"step {step}  loss {mean_loss:.3f}  minutes {minutes:.1f}")
                recent_losses.clear()


@torch.no_grad()
def rescale_raw_features(model: CLIP, pairs: ToyPairs) -> None:
    """Scale each tower's projection so that mean raw norms on `pairs` are `RAW_NORM`; in place."""
    images, texts = raw_features(model, images_of(pairs), tokens_of(first_captions(pairs)))
    weights = model.state_dict()  # shares memory with the model
    for projection, features in (("visual.proj", images), ("text_projection", texts)):
        factor = RAW_NORM / features.norm(dim=1).mean().item()
        weights[projection].mul_(factor)
        print(f"{projection} times {factor:.4f}: its features' mean norm is now {RAW_NORM:g}")


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


def measure(directory: Path) -> dict[str, float]:
    """Load `directory` with stock open_clip and measure it on held-out images, in float32.

    Returns:
        Mean raw norms; `centroid_distance` of unit features; recall@1 both ways on `toy_val`'s
        1,000 pairs; top-1 accuracy of each of `toy_tasks`. All but norms and distance are 0-1.
    """
    model = cast(CLIP, open_clip.create_model(f"local-dir:{directory}")).eval()
    val = toy_val()
    images, texts = raw_features(model, images_of(val), tokens_of(first_captions(val)))
    image_unit, text_unit = functional.normalize(images), functional.normalize(texts)
    similarity = image_unit @ text_unit.T
    partner = torch.arange(len(val))
    numbers = {
        "image_norm": images.norm(dim=1).mean(),
        "text_norm": texts.norm(dim=1).mean(),
        "centroid_distance": (image_unit.mean(0) - text_unit.mean(0)).norm(),
        "image_to_text_recall@1": (similarity.argmax(1) == partner).float().mean(),
        "text_to_image_recall@1": (similarity.argmax(0) == partner).float().mean(),
    }
    numbers |= {f"{task.name}_top1": zero_shot_top1(model, task) for task in toy_tasks()}
    return {name: float(number) for name, number in numbers.items()}


@torch.no_grad()
def zero_shot_top1(model: CLIP, task: ToyClasses) -> float:
    """Share of `task`'s images, 0-1, whose class has the nearest mean prompt."""
    class_unit = torch.stack(
        [
            functional.normalize(
                functional.normalize(
                    model.encode_text(tokens_of([t.format(name) for t in task.templates]))
                ).mean(0),
                dim=0,
            )
            for name in task.class_names
        ]
    )
    image_features = model.encode_image(pixels_of(images_of(task)))
    guesses = (image_features @ class_unit.T).argmax(1)
    return (guesses == torch.tensor(task.labels)).float().mean().item()


@torch.no_grad()
def raw_features(model: CLIP, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Image and text features, (N, d) each, not normalised."""
    return model.encode_image(pixels_of(images)), model.encode_text(tokens)


def images_of(world: ToyPairs | ToyClasses) -> Tensor:
    """Every image of `world`, drawn once: (N, 3, 48, 48), uint8."""
    pixels = np.stack([np.asarray(world.load_image(index)) for index in range(len(world))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def pixels_of(images: Tensor) -> Tensor:
    """What the model's own preprocessing makes of uint8 `images` of its size."""
    return (images.float() / 255 - PIXEL_MEAN) / PIXEL_STD


def tokens_of(texts: Sequence[str]) -> Tensor:
    """Token ids, (N, 32)."""
    return _TOKENIZER(list(texts))


def first_captions(pairs: ToyPairs) -> list[str]:
    """One caption an image."""
    return [captions[0] for captions in pairs.captions]


def _contrastive_loss(image_features: Tensor, text_features: Tensor) -> Tensor:
    image_unit, text_unit = (
        functional.normalize(image_features),
        functional.normalize(text_features),
    )
    logits = LOGIT_SCALE * image_unit @ text_unit.T
    partner = torch.arange(len(logits))
    return (
        functional.cross_entropy(logits, partner) + functional.cross_entropy(logits.T, partner)
    ) / 2


def _rate_share(step: int, steps: int) -> float:
    """Share of the peak learning rate at `step`: 5 % warm-up, then a cosine to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _endless_batches(count: int, batch_size: int, order: torch.Generator) -> Iterator[Tensor]:
    """Rows of one batch after the other, every row once an epoch, reshuffled after each."""
    while True:
        yield from torch.randperm(count, generator=order).split(batch_size)


def main() -> None:
    """The command line: every field of `PretrainConfig` is a flag."""
    parser = argparse.ArgumentParser(prog="python tools/pretrain_toy.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for field in dataclasses.fields(PretrainConfig):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(
            flag, type=type(field.default), default=field.default, help="%(default)s"
        )
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    for name, number in pretrain(PretrainConfig(**arguments), out).items():
        print(f"{name:28} {number:.3f}")


if __name__ == "__main__":
    main()
