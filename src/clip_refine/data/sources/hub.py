"""Datasets on the Hugging Face Hub, read by `datasets` by their name there."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from clip_refine.data.rows import ReadOptions, Row
from clip_refine.data.sources.dataset_rows import readable, table_written
from clip_refine.data.sources.paths import Written, file_rows
from clip_refine.data.sources.split_files import choose_split

KIND = "dataset on the Hub"
_ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd")


@dataclass(frozen=True, slots=True)
class ImageOnHub:
    """An image file of a dataset that is streamed."""

    address: str

    def __str__(self) -> str:
        return self.address

    def read(self) -> bytes:
        """The content of the image file."""
        import fsspec

        with fsspec.open(self.address, "rb") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]


def hub_rows(name: str, options: ReadOptions, *, training: bool) -> Iterator[Row]:
    """The rows of a dataset on the Hub.

    Raises:
        DataError: It cannot be read, or it is not clear which split to read.
    """
    import datasets

    split = hub_split(name, options, training=training)
    with readable(f"hf:{name}"):
        table = datasets.load_dataset(name, options.subset, split=split)
    written = hub_paths(table_written(table, f"hf:{name} ({split})", options), name)
    return file_rows(hub_file(name), written, options)


def hub_split(name: str, options: ReadOptions, *, training: bool) -> str:
    """The split to read, as `datasets` writes it.

    Raises:
        DataError: The dataset cannot be reached, or it is not clear which split to read.
    """
    import datasets

    if options.split and "[" in options.split:  # a slice, which `datasets` understands
        return options.split
    with readable(f"hf:{name}"):
        found = {str(s) for s in datasets.get_dataset_split_names(name, options.subset)}
    return "+".join(choose_split(f"hf:{name}", found, options.split, training=training))


def hub_file(name: str) -> Path:
    """Relative image paths start beside this."""
    return Path(name) / "data"


def hub_paths(written: Iterable[Written], name: str) -> Iterator[Written]:
    """Rows with the image files that `datasets` itself found for them.

    It writes them as absolute paths into its caches, or as addresses on the Hub. Any other path is
    the dataset's own and left to be checked.
    """
    from datasets import config
    from huggingface_hub import constants

    caches = (constants.HF_HUB_CACHE, config.DOWNLOADED_DATASETS_PATH, name)
    roots = [Path(root).resolve() for root in caches]
    for row in written:
        image = row.image
        if not isinstance(image, str):
            yield row
        elif _on_hub(image):
            yield replace(row, image=ImageOnHub(image))
        elif any(_inside(image, root) for root in roots):
            yield replace(row, image=Path(image))
        else:
            yield row


def _on_hub(address: str) -> bool:
    """Whether an address is of a file on the Hub, or of a file in an archive there."""
    *inner, outer = address.split("::")
    archived = all(part.partition("://")[0] in _ARCHIVES for part in inner)
    return archived and outer.startswith("hf://datasets/")


def _inside(path: str, folder: Path) -> bool:
    return Path(path).is_absolute() and Path(path).resolve().is_relative_to(folder)
