"""Recipes × swept values → what is trained, and under which name it stands in the table."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from clip_refine.config import LossConfig, RefineConfig, override, with_recipe
from clip_refine.config.runs import recipe_settings, unused_settings
from clip_refine.losses.objective import check_objective
from clip_refine.support.console import remark
from clip_refine.support.errors import ConfigError
from clip_refine.support.limits import parse_yaml

SWEPT_GROUPS = ("train", "loss", "prior")
ONE_FOR_ALL = ("precision", "device", "workers")  # of `train`: all runs share them


@dataclass(frozen=True)
class Variant:
    """Something to train."""

    name: str  # what it is called in the table: the recipe, and in brackets what was swept
    recipe: str  # the recipe
    config: RefineConfig  # its settings, but for seed and learning rate
    fraction: float = 1.0  # share of the training pairs it is trained on
    fixed_rate: float | None = None  # the learning rate where that itself is swept

    def at(self, *, seed: int, learning_rate: float) -> RefineConfig:
        """The settings of one run."""
        return override(self.config, seed=seed, train={"learning_rate": learning_rate})


@dataclass(frozen=True)
class Sweep:
    """One setting and its values."""

    group: str  # `train`, `loss`, `prior` or `data`
    setting: str  # its name in that group
    values: tuple[tuple[str, Any], ...]  # as written and as read


def list_variants(
    base: RefineConfig, *, recipes: Sequence[str], sweeps: Sequence[str]
) -> list[Variant]:
    """Every recipe, or with sweeps every recipe with every swept value."""
    parsed = [parse_sweep(text) for text in sweeps]
    variants = []
    for recipe in recipes:
        plain = Variant(recipe, recipe, of_recipe(base, recipe))
        swept = [_with_value(plain, s, *value, base) for s in parsed for value in s.values]
        variants += swept if parsed else [plain]
    _refuse_in_vain(base, recipes)
    for variant in variants:
        check_objective(variant.config.loss, None)
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"{twice} would be trained twice. Name each recipe and value once.")
    return variants


def _given(loss: LossConfig) -> dict[str, Any]:
    """What was asked for; of a group that is whole, as files have it, what is no default."""
    names = loss.model_fields_set
    if names < type(loss).model_fields.keys():
        return loss.model_dump(include=names)
    default = LossConfig().model_dump()
    return {name: at for name, at in loss.model_dump().items() if at != default[name]}


def _refuse_in_vain(base: RefineConfig, recipes: Sequence[str]) -> None:
    """Refuse a setting of `loss` that every recipe has otherwise, so that nobody would heed it."""
    every = {recipe: recipe_settings(recipe, base.train.parameters) for recipe in recipes}
    if base.loss.model_fields_set >= type(base.loss).model_fields.keys():
        return  # a comparison's own file has all, and may name fewer recipes
    for name, at in _given(base.loss).items():
        others = {recipe: own[name] for recipe, own in every.items() if own.get(name, at) != at}
        if others and len(others) == len(every):
            listed = ", ".join(f"{recipe} {value}" for recipe, value in others.items())
            raise ConfigError(
                f"loss.{name} {at}: every recipe here has its own ({listed}), which stays. Leave "
                f"it out, or try it with --sweep loss.{name}={at}, or with refine --recipe."
            )


def of_recipe(base: RefineConfig, recipe: str) -> RefineConfig:
    """A recipe with its own settings of `loss`, else those that were given."""
    config = with_recipe(base, recipe)
    given = _given(base.loss)
    own = recipe_settings(recipe, base.train.parameters)
    kept = {name: at for name, at in given.items() if name not in own}
    stays = {name: own[name] for name, at in given.items() if name in own and own[name] != at}
    for name, value in stays.items():
        remark(f"{recipe}: loss.{name} stays {value}, as this recipe has it.", style="yellow")
    config = override(config, loss=kept)
    for name, why in unused_settings(config).items():
        remark(f"{recipe}: {name} changes nothing here: {why}.", style="yellow")
    return config


def parse_sweep(text: str) -> Sweep:
    """Read `group.setting=value,value,...`."""
    name, equals, listed = text.partition("=")
    group, dot, setting = name.strip().partition(".")
    written = [value.strip() for value in listed.split(",")]
    if not (equals and dot and all(written)):
        raise ConfigError(
            f"sweep {text!r}: expected a setting and its values, as in loss.alpha=0,0.25,0.5."
        )
    _check_setting(text, group, setting)
    try:
        values = tuple((value, parse_yaml(value)) for value in written)
    except ValueError as error:
        raise ConfigError(f"sweep {text!r}: a value cannot be read ({error}).") from error
    return Sweep(group, setting, values)


def split_combination(name: str, recipes: Sequence[str]) -> tuple[str, str]:
    """Split `recipe+peer`, both of which may hold a `+` themselves."""
    begins = [recipe for recipe in recipes if name.startswith(f"{recipe}+")]
    if not begins:
        raise ConfigError(
            f"combine {name!r}: does not begin with a recipe that is compared "
            f"({', '.join(recipes)}) and a +. Write it as in clip-refine+mean-centring."
        )
    recipe = max(begins, key=len)
    return recipe, name.removeprefix(f"{recipe}+")


Rate = TypeVar("Rate", int, float)
SHORT = 50  # steps of the runs that `refine` compares learning rates by
HARMED = 0.9  # share of the best score below which a rate is too high
MOST_RATES = 9  # that `auto` tries


def next_rate(tried: Mapping[float, float | None], start: float) -> float | None:
    """The learning rate that `auto` tries next, None where enough are tried; failed ones are None.

    `start`, powers of ten up to where it harms, then half powers beside the best.

    >>> next_rate({0.1: 0.3, 1.0: 0.4}, 1.0), next_rate({0.1: 0.3, 1.0: 0.4, 10.0: None}, 1.0)
    (10.0, 0.316228)
    """
    halves = {round(2 * math.log10(rate / start)): score for rate, score in tried.items()}
    best = best_rate({step: score for step, score in halves.items() if step % 2 == 0})
    beside = [min(halves, default=0) - 2] if best is None else [best + at for at in (-2, 2, -1, 1)]
    top = max(halves, default=0)
    if best is not None and (halves[top] or 0) >= HARMED * (halves[best] or 0):
        beside.insert(0, top + 2)  # small scores are noisy, so up to where it harms
    new = next((step for step in (0, -2, 2, *beside) if step not in halves), None)
    if new is None or len(tried) >= MOST_RATES:
        return None
    return float(f"{start * 10 ** (new / 2):.6g}")


def best_rate(tried: Mapping[Rate, float | None]) -> Rate | None:
    """The rate of the highest score, of equal ones the lowest; None where all failed."""
    scored = {rate: score for rate, score in tried.items() if score is not None}
    return max(scored, key=lambda rate: (scored[rate], -rate)) if scored else None


def _check_setting(text: str, group: str, setting: str) -> None:
    if group == "data":
        known = ["fraction"]
    elif group in SWEPT_GROUPS:
        kind: Any = RefineConfig.model_fields[group].annotation
        known = list(kind.model_fields)
    else:
        raise ConfigError(
            f"sweep {text!r}: settings of {', '.join(SWEPT_GROUPS)} and data.fraction can be "
            f"swept, got {group}.{setting}."
        )
    if group == "train" and setting in ONE_FOR_ALL:
        raise ConfigError(
            f"sweep {text!r}: all runs of a comparison share one train.{setting}. Compare two "
            f"calls with --train.{setting}, each with its own --out."
        )
    if setting not in known:
        near = difflib.get_close_matches(setting, known, n=1)
        hint = f"Did you mean {group}.{near[0]}?" if near else f"There are {', '.join(known)}."
        raise ConfigError(f"sweep {text!r}: there is no setting {group}.{setting}. {hint}")


def _with_value(
    plain: Variant, sweep: Sweep, written: str, value: Any, base: RefineConfig
) -> Variant:
    name = f"{plain.name}[{sweep.group}.{sweep.setting}={written}]"
    if sweep.group == "data":
        if not (isinstance(value, int | float) and 0 < value <= 1):
            raise ConfigError(f"{name}: the fraction must be above 0 and at most 1.")
        return Variant(name, plain.recipe, plain.config, fraction=float(value))
    try:
        changed = {sweep.group: {sweep.setting: value}}
        config = override(plain.config, **changed)
        if sweep.setting == "parameters":  # which some recipes go by
            config = of_recipe(override(base, **changed), plain.recipe)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    why = unused_settings(config).get(f"{sweep.group}.{sweep.setting}")
    if why:
        raise ConfigError(
            f"{name}: {sweep.group}.{sweep.setting} changes nothing in this recipe ({why}), so "
            "that its rows would all be the same. Sweep it with another recipe."
        )
    swept_rate = (sweep.group, sweep.setting) == ("train", "learning_rate")
    if swept_rate and value == "auto":
        raise ConfigError(f"{name}: name rates, or leave this out and pass --learning-rates auto.")
    fixed_rate = config.train.rate if swept_rate else None
    return Variant(name, plain.recipe, config, fixed_rate=fixed_rate)
