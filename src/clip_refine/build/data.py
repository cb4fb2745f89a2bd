"""Settings → images and captions."""

from pathlib import Path

from clip_refine.config import (
    DataConfig,
    EvaluationConfig,
)
from clip_refine.data import (
    ImageCaptions,
    LabelledImages,
    hold_out,
    read_class_folders,
    read_table,
)
from clip_refine.errors import ConfigError, DataError
from clip_refine.toy import toy_tasks, toy_train, toy_val

TOY = "toy"


def build_data(config: DataConfig, *, seed: int) -> tuple[ImageCaptions, ImageCaptions]:
    """Training pairs and held-out pairs.

    Raises:
        ConfigError: No training source is named.
        DataError: A source cannot be read, or is too small to hold a part out.
    """
    if config.train is None:
        raise ConfigError("data.train is missing. Give captioned images: --data.train captions.csv")
    if config.val is not None:
        return open_source(config.train, config), open_source(config.val, config)
    if config.train == TOY:
        return toy_train(), toy_val()
    source = open_source(config.train, config)
    return hold_out(source, fraction=config.val_fraction, seed=seed)


def build_held_out(config: DataConfig, *, seed: int) -> ImageCaptions:
    """The pairs that `refine` with these settings takes its before/after numbers from."""
    if config.val is not None:
        return toy_val() if config.val == TOY else open_source(config.val, config)
    if config.train is None:
        raise ConfigError("data.val is missing. Give captioned images: --data.val captions.csv")
    return build_data(config, seed=seed)[1]


def open_source(name: str, config: DataConfig) -> ImageCaptions:
    """Recognise a source of captioned images and open it.

    Raises:
        DataError: The kind is not known, or the source is bad.
    """
    path = Path(name)
    match path.suffix.lower():
        case "" if name == TOY:
            return toy_train()
        case ".csv" | ".tsv":
            return read_table(
                path, image_column=config.image_column, caption_column=config.caption_column
            )
    raise DataError(
        f"{name}: not a kind of source that can be read. Give a .csv or .tsv file with an image "
        f"and a caption column, or {TOY!r}."
    )


def build_tasks(config: EvaluationConfig) -> list[LabelledImages]:
    """The zero-shot tasks.

    Raises:
        DataError: A folder is missing or has no classes.
        ConfigError: Two tasks have one name.
    """
    tasks: list[LabelledImages] = []
    for name in config.zero_shot:
        if name == TOY:
            tasks += toy_tasks()
        else:
            tasks.append(read_class_folders(Path(name), templates=(config.template,)))
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"evaluation.zero_shot: two tasks have one name among {', '.join(names)}. "
            "Rename a folder, or leave one out."
        )
    return tasks
