"""A suite's settings → opened sources, prompts, models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clip_refine.build.data import open_source
from clip_refine.config import (
    DataConfig,
    EvaluateConfig,
    Suite,
    explain,
)
from clip_refine.config.suites import CaptionsSource, RowsSource, Source, SuiteSource
from clip_refine.data import ImageCaptions
from clip_refine.data.class_names import OPEN_CLIP, choose_names
from clip_refine.data.labelled import (
    IndexedImages,
    read_cub,
    read_labelled_rows,
    read_listed_folders,
    read_torchvision,
)
from clip_refine.data.loader import Images
from clip_refine.errors import ConfigError, DataError
from clip_refine.toy import toy_tasks, toy_val


class NotThereError(DataError):
    """A source that has not been laid out, which a run may leave out."""


@dataclass(frozen=True)
class OpenedSource:
    """A suite's source whose images can be loaded.

    Attributes:
        name: As the suite calls it.
        images: What to encode.
        place: Where it was found.
        note: What the suite says about it.
        captions: The texts of each image; None where it has classes.
        labels: The class of each image; empty where it has captions.
        class_names: For prompts.
        names_from: Which list those are.
    """

    name: str
    images: Images
    place: str
    note: str | None
    captions: Sequence[Sequence[str]] | None = None
    labels: Sequence[int] = ()
    class_names: Sequence[str] = ()
    names_from: str | None = None


@dataclass(frozen=True)
class SuitePlaces:
    """Where a suite's relative paths start.

    Attributes:
        data: For images.
        files: For lists, class names and prompts: the suite file's folder, then that for images.
        download: Whether torchvision may fetch what is missing.
    """

    data: Path
    files: tuple[Path, ...]
    download: bool

    @classmethod
    def of(cls, config: EvaluateConfig) -> "SuitePlaces":
        """By `data_root` and by where the suite's file is."""
        suite = Path(config.suite or "")
        beside = suite.parent if suite.is_file() else Path()
        data = config.data_root or beside
        return cls(data, (beside, data, Path()), config.download)

    def file(self, name: str) -> str:
        """The first file of this name; the name itself where there is none."""
        return next((str(at / name) for at in self.files if (at / name).is_file()), name)


def open_sources(
    suite: Suite, places: SuitePlaces
) -> tuple[dict[str, OpenedSource], dict[str, str]]:
    """The sources that tasks name, and those that are not there with how to get them.

    Raises:
        DataError: A source is there but bad.
    """
    opened: dict[str, OpenedSource] = {}
    missing: dict[str, str] = {}
    wanted = [name for task in suite.tasks for name in task.sources().values()]
    for name in dict.fromkeys(wanted):
        try:
            opened[name] = open_suite_source(name, suite.sources[name], places)
        except NotThereError as absent:
            missing[name] = str(absent)
    return opened, missing


def open_suite_source(name: str, source: SuiteSource, places: SuitePlaces) -> OpenedSource:
    """The first of a source's places that is there.

    Raises:
        NotThereError: None is; the message lists them and says how to get it.
        DataError: It is there but bad.
    """
    tried = []
    for place in source.at:
        try:
            images, where = _open(place, places)
        except NotThereError as absent:
            tried.append(str(absent))
            continue
        if source.captioned:
            return OpenedSource(name, images, where, source.note, captions=images.captions)
        asked = source.class_names
        if isinstance(asked, str) and asked != OPEN_CLIP:
            asked = places.file(asked)
        names, names_from = choose_names(images.class_names, asked, naming=source.naming)
        return OpenedSource(
            name,
            images,
            where,
            source.note,
            labels=images.labels,
            class_names=names,
            names_from=names_from,
        )
    advice = f" {source.how_to_get}" if source.how_to_get else ""
    raise NotThereError(f"looked for {', '.join(tried)}.{advice}")


def _open(place: Source, places: SuitePlaces) -> tuple[Any, str]:
    """The images of a place, and what to call it."""
    match place.kind:
        case "toy" if place.task is None:
            return toy_val(), "toy"
        case "toy":
            tasks = {task.name: task for task in toy_tasks()}
            if place.task not in tasks:
                raise DataError(f"toy: has no task {place.task!r}, only {', '.join(tasks)}.")
            return tasks[place.task], f"toy {place.task}"
        case "rows" | "captions" if place.path.startswith("hf:"):
            return _open_from_hub(place), place.path
    file, mark, part = place.path.partition("#")
    path = places.data / file
    if not path.exists() and not any(mark in file for mark in "{*"):  # else several files
        raise NotThereError(str(path))
    where = f"{path}{mark}{part}"
    match place.kind:
        case "folder":
            only = Path(places.file(place.only)) if place.only else None
            return read_listed_folders(path, only), where
        case "cub":
            return read_cub(path, split=place.split), f"{where} {place.split}"
        case "torchvision":
            where = f"torchvision {place.dataset} {place.split or ''} in {path}".replace("  ", " ")
            # torchvision makes this folder, there or not
            made = path / "caltech101"
            if place.dataset == "Caltech101" and not made.is_dir() and not places.download:
                raise NotThereError(str(made))
            try:
                found = read_torchvision(
                    place.dataset, path, split=place.split, download=places.download
                )
            except DataError as error:
                raise NotThereError(f"torchvision's {place.dataset} in {path}") from error
            return found, where
        case "rows":
            return _read_rows(place, str(path)), where
        case "captions":
            return _read_captions(place, where), where


def _open_from_hub(place: RowsSource | CaptionsSource) -> Images:
    """What is on the Hub may be out of reach, which is as good as not there."""
    try:
        if isinstance(place, RowsSource):
            return _read_rows(place, place.path)
        return _read_captions(place, place.path)
    except DataError as error:
        raise NotThereError(f"{place.path} ({error})") from error


def _read_rows(place: RowsSource, path: str) -> IndexedImages:
    return read_labelled_rows(
        path, split=place.split, subset=place.subset, image=place.image, label=place.label
    )


def _read_captions(place: CaptionsSource, where: str) -> ImageCaptions:
    try:
        config = DataConfig.model_validate({"val": where, **place.options})
    except ValidationError as error:
        raise ConfigError(explain(error, where=f"{where}: options.")) from error
    return open_source(where, config, training=False)
