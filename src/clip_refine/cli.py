"""The command line. Torch is imported only inside a verb, so that help is there at once."""

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from clip_refine.cli_posthoc import posthoc_verb
from clip_refine.errors import ClipRefineError, ConfigError

if TYPE_CHECKING:
    from clip_refine.compare_config import CompareConfig
    from clip_refine.config import EvaluateConfig, RefineConfig

HELP = """\
clip-refine: make a CLIP-style model better aligned without breaking it.

  clip-refine demo
      The whole road on a small drawn world, offline, in about a minute.

  clip-refine refine --data.train captions.csv --out runs/mine
      Refine OpenAI's ViT-B/32 on your captioned images for one epoch: scores before, scores
      after, and a checkpoint for open_clip in runs/mine/model.

  clip-refine refine --model.name ViT-L-14 --model.pretrained laion2b_s32b_b82k \\
      --data.train captions.csv --train.batch-size 256 --out runs/mine
      Another model: any architecture and tag of open_clip, a file, or local-dir:FOLDER.

  clip-refine evaluate --model.name local-dir:runs/mine/model --data.val test.csv
      The same scores for a model as it stands.

  clip-refine compare --recipes clip-refine,contrastive,hycd --seeds 3 \\
      --data.train captions.csv --out runs/compared
      Which recipe is best here? All of them on the same batches, each at its own learning rate,
      beside what needs no training, with intervals. The same command goes on where it stopped.

  clip-refine interpolate ViT-B-32 runs/mine --weight 0.5 --out runs/half
      A model on the line between two: most of the gain, less of the loss.

  clip-refine posthoc fit mean-centring FEATURES.safetensors --out peers/centred
  clip-refine posthoc apply peers/centred OTHERS.safetensors --out centred.safetensors
      What needs no training, fitted on features of held-out training pairs and applied to others;
      `clip-refine evaluate --save-features FILE` writes features.

`clip-refine VERB --help` lists every setting with its default. Settings can also come from a
YAML file, --config run.yaml, and --print-config shows them without running anything.
"""

LISTS = ("--recipes", "--peers", "--combine", "--learning-rates")
"""Flags of compare whose values may stand in one word, as in a,b,c."""

Config = TypeVar("Config", "RefineConfig", "EvaluateConfig", "CompareConfig")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; exit with status 2 and one clear message where something is wrong."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    verb, *rest = arguments
    if verb == "--version":
        from clip_refine import __version__

        print(__version__)
        return
    try:
        _find(verb)(rest)
    except ClipRefineError as error:
        print(f"clip-refine {verb}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        left = "finished runs are kept" if verb == "compare" else "nothing was written"
        print(f"\nclip-refine {verb}: stopped; {left}.", file=sys.stderr)
        raise SystemExit(130) from None


def refine_verb(arguments: list[str]) -> None:
    """Refine a model on captioned images, measure it before and after, save it."""
    from clip_refine.config import RefineConfig

    config = _configure(RefineConfig, "refine", arguments)
    if config is not None:
        _refine(config)


def evaluate_verb(arguments: list[str]) -> None:
    """Measure a model as it stands, to the terminal and with --out to a JSON file."""
    from clip_refine.config import EvaluateConfig

    config = _configure(EvaluateConfig, "evaluate", arguments)
    if config is None:
        return
    from rich.console import Console

    from clip_refine.report.terminal import scores_table
    from clip_refine.road import evaluate

    Console().print(scores_table(evaluate(config)))


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


def compare_verb(arguments: list[str]) -> None:
    """Train several recipes alike, with several seeds, and score them beside training-free peers.

    Writes comparison.json, comparison.csv and comparison.md to --out. Lists take commas or spaces:
    --recipes a,b,c or --recipes a b c.
    """
    from clip_refine.compare_config import CompareConfig

    config = _configure(CompareConfig, "compare", _split_lists(arguments))
    if config is None:
        return
    from rich.console import Console

    from clip_refine.comparison import compare
    from clip_refine.report.comparison import comparison_tables

    terminal = Console()
    terminal.print(*comparison_tables(compare(config)))
    terminal.print(f"{config.out}/comparison.json, .csv and .md", soft_wrap=True)


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


VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo_verb,
    "refine": refine_verb,
    "evaluate": evaluate_verb,
    "compare": compare_verb,
    "interpolate": interpolate_verb,
    "posthoc": posthoc_verb,
}


def _find(verb: str) -> Callable[[list[str]], None]:
    if verb in VERBS:
        return VERBS[verb]
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"there is no such verb.{hint} The verbs are {', '.join(VERBS)}.")


def _configure(kind: type[Config], verb: str, arguments: list[str]) -> Config | None:
    """The settings of a verb: defaults, then --config, then flags; None after --print-config."""
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    import tyro

    from clip_refine.config import RefineConfig, dump_config, load_config, with_recipe

    arguments, file = _take_option(arguments, "--config")
    recipe = _take_option(arguments, "--recipe")[1]
    print_only = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]
    default = load_config(kind, Path(file)) if file else kind()
    if recipe and isinstance(default, RefineConfig):
        default = with_recipe(default, recipe)
    config = tyro.cli(
        kind,
        prog=f"clip-refine {verb}",
        description=f"{inspect.getdoc(VERBS[verb])}\n\nAlso: --config FILE.yaml for settings from "
        "a file (flags win), --print-config to show all settings and stop.",
        args=arguments,
        default=default,
    )
    if print_only:
        print(dump_config(config), end="")
        return None
    return config


def _split_lists(arguments: list[str]) -> list[str]:
    """Write `--recipes a,b` and `--recipes=a,b` as `--recipes a b`."""
    split: list[str] = []
    in_list = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            in_list = flag.replace("_", "-") in LISTS
            split += [flag, *value.split(",")] if in_list and equals else [argument]
        else:
            split += argument.split(",") if in_list else [argument]
    return split


def _take_option(arguments: list[str], option: str) -> tuple[list[str], str | None]:
    """Split `option VALUE` off, because it decides about the other flags' defaults."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            rest = arguments[:position] + arguments[position + 1 :]
            return rest, argument.removeprefix(f"{option}=")
        if argument == option:
            if position + 1 == len(arguments):
                raise ConfigError(f"{option} needs a value after it.")
            rest = arguments[:position] + arguments[position + 2 :]
            return rest, arguments[position + 1]
    return arguments, None


def _refine(config: "RefineConfig") -> None:
    from rich.console import Console

    from clip_refine.report.terminal import before_after_table, verdict
    from clip_refine.road import refine

    scores = refine(config)
    if int(os.environ.get("RANK", "0")):
        return
    terminal = Console()
    terminal.print(before_after_table(scores.before, scores.after))
    terminal.print(verdict(scores.before, scores.after))
    terminal.print(
        f"{scores.seconds['total']:.0f} s. Scores: {config.out}/scores.json. "
        f"Model: {config.out}/model, which open_clip loads as local-dir:{config.out}/model",
        soft_wrap=True,
    )
