"""The verb `report`."""

from pathlib import Path
from typing import Annotated


def report_verb(arguments: list[str]) -> None:
    """Make report.html again from the folders of refinements."""
    import tyro
    from tyro.conf import Positional, arg

    def run(
        runs: Annotated[Positional[tuple[Path, ...]], arg(help="Folders that refine wrote.")],
    ) -> None:
        """Make report.html again from the folders of refinements.

        By default refine has made it already.
        """
        from clip_refine.report.run_page import write_run_report

        for folder in runs:
            print(write_run_report(folder))

    tyro.cli(run, prog="clip-refine report", args=arguments)
