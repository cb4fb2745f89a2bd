"""A name of any kind → images with captions."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from clip_refine.config import SourceKind
from clip_refine.data.bad_rows import BadRowPolicy
from clip_refine.data.captioned import CaptionedImages, collect
from clip_refine.data.rows import ReadOptions, Row
from clip_refine.data.sources import (
    coco,
    dataset_rows,
    hub,
    image_folders,
    jsonl,
    shards,
    token_files,
)
from clip_refine.data.sources.kinds import HUB_PREFIX, files_of
from clip_refine.data.sources.patterns import is_remote
from clip_refine.data.sources.tables import table_kind, table_rows
from clip_refine.errors import DataError


def open_pairs(
    name: str,
    kind: SourceKind,
    options: ReadOptions,
    policy: BadRowPolicy,
    *,
    training: bool = True,
) -> CaptionedImages:
    """Read a source of a known kind, every row checked.

    Args:
        name: File, folder, pattern or dataset.
        kind: What it is.
        options: How to read it.
        policy: What to do about bad rows.
        training: Whether to take the training split or the validation split where there are both
            and `options.split` names none.

    Raises:
        DataError: It cannot be read, or has bad rows.
    """
    called, rows = source_rows(name, kind, options, training=training)
    return collect(name, called, rows, policy)


def source_rows(
    name: str, kind: SourceKind, options: ReadOptions, *, training: bool
) -> tuple[str, Iterator[Row]]:
    """What to call the kind, and the rows, not yet checked.

    Raises:
        DataError: The source cannot be read; often only once the rows are asked for.
    """
    if is_remote(name) and kind not in ("webdataset", "parquet"):
        raise DataError(
            f"{name}: only .tar and .parquet files are read from elsewhere. Download it together "
            "with its images first."
        )
    match kind:
        case "table":
            return table_kind(Path(name)), table_rows(Path(name), options)
        case "token":
            return token_files.KIND, token_files.token_rows(Path(name), options)
        case "coco":
            return coco.COCO, coco.coco_rows(Path(name), options)
        case "karpathy":
            rows = coco.karpathy_rows(Path(name), options, training=training)
            return coco.KARPATHY, rows
        case "jsonl":
            each = (jsonl.jsonl_rows(Path(file), options) for file in files_of(name, kind))
            return jsonl.KIND, chain.from_iterable(each)
        case "parquet":
            rows = dataset_rows.parquet_rows(files_of(name, kind), name, options)
            return dataset_rows.PARQUET, rows
        case "imagefolder":
            rows = image_folders.image_folder_rows(Path(name), options, training=training)
            return image_folders.KIND, rows
        case "webdataset":
            local = shards.downloaded(name, files_of(name, kind))
            called = f"{shards.KIND} of {len(local):,} shards"
            return called, shards.shard_rows(local, options)
        case "saved":
            return dataset_rows.SAVED, dataset_rows.saved_rows(
                Path(name), options, training=training
            )
        case "hub":
            rows = hub.hub_rows(name.removeprefix(HUB_PREFIX), options, training=training)
            return hub.KIND, rows
    raise DataError(f"{name}: {kind} is no kind that is read from files.")
