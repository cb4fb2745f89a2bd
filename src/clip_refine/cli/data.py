"""The verb `data`, which has one verb of its own."""

from pathlib import Path
from typing import Annotated

from clip_refine.errors import ConfigError

SOURCE_HELP = "What `refine` takes as --data.train."
NEAR_HELP = "Near duplicates: bits of 64 in which their perceptual hashes may differ, 0 to 16."


def data_verb(arguments: list[str]) -> None:
    """Look a source of captioned images over: `clip-refine data check SOURCE`."""
    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help"):
        _check(["--help"])
    elif action == "check":
        _check(rest)
    else:
        raise ConfigError(f"data {action!r}: there is no such action. There is check.")


def _check(arguments: list[str]) -> None:
    import tyro
    from pydantic import ValidationError
    from tyro.conf import Positional, arg

    from clip_refine.config import DataConfig, ModelConfig, explain

    def check(
        source: Annotated[Positional[str], arg(help=SOURCE_HELP)],
        data: DataConfig = DataConfig(),  # noqa: B008
        model: ModelConfig = ModelConfig(),  # noqa: B008
        out: Annotated[Path | None, arg(help="JSON file for everything found.")] = None,
        sheet: Annotated[Path | None, arg(help="PNG file for ten pairs, to look at.")] = None,
        seed: Annotated[int, arg(help="Which ten.")] = 0,
        near: Annotated[int, arg(help=NEAR_HELP)] = 4,
        workers: Annotated[int | None, arg(help="Processes; else one a core, up to 8.")] = None,
        overwrite: Annotated[bool, arg(help="Replace `out` and `sheet`.")] = False,
    ) -> None:
        """Count and decode everything in a source of captioned images; stop at nothing bad in it.

        Only the tokenizer of --model is used, to count the captions that are too long for it.
        """
        from rich.console import Console

        from clip_refine.data_check import check_data
        from clip_refine.report.findings import findings_table

        findings = check_data(
            source,
            data,
            model=model,
            near=near,
            out=out,
            sheet=sheet,
            seed=seed,
            workers=workers,
            overwrite=overwrite,
        )
        Console(highlight=False).print(findings_table(findings), soft_wrap=False)
        for path in (out, sheet):
            if path is not None and path.exists():
                print(path)

    try:
        tyro.cli(check, prog="clip-refine data check", args=arguments)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
