"""The verb `interpolate`."""

from pathlib import Path
from typing import Annotated


def interpolate_verb(arguments: list[str]) -> None:
    """Write a model on the line between two, often the best of both."""
    import tyro
    from tyro.conf import Positional, arg

    def run(
        base: Annotated[Positional[str], arg(help="Run or model folder, or a model's name.")],
        refined: Annotated[Positional[str], arg(help="The same, of the same architecture.")],
        out: Annotated[Path, arg(help="Folder for the model.")],
        weight: Annotated[float, arg(help="0 gives the first model, 1 the second.")] = 0.5,
        overwrite: Annotated[bool, arg(help="Replace `out` where it exists.")] = False,
    ) -> None:
        """Write a model on the line between two, often the best of both."""
        from clip_refine.interpolation import interpolate

        interpolate(base, refined, weight=weight, out=out, overwrite=overwrite)
        print(f"{weight:g} of the way from {base} to {refined}: {out}")

    tyro.cli(run, prog="clip-refine interpolate", args=arguments)
