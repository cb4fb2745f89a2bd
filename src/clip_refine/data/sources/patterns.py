"""Names of several files in one: `shards-{0000..0127}.tar`, `data/*.parquet`."""

import glob
import re
from pathlib import Path

from clip_refine.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_remote(name: str) -> bool:
    """Whether a name is an address such as `https://...` or `s3://...`."""
    return "://" in name


def expand_braces(name: str) -> list[str]:
    """Every name that a pattern with braces stands for.

    >>> expand_braces("a-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    >>> expand_braces("{a,b}.tar")
    ['a.tar', 'b.tar']
    """
    found = _BRACES.search(name)
    if found is None:
        return [name]
    between = _RANGE.fullmatch(found[1])
    if between:
        first, last = int(between[1]), int(between[2])
        width = len(between[1])
        step = 1 if last >= first else -1
        options = [f"{number:0{width}}" for number in range(first, last + step, step)]
    elif "," in found[1]:
        options = found[1].split(",")
    else:
        return [name]
    rest = expand_braces(name[found.end() :])
    return [f"{name[: found.start()]}{option}{end}" for option in options for end in rest]


def expand(name: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a name stands for, in order.

    Args:
        name: A file, a folder, or a pattern with braces and `*`; local or remote.
        suffixes: Of the files to take where `name` is a folder.

    Raises:
        DataError: There are none.
    """
    files: list[str] = []
    for one in expand_braces(name):
        if is_remote(one):
            files += _remote(one) if "*" in one else [one]
        elif Path(one).is_dir():
            found = (path for suffix in suffixes for path in Path(one).rglob(f"*{suffix}"))
            files += sorted(map(str, found))
        else:
            files += sorted(glob.glob(one)) if "*" in one or "?" in one else [one]
    missing = [file for file in files if not is_remote(file) and not Path(file).is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such file ({len(missing)} of {len(files)} missing).")
    if not files:
        raise DataError(f"{name}: stands for no file. Check the path.")
    return files


def _remote(pattern: str) -> list[str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        return [filesystem.unstrip_protocol(str(found)) for found in sorted(filesystem.glob(path))]
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{pattern}: cannot be listed ({error}). Check the address.") from error
