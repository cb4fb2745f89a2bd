"""Reading the small files of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clip_refine.errors import DataError


def read_mapping(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON mapping; JSON is YAML, too.

    Raises:
        DataError: The file is missing or holds something else.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not valid. {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected names and values, got {found!r:.60}.")
    return found


def read_steps(path: Path) -> list[dict[str, float]]:
    """The records of `log.jsonl`.

    Raises:
        DataError: The file is missing or holds something else.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path}: is no log of a run ({error}).") from error
