"""A verb's settings from defaults, a YAML file and flags."""

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from clip_refine.errors import ConfigError

if TYPE_CHECKING:
    from clip_refine.compare_config import CompareConfig
    from clip_refine.config import EvaluateConfig, RefineConfig

Config = TypeVar("Config", "RefineConfig", "EvaluateConfig", "CompareConfig")


def configure(
    kind: type[Config], verb: Callable[[list[str]], None], arguments: list[str]
) -> Config | None:
    """The settings of a verb: defaults, then --config, then flags; None after --print-config."""
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    import tyro

    from clip_refine.config import RefineConfig, dump_config, load_config, with_recipe

    arguments, file = take_option(arguments, "--config")
    recipe = take_option(arguments, "--recipe")[1]
    arguments, print_only = take_flag(arguments, "--print-config")
    default = load_config(kind, Path(file)) if file else kind()
    if recipe and isinstance(default, RefineConfig):
        default = with_recipe(default, recipe)
    config = tyro.cli(
        kind,
        prog=f"clip-refine {verb.__name__.removesuffix('_verb')}",
        description=f"{inspect.getdoc(verb)}\n\nAlso: --config FILE.yaml for settings from "
        "a file (flags win), --print-config to show all settings and stop.",
        args=arguments,
        default=default,
    )
    if print_only:
        print(dump_config(config), end="")
        return None
    return config


def split_lists(arguments: list[str], lists: Sequence[str]) -> list[str]:
    """Write `--recipes a,b` and `--recipes=a,b` as `--recipes a b`."""
    split: list[str] = []
    in_list = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            in_list = flag.replace("_", "-") in lists
            split += [flag, *value.split(",")] if in_list and equals else [argument]
        else:
            split += argument.split(",") if in_list else [argument]
    return split


def take_flag(arguments: list[str], flag: str) -> tuple[list[str], bool]:
    """Split a flag without a value off."""
    return [argument for argument in arguments if argument != flag], flag in arguments


def take_option(arguments: list[str], option: str) -> tuple[list[str], str | None]:
    """Split `option VALUE` off, because it decides about the other flags' defaults."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            rest = arguments[:position] + arguments[position + 1 :]
            return rest, argument.removeprefix(f"{option}=")
        if argument == option:
            if position + 1 == len(arguments):
                raise ConfigError(f"{option} needs a value after it.")
            rest = arguments[:position] + arguments[position + 2 :]
            return rest, arguments[position + 1]
    return arguments, None
