"""Vectors that others have stored: pairs to learn on, and whole indexes streamed through a map.

| stored as | images and texts | which belongs to which |
|---|---|---|
| `.npz`, `.safetensors` | `image_features`, `text_features` | `text_to_image`, or rows |
| folder of `.npy` | `image.npy`, `text.npy` | `text_to_image.npy`, or rows |
| `A.npy,B.npy` | images, texts | rows |
| clip-retrieval's folder | `img_emb/img_emb_0.npy`, `text_emb/…` | rows, or a column of metadata |
| `.parquet` | two columns of lists | rows, or another column |
| a saved `datasets` folder, a LanceDB table `DB/NAME.lance` | the same | the same |
| `hf:ORG/NAME`, `hf:ORG/NAME#split=S`, to learn on only | the same | the same |
"""

import io
import json
import math
import re
import secrets
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from clip_refine.data.datasets import HUB_PREFIX, hub_table
from clip_refine.data.rows import SourceSettings
from clip_refine.support.console import Bar, remark, speaks
from clip_refine.support.errors import (
    ConfigError,
    DataError,
    EndedError,
    OutputError,
    first_line,
    foreign,
)
from clip_refine.support.folder import (
    FINISHED,
    SUMS,
    check_free,
    check_room,
    check_sums,
    complete_file,
    complete_folder,
    file_sum,
    hidden_work,
    sum_beside,
    sync,
    write_file,
    writing,
)
from clip_refine.support.group import Group
from clip_refine.support.limits import check_regular, leads_out, parse_json, read_text
from clip_refine.vectors.files import FeatureSet, load_peer, peer_sum, read_features, read_npz
from clip_refine.vectors.transforms import Modality, Peer

NAMES: dict[Modality, tuple[str, ...]] = {
    "image": (
        *("image_features", "image", "images", "image_embedding", "image_embeddings"),
        *("image_vector", "img_emb"),
    ),
    "text": (
        *("text_features", "text", "texts", "text_embedding", "text_embeddings"),
        *("text_vector", "text_emb"),
    ),
}
"""What arrays and columns of either side are called, where `column` says nothing else."""
SHARDS: dict[Modality, str] = {"image": "img_emb", "text": "text_emb"}
"""clip-retrieval's folders, and what the files in them begin with."""
NOTE = "vectors.json"
"""What was done to a folder of vectors, in it."""
_OWNERS = "text_to_image"
_ROWS = 16384  # a block; with its float32 copies about 150 MB at 512 dimensions
_TYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}
_SAFETENSORS_TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_CHECKSUM = re.compile(rb'(\\"sha256\\": \\")[0-9a-f]{64}\\"')  # as `write_features` notes it
_HEADER = 1 << 16  # bytes that the header of a .npy file may have
_SAME = 0.999  # cosine of two vectors of one image; float16 rounding leaves more

# --------------------------------------------------------------------------------------------------
# Where the rows of a matrix lie in a file, so that they need not all be in memory.


@dataclass(frozen=True)
class Matrix:
    """Rows in a file that is at least as long as it says."""

    path: Path
    offset: int  # bytes before the first row
    rows: int
    dim: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dim * self.dtype.itemsize

    def blocks(self, file: BinaryIO) -> Iterator[tuple[int, Tensor]]:
        """Number of the first row and (B, d) rows, block after block."""
        file.seek(self.offset)
        for start in range(0, self.rows, _ROWS):
            count = min(_ROWS, self.rows - start)
            raw = bytearray(file.read(count * self.row_bytes))
            yield start, torch.frombuffer(raw, dtype=self.dtype).view(count, self.dim)

    def read(self) -> Tensor:
        """All rows, (N, d)."""
        with self.path.open("rb") as file:
            return torch.cat([rows for _, rows in self.blocks(file)])


def open_npy(path: Path) -> Matrix:
    """The matrix of a `.npy` file; refused where it is no whole matrix of floating-point rows."""
    shape, fortran, dtype, offset = _npy_header(path)
    kind = _TYPES.get(dtype.str[1:])
    if len(shape) != 2 or min(shape) < 1 or fortran or kind is None or dtype.byteorder == ">":
        raise DataError(
            f"{path}: expected rows of float16, float32 or float64, got {shape} of {dtype}"
            f"{' in column order' if fortran else ''}. Save it as a (rows, dim) array in C order."
        )
    matrix = Matrix(path, offset, *shape, kind)
    _check_complete(path, offset + matrix.rows * matrix.row_bytes)
    return matrix


def _npy_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in column order, type, and where the data begins."""
    with foreign(DataError, f"{path}: cannot be read"):
        check_regular(path)
        with path.open("rb") as file:
            begin = io.BytesIO(file.read(_HEADER))  # it may say that it has gigabytes
        if np.lib.format.read_magic(begin) == (1, 0):
            return *np.lib.format.read_array_header_1_0(begin), begin.tell()
        return *np.lib.format.read_array_header_2_0(begin), begin.tell()


def _check_complete(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size != expected:
        raise DataError(
            f"{path}: its header says {expected:,} bytes, but it has {size:,}, so it was not "
            "written to the end. Write it again."
        )


def _safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and what is there."""
    with foreign(DataError, f"{path}: cannot be read"):
        check_regular(path)
        with safe_open(path, "np"), path.open("rb") as file:  # the first sees that it is sound
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def _shards(folder: Path, side: Modality) -> list[Matrix]:
    """clip-retrieval's files of one side in order of their numbers."""
    found = {}
    for path in (folder / SHARDS[side]).glob("*.npy"):
        number = re.fullmatch(rf"{SHARDS[side]}_(\d+)\.npy", path.name)
        if number is None:
            raise DataError(f"{path}: expected {SHARDS[side]}_NUMBER.npy. Move it elsewhere.")
        found[int(number[1])] = path
    if not found:
        raise DataError(f"{folder / SHARDS[side]}: there is no {SHARDS[side]}_0.npy.")
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise DataError(
            f"{folder / SHARDS[side]}: there is no {SHARDS[side]}_{missing[0]}.npy among "
            f"{len(found)} files, so the rows behind it would belong to others."
        )
    return [open_npy(found[number]) for number in sorted(found)]


def is_clip_retrieval(path: Path) -> bool:
    """Whether a folder has clip-retrieval's layout."""
    return any((path / name).is_dir() for name in SHARDS.values())


# --------------------------------------------------------------------------------------------------
# Pairs to learn on and to measure: all in memory.


def read_pairs(source: str, *, owner: str | None = None) -> FeatureSet:
    """Image and text vectors of pairs, from any of the layouts above; `IMAGE.npy,TEXT.npy`, too.

    Args:
        source: A file, folder or name of docs/vectors.md.
        owner: The column of the Parquet file or of clip-retrieval's metadata that says which image
            a row is of, where an image has several captions and so several rows.

    Raises:
        DataError: It cannot be read, or does not hold both sides of some pairs.
    """
    images, comma, texts = source.partition(",")
    path = Path(source)
    on_hub = source.startswith(HUB_PREFIX)
    columns = on_hub or path.suffix in (".parquet", LANCE)
    columns = columns or is_clip_retrieval(path) or is_dataset(path)
    if owner is not None and not columns:
        raise DataError(
            f"{source}: owner {owner!r} is a column, which only .parquet, saved datasets, LanceDB "
            f"tables and clip-retrieval's folders have. Other files have {_OWNERS}."
        )
    if not on_hub and path.suffix not in (".npz", ".safetensors"):  # which `read_features` checks
        for part in source.split(",", 1):
            _check_sums(Path(part))
    try:
        if on_hub:
            name, _, split = source.partition("#split=")
            table, _ = hub_table(name, SourceSettings(split=split or None))
            found = _read_columns(path, table.column_names, partial(_hub_batches, table), owner)
        elif comma:
            found = FeatureSet(open_npy(Path(images)).read(), open_npy(Path(texts)).read())
        elif is_clip_retrieval(path):
            found = _read_clip_retrieval(path, owner)
        elif path.suffix == ".parquet":
            with _open_parquet(path) as file:
                batches = partial(file.iter_batches, _ROWS)
                found = _read_columns(path, file.schema_arrow.names, batches, owner)
        elif path.suffix == LANCE:
            table = open_lance(path)
            found = _read_columns(path, table.schema.names, partial(_lance_batches, table), owner)
        elif is_dataset(path):
            with _open_arrow(_dataset_files(path)[0]) as opened:
                names = opened.schema.names
            found = _read_columns(path, names, partial(_dataset_batches, path), owner)
        elif path.is_dir():
            found = _read_folder(path)
        else:
            found = read_features(path)
        _check_rows(found)
    except (ArithmeticError, TypeError, ValueError) as error:  # of times and owners that are odd
        raise DataError(f"{source}: {error}.") from error
    return found


def _check_sums(path: Path) -> None:
    """Compare with the checksums that `vectors apply` wrote beside, where there are any."""
    for place in (path, *(path / name for name in SHARDS.values())):
        check_sums(place)


def _check_rows(found: FeatureSet) -> None:
    images, texts = len(found.image_features), len(found.text_features)
    if found.text_to_image is None and images != texts:
        raise ValueError(
            f"{images} image vectors and {texts} text vectors, and no {_OWNERS} that says which "
            "belong together"
        )
    for name in ("image_features", "text_features"):
        zero = (~getattr(found, name).any(dim=1)).nonzero().flatten()
        if len(zero):
            raise ValueError(f"{name}: row {int(zero[0])} is zero ({len(zero)} such)")
    if found.text_to_image is not None:
        without = torch.bincount(found.text_to_image, minlength=images) == 0
        if without.any():
            raise ValueError(f"image {int(without.nonzero()[0, 0])} has no text")


def _read_folder(folder: Path) -> FeatureSet:
    image, text = (open_npy(_named_npy(folder, side)).read() for side in NAMES)
    owners = folder / f"{_OWNERS}.npy"
    if not owners.is_file():
        return FeatureSet(image, text)
    shape, _, dtype, offset = _npy_header(owners)
    _check_complete(owners, offset + math.prod(shape) * dtype.itemsize)
    with foreign(DataError, f"{owners}: cannot be read"):
        return FeatureSet(image, text, torch.from_numpy(np.load(owners, allow_pickle=False)))


def _named_npy(folder: Path, side: Modality) -> Path:
    paths = [folder / f"{name}.npy" for name in NAMES[side]]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise DataError(
            f"{folder}: no {side} vectors there. Give a folder with {side}.npy, or with "
            f"{SHARDS[side]}/{SHARDS[side]}_0.npy as clip-retrieval writes it."
        )
    return found


def _read_clip_retrieval(folder: Path, owner: str | None) -> FeatureSet:
    images, texts = (_shards(folder, side) for side in SHARDS)
    _same_order(folder, [m.rows for m in images], [m.rows for m in texts], "text_emb")
    sides = torch.cat([m.read() for m in images]), torch.cat([m.read() for m in texts])
    if owner is None:
        return FeatureSet(*sides)
    paths = [folder / "metadata" / f"metadata_{number}.parquet" for number in range(len(images))]
    columns = [_column(path, owner) for path in paths]
    _same_order(folder, [m.rows for m in images], [len(c) for c in columns], "metadata")
    return _grouped(*sides, [value for column in columns for value in column])


def _same_order(folder: Path, rows: Sequence[int], others: Sequence[int], name: str) -> None:
    """Refuse shards whose rows cannot belong to each other."""
    if list(rows) != list(others):
        raise DataError(
            f"{folder}: img_emb has {list(rows)} rows a file, {name} has {list(others)}, so that "
            "their order does not match. Both must come from one run of clip-retrieval inference."
        )


def _column(path: Path, name: str) -> list[Any]:
    with _open_parquet(path) as file, foreign(DataError, f"{path}: cannot be read"):
        known = file.schema_arrow.names
        if name not in known:
            raise DataError(f"{path}: there is no column {name!r}. There are {', '.join(known)}.")
        return file.read(columns=[name])[name].to_pylist()


def _read_columns(
    path: Path,
    there: Sequence[str],
    batches: Callable[..., Iterator[pa.RecordBatch]],
    owner: str | None,
) -> FeatureSet:
    """Two columns of lists; `batches` gives those `columns` that it is asked for."""
    names = [_side_column(path, there, side) for side in NAMES]
    if owner is not None and owner not in there:
        raise DataError(f"{path}: there is no column {owner!r}. There are {', '.join(there)}.")
    parts: list[list[Tensor]] = [[], []]
    owners: list[Any] = []
    start = 0
    for batch in _sound(path, batches(columns=[*names, *([] if owner is None else [owner])])):
        for part, name in zip(parts, names, strict=True):
            part.append(_rows_of(path, batch.column(name), name, start))
        owners += [] if owner is None else batch.column(owner).to_pylist()
        start += len(batch)
    for part, name in zip(parts, names, strict=True):
        _one_dim(path, part, name)
    sides = torch.cat(parts[0]), torch.cat(parts[1])
    return FeatureSet(*sides) if owner is None else _grouped(*sides, owners)


LANCE = ".lance"


def open_lance(path: Path) -> Any:
    """A LanceDB table by its folder, `DB/NAME.lance`."""
    try:
        import lancedb  # pyright: ignore[reportMissingImports]: an extra
    except ImportError as error:
        raise DataError(
            f"{path}: LanceDB tables need the extra [lance]: pip install 'clip-refine[lance]'."
        ) from error
    try:
        return lancedb.connect(str(path.parent)).open_table(path.stem)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}).") from error


def _lance_batches(table: Any, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    rows = table.search()
    return rows.select(list(columns)).to_batches(_ROWS) if columns else rows.to_batches(_ROWS)


def _hub_batches(table: Any, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for part in table.select_columns(list(columns)).with_format("arrow").iter(_ROWS):
        yield from part.combine_chunks().to_batches()


def is_dataset(path: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _dataset_files(path: Path) -> list[Path]:
    """Its Arrow streams in order."""
    state = path / "state.json"
    with foreign(DataError, f"{state}: cannot be read"):
        files = [path / one["filename"] for one in parse_json(read_text(state))["_data_files"]]
        outside = [file.name for file in files if leads_out(file, path)]
        if outside or not files:
            raise ValueError(f"names {outside[0]} outside its folder" if outside else "no files")
        return files


def _open_arrow(path: Path) -> pa.RecordBatchStreamReader:
    with foreign(DataError, f"{path}: cannot be read"):
        check_regular(path)
        return pa.ipc.open_stream(pa.memory_map(str(path)))


_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


def _sound(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batch after batch, none of which says that its values lie where there are none."""
    with foreign(DataError, f"{path}: cannot be read"):
        for batch in batches:
            for column in batch.columns:
                as_bytes = _AS_BYTES.get(column.type)  # of any encoding, which is copied as it is
                (column.view(as_bytes) if as_bytes else column).validate(full=True)
            yield batch


def _dataset_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for file in _dataset_files(path):
        with _open_arrow(file) as opened:
            for batch in opened:
                yield batch.select(list(columns))


def _one_dim(path: Path, parts: Sequence[Tensor], name: str) -> None:
    dims = sorted({part.shape[1] for part in parts})
    if len(dims) != 1:
        raise DataError(f"{path}: column {name} has lists of {dims or 'no'} numbers.")


def _grouped(image: Tensor, text: Tensor, owners: Sequence[Any]) -> FeatureSet:
    """One row an image, the first of those that name the same owner."""
    first: dict[Any, int] = {}
    for row, owner in enumerate(owners):
        first.setdefault(owner, row)
    place = {owner: number for number, owner in enumerate(first)}
    text_to_image = torch.tensor([place[owner] for owner in owners])
    rows = torch.tensor(list(first.values()))
    chosen = image[rows]
    cosines = torch.cosine_similarity(image.float(), chosen[text_to_image].float(), dim=1)
    unlike = (cosines < _SAME).nonzero().flatten()
    if len(unlike):
        row = int(unlike[0])
        raise ValueError(
            f"rows {first[owners[row]]} and {row} are both of image {owners[row]!r}, but their "
            f"image vectors differ (cosine {cosines[row]:.3f}), so that the order of vectors and "
            "owners does not match"
        )
    return FeatureSet(chosen, text, text_to_image)


def _open_parquet(path: Path) -> pq.ParquetFile:
    with foreign(DataError, f"{path}: cannot be read"):
        check_regular(path)
        return pq.ParquetFile(path)


def _side_column(
    path: Path, there: Sequence[str], side: Modality, column: str | None = None
) -> str:
    """The name of one side's array or column."""
    wanted = NAMES[side] if column is None else (column,)
    found = next((name for name in wanted if name in there), None)
    if found is None:
        raise DataError(
            f"{path}: there are no {side} vectors called {' or '.join(wanted)}. It has "
            f"{', '.join(there) or 'nothing'}."
        )
    return found


def _rows_of(path: Path, column: Any, name: str, start: int) -> Tensor:
    """(B, d) of a column of lists."""
    kind = column.type
    if not (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ) or not pa.types.is_floating(kind.value_type):
        raise DataError(f"{path}: column {name} is {kind}, not lists of floating point.")
    if column.null_count:
        row = start + column.is_null().to_pylist().index(True)
        raise DataError(f"{path}: column {name}, row {row}: there is no vector.")
    lengths = set(pc.call_function("list_value_length", [column]).to_pylist())
    if len(lengths) != 1 or 0 in lengths:
        raise DataError(f"{path}: column {name} has lists of {sorted(lengths)} numbers.")
    values = column.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(values.reshape(len(column), -1).copy())


# --------------------------------------------------------------------------------------------------
# A whole index through a map, a block at a time, written beside and renamed.


def apply_stored(
    peer: Peer | str | Path,
    source: Path,
    out: Path,
    *,
    side: Modality,
    column: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a copy of stored vectors whose `side` has gone through a transform, and count them.

    The layout, ids, order and type stay; transformed rows have norm 1. Only `.npy` and
    clip-retrieval's folders take a map that changes the dimension.

    Under torchrun or `accelerate launch` the processes share the files of a folder, on a disk that
    all see; what comes out is the same, and each returns the count of all.

    Args:
        peer: The transform, or the folder that holds it.
        source: A file or folder of docs/vectors.md, or one `.npy` of a side.
        out: The new file or folder.
        side: Whose vectors are transformed.
        column: The side's array or column, where it is not one of `NAMES`.
        overwrite: Replace `out`.

    Raises:
        ClipRefineError: Vectors that cannot be read or do not fit, no such column, `out` that
            exists, one file or table for several processes.
    """
    if side not in ("image", "text"):
        raise ConfigError(f"side {side!r}: must be image or text.")
    group = Group()
    if group.count > 1 and source.suffix in (*_FILES, LANCE):
        raise ConfigError(
            f"{source}: is written by one process, but {group.count} run. Start this without "
            "torchrun or accelerate, or give a folder of clip-retrieval's or a saved dataset, "
            "whose files they share."
        )
    with group.together():
        peer = load_peer(Path(peer)) if isinstance(peer, str | Path) else peer
        if peer.score_columns:
            raise DataError(
                f"{peer.name}: appends {peer.score_columns} columns of scores, which no index of "
                "vectors has. Take another transform."
            )
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{out}: lies in {source}, which is read. Choose an --out beside it.")
        named = source.suffix == LANCE or is_dataset(source)  # folders whose vectors have names
        if column is not None and not named and (source.is_dir() or source.suffix == ".npy"):
            raise DataError(
                f"{source}: has no column {column!r}, since .npy files hold one array each. Leave "
                "--column out."
            )
        if group.first:
            _check_sums(source)
        move = _Move(peer, side)
        if source.suffix == LANCE:
            return _apply_lance(move, source, out, column, overwrite=overwrite)
        if is_dataset(source):
            return _apply_dataset(move, source, out, column, group, overwrite=overwrite)
        if source.is_dir():
            return _apply_folder(move, source, out, group, overwrite=overwrite)
        return _apply_file(move, source, out, column, overwrite=overwrite)


_FILES = (".npy", ".npz", ".safetensors", ".parquet")


def _apply_file(
    move: "_Move", source: Path, out: Path, column: str | None, *, overwrite: bool
) -> int:
    check_free(out, overwrite=overwrite, folder=False)
    if source.suffix not in _FILES:
        raise DataError(
            f"{source}: not a kind of stored vectors. Give .npy, .npz, .safetensors, .parquet, "
            f"a saved dataset, a table DB/NAME{LANCE}, or a folder of clip-retrieval's."
        )
    if out.suffix != source.suffix:
        raise OutputError(f"{out}: the layout stays, so give a name that ends in {source.suffix}.")
    matrices = [open_npy(source)] if source.suffix == ".npy" else []
    _check_room(move, source, out, matrices)
    with complete_file(out) as new:
        match source.suffix:
            case ".npy":
                rows = _apply_npy(move, matrices[0], new)
            case ".safetensors":
                rows = _apply_safetensors(move, source, new, column)
            case ".npz":
                rows = _apply_npz(move, source, new, column)
            case _:
                rows = _apply_parquet(move, source, new, column)
        noted = f"{file_sum(new)}  {out.name}\n"
        sum_beside(out).unlink(missing_ok=True)  # of what is replaced
    write_file(sum_beside(out), noted)
    return rows


def _check_room(move: "_Move", source: Path, out: Path, matrices: Sequence[Matrix] = ()) -> None:
    """Refuse to begin where the copy, as large but for another dimension, has no room."""
    size, there = (
        sum(file.stat().st_size for file in (place, *place.rglob("*")) if file.is_file())
        for place in (source, hidden_work(out))  # which is used again, or cleared
    )
    size += sum(m.rows * (move.dim(m.dim, m.path) - m.dim) * m.dtype.itemsize for m in matrices)
    check_room(out, size - there, "the mapped vectors", "Make room, or choose another --out.")


@dataclass(frozen=True)
class _Move:
    """One side through one transform, with errors that name the row in the file."""

    peer: Peer
    side: Modality

    @torch.no_grad()
    def __call__(self, path: Path, start: int, rows: Tensor) -> Tensor:
        if rows.shape[1] != self.peer.dim:
            raise DataError(
                f"{path}: vectors have dimension {rows.shape[1]}, but {self.peer.name} was fitted "
                f"on {self.peer.dim}. They are of another model."
            )
        try:
            return self.peer.transform(rows, self.side).to(rows.dtype)
        except ValueError as error:
            norms = torch.linalg.vector_norm(rows.float(), dim=1)
            for fault, bad in (("not finite", ~norms.isfinite()), ("zero", norms == 0)):
                if bad.any():
                    row = start + int(bad.nonzero()[0, 0])
                    raise DataError(
                        f"{path}: row {row} is {fault}. Remove such rows, with their ids, first."
                    ) from error
            raise DataError(f"{path}: rows from {start} on: {error}.") from error

    def dim(self, dim: int, path: Path) -> int:
        """How long transformed rows are; refuses another dimension before anything is written."""
        return self(path, 0, torch.ones(1, dim)).shape[1]


def _stream(move: _Move, matrix: Matrix, file: BinaryIO, target: BinaryIO, title: str) -> None:
    bar = Bar(title, -(-matrix.rows // _ROWS), visible=speaks(), transient=True)
    for start, rows in bar.over(matrix.blocks(file)):
        moved = move(matrix.path, start, rows).contiguous()
        target.write(moved.view(torch.uint8).numpy().data)


def _apply_npy(move: _Move, matrix: Matrix, out: Path) -> int:
    dim = move.dim(matrix.dim, matrix.path)
    with matrix.path.open("rb") as file, out.open("wb") as target:
        if dim == matrix.dim:
            target.write(file.read(matrix.offset))  # byte for byte, whatever version wrote it
        else:
            kind = next(name for name, dtype in _TYPES.items() if dtype == matrix.dtype)
            header = {"descr": f"<{kind}", "fortran_order": False, "shape": (matrix.rows, dim)}
            np.lib.format.write_array_header_1_0(target, header)
        _stream(move, matrix, file, target, f"Mapping {matrix.path.name}")
    return matrix.rows


def _same_dim(move: _Move, dim: int, path: Path) -> None:
    if move.dim(dim, path) != dim:
        raise DataError(
            f"{path}: {move.peer.name} makes {move.dim(dim, path)} dimensions of {dim}, which "
            f"{path.suffix} files are not rewritten for. Save the vectors as .npy."
        )


def _apply_safetensors(move: _Move, source: Path, out: Path, column: str | None) -> int:
    """Header and other tensors byte for byte, since shapes and types stay, but for our checksum."""
    begin, header = _safetensors_header(source)
    name = _side_column(source, list(header), move.side, column)
    facts = header[name]
    dtype, shape = _SAFETENSORS_TYPES.get(facts["dtype"]), facts["shape"]
    if dtype is None or len(shape) != 2 or 0 in shape:
        raise DataError(
            f"{source}: {name} must be (rows, dim) of floating point, got {shape} of "
            f"{facts['dtype']}."
        )
    first, end = (begin + offset for offset in facts["data_offsets"])
    _same_dim(move, shape[1], source)
    with source.open("rb") as file, out.open("wb") as target:
        # of other content from here on; blanks instead, since the tensors' places shall stay
        target.write(_CHECKSUM.sub(rb'\1\\"' + b" " * 64, file.read(begin)))
        _copy(file, target, first - begin)
        matrix = Matrix(source, first, shape[0], shape[1], dtype)
        _stream(move, matrix, file, target, f"Mapping {source.name}")
        file.seek(end)
        shutil.copyfileobj(file, target)
    return shape[0]


def _copy(file: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        piece = file.read(min(count, 2**24))
        target.write(piece)
        count -= len(piece)


def _apply_npz(move: _Move, source: Path, out: Path, column: str | None) -> int:
    """In memory, since a compressed member cannot be entered in the middle."""
    with foreign(DataError, f"{source}: cannot be read", " Write it again."):
        check_regular(source)
        arrays, compressed = read_npz(source)
    name = _side_column(source, list(arrays), move.side, column)
    if arrays[name].ndim != 2 or arrays[name].dtype.kind != "f":
        raise DataError(f"{source}: {name} must be (rows, dim) of floating point.")
    _same_dim(move, arrays[name].shape[1], source)
    rows = torch.from_numpy(arrays[name])
    arrays[name] = torch.cat(
        [move(source, at * _ROWS, part) for at, part in enumerate(rows.split(_ROWS))]
    ).numpy()
    save: Callable[..., None] = np.savez_compressed if compressed else np.savez
    with out.open("wb") as target:
        save(target, **arrays)
    return len(rows)


@dataclass
class _MoveColumn:
    """Batch after batch with one column mapped, every other column and the order as they are."""

    move: _Move
    path: Path
    schema: pa.Schema
    column: str | None
    done: int = 0  # rows so far

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        name = _side_column(self.path, self.schema.names, self.move.side, self.column)
        place = self.schema.get_field_index(name)
        field = self.schema.field(place)
        rows = _rows_of(self.path, batch.column(place), name, self.done)
        _same_dim(self.move, rows.shape[1], self.path)
        mapped = self.move(self.path, self.done, rows).numpy().ravel()
        values = pa.array(mapped, field.type.value_type)
        moved = pa.FixedSizeListArray.from_arrays(values, rows.shape[1]).cast(field.type)
        self.done += len(rows)
        return batch.set_column(place, field, moved)


def _apply_parquet(move: _Move, source: Path, out: Path, column: str | None) -> int:
    with _open_parquet(source) as file:
        moved = _MoveColumn(move, source, file.schema_arrow, column)
        with pq.ParquetWriter(out, moved.schema) as writer:
            for batch in _sound(source, file.iter_batches(_ROWS)):
                writer.write_batch(moved(batch))
    return moved.done


def _apply_lance(
    move: _Move, source: Path, out: Path, column: str | None, *, overwrite: bool
) -> int:
    if out.suffix != LANCE:
        raise OutputError(f"{out}: the layout stays, so give a name that ends in {LANCE}.")
    table = open_lance(source)
    import lancedb  # pyright: ignore[reportMissingImports]: an extra

    moved = _MoveColumn(move, source, table.schema, column)
    _check_room(move, source, out)
    with complete_folder(out, overwrite=overwrite) as new:
        # block by block: LanceDB waits for itself if it is to write what it is reading
        target = lancedb.connect(str(new)).create_table("t", schema=moved.schema)
        for batch in _sound(source, _lance_batches(table)):
            target.add(pa.Table.from_batches([moved(batch)]))
        for path in (new / f"t{LANCE}").iterdir():
            path.rename(new / path.name)
        (new / f"t{LANCE}").rmdir()
        _write_note(move, new)
    return moved.done


def _write_note(move: _Move, folder: Path) -> None:
    """Tell what a folder holds; by it `--overwrite` knows that the folder is ours."""
    note = {"transform": move.peer.name, "side": move.side, "dim": move.peer.dim}
    (folder / NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")


_MAPPING = 13  # times as long as its copy takes what goes through a map (docs/vectors.md)


class _Finished:
    """Files of a folder in the making, those kept that a run before a kill made of the same.

    Each process lists what it has made, the first one in the list that is there as long as all go
    on. A list says by what it was made and in which run, then has a line for each file. Whose share
    is what the first process says, so that nothing is left out where others see other files.
    """

    def __init__(self, out: Path, move: "_Move", about: object, group: Group) -> None:
        self._folder, self._group = hidden_work(out), group
        self._by = [peer_sum(move.peer), move.side]
        self._made_by = json.dumps([*self._by, str(about)])
        names = (f"{FINISHED}-{rank}" if rank else FINISHED for rank in range(group.count))
        self._lists = [self._folder / name for name in names]
        self._list, self._own = self._lists[0], self._lists[group.rank]
        self._known: dict[str, list[Any]] = {}
        self._sums: dict[Path, str] = {}
        self._wanted: set[Path] = {self._list}
        self._run = ""

    @classmethod
    @contextmanager
    def within(
        cls, out: Path, move: "_Move", about: object, group: Group, *, overwrite: bool
    ) -> Iterator[tuple[Path, "_Finished"]]:
        """The folder that becomes `out`, and what is finished in it."""
        finished = cls(out, move, about, group)
        with ExitStack() as opened:
            if group.first:
                lists = sorted(finished._folder.glob(f"{FINISHED}*"))
                for file in lists:
                    finished._read(file)
                known, sums = finished._known, finished._sums
                opened.enter_context(
                    complete_folder(out, overwrite=overwrite, go_on=bool(known), sums=sums)
                )
                if known:
                    remark(f"Going on: {len(known)} files of an earlier run are finished.")
                finished._begin(secrets.token_hex(8), known)
                for file in {*lists} - {finished._list}:
                    file.unlink(missing_ok=True)
            else:
                opened.enter_context(writing(out))
            try:
                with group.together():
                    finished._join()
                    yield finished._folder, finished
            except Exception as error:  # which would come again; who was stopped goes on
                stopped = isinstance(error, EndedError) and error.__cause__
                if finished._goes_on() and not (stopped and finished._any()):
                    finished._list.unlink(missing_ok=True)
                raise
            if group.first:
                finished._list.unlink()
                _write_note(move, finished._folder)

    def _read(self, file: Path) -> str:
        """Know what is in a list; of which run it is."""
        run = ""
        with suppress(OSError, ValueError):  # there is none, or its last line was cut off
            made_by, run, *lines = file.read_text(encoding="utf-8").splitlines()
            for line in lines if made_by == self._made_by else ():
                name, *facts = json.loads(line)
                self._known[name] = facts
        return run

    def _begin(self, run: str, known: Mapping[str, list[Any]]) -> None:
        self._run = run
        lines = [json.dumps([name, *facts]) for name, facts in known.items()]
        self._own.write_text("\n".join([self._made_by, run, *lines, ""]), encoding="utf-8")

    def _join(self) -> None:
        """Know what the first process knows, in the folder that it has made."""
        told = self._group.tell(json.dumps([self._run, self._by, self._known]))
        if not self._group.first:
            run, by, self._known = json.loads(told)
            if by != self._by:
                raise DataError(
                    f"process {self._group.rank} has another map or side than the first one. Give "
                    "all the same."
                )
            self._run = run
            if not self._goes_on():
                raise OutputError(
                    f"{self._folder}: process {self._group.rank} does not find what the first one "
                    "has begun there. Give an --out on a disk that all processes see."
                )
            self._begin(run, {})
        self._group.meet()

    def _goes_on(self) -> bool:
        """Whether this run's list is there, which whoever fails removes."""
        with suppress(OSError, ValueError), self._list.open(encoding="utf-8") as lines:
            lines.readline()
            return lines.readline() == f"{self._run}\n"
        return False

    def _any(self) -> bool:
        """Whether there is anything to go on with."""
        for file in self._lists:
            self._read(file)
        return bool(self._known)

    def share(
        self, files: Mapping[Path, Path], mapped: Container[Path], make: Callable[[Path, Path], int]
    ) -> int:
        """Make each of the files, `{new: source}`, in one process; the rows of all."""
        places = {str(file.relative_to(self._folder)): file for file in files}
        there = {name: files[file].stat().st_size for name, file in places.items()}
        costs = {
            name: size
            * (_MAPPING if files[places[name]] in mapped and name not in self._known else 1)
            for name, size in there.items()
        }
        loads, shares = [0] * self._group.count, [[] for _ in range(self._group.count)]
        for name in sorted(costs, key=costs.__getitem__, reverse=True):
            least = loads.index(min(loads))
            loads[least] += costs[name]
            shares[least].append(name)
        first_there, shares = json.loads(self._group.tell(json.dumps([there, shares])))
        if first_there != there:
            [name, *_] = sorted(set(there.items()) ^ set(first_there.items()))[0]
            raise DataError(
                f"process {self._group.rank} sees other files than the first one, such as {name}. "
                "Give a source on a disk that all see, to which nobody writes."
            )
        self._group.meet()  # nobody makes anything before all have seen the same
        self._wanted.update(files)
        own, rows = set(shares[self._group.rank]), 0
        for name, file in places.items():
            if name in own:
                if self._group.count > 1 and not self._goes_on():
                    raise EndedError
                rows += self.once(file, files[file], partial(make, files[file]))
        return self._group.meet(rows)

    def once(self, file: Path, source: Path, make: Callable[[Path], int]) -> int:
        """The rows of a file, which is made if it is not finished."""
        name, read = str(file.relative_to(self._folder)), source.stat()
        of = [read.st_size, read.st_mtime_ns]
        *noted, rows = self._known.get(name, [None])
        if noted and file.is_file() and noted == [*of, file_sum(file)]:
            return rows
        rows = make(file)
        sync(file)  # by who wrote it, which may be another machine than the first's
        with self._own.open("a", encoding="utf-8") as notes:
            notes.write(json.dumps([name, *of, file_sum(file), rows]) + "\n")
        return rows

    def settle(self) -> None:
        """Know the sums of all, and remove what an earlier run made, or began, of what has gone."""
        for file in self._wanted:
            if not file.is_file():
                raise OutputError(
                    f"{file}: was made by another process and is not to be seen here. Give an "
                    "--out on a disk that all processes see."
                )
        if {self._read(file) for file in self._lists} == {self._run}:
            self._sums.update({self._folder / name: of[-2] for name, of in self._known.items()})
        for path in self._folder.rglob("*"):
            if path.is_file() and path not in self._wanted:
                path.unlink()


def _apply_dataset(
    move: _Move, source: Path, out: Path, column: str | None, group: Group, *, overwrite: bool
) -> int:
    def apply(path: Path, target: Path) -> int:
        with _open_arrow(path) as opened:
            moved = _MoveColumn(move, path, opened.schema, column)
            with pa.ipc.new_stream(str(target), moved.schema) as writer:
                for batch in _sound(path, opened):
                    writer.write_batch(moved(batch))
        return moved.done

    _check_own(source / "dataset_info.json", source)
    if group.first:
        _check_room(move, source, out)
    about, paths = (source.resolve(), column), _dataset_files(source)
    with _Finished.within(out, move, about, group, overwrite=overwrite) as (new, finished):
        rows = finished.share({new / path.name: path for path in paths}, paths, apply)
        if group.first:
            finished.settle()
            shutil.copyfile(source / "dataset_info.json", new / "dataset_info.json")
            state = json.loads((source / "state.json").read_text(encoding="utf-8"))
            state["_fingerprint"] = secrets.token_hex(8)  # by which `datasets` finds what it cached
            (new / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    return rows


def _check_own(path: Path, folder: Path) -> None:
    """Refuse to copy what another folder holds, or what may have no end."""
    linked = leads_out(path, folder) or (path.is_symlink() and path.is_dir())
    if linked or not (path.is_file() or path.is_dir()):
        raise DataError(
            f"{path}: a link to a folder or out of {folder}, or no file, none of which is copied. "
            "Put there what it stands for."
        )


def _apply_folder(move: _Move, source: Path, out: Path, group: Group, *, overwrite: bool) -> int:
    """The files of one side mapped, all others copied."""
    if is_clip_retrieval(source):
        matrices = _shards(source, move.side)
    else:
        matrices = [open_npy(_named_npy(source, move.side))]
    mapped = {matrix.path: matrix for matrix in matrices}
    # sums are of what was there before
    paths = [p for p in sorted(source.rglob("*")) if p.name != SUMS and p.suffix != ".sha256"]
    for path in paths:
        if path not in mapped:
            _check_own(path, source)
    if group.first:
        _check_room(move, source, out, matrices)

    def apply(path: Path, target: Path) -> int:
        if path in mapped:
            return _apply_npy(move, mapped[path], target)
        shutil.copyfile(path, target)
        return 0

    with _Finished.within(out, move, source.resolve(), group, overwrite=overwrite) as found:
        new, finished = found
        places = {new / path.relative_to(source): path for path in paths}
        for place in (place for place, path in places.items() if path.is_dir()):
            place.mkdir(parents=True, exist_ok=True)
        files = {place: path for place, path in places.items() if not path.is_dir()}
        rows = finished.share(files, mapped, apply)
        if group.first:
            finished.settle()
    return rows
