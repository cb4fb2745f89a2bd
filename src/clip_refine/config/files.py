"""Settings to and from YAML, changed and explained."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from clip_refine.config.groups import LossConfig, SettingsGroup
from clip_refine.config.runs import RefineConfig, recipe_settings
from clip_refine.errors import ConfigError

Settings = TypeVar("Settings", bound=SettingsGroup)


def load_config(kind: type[Settings], path: Path) -> Settings:
    """Read `kind` from a YAML file.

    Raises:
        ConfigError: The file is missing, is no YAML mapping, or holds an unknown or bad setting.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML. {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings such as 'seed: 42', got {values!r:.60}.")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, where=f"{path}: ")) from error


def dump_config(config: BaseModel) -> str:
    """The configuration as YAML, in the order of the fields; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def override(config: Settings, **changes: Any) -> Settings:
    """A validated copy with some settings replaced.

    Args:
        config: What to start from.
        changes: Settings by name; for a group a dict of those to replace in it, as in
            `override(config, seed=1, train={"epochs": 2})`.

    Raises:
        ConfigError: A setting does not exist or is out of range.
    """
    values = config.model_dump()
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    try:
        return type(config).model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def with_recipe(config: RefineConfig, name: str) -> RefineConfig:
    """`config` with another recipe: all of `loss` is the recipe's, the other groups stay.

    Raises:
        ConfigError: There is no such recipe; near ones are named.
    """
    try:
        loss = LossConfig(**recipe_settings(name)).model_dump()
        return override(config, recipe=name, loss=loss)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def explain(error: ValidationError, *, where: str = "") -> str:
    """A validation error in one line a problem: setting, what is wrong, what was given."""
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]) or "settings"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}{name}: there is no such setting. `--help` lists them.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            shown = "" if isinstance(given, dict | BaseModel) else f", got {given!r}"
            lines.append(f"{where}{name}: {message}{shown}.")
    return "\n".join(lines)
