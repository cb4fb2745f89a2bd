"""Recipes and peers on real photographs, early image blocks frozen.

Reads the research-only model and photographs of the folder `../shared`, which are not part of this
project. What comes before the first trained block of the image trunk is computed once, so that a
run takes seconds instead of minutes on two cores: `--trained-blocks 0` trains the projection and
the text tower only, 2 the last two of the trunk's seven blocks, too.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from clip_refine.config.runs import CompareConfig
from clip_refine.config.settings import RECIPES
from clip_refine.data import image_batches, read_class_folders, read_table
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.models.open_clip import encode_cut
from clip_refine.report.comparison import comparison_tables
from clip_refine.roads.compare import compare


class TextOnly(nn.Module):
    """photo-clip's text tower as an open_clip model without images."""

    def __init__(self, model: OpenClipEncoder) -> None:
        super().__init__()
        self.text = model.clip.text

    def encode_text(self, tokens: Tensor, *, normalize: bool) -> Tensor:
        return self.text(tokens)


class LateTowers(nn.Module):
    """photo-clip without its early image blocks: "pixels" are what those blocks put out."""

    def __init__(self, model: OpenClipEncoder, trained_blocks: int) -> None:
        super().__init__()
        visual = model.clip.visual
        self.early, self.late = split_trunk(visual.trunk, trained_blocks)
        self.late.append(visual.head)
        self.text = TextOnly(model)
        self.log_scale = nn.Parameter(model.clip.logit_scale.detach(), requires_grad=False)
        self.tokenizer = model.tokenizer
        self.model_preprocess = model.preprocess
        self.early.requires_grad_(False)

    def preprocess(self, image: Any) -> Tensor:
        """The study's sources give what the early blocks put out; only pictures still need them."""
        if isinstance(image, Tensor):
            return image
        with torch.no_grad():
            return self.early(self.model_preprocess(image).unsqueeze(0))[0]

    @property
    def logit_scale(self) -> Tensor:
        return self.log_scale.exp()

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.late(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return encode_cut(self.text, tokens)


def split_trunk(trunk: Any, trained_blocks: int) -> tuple[nn.Sequential, nn.Sequential]:
    """A timm EfficientNet in two parts, the second with its last blocks, nothing, or (−1) all."""
    blocks = list(trunk.blocks)
    ending = [trunk.conv_head, trunk.bn2, trunk.global_pool]
    if trained_blocks < 0:
        late = nn.Sequential(trunk.conv_stem, trunk.bn1)
        late.add_module("blocks", nn.Sequential(*blocks))  # found by this name for layer decay
        return nn.Sequential(), late.extend(ending)
    if not trained_blocks:
        return nn.Sequential(trunk.conv_stem, trunk.bn1, *blocks, *ending), nn.Sequential()
    cut = len(blocks) - trained_blocks
    early = nn.Sequential(trunk.conv_stem, trunk.bn1, *blocks[:cut])
    return early, nn.Sequential(*blocks[cut:], *ending)


class WithTrunkFeatures:
    """A source of images whose `load_image` gives the trunk's features instead of pixels."""

    def __init__(self, source: Any, features: Tensor) -> None:
        self.source, self.features = source, features

    def __getattr__(self, name: str) -> Any:
        if name in ("source", "features"):
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def load_image(self, index: int) -> Any:
        return self.features[index]


@torch.no_grad()
def early_features(towers: LateTowers, source: Any) -> Tensor:
    batches = image_batches(source, batch_size=50, preprocess=towers.model_preprocess)
    return torch.cat([towers.early(pixels) for pixels in batches])


def towers_and_sources(shared: Path, trained_blocks: int) -> tuple[LateTowers, list[Any]]:
    """The model; behind its early blocks pairs to train on, held-out ones and two tasks."""
    data = shared / "data"
    model = load_open_clip(f"local-dir:{shared / 'models' / 'photo-clip'}")
    pairs = [read_table(data / "flickr8k" / part / "captions.csv") for part in ("refine", "dev")]
    tasks = [
        read_class_folders(data / name, templates=("a photo of a {}.",))
        for name in ("cifar10", "caltech101")
    ]
    towers = LateTowers(model, trained_blocks)
    return towers, [WithTrunkFeatures(s, early_features(towers, s)) for s in (*pairs, *tasks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path("runs/photo-study"))
    parser.add_argument("--recipes", nargs="*", default=[name for name in RECIPES if name != "own"])
    default = CompareConfig.model_fields["peers"].get_default()
    parser.add_argument("--peers", nargs="*", default=list(default))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", nargs="*", default=[])
    parser.add_argument("--learning-rates", nargs="*", type=float, default=[3e-5, 1e-4])
    parser.add_argument("--trained-blocks", type=int, default=0, help="-1: all")
    options = parser.parse_args()
    towers, sources = towers_and_sources(options.shared, options.trained_blocks)
    config = CompareConfig.model_validate(
        {
            "recipes": options.recipes,
            "peers": options.peers,
            "seeds": options.seeds,
            "sweep": options.sweep,
            "combine": ["clip-refine+mean-centring"] if "clip-refine" in options.recipes else [],
            "learning_rates": options.learning_rates,
            "train": {"batch_size": 100, "precision": "fp32"},
            "data": {"draft": False},  # files are only read for their content, never decoded
            "out": options.out,
            "cache": options.out.parent / "photo-study-cache",
        }
    )
    train, held_out, *zero_shot = sources
    compared = compare(
        config,
        model=towers,  # pyright: ignore
        train_pairs=train,
        held_out=held_out,
        tasks=zero_shot,
    )
    Console().print(*comparison_tables(compared))


if __name__ == "__main__":
    main()
