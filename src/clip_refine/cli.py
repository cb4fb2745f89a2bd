"""The command line: each verb's flags, help and what it calls. Needs no torch for --help."""

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from clip_refine.errors import ClipRefineError, ConfigError
from clip_refine.support.console import printable

if TYPE_CHECKING:
    from clip_refine.config import EvaluateConfig, RefineConfig
    from clip_refine.config.runs import CompareConfig


# --------------------------------------------------------------------------------------------------
# A verb's settings from defaults, a YAML file and flags.


Config = TypeVar("Config", "RefineConfig", "EvaluateConfig", "CompareConfig")


def configure(
    kind: type[Config], verb: Callable[[list[str]], None], arguments: list[str]
) -> Config | None:
    """The settings of a verb: defaults, then --config, then flags; None after --print-config."""
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    import tyro

    from clip_refine.config import RefineConfig, dump_config, load_config, with_recipe

    arguments, file = take_option(arguments, "--config")
    recipe = take_option(arguments, "--recipe")[1]
    arguments, print_only = take_flag(arguments, "--print-config")
    default = load_config(kind, Path(file)) if file else kind()
    if recipe and isinstance(default, RefineConfig):
        default = with_recipe(default, recipe)
    config = tyro.cli(
        kind,
        prog=f"clip-refine {verb.__name__.removesuffix('_verb')}",
        description=f"{inspect.getdoc(verb)}\n\nAlso: --config FILE.yaml for settings from "
        "a file (flags win), --print-config to show all settings and stop.",
        args=arguments,
        default=default,
    )
    if print_only:
        print(dump_config(config), end="")
        return None
    return config


def split_lists(arguments: list[str], lists: Sequence[str]) -> list[str]:
    """Write `--recipes a,b` and `--recipes=a,b` as `--recipes a b`."""
    split: list[str] = []
    in_list = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            in_list = flag.replace("_", "-") in lists
            split += [flag, *value.split(",")] if in_list and equals else [argument]
        else:
            split += argument.split(",") if in_list else [argument]
    return split


def take_flag(arguments: list[str], flag: str) -> tuple[list[str], bool]:
    """Split a flag without a value off."""
    return [argument for argument in arguments if argument != flag], flag in arguments


def take_option(arguments: list[str], option: str) -> tuple[list[str], str | None]:
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


# --------------------------------------------------------------------------------------------------
# The verbs `refine` and `demo`: one road, other settings.


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

    from clip_refine.models.checkpoints import how_to_load
    from clip_refine.report.tables import before_after_table, verdict
    from clip_refine.roads.refine import refine

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


# --------------------------------------------------------------------------------------------------
# The verb `compare`.


LISTS = ("--recipes", "--peers", "--combine", "--learning-rates")
"""Flags of compare whose values may stand in one word, as in a,b,c."""


def compare_verb(arguments: list[str]) -> None:
    """Train several recipes alike, with several seeds, and score them beside training-free peers.

    Writes report.html, comparison.json, comparison.csv and comparison.md to --out. Lists take
    commas or spaces: --recipes a,b,c or --recipes a b c. --json prints comparison.json to standard
    output instead of tables.
    """
    from clip_refine.config.runs import CompareConfig

    arguments, as_json = take_flag(arguments, "--json")
    config = configure(CompareConfig, compare_verb, split_lists(arguments, LISTS))
    if config is None:
        return
    from rich.console import Console

    from clip_refine.report.comparison_page import comparison_verdict
    from clip_refine.report.tables import comparison_tables
    from clip_refine.roads.compare import compare

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


# --------------------------------------------------------------------------------------------------
# The verb `evaluate`.


def evaluate_verb(arguments: list[str]) -> None:
    """Measure a model as it stands, or several on a suite of tasks.

    To the terminal, and with --out to a JSON file. --json prints the numbers as JSON instead of
    tables. Suites: docs/evaluation.md.
    """
    from clip_refine.config import EvaluateConfig

    arguments, as_json = take_flag(arguments, "--json")
    config = configure(EvaluateConfig, evaluate_verb, split_lists(arguments, ("--models",)))
    if config is None:
        return
    if config.suite is not None:
        _evaluate_suite(config, as_json)
        return
    from rich.console import Console

    from clip_refine.report.tables import scores_table
    from clip_refine.roads.evaluate import evaluate

    scores = evaluate(config)
    if int(os.environ.get("RANK", "0")):
        return
    if as_json:
        print(scores.model_dump_json(indent=2))
    else:
        Console().print(scores_table(scores))
        _say_written(config)


def _evaluate_suite(config: "EvaluateConfig", as_json: bool) -> None:
    from rich.console import Console

    from clip_refine.report.tables import suite_tables
    from clip_refine.roads.suites import evaluate_suite

    scores = evaluate_suite(config)
    if scores is None:
        return
    if as_json:
        print(scores.model_dump_json(indent=2))
    else:
        Console().print(*suite_tables(scores), sep="\n")
        _say_written(config)


def _say_written(config: "EvaluateConfig") -> None:
    written = {"Scores": config.out, "Features": config.save_features}
    lines = [f"{what}: {path}." for what, path in written.items() if path]
    if lines:
        print(*lines)


# --------------------------------------------------------------------------------------------------
# The verb `data`, which has one verb of its own.


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

        from clip_refine.report.tables import findings_table
        from clip_refine.roads.check import check_data

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


# --------------------------------------------------------------------------------------------------
# The verb `explore`.


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
        from clip_refine.roads.explore import launch, open_explorer

        explorer = open_explorer(run, images, limit=limit, device=device)
        launch(explorer, port=port, browser=browser)

    tyro.cli(run, prog="clip-refine explore", args=arguments)


# --------------------------------------------------------------------------------------------------
# The verb `export`.


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
        from clip_refine.roads.export import export

        check = export(source, to=to, out=out, overwrite=overwrite)
        print(f"{source} for {to}: {out}. Loaded back, {check}.")
        if min(check.image_cosine, check.text_cosine) < 0.999:
            print(
                f"Left to itself, {to} resizes images and cleans captions a little differently: "
                f"the lowest cosine is {check.image_cosine:.4f} (images) and "
                f"{check.text_cosine:.4f} (texts). See docs/models.md."
            )

    tyro.cli(run, prog="clip-refine export", args=arguments)


# --------------------------------------------------------------------------------------------------
# The verb `interpolate`.


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
        from clip_refine.roads.interpolate import interpolate

        interpolate(base, refined, weight=weight, out=out, overwrite=overwrite)
        print(f"{weight:g} of the way from {base} to {refined}: {out}")

    tyro.cli(run, prog="clip-refine interpolate", args=arguments)


# --------------------------------------------------------------------------------------------------
# The verb `posthoc`, which has two verbs of its own.


FEATURES_HELP = ".safetensors or .npz with image_features, text_features, maybe text_to_image."
FIT_FEATURES_HELP = f"{FEATURES_HELP} Of other pairs than those you evaluate on."


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
    from clip_refine.config.runs import PEER_NAMES

    defaults = PosthocConfig()
    named = f"{', '.join(PEER_NAMES[:-1])} or {PEER_NAMES[-1]}"
    peer_help = f"{named}, or several in order as in mean-centring+nnn."
    overwriting = arg(help="Replace `out` where it exists.")

    def fit(
        peer: Annotated[Positional[str], arg(help=peer_help)],
        features: Annotated[Positional[Path], arg(help=FIT_FEATURES_HELP)],
        out: Annotated[Path, arg(help="Folder for the fitted peer.")],
        config: Annotated[PosthocConfig, arg(name="")] = defaults,
        overwrite: Annotated[bool, overwriting] = False,
    ) -> None:
        """Fit a training-free peer on features of held-out training pairs."""
        from clip_refine.roads.vectors import fit_file

        fitted = fit_file(peer, features, out, config, overwrite=overwrite)
        images, texts = fitted.fitted_on
        print(f"{fitted.name}, fitted on {images} images and {texts} texts: {out}")

    def apply(
        peer: Annotated[Positional[Path], arg(help="Folder that fit wrote.")],
        features: Annotated[Positional[Path], arg(help=FEATURES_HELP)],
        out: Annotated[Path, arg(help="File for the result: NAME.safetensors.")],
        overwrite: Annotated[bool, overwriting] = False,
    ) -> None:
        """Transform features by a fitted peer; they are then compared by their dot product."""
        from clip_refine.roads.vectors import apply_file

        applied = apply_file(peer, features, out, overwrite=overwrite)
        print(f"{applied.name}, applied to {features}: {out}")

    return {"fit": fit, "apply": apply}


# --------------------------------------------------------------------------------------------------
# The verb `report`.


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


# --------------------------------------------------------------------------------------------------
# `clip-refine VERB`: find the verb, run it, say clearly what is wrong.


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

  clip-refine evaluate --model.name runs/mine --data.val test.csv
      The same scores for a model as it stands.

  clip-refine evaluate --suite paper --data-root DIR --models runs/mine
      The paper's twelve zero-shot sets, COCO and Flickr30k, a run's base and model side by side
      with intervals; or quick, toy, or a suite of your own as a small YAML file.

  clip-refine compare --recipes clip-refine,contrastive,hycd --seeds 3 \\
      --data.train captions.csv --out runs/compared
      Which recipe is best here? All of them on the same batches, each at its own learning rate,
      beside what needs no training, with intervals. The same command goes on where it stopped.

  clip-refine report runs/mine
      Make the page again that refine and compare end with: runs/mine/report.html, one file to look
      at and share.

  clip-refine explore runs/mine --images photos
      Search your own images with the base model and the refined one side by side.

  clip-refine data check captions.csv --sheet pairs.png
      What is in a source, before a run is spent on it: bad rows, unreadable images, duplicates,
      captions too long for the model, and ten pairs to look at.

  clip-refine interpolate ViT-B-32 runs/mine --weight 0.5 --out runs/half
      A model on the line between two: most of the gain, less of the loss.

  clip-refine export runs/mine --to transformers --out exported
      The model for another library: open_clip, transformers, sentence-transformers or onnx,
      checked by loading it back there.

  clip-refine posthoc fit mean-centring FEATURES.safetensors --out peers/centred
  clip-refine posthoc apply peers/centred OTHERS.safetensors --out centred.safetensors
      What needs no training, fitted on features of held-out training pairs and applied to others;
      `clip-refine evaluate --save-features FILE` writes features.

`clip-refine VERB --help` lists every setting with its default. Settings can also come from a
YAML file, --config run.yaml, and --print-config shows them without running anything.
"""

VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo_verb,
    "refine": refine_verb,
    "evaluate": evaluate_verb,
    "compare": compare_verb,
    "report": report_verb,
    "explore": explore_verb,
    "data": data_verb,
    "interpolate": interpolate_verb,
    "export": export_verb,
    "posthoc": posthoc_verb,
}


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
        print(printable(f"clip-refine {verb}: {error}"), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        kept = {"compare": "finished runs are kept", "evaluate": "features of a suite are kept"}
        left = kept.get(verb, "nothing was written")
        print(f"\nclip-refine {verb}: stopped; {left}.", file=sys.stderr)
        raise SystemExit(130) from None


def _find(verb: str) -> Callable[[list[str]], None]:
    if verb in VERBS:
        return VERBS[verb]
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"there is no such verb.{hint} The verbs are {', '.join(VERBS)}.")
