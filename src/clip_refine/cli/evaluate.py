"""The verb `evaluate`."""

import os
from typing import TYPE_CHECKING

from clip_refine.cli.settings import configure, split_lists, take_flag

if TYPE_CHECKING:
    from clip_refine.config import EvaluateConfig


def evaluate_verb(arguments: list[str]) -> None:
    """Measure a model as it stands, or several on a suite of tasks.

    To the terminal, and with --out to a JSON file. --json prints the numbers as JSON instead of
    tables. Suites: docs/evaluation.md.
    """
    from clip_refine.config import EvaluateConfig

    arguments, as_json = take_flag(arguments, "--json")
    config = configure(EvaluateConfig, evaluate_verb, split_lists(arguments, ("--models",)))
    if config is None:
        return
    if config.suite is not None:
        _evaluate_suite(config, as_json)
        return
    from rich.console import Console

    from clip_refine.measure import evaluate
    from clip_refine.report.terminal import scores_table

    scores = evaluate(config)
    if int(os.environ.get("RANK", "0")):
        return
    if as_json:
        print(scores.model_dump_json(indent=2))
    else:
        Console().print(scores_table(scores))
        _say_written(config)


def _evaluate_suite(config: "EvaluateConfig", as_json: bool) -> None:
    from rich.console import Console

    from clip_refine.report.suite import suite_tables
    from clip_refine.suites import evaluate_suite

    scores = evaluate_suite(config)
    if scores is None:
        return
    if as_json:
        print(scores.model_dump_json(indent=2))
    else:
        Console().print(*suite_tables(scores), sep="\n")
        _say_written(config)


def _say_written(config: "EvaluateConfig") -> None:
    written = {"Scores": config.out, "Features": config.save_features}
    lines = [f"{what}: {path}." for what, path in written.items() if path]
    if lines:
        print(*lines)
