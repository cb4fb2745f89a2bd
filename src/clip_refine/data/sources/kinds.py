"""Which kind of source a name stands for."""

import json
from pathlib import Path

from clip_refine.config import SourceKind
from clip_refine.data.sources.coco import is_coco
from clip_refine.data.sources.image_folders import metadata_files
from clip_refine.data.sources.patterns import expand, expand_braces, is_remote
from clip_refine.data.sources.split_files import is_karpathy, read_json
from clip_refine.data.sources.token_files import is_token_line
from clip_refine.errors import DataError

HUB_PREFIX = "hf:"
TOY = "toy"

_BY_SUFFIX: dict[str, SourceKind] = {
    ".csv": "table",
    ".tsv": "table",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_HELP = (
    "Give a .csv, .tsv, .jsonl, .parquet or .tar file (several as in {000..127}.tar), COCO's or "
    "Karpathy's .json, Flickr's token file, a folder with metadata.jsonl or metadata.csv, a folder "
    "of `save_to_disk`, hf:ORG/NAME, or 'toy'."
)


def recognise(name: str) -> SourceKind:
    """The kind of a source, by its name and, where that does not tell, by how it begins.

    >>> recognise("shards-{0000..0127}.tar"), recognise("hf:nlphuji/flickr30k")
    ('webdataset', 'hub')

    Raises:
        DataError: It is missing, or of no known kind.
    """
    if name == TOY:
        return "toy"
    if name.startswith(HUB_PREFIX):
        return "hub"
    plain = name.partition("?")[0] if is_remote(name) else name
    suffix = Path(expand_braces(plain)[0].rstrip("*")).suffix.lower()
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    if suffix in ("", ".json", ".txt", ".token") and not is_remote(name):
        return _file(path)
    raise DataError(f"{name}: not a kind of source that can be read. {_HELP}")


def _folder(path: Path) -> SourceKind:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "saved"
    if metadata_files(path):
        return "imagefolder"
    for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
        if next(path.rglob(f"*{suffix}"), None):
            return kind  # pyright: ignore[reportReturnType]
    raise DataError(
        f"{path}: a folder without metadata.jsonl, metadata.csv, .tar or .parquet files, so there "
        f"are no captions in it. {_HELP}"
    )


def _file(path: Path) -> SourceKind:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            first = file.readline(4096)
    except OSError as error:
        hint = " A dataset on the Hub is written hf:ORG/NAME." if path.suffix == "" else ""
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Check the path.{hint}"
        ) from error
    if is_token_line(first):
        return "token"
    if first.lstrip()[:1] in ("{", "["):
        return _json(path, first)
    if "," in first or "\t" in first or "|" in first:
        return "table"
    raise DataError(f"{path}: not a kind of source that can be read. {_HELP}")


def _json(path: Path, first: str) -> SourceKind:
    try:
        whole = isinstance(json.loads(first), dict)
    except ValueError:
        whole = False
    if path.suffix.lower() != ".json" and whole:
        return "jsonl"
    try:
        content = read_json(path)
    except DataError:
        if whole:  # objects line by line, whatever the file is called
            return "jsonl"
        raise
    if is_karpathy(content):
        return "karpathy"
    if is_coco(content):
        return "coco"
    raise DataError(
        f"{path}: JSON, but neither COCO captions (images and annotations) nor Karpathy's "
        "(images with filename, split and sentences). One object a line is a .jsonl file."
    )


def files_of(name: str, kind: SourceKind) -> list[str]:
    """The files that a name of this kind stands for.

    Raises:
        DataError: There are none.
    """
    match kind:
        case "webdataset":
            return expand(name, (".tar",))
        case "parquet":
            return expand(name, (".parquet",))
        case "jsonl":
            return expand(name, (".jsonl", ".ndjson"))
    return [name]
