"""Recipes and peers on real photographs, image trunk frozen: `python benchmarks/photo_study.py`.

Reads the research-only model and photographs of the folder `../shared`, which are not part of this
project. Only the image tower's last projection and the text tower are trained; the trunk's pooled
features are computed once, so that a run takes seconds instead of minutes on two cores.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from clip_refine import CompareConfig, compare
from clip_refine.data import image_batches, read_class_folders, read_table
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.models.text_length import text_tower
from clip_refine.recipes import RECIPES
from clip_refine.report.comparison import comparison_tables

TRUNK_WIDTH = 1280


class FrozenTrunk(nn.Module):
    """photo-clip without its image trunk: "pixels" are the trunk's pooled features."""

    def __init__(self, model: OpenClipEncoder) -> None:
        super().__init__()
        self.projection = model.clip.visual.head
        self.text = text_tower(model.clip)
        self.log_scale = nn.Parameter(model.clip.logit_scale.detach(), requires_grad=False)
        self.text_cut = model.text_cut
        self.tokenizer = model.tokenizer

    def preprocess(self, image: Any) -> Tensor:
        return image if isinstance(image, Tensor) else torch.zeros(TRUNK_WIDTH)

    @property
    def logit_scale(self) -> Tensor:
        return self.log_scale.exp()

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.projection(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.text_cut.encode(self.text, tokens)


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
def trunk_features(model: OpenClipEncoder, source: Any) -> Tensor:
    batches = image_batches(source, batch_size=50, preprocess=model.preprocess)
    return torch.cat([model.clip.visual.trunk(pixels) for pixels in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path("runs/photo-study"))
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", nargs="*", default=[])
    parser.add_argument("--learning-rates", nargs="*", type=float, default=[3e-5, 1e-4])
    options = parser.parse_args()
    data = options.shared / "data"
    model = load_open_clip(f"local-dir:{options.shared / 'models' / 'photo-clip'}")
    pairs = [read_table(data / "flickr8k" / part / "captions.csv") for part in ("refine", "dev")]
    tasks = [
        read_class_folders(data / name, templates=("a photo of a {}.",))
        for name in ("cifar10", "caltech101")
    ]
    sources = [WithTrunkFeatures(s, trunk_features(model, s)) for s in (*pairs, *tasks)]
    config = CompareConfig.model_validate(
        {
            "recipes": options.recipes,
            "seeds": options.seeds,
            "sweep": options.sweep,
            "combine": ["clip-refine+mean-centring"] if "clip-refine" in options.recipes else [],
            "learning_rates": options.learning_rates,
            "train": {"batch_size": 100, "precision": "fp32"},
            "out": options.out,
            "cache": options.out.parent / "photo-study-cache",
        }
    )
    train, held_out, *zero_shot = sources
    compared = compare(
        config,
        model=FrozenTrunk(model),  # pyright: ignore
        train_pairs=train,
        held_out=held_out,
        tasks=zero_shot,
    )
    Console().print(*comparison_tables(compared))


if __name__ == "__main__":
    main()
