"""The verb `compare`."""

from clip_refine.cli.settings import configure, split_lists

LISTS = ("--recipes", "--peers", "--combine", "--learning-rates")
"""Flags of compare whose values may stand in one word, as in a,b,c."""


def compare_verb(arguments: list[str]) -> None:
    """Train several recipes alike, with several seeds, and score them beside training-free peers.

    Writes comparison.json, comparison.csv and comparison.md to --out. Lists take commas or spaces:
    --recipes a,b,c or --recipes a b c.
    """
    from clip_refine.compare_config import CompareConfig

    config = configure(CompareConfig, compare_verb, split_lists(arguments, LISTS))
    if config is None:
        return
    from rich.console import Console

    from clip_refine.comparison import compare
    from clip_refine.report.comparison import comparison_tables

    terminal = Console()
    terminal.print(*comparison_tables(compare(config)))
    terminal.print(f"{config.out}/comparison.json, .csv and .md", soft_wrap=True)
