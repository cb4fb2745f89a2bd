"""Finished runs of a comparison on disk, so that one that stopped goes on where it was."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from clip_refine.results import ComparisonRow, Record, flat
from clip_refine.support.console import remark
from clip_refine.support.errors import OutputError
from clip_refine.support.folder import drop_aside, set_aside, write_file


class FinishedRun(Record):
    """A finished run as `rows/NAME.json` has it."""

    depends_on: str  # everything that its numbers follow from, as one fingerprint
    # the numbers; None where training failed, which happens while learning rates are tried
    row: ComparisonRow | None
    # headline name → its value in each bootstrap resample
    resampled: Mapping[str, tuple[float, ...]]
    bystanders: float | None = None  # mean R@1 on them, where `tune` guards them


class _State(Record):
    """`state.json`, the one record of what a comparison's runs depend on."""

    settings: Mapping[str, Any]
    found: Mapping[str, str] = {}  # what was measured once


class FinishedRuns:
    """A comparison's folder, locked: its settings, and a file for each run that is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # the comparison's `out`

    @staticmethod
    def check(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Refuse what `open` would refuse, before anything is read or cleared."""
        if folder.exists():
            _check_usable(folder, settings, overwrite=overwrite)

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> "FinishedRuns":
        """Begin anew, what was there kept beside till the end, or go on with the same settings."""
        try:
            cls.check(folder, settings, overwrite=overwrite)
            if overwrite:
                set_aside(folder)
            (folder / "rows").mkdir(parents=True, exist_ok=True)
            store = cls(folder)
            state = _read_state(folder)
            if state is None or dict(state.settings) != settings:
                kept = state.found if state else {}
                store._write(_State(settings=dict(settings), found=kept))
            text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
            config = folder / "config.yaml"  # to read, and for `compare --config`
            if not config.is_file() or config.read_bytes() != text.encode():
                write_file(config, text)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be written ({error.strerror}). Choose another --out."
            ) from error
        return store

    def complete(self) -> None:
        """All is written: what was overwritten goes."""
        drop_aside(self.folder)

    def read(self, name: str, depends_on: str) -> FinishedRun | None:
        """The run of this name if it is finished and followed from the same things."""
        try:
            stored = FinishedRun.model_validate_json(self._path(name).read_bytes())
        except (OSError, ValidationError):  # not there, or cut off while it was written
            return None
        return stored if stored.depends_on == depends_on else None

    def write(self, name: str, stored: FinishedRun) -> None:
        """Keep a finished run; it is there whole or not at all."""
        write_file(self._path(name), stored.model_dump_json(indent=1) + "\n")

    def once(self, name: str, find: Callable[[], str]) -> str:
        """A word that is found when a comparison begins and kept when it goes on.

        Without a finished run nothing depends on it, and it may be of other settings.
        """
        state = _read_state(self.folder) or _State(settings={})
        if name not in state.found or not any((self.folder / "rows").glob("*.json")):
            state = state.model_copy(update={"found": {**state.found, name: find()}})
            self._write(state)
        return state.found[name]

    def _write(self, state: _State) -> None:
        write_file(self.folder / "state.json", state.model_dump_json(indent=1) + "\n")

    def _path(self, name: str) -> Path:
        """Readable, and different for different names on every file system."""
        readable = re.sub(r"[^A-Za-z0-9.=+-]+", "_", name)[:120]
        return self.folder / "rows" / f"{readable}-{digest(name)[:8]}.json"


def digest(value: Any) -> str:
    """A fingerprint of plain data, whatever the order of its keys: 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read_state(folder: Path) -> _State | None:
    try:
        return _State.model_validate_json((folder / "state.json").read_bytes())
    except (OSError, ValidationError):
        return None


def _check_usable(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder that is no comparison, or one with finished runs of other settings."""
    written = {path.name for path in folder.rglob("[!.]*") if path.is_file()}
    if folder.is_dir() and not written:
        return  # empty, or of one that was killed when it had made its folders
    state, finished = _read_state(folder), any((folder / "rows").glob("*.json"))
    if not (folder / "rows").is_dir() or not (state or finished or "config.yaml" in written):
        raise OutputError(
            f"{folder}: exists already and holds no comparison. Choose another --out."
        )
    if overwrite or not finished:
        return
    if state is None:
        remark(
            f"{folder}: state.json cannot be read. Finished runs that do not follow from these "
            "settings are made again.",
            "yellow",
        )
        return
    earlier, now = flat(state.settings), flat(settings)
    differing = sorted(name for name in {*earlier, *now} if earlier.get(name) != now.get(name))
    if differing:
        name = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise OutputError(
            f"{folder}: holds a comparison with other settings ({name} was "
            f"{earlier.get(name)!r}, is {now.get(name)!r}{more}). Pass --overwrite to start "
            "again, or another --out."
        )
