"""The verb `report`."""

from pathlib import Path
from typing import Annotated

from clip_refine.errors import ConfigError


def report_verb(arguments: list[str]) -> None:
    """Make report.html again from the folders of refinements and comparisons."""
    import tyro
    from tyro.conf import Positional, arg

    def run(
        runs: Annotated[
            Positional[tuple[Path, ...]], arg(help="Folders that refine or compare wrote.")
        ],
    ) -> None:
        """Make report.html again from the folders of refinements and comparisons.

        By default those verbs have made it already.
        """
        from clip_refine.report.comparison_page import write_comparison_report
        from clip_refine.report.run_page import write_run_report

        if not runs:
            raise ConfigError("which run? Give folders that refine or compare wrote.")
        for folder in runs:
            compared = (folder / "comparison.json").is_file()
            if not compared and not (folder / "scores.json").is_file():
                raise ConfigError(
                    f"{folder}: neither scores.json nor comparison.json is there. Give a folder "
                    "that refine or compare wrote."
                )
            print(write_comparison_report(folder) if compared else write_run_report(folder))

    tyro.cli(run, prog="clip-refine report", args=arguments)
