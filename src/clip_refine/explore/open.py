"""The folder of a run → two searchable models."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import nn

from clip_refine import build
from clip_refine.config import ModelConfig, RefineConfig, load_config, override
from clip_refine.data import ImageCaptions, Subset
from clip_refine.data.images import SUFFIXES, open_image
from clip_refine.data.pairs import Images
from clip_refine.errors import DataError, ModelError
from clip_refine.evaluation import Embedder
from clip_refine.explore.index import SearchIndex


@dataclass(frozen=True)
class Explorer:
    """Two models on the same images.

    Attributes:
        title: What is explored.
        images: What is searched.
        captions: Of the images; empty where they have none.
        base: The model as it came.
        refined: The refined model.
    """

    title: str
    images: Images
    captions: list[str]
    base: SearchIndex
    refined: SearchIndex


@dataclass(frozen=True)
class ImageFiles:
    """Image files without captions.

    Attributes:
        paths: One path an image.
    """

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def load_image(self, index: int) -> Image.Image:
        """Image `index` in RGB.

        Raises:
            DataError: The file is gone or cannot be decoded.
        """
        return open_image(self.paths[index])

    def image_name(self, index: int) -> str:
        """The image's path."""
        return str(self.paths[index])


def open_explorer(
    run: Path, images: str | None = None, *, limit: int = 2000, device: str = "auto"
) -> Explorer:
    """Load both models of a run and encode what is to be searched.

    Args:
        run: The folder that `refine` wrote.
        images: A folder of images, or captioned images as for `refine --data.train`; None for the
            run's held-out images.
        limit: Images at most, the first ones.
        device: auto, cpu, cuda, cuda:1, mps.

    Raises:
        ClipRefineError: The run, a model or the images cannot be read.
    """
    if not (run / "config.yaml").is_file():
        raise DataError(f"{run}: holds no run (no config.yaml). Give a folder that refine wrote.")
    config = load_config(RefineConfig, run / "config.yaml")
    if config.model.name.startswith("python:"):
        raise ModelError(
            f"{run}: its base model was passed from Python ({config.model.name}), so it cannot be "
            "loaded by name. Refine with --model.name or --model.factory to explore."
        )
    found, captions = _images(config, images, limit)
    accelerator = build.build_accelerator(device)
    indices = []
    for name, model in (("base", config.model), ("refined", ModelConfig(name=str(run / "model")))):
        encoder = build.build_model(model)
        if isinstance(encoder, nn.Module):
            encoder.float().eval().to(accelerator.device)
        workers = build.count_workers(None, accelerator.device)
        embedder = Embedder(encoder, accelerator.device, config.evaluation.batch_size, workers)
        indices.append(SearchIndex(embedder, found, captions, name))
    return Explorer(f"{config.model.name}, {config.recipe}", found, captions, *indices)


def _images(config: RefineConfig, name: str | None, limit: int) -> tuple[Images, list[str]]:
    folder = Path(name) if name else None
    if folder and folder.is_dir():
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))}).")
        return ImageFiles(paths[:limit]), []
    pairs = _pairs(config, name)
    chosen = Subset(pairs, range(min(limit, len(pairs))), pairs.name)
    return chosen, [text for texts in chosen.captions for text in texts]


def _pairs(config: RefineConfig, name: str | None) -> ImageCaptions:
    if name is not None:
        return build.open_source(name, override(config, data={"split": None}).data, training=False)
    return build.build_data(config.data, seed=config.seed)[1]
