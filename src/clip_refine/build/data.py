"""Settings → images and captions."""

from pathlib import Path

from clip_refine.build.sources import TOY, open_source, open_training
from clip_refine.config import (
    DataConfig,
    EvaluationConfig,
)
from clip_refine.console import console
from clip_refine.data import (
    EveryCaption,
    ImageCaptions,
    LabelledImages,
    Stream,
    hold_out,
    read_class_folders,
)
from clip_refine.errors import ConfigError, DataError
from clip_refine.toy import toy_tasks, toy_val

MINIMUM_PAIRS = 11
"""Held-out images that the geometry's 10 nearest neighbours need."""


def build_data(
    config: DataConfig,
    *,
    seed: int,
    train_pairs: ImageCaptions | Stream | None = None,
    held_out: ImageCaptions | None = None,
) -> tuple[ImageCaptions | Stream, ImageCaptions]:
    """Training pairs and held-out pairs.

    Args:
        config: What to open.
        seed: Of the held-out part.
        train_pairs: Used instead of opening `config.train`.
        held_out: Used instead of opening `config.val` or holding a part out.

    Raises:
        ConfigError: No training source is named, or pairs are to be held out of a stream.
        DataError: A source cannot be read, or is too small to hold a part out.
    """
    if train_pairs is None:
        if not config.sources:
            raise ConfigError(
                "data.train is missing. Give captioned images: --data.train captions.csv"
            )
        if config.streaming and config.val is None and held_out is None:
            raise ConfigError(
                "data.val is missing: nothing can be held out of a stream. Give the pairs for the "
                "before/after numbers: --data.val captions.csv"
            )
        train_pairs = open_training(config)
        if held_out is None and config.val is None and config.sources == (TOY,):
            held_out = toy_val()
    if config.captions == "all" and not isinstance(train_pairs, Stream | EveryCaption):
        train_pairs = EveryCaption(train_pairs)
    if held_out is None and config.val is not None:
        held_out = open_source(config.val, config, training=False)
    if held_out is None:
        if isinstance(train_pairs, Stream):
            raise ConfigError("nothing can be held out of a stream. Pass held_out, or data.val.")
        train_pairs, held_out = hold_out(train_pairs, fraction=config.val_fraction, seed=seed)
    _check_held_out(held_out, None if isinstance(train_pairs, Stream) else train_pairs)
    return train_pairs, held_out


def build_held_out(config: DataConfig, *, seed: int) -> ImageCaptions:
    """The pairs that `refine` with these settings takes its before/after numbers from."""
    if config.val is not None:
        held_out = open_source(config.val, config, training=False)
        _check_held_out(held_out, None)
        return held_out
    if not config.sources:
        raise ConfigError("data.val is missing. Give captioned images: --data.val captions.csv")
    return build_data(config, seed=seed)[1]


def _check_held_out(held_out: ImageCaptions, train_pairs: ImageCaptions | None) -> None:
    """Refuse too few pairs to measure on; say so where they are trained on, too."""
    if len(held_out) < MINIMUM_PAIRS:
        raise DataError(
            f"{held_out.name}: {len(held_out)} held-out images are too few to measure anything. "
            f"Give {MINIMUM_PAIRS} or more, better some hundreds, with --data.val."
        )
    if train_pairs is None:
        return
    trained = {train_pairs.image_name(index) for index in range(len(train_pairs))}
    shared = sum(held_out.image_name(index) in trained for index in range(len(held_out)))
    if shared:
        console.print(
            f"Beware: {shared:,} of the {len(held_out):,} held-out images are trained on, too, so "
            "the scores after training are not held-out scores.",
            style="yellow",
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
