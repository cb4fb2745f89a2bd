"""The names of classes: how a source has them, made readable, or from a list of the user's."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from clip_refine.errors import DataError

OPEN_CLIP = "open_clip"


def readable(name: str, naming: str) -> str:
    """A folder's name as one would write it.

    Args:
        name: As the source has it.
        naming: `plain`, `camel-case` or `numbered`.

    Example:
        >>> readable("001.Black_footed_Albatross", "numbered"), readable("YoYo", "camel-case")
        ('Black footed Albatross', 'yo yo')
    """
    if naming == "numbered":
        name = re.sub(r"^\d+[.\-_ ]+", "", name)
    if naming == "camel-case":
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return name.replace("_", " ").replace("/", " ").strip()


def choose_names(
    own: Sequence[str], asked: str | Sequence[str] | Mapping[str, str] | None, *, naming: str
) -> tuple[tuple[str, ...], str]:
    """The class names to put into prompts, and what to call this list in the results.

    Args:
        own: The source's.
        asked: None for those; a list in their order; a mapping from them; a file with either; or
            `open_clip` for its list of ImageNet's 1,000.
        naming: As in `readable`, for the source's own.

    Raises:
        DataError: A file cannot be read, or a list does not fit the source's classes.
    """
    if asked is None:
        how = "the source's own" + ("" if naming == "plain" else f", {naming}")
        return tuple(readable(name, naming) for name in own), how
    if asked == OPEN_CLIP:
        from open_clip import IMAGENET_CLASSNAMES

        return _checked(IMAGENET_CLASSNAMES, own, "open_clip IMAGENET_CLASSNAMES")
    where = asked if isinstance(asked, str) else "the suite's"
    given: Any = read_texts(Path(asked)) if isinstance(asked, str) else asked
    if isinstance(given, Mapping):
        missing = [name for name in own if name not in given]
        if missing:
            raise DataError(
                f"class names ({where}): {missing[0]!r} is not among them ({len(missing)} of "
                f"{len(own)} missing). Name every class of the source."
            )
        return tuple(str(given[name]) for name in own), where
    return _checked(given, own, where)


def read_texts(path: Path) -> Any:
    """A list of texts, or a mapping, from a .txt (one a line), .yaml or .json file.

    Raises:
        DataError: It cannot be read or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".txt":
            return [line.strip() for line in text.splitlines() if line.strip()]
        found = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Give a .txt file with one text a line, or .yaml "
            "or .json with a list."
        ) from error
    texts = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: expected a list of texts or a mapping to texts.")
    return found


def _checked(names: Sequence[str], own: Sequence[str], where: str) -> tuple[tuple[str, ...], str]:
    if len(names) != len(own):
        raise DataError(
            f"class names ({where}): {len(names)} names for {len(own)} classes, of which the first "
            f"is {own[0]!r}. Give one a class, in their order."
        )
    return tuple(names), where
