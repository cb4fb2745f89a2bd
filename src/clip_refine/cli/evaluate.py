"""The verb `evaluate`."""

from clip_refine.cli.settings import configure


def evaluate_verb(arguments: list[str]) -> None:
    """Measure a model as it stands, to the terminal and with --out to a JSON file."""
    from clip_refine.config import EvaluateConfig

    config = configure(EvaluateConfig, evaluate_verb, arguments)
    if config is None:
        return
    from rich.console import Console

    from clip_refine.report.terminal import scores_table
    from clip_refine.road import evaluate

    Console().print(scores_table(evaluate(config)))
