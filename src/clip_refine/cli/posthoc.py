"""The verb `posthoc`, which has two verbs of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from clip_refine.errors import ConfigError

FEATURES_HELP = ".safetensors or .npz with image_features, text_features, maybe text_to_image."
FIT_FEATURES_HELP = f"{FEATURES_HELP} Of other pairs than those you evaluate on."
PEER_HELP = (
    "mean-centring, distribution-normalisation, nnn or modality-shift, "
    "or several in order as in mean-centring+nnn."
)


def posthoc_verb(arguments: list[str]) -> None:
    """Fit a training-free feature transform on a file of features, or apply one."""
    import tyro
    from pydantic import ValidationError

    from clip_refine.config import explain

    try:
        tyro.extras.subcommand_cli_from_dict(
            _posthoc_actions(),
            prog="clip-refine posthoc",
            description=f"{posthoc_verb.__doc__}\n\n`clip-refine posthoc fit --help` lists the "
            "peers, and their settings with the defaults.",
            args=arguments,
        )
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def _posthoc_actions() -> dict[str, Callable[..., None]]:
    from tyro.conf import Positional, arg

    from clip_refine.config import PosthocConfig

    defaults = PosthocConfig()
    overwriting = arg(help="Replace `out` where it exists.")

    def fit(
        peer: Annotated[Positional[str], arg(help=PEER_HELP)],
        features: Annotated[Positional[Path], arg(help=FIT_FEATURES_HELP)],
        out: Annotated[Path, arg(help="Folder for the fitted peer.")],
        config: Annotated[PosthocConfig, arg(name="")] = defaults,
        overwrite: Annotated[bool, overwriting] = False,
    ) -> None:
        """Fit a training-free peer on features of held-out training pairs."""
        from clip_refine.posthoc import fit_file

        fitted = fit_file(peer, features, out, overwrite=overwrite, **config.model_dump())
        images, texts = fitted.fitted_on
        print(f"{fitted.name}, fitted on {images} images and {texts} texts: {out}")

    def apply(
        peer: Annotated[Positional[Path], arg(help="Folder that fit wrote.")],
        features: Annotated[Positional[Path], arg(help=FEATURES_HELP)],
        out: Annotated[Path, arg(help="File for the result: NAME.safetensors.")],
        overwrite: Annotated[bool, overwriting] = False,
    ) -> None:
        """Transform features by a fitted peer; they are then compared by their dot product."""
        from clip_refine.posthoc import apply_file

        applied = apply_file(peer, features, out, overwrite=overwrite)
        print(f"{applied.name}, applied to {features}: {out}")

    return {"fit": fit, "apply": apply}
