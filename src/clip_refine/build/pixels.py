"""Settings → the way from images to pixels."""

import os
from collections.abc import Sequence
from pathlib import Path

from clip_refine.build.devices import count_free_workers
from clip_refine.config import DataConfig
from clip_refine.data import EveryCaption, PixelReader, Stream, with_cached_pixels
from clip_refine.data.pairs import Images
from clip_refine.data.reader import side_to_keep
from clip_refine.models import DualEncoder


def build_reader(
    config: DataConfig,
    model: DualEncoder,
    sources: Sequence[Images | Stream],
    *,
    workers: int | None = None,
    visible: bool = True,
    folder: Path | None = None,
) -> PixelReader:
    """What decodes and preprocesses images for a model, or reads them from the cache.

    Args:
        config: Whether to cache, and where.
        model: Whose preprocessing.
        sources: Whose images will be asked for.
        workers: Processes that fill the cache.
        visible: Whether to say what is done.
        folder: Of the cache, where `config` names none.

    Raises:
        DataError: An image cannot be decoded, or the preprocessing cannot be cached.
        OutputError: The cache cannot be written.
    """
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


def default_cache() -> Path:
    """Where this user's programs keep what they can make again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "clip-refine"
