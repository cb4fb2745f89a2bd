"""The verb `export`."""

from pathlib import Path
from typing import Annotated, Literal


def export_verb(arguments: list[str]) -> None:
    """Write a model in another library's format, checked by loading it back."""
    import tyro
    from tyro.conf import Positional, arg

    def run(
        source: Annotated[
            Positional[str], arg(metavar="RUN", help="Run or model folder, or a model's name.")
        ],
        to: Annotated[
            Literal["open_clip", "transformers", "sentence-transformers", "onnx"],
            arg(help="The library that is to load it."),
        ],
        out: Annotated[Path, arg(help="Folder for the model.")],
        overwrite: Annotated[bool, arg(help="Replace `out` where it exists.")] = False,
    ) -> None:
        """Write a model in another library's format, checked by loading it back.

        The features of 16 images and captions must be the same as before, up to 1e-5 of their norm
        (1e-4 for ONNX); else nothing is written.
        """
        from clip_refine.exporting import export

        check = export(source, to=to, out=out, overwrite=overwrite)
        print(f"{source} for {to}: {out}. Loaded back, {check}.")
        if min(check.image_cosine, check.text_cosine) < 0.999:
            print(
                f"Left to itself, {to} resizes images and cleans captions a little differently: "
                f"the lowest cosine is {check.image_cosine:.4f} (images) and "
                f"{check.text_cosine:.4f} (texts). See docs/models.md."
            )

    tyro.cli(run, prog="clip-refine export", args=arguments)
