"""The verb `explore`."""

from pathlib import Path
from typing import Annotated


def explore_verb(arguments: list[str]) -> None:
    """Search your own images with the base model and the refined one side by side."""
    import tyro
    from tyro.conf import Positional, arg

    images_help = "A folder of images, or captioned images as for refine --data.train. Without it: "
    images_help += "the run's held-out images."

    def run(
        run: Annotated[Positional[Path], arg(help="Folder that refine wrote.")],
        images: Annotated[str | None, arg(help=images_help)] = None,
        limit: Annotated[int, arg(help="Images at most, the first ones.")] = 2000,
        device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
        port: Annotated[int | None, arg(help="Of localhost; the first free one from 7860.")] = None,
        browser: Annotated[bool, arg(help="Open the page in a browser.")] = True,
    ) -> None:
        """Search your own images with the base model and the refined one side by side.

        Serves a page on this machine only; Ctrl-C stops it. Needs the extra [app].
        """
        from clip_refine.explore import open_explorer
        from clip_refine.explore.app import launch

        explorer = open_explorer(run, images, limit=limit, device=device)
        launch(explorer, port=port, browser=browser)

    tyro.cli(run, prog="clip-refine explore", args=arguments)
