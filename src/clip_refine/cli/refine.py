"""The verbs `refine` and `demo`: one road, other settings."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from clip_refine.cli.settings import configure, take_flag

if TYPE_CHECKING:
    from clip_refine.config import RefineConfig


def refine_verb(arguments: list[str]) -> None:
    """Refine a model on captioned images, measure it before and after, save it.

    --json prints scores.json to standard output instead of tables.
    """
    from clip_refine.config import RefineConfig

    arguments, as_json = take_flag(arguments, "--json")
    config = configure(RefineConfig, refine_verb, arguments)
    if config is not None:
        _refine(config, as_json=as_json)


def demo_verb(arguments: list[str]) -> None:
    """Refine a small model of a drawn world on 6,000 drawn images, offline."""
    import tyro

    from clip_refine.config import demo_config

    def demo(
        out: Annotated[Path, tyro.conf.arg(help="Folder for the results.")] = Path("runs/demo"),
        seed: Annotated[int, tyro.conf.arg(help="Of the order and the references.")] = 0,
        overwrite: Annotated[bool, tyro.conf.arg(help="Replace `out` where it exists.")] = False,
    ) -> None:
        """Refine a small model of a drawn world on 6,000 drawn images, offline.

        The same as `clip-refine refine` with the settings in the `config.yaml` that it writes.
        """
        _refine(demo_config(out=out, seed=seed, overwrite=overwrite))

    tyro.cli(demo, prog="clip-refine demo", args=arguments)


def _refine(config: "RefineConfig", *, as_json: bool = False) -> None:
    from rich.console import Console

    from clip_refine.models.folders import how_to_load
    from clip_refine.report.score_lines import verdict
    from clip_refine.report.terminal import before_after_table
    from clip_refine.road import refine

    scores = refine(config)
    if int(os.environ.get("RANK", "0")):
        return
    if as_json:
        print(scores.model_dump_json(indent=2))
        return
    terminal = Console()
    terminal.print(before_after_table(scores))
    terminal.print(verdict(scores))
    terminal.print(
        f"{scores.seconds['total']:.0f} s. {_report_line(config)}Scores: {config.out}/scores.json. "
        f"Model: {config.out}/model{how_to_load(config.out / 'model')}",
        markup=False,
        soft_wrap=True,
    )


def _report_line(config: "RefineConfig") -> str:
    return f"Report: {config.out}/report.html. " if config.report else ""
