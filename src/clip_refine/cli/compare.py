"""The verb `compare`."""

from clip_refine.cli.settings import configure, split_lists, take_flag

LISTS = ("--recipes", "--peers", "--combine", "--learning-rates")
"""Flags of compare whose values may stand in one word, as in a,b,c."""


def compare_verb(arguments: list[str]) -> None:
    """Train several recipes alike, with several seeds, and score them beside training-free peers.

    Writes report.html, comparison.json, comparison.csv and comparison.md to --out. Lists take
    commas or spaces: --recipes a,b,c or --recipes a b c. --json prints comparison.json to standard
    output instead of tables.
    """
    from clip_refine.compare_config import CompareConfig

    arguments, as_json = take_flag(arguments, "--json")
    config = configure(CompareConfig, compare_verb, split_lists(arguments, LISTS))
    if config is None:
        return
    from rich.console import Console

    from clip_refine.comparison import compare
    from clip_refine.report.comparison import comparison_tables
    from clip_refine.report.comparison_view import comparison_verdict

    comparison = compare(config)
    if as_json:
        print(comparison.model_dump_json(indent=2))
        return
    terminal = Console()
    terminal.print(*comparison_tables(comparison))
    terminal.print(comparison_verdict(comparison))
    report = f"Report: {config.out}/report.html. " if config.report else ""
    line = f"{report}Also {config.out}/comparison.json, .csv and .md"
    terminal.print(line, markup=False, soft_wrap=True)
