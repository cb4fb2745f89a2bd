"""The command line: verb → road.

Every verb imports its road when it is called and not before, so that help needs no torch, which
takes seconds to import. A verb is a function whose flags tyro reads off its signature or settings.
Tyro could choose the verb as well (`SubcommandApp`), but then it makes the parsers of all verbs for
each call, gives `--config` no say in the other flags' defaults, and asks no "Did you mean".
"""

import argparse
import ast
import difflib
import inspect
import io
import json as json_format
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from errno import ENOSPC
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from clip_refine.support.console import PlainConsole, printable, say, speaks, talk
from clip_refine.support.errors import ClipRefineError, ConfigError, EndedError, first_line, ran_out
from clip_refine.support.process import Stopped, stop_asked

if TYPE_CHECKING:
    from pydantic import BaseModel

    from clip_refine.config import EvaluateConfig, RefineConfig
    from clip_refine.config.runs import CompareConfig, TuneConfig
    from clip_refine.results import Comparison, RunScores

OVERWRITE = arg(help="Replace `out` where it exists.")
MODEL_OUT = arg(help="Folder for the model.")
JSON = arg(help="Print the numbers as JSON instead.")
MODEL_HELP = "Run or model folder, name, ARCH@TAG, or factory:MODULE:FUNCTION@RUN."

# --------------------------------------------------------------------------------------------------
# Whether what a verb reads is there, looked for before libraries are loaded, which takes seconds.


def _model_there(name: str) -> None:
    from clip_refine.config import named_model

    named_model(name).check_there()


def _pairs_there(name: str | None) -> None:
    from clip_refine.config import DataConfig

    # IMAGE.npy,TEXT.npy are two
    names = [] if name is None else [name] if os.path.exists(name) else name.split(",")
    DataConfig(train=tuple(names)).check_there()


def _paths_there(paths: Path | tuple[Path, ...]) -> None:
    from clip_refine.config.settings import check_path

    for path in (paths,) if isinstance(paths, Path) else paths:
        check_path(path)


_LOOKS = (_model_there, _pairs_there, _paths_there)
"""They stand in the annotations of a verb's arguments."""


def _look_for(config: "BaseModel") -> None:
    """Refuse settings that name what is not there."""
    from clip_refine.config.settings import check_path
    from clip_refine.config.suites import load_suite
    from clip_refine.support.folder import hidden_work

    for name, group in [*config, ("", config)]:
        if hasattr(group, "check_there"):
            group.check_there()
        elif name == "models":
            for model in group:
                _model_there(model)
        elif name == "bystanders":
            _pairs_there(group)
        elif name == "suite" and group:
            load_suite(group)
        elif name == "data_root" and group and not getattr(config, "download", False):
            check_path(group)
        elif name == "evaluation":
            for task in group.zero_shot:
                if task != "toy":
                    check_path(task, " A task is a folder with a sub-folder for each class.")
        elif name == "resume" and group not in (None, "auto"):
            work = hidden_work(Path(group))  # of a run that was stopped
            advice = " Name the folder that was given as --out, or leave --resume out."
            check_path(work if work.exists() else group, advice)


def _looking(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, once all that it reads is there."""
    signature = inspect.signature(verb)

    @wraps(verb)
    def run(*given: Any, **named: Any) -> None:
        for name, value in signature.bind(*given, **named).arguments.items():
            for look in getattr(signature.parameters[name].annotation, "__metadata__", ()):
                if look in _LOOKS:
                    look(value)
            if hasattr(value, "check_there"):
                value.check_there()
        verb(*given, **named)

    return run


# --------------------------------------------------------------------------------------------------
# Verbs whose settings may come from a file: `refine`, `compare`, `evaluate`; and `demo`, which is
# `refine` with settings of its own.


def refine(config: "RefineConfig", *, as_json: bool = False, fail_if_worse: bool = False) -> None:
    """Refine a model on captioned images, measure it before and after, save it.

    --json prints scores.json to standard output instead of tables. --fail-if-worse exits with 3
    where mean R@1 or zero-shot is clearly lower after than before. --guard is --guard.every 10.
    """
    from clip_refine.models.checkpoints import how_to_load
    from clip_refine.report.tables import worse
    from clip_refine.roads import refine as road

    scores = road.refine(config)
    if _wants_tables(scores, as_json):
        _show_refined(scores)
        report = f"Report: {config.out}/report.html. " if config.report else ""
        say(
            f"{scores.seconds['total']:.0f} s. {report}Scores: {config.out}/scores.json. "
            f"Model: {config.out}/model{how_to_load(config.out / 'model')}"
        )
    if fail_if_worse and worse(scores):
        raise SystemExit(3)


def demo(
    out: Annotated[Path, arg(help="Folder for the results.")] = Path("runs/demo"),
    seed: Annotated[int, arg(help="Of the order and the references.")] = 0,
    recipe: Annotated[str, arg(help="As for refine; centred is ours.")] = "clip-refine",
    overwrite: Annotated[bool, OVERWRITE] = False,
) -> None:
    """Refine a small model of a drawn world on 6,000 drawn images, offline.

    The same as `clip-refine refine` with the settings in the `config.yaml` that it writes.
    """
    from clip_refine.config import demo_config

    refine(demo_config(out=out, seed=seed, recipe=recipe, overwrite=overwrite))


def compare(config: "CompareConfig", *, as_json: bool = False) -> None:
    """Train several recipes alike, with several seeds, and score them beside training-free peers.

    Writes report.html, comparison.json, comparison.csv and comparison.md to --out. Lists take
    commas or spaces: --recipes a,b,c or --recipes a b c. --json prints comparison.json to standard
    output instead of tables.
    """
    from clip_refine.roads import compare as road

    _show_comparison(road.compare(config), config.out, as_json=as_json, report=config.report)


def tune(config: "TuneConfig", *, as_json: bool = False) -> None:
    """Search recipe, learning rate and weights that fit, by successive halving (extra [tune]).

    Scored on held-out training pairs; what costs more than --guard on --evaluation.zero-shot or
    --bystanders is refused. The same command goes on where it stopped, more --trials add to it.
    """
    from clip_refine.roads import tune as road

    found = road.tune(config)
    _say(
        f"{found.recipe} at learning rate {found.learning_rate:g}"
        + "".join(f", {name} {value:g}" for name, value in found.loss.items())
        + f": mean recall {found.selection:.3f} on held-out training pairs, "
        f"{found.untouched:.3f} untouched, the best of {len(found.trials)}. "
        + (
            "Refine with it:\n\n"
            if found.selection > found.untouched
            else "None retrieves better than the untouched model: keep that, or go on with more "
            "--trials. To close its gap all the same:\n\n"
        )
        + f"  clip-refine refine --config {config.out}/tuned.yaml --out {config.out}-refined\n",
        as_json,
        **found.model_dump(),
    )


def _show_comparison(
    comparison: "Comparison", out: Path, *, as_json: bool, report: bool = True
) -> None:
    from rich.markup import escape

    from clip_refine.report.comparison import comparison_tables, decide

    if _wants_tables(comparison, as_json):
        decision = decide(comparison, str(out))
        # names such as hycd[loss.alpha=0] would be taken for markup
        _show(escape(decision.text))
        if decision.command:
            say(f"\n  {decision.command}\n")  # in one line, so that it can be copied
        _show(*comparison_tables(comparison))
        page = f"Report: {out}/report.html. " if report else ""
        say(f"{page}Also {out}/comparison.json, .csv and .md")


def evaluate(config: "EvaluateConfig", *, as_json: bool = False) -> None:
    """Measure a model as it stands, or several on a suite of tasks.

    To the terminal, and with --out to a JSON file. --json prints the numbers as JSON instead of
    tables. Suites: docs/evaluation.md.
    """
    from clip_refine.report.comparison_page import suite_page
    from clip_refine.report.tables import scores_table, suite_tables

    if config.suite is None:
        from clip_refine.roads import evaluate as road

        scores = road.evaluate(config)
        if not _wants_tables(scores, as_json):
            return
        _show(scores_table(scores))
        if config.save_threshold:
            from clip_refine.report.tables import threshold_lines
            from clip_refine.results import FitProbability, read

            found = read(FitProbability, config.save_threshold)
            say(threshold_lines(found, config.save_threshold))
    else:
        from clip_refine.roads.suites import evaluate_suite

        scores = evaluate_suite(config)
        if scores is None or not _wants_tables(scores, as_json):
            return
        _show(*suite_tables(scores))
    written = {
        "Scores": config.out,
        "Page": suite_page(config.out) if config.suite and config.out else None,
        "Features": config.save_features,
        "Threshold": config.save_threshold,
    }
    if any(written.values()):
        say(*(f"{what}: {path}." for what, path in written.items() if path))


def _wants_tables(scores: "BaseModel", as_json: bool) -> bool:
    """Whether tables are to follow: not after JSON, which this prints, nor in a second process."""
    if not speaks():
        return False
    if as_json:
        print(scores.model_dump_json(indent=2))
    return not as_json


def _for_parts(config: "RefineConfig", parameters: str) -> "RefineConfig":
    """What a recipe sets by the part that is trained, which flags choose behind it."""
    from clip_refine.config import override
    from clip_refine.config.runs import recipe_settings

    was, now = (recipe_settings(config.recipe, p) for p in (config.train.parameters, parameters))
    own = {name for name, value in was.items() if getattr(config.loss, name) == value}
    return override(config, loss={name: now[name] for name in own & now.keys()})


def _say(text: str, as_json: bool, **numbers: Any) -> None:
    """What a verb without tables found."""
    if speaks():
        say(json_format.dumps(numbers, default=str) if as_json else text)


def _show_refined(scores: "RunScores") -> None:
    from clip_refine.report.tables import answer, before_after_table, doubts, verdict

    said = " ".join((answer(scores), verdict(scores)))
    _show(before_after_table(scores), *filter(None, (said, doubts(scores))))


def _show(*shown: Any) -> None:
    PlainConsole().print(*shown, sep="\n")


LISTS = ("--recipes", "--peers", "--combine", "--learning-rates", "--models")
"""Flags whose values may stand in one word, as in a,b,c."""


def with_settings(verb: Callable[..., None], arguments: list[str]) -> None:
    """Call a verb with defaults, then --config, then flags; after --print-config do not call it."""
    from clip_refine.config import (
        EvaluateConfig,
        RefineConfig,
        dump_config,
        load_config,
        override,
        with_recipe,
    )
    from clip_refine.config.runs import CompareConfig, TuneConfig

    kinds = {
        "refine": RefineConfig,
        "compare": CompareConfig,
        "tune": TuneConfig,
        "evaluate": EvaluateConfig,
    }
    kind = kinds[verb.__name__]
    # These decide about the other flags' defaults or are no settings, so they are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    if kind is RefineConfig:
        first.add_argument("--recipe")
        first.add_argument("--train.parameters", dest="parameters")
    for flag in _switches(verb.__name__):
        first.add_argument(flag, action="store_true")
    if kind is CompareConfig and any(word.startswith("--guard") for word in arguments):
        raise ConfigError(
            "--guard belongs to refine: compare measures what each recipe does when it is trained "
            "to its end, and tables show what that costs. Leave it out."
        )
    try:
        chosen, arguments = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        fault = "needs a value after it" if "expected" in error.message else "takes no value"
        raise ConfigError(f"{error.argument_name} {fault}.") from None
    default = load_config(kind, chosen.config) if chosen.config else kind()
    if isinstance(default, RefineConfig) and chosen.recipe:
        default = with_recipe(default, chosen.recipe)
    own = {}
    if isinstance(default, RefineConfig):
        own = {"fail_if_worse": chosen.fail_if_worse}
        if chosen.parameters:
            arguments += ["--train.parameters", chosen.parameters]
            default = _for_parts(default, chosen.parameters)
        if chosen.guard and not default.guard.every:
            default = override(default, guard={"every": 10})
    arguments = split_lists(arguments)
    try:
        config = tyro.cli(
            kind,
            prog=f"clip-refine {verb.__name__}",
            description=f"{inspect.getdoc(verb)}\n\nAlso: --config FILE.yaml for settings from "
            "a file (flags win), --print-config to show all settings and stop.",
            args=arguments,
            default=default,
        )
    except SystemExit as stop:
        if stop.code:
            _suggest(verb.__name__, default, arguments)
        raise
    flagged = any(word.startswith("--model.") for word in arguments)
    if kind is CompareConfig and not flagged and "model" not in default.model_fields_set:
        # tyro hands every setting over, so that the first of --models would stand behind a default
        config = kind.model_validate(config.model_dump(exclude={"model"}))
    if isinstance(config, CompareConfig):
        config = config.model_copy(update={"loss": _given_loss(config, default, arguments)})
    if chosen.print_config:
        print(dump_config(config), end="")
    else:
        _look_for(config)
        verb(config, as_json=chosen.json, **own)


def _switches(verb: str) -> tuple[str, ...]:
    """Flags without a value of a verb with settings that are none of these."""
    return "--print-config", "--json", *(("--guard", "--fail-if-worse") if verb == "refine" else ())


def _given_loss(config: Any, default: Any, arguments: list[str]) -> Any:
    """Which of its settings were asked for, as tyro sets all: recipes have others than defaults."""
    from clip_refine.config.runs import RECIPES, recipe_settings

    flags = (word.partition("=")[0].replace("-", "_") for word in arguments)
    flagged = {re.sub(r"__loss\.(no_)?", "", flag) for flag in flags if flag.startswith("__loss.")}
    own = default.loss.model_fields_set
    if own >= type(config.loss).model_fields.keys():  # a comparison's own file, of other recipes
        usual = type(config.loss)()
        recipes = [recipe for recipe in config.recipes if recipe in RECIPES]
        each = [recipe_settings(recipe, config.train.parameters) for recipe in recipes]
        heeded = {name for name in own if any(name not in recipe for recipe in each)}
        own = {name for name in heeded if getattr(default.loss, name) != getattr(usual, name)}
    names = flagged | own
    return type(config.loss).model_validate(config.loss.model_dump(include=names))


def _suggest(verb: str, default: "BaseModel", arguments: list[str]) -> None:
    """Say what tyro does not: whose value a word is, and which flag an abbreviation may be."""
    from clip_refine.results import flat

    unknown: list[str] = []
    with redirect_stderr(io.StringIO()), suppress(SystemExit):  # of other faults
        _, unknown = tyro.cli(
            type(default), args=arguments, default=default, return_unknown_args=True
        )
    names = [name.replace("_", "-") for name in flat(default.model_dump())]
    pairs = "--data.val" if verb == "evaluate" else "--data.train"
    for before, word in pairwise(("", *unknown)):
        group, _, short = word.lstrip("-").rpartition(".")
        near = [
            f"--{name}"
            for name in names
            if name.startswith(group)
            and short == "".join(re.findall(r"(?:^|-)(\w)", name.rpartition(".")[2]))
        ]
        if word.startswith("--") and near:
            print(f"{word}: did you mean {' or '.join(near)}?", file=sys.stderr)
        elif not word.startswith("-") and not before.startswith("-"):
            print(
                f"{word}: captioned images are given as {pairs} {word}, a model as --model.name "
                f"{word}.",
                file=sys.stderr,
            )


def split_lists(arguments: list[str]) -> list[str]:
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


# --------------------------------------------------------------------------------------------------
# Verbs that have verbs of their own: `data check`, `posthoc fit`, `vectors refine`. Their functions
# stand inside, since the settings in their signatures take longer to import than all help else.


def data(arguments: list[str]) -> None:
    """Look a source of captioned images over: `clip-refine data check SOURCE`."""
    from clip_refine.config import DataConfig, ModelConfig

    near_help = "Near duplicates: bits of 64 in which their perceptual hashes may differ, 0 to 16."

    def check(
        source: Annotated[
            Positional[str], arg(help="What `refine` takes as --data.train."), _pairs_there
        ],
        data: DataConfig = DataConfig(),  # noqa: B008
        model: ModelConfig = ModelConfig(),  # noqa: B008
        out: Annotated[Path | None, arg(help="JSON file for everything found.")] = None,
        sheet: Annotated[Path | None, arg(help="PNG file for ten pairs, to look at.")] = None,
        seed: Annotated[int, arg(help="Which ten.")] = 0,
        near: Annotated[int, arg(help=near_help)] = 4,
        workers: Annotated[int | None, arg(help="Processes; else one a core, up to 8.")] = None,
        overwrite: Annotated[bool, arg(help="Replace `out` and `sheet`.")] = False,
        strict: Annotated[
            bool, arg(help="Exit with 1 where bad rows, images or no pairs would stop a run.")
        ] = False,
        json: Annotated[bool, arg(help="Print everything found as JSON, no table.")] = False,
    ) -> None:
        """Count and decode everything in a source of captioned images; stop at nothing bad in it.

        Only the tokenizer of --model is used, to count the captions that are too long for it.
        """
        from clip_refine.roads.check import check_data, findings_table

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
        if json:
            print(findings.text, end="")
        else:
            PlainConsole(highlight=False).print(findings_table(findings, data), soft_wrap=False)
            for path in (out, sheet):
                if path is not None and path.exists():
                    say(path)
        if strict and not findings.sound:
            raise SystemExit(1)

    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help"):
        rest = ["--help"]
    elif action != "check":
        raise ConfigError(f"data {action!r}: there is no such action. There is check.")
    tyro.cli(_looking(check), prog="clip-refine data check", args=rest)


def fold(arguments: list[str]) -> None:
    """Close a model's gap by its weights alone: fold the means of its features out, untrained."""
    from clip_refine.config import DataConfig

    share_help = "Of each tower's mean feature that is taken off, 0 to 1."

    def run(
        model: Annotated[Positional[str], arg(help=MODEL_HELP), _model_there],
        out: Annotated[Path, arg(help="Folder for the model.")],
        data: DataConfig = DataConfig(),  # noqa: B008
        share: Annotated[float, arg(help=share_help)] = 1.0,
        share_text: Annotated[float | None, arg(help="For captions, where it differs.")] = None,
        seed: Annotated[int, arg(help="Which pairs the means are taken of.")] = 42,
        overwrite: Annotated[bool, OVERWRITE] = False,
        json: Annotated[bool, JSON] = False,
    ) -> None:
        """Close a model's gap by its weights alone: fold the means of its features out, untrained.

        The result is an ordinary checkpoint. `refine --recipe centred` starts from it and trains.
        """
        from clip_refine.roads import weights as road

        found = road.fold(
            model,
            data,
            out=out,
            share=share,
            share_text=share_text,
            seed=seed,
            overwrite=overwrite,
        )
        before, after = found.gap
        text = (
            f"{model}, its means folded out, logit scale {found.logit_scale:.1f}: {out}. On "
            f"{found.pairs:,} pairs that the means were not taken of, the gap goes from "
            f"{before:.3f} to {after:.3f}{', few to rest on' if found.pairs < 100 else ''}; what "
            "else changed: `clip-refine evaluate`."
        )
        told = {"model": model, "logit_scale": found.logit_scale, "out": out}
        _say(text, json, **told, gap_before=before, gap_after=after, pairs=found.pairs)

    tyro.cli(_looking(run), prog="clip-refine fold", args=arguments)


def posthoc(arguments: list[str]) -> None:
    """Fit a training-free feature transform on a file of features, or apply one."""
    from clip_refine.config import PosthocConfig
    from clip_refine.config.runs import PEER_NAMES

    named = f"{', '.join(PEER_NAMES[:-1])} or {PEER_NAMES[-1]}"
    peer_help = f"{named}, or several in order as in mean-centring+nnn."
    features_help = ".safetensors or .npz with image_features, text_features, maybe text_to_image."
    fit_help = f"{features_help} Of other pairs than those you evaluate on."
    defaults = PosthocConfig()

    def fit(
        peer: Annotated[Positional[str], arg(help=peer_help)],
        features: Annotated[Positional[Path], arg(help=fit_help), _paths_there],
        out: Annotated[Path, arg(help="Folder for the fitted peer.")],
        config: Annotated[PosthocConfig, arg(name="")] = defaults,
        overwrite: Annotated[bool, OVERWRITE] = False,
        json: Annotated[bool, JSON] = False,
    ) -> None:
        """Fit a training-free peer on features of held-out training pairs."""
        from clip_refine.roads.vectors import fit_file

        fitted = fit_file(peer, features, out, config, overwrite=overwrite)
        images, texts = fitted.fitted_on
        text = f"{fitted.name}, fitted on {images} images and {texts} texts: {out}"
        _say(text, json, peer=fitted.name, images=images, texts=texts, out=out)

    def apply(
        peer: Annotated[Positional[Path], arg(help="Folder that fit wrote."), _paths_there],
        features: Annotated[Positional[Path], arg(help=features_help), _paths_there],
        out: Annotated[Path, arg(help="File for the result: NAME.safetensors.")],
        overwrite: Annotated[bool, OVERWRITE] = False,
        json: Annotated[bool, JSON] = False,
    ) -> None:
        """Transform features by a fitted peer; they are then compared by their dot product."""
        from clip_refine.roads.vectors import apply_file

        applied = apply_file(peer, features, out, overwrite=overwrite)
        text = f"{applied.name}, applied to {features}: {out}"
        _say(text, json, peer=applied.name, score_columns=applied.score_columns, out=out)

    tyro.extras.subcommand_cli_from_dict(
        {"fit": _looking(fit), "apply": _looking(apply)},
        prog="clip-refine posthoc",
        description=f"{posthoc.__doc__}\n\n`clip-refine posthoc fit --help` lists the "
        "peers, and their settings with the defaults.",
        args=arguments,
    )


def vectors(arguments: list[str]) -> None:
    """Refine vectors that are stored already, without images and without encoding again."""
    from clip_refine.config import ModelConfig
    from clip_refine.config.runs import VectorsConfig

    pairs_help = (
        ".npz, .safetensors, .parquet, IMAGE.npy,TEXT.npy, hf:ORG/NAME[#split=S], a LanceDB table "
        "DB/NAME.lance, or a folder: clip-retrieval's, a saved dataset's, or with image.npy and "
        "text.npy."
    )
    owner_help = "Column that says which image a row is of, where images have several rows."
    maps_help = "Folder that vectors refine, vectors align or posthoc fit wrote."
    stored_help = (
        ".npy, .npz, .safetensors, .parquet, a LanceDB table DB/NAME.lance, or a folder: "
        "clip-retrieval's or a saved dataset's."
    )
    old_help = "Vectors of some items in the old index."
    new_help = "The same items, in order, of the new model."
    recipes_help = "Named objectives, as for refine --recipe."
    peers_help = "What needs no training, as for posthoc fit."
    defaults = VectorsConfig()

    def refine(
        pairs: Annotated[Positional[str], arg(metavar="PAIRS", help=pairs_help), _pairs_there],
        out: Annotated[Path, arg(help="Folder for the maps, their scores and report.html.")],
        config: Annotated[VectorsConfig, arg(name="")] = defaults,
        overwrite: Annotated[bool, OVERWRITE] = False,
        json: Annotated[bool, JSON] = False,
    ) -> None:
        """Learn one linear map a modality on stored pairs; scores before and after on the rest."""
        from clip_refine.results import RunScores, read
        from clip_refine.roads.vector_maps import refine_vectors

        _, scores = refine_vectors(pairs, config, out, overwrite=overwrite)
        if _wants_tables(scores, json):
            _show_refined(read(RunScores, out / "scores.json"))
            say(
                f"{scores.seconds:.0f} s. Report: {out}/report.html. The fold alone beside it, "
                f"storage and more: {out}/evaluation.json"
            )

    def compare(
        pairs: Annotated[Positional[str], arg(metavar="PAIRS", help=pairs_help), _pairs_there],
        out: Annotated[Path, arg(help="Folder for report.html and comparison.json.")],
        recipes: Annotated[tuple[str, ...], arg(help=recipes_help)] = ("centred", "clip-refine"),
        seeds: Annotated[int, arg(help="Trainings of each, on one split.")] = 3,
        peers: Annotated[tuple[str, ...], arg(help=peers_help)] = ("fold", "mean-centring"),
        config: Annotated[VectorsConfig, arg(name="")] = defaults,
        overwrite: Annotated[bool, OVERWRITE] = False,
        json: Annotated[bool, JSON] = False,
    ) -> None:
        """Learn maps by several recipes and seeds and score them beside what needs no training."""
        from clip_refine.roads.vector_maps import compare_vectors

        choice = {"recipes": recipes, "seeds": seeds, "peers": peers}
        found = compare_vectors(pairs, config, out, overwrite=overwrite, **choice)
        _show_comparison(found, out, as_json=json)

    def evaluate(
        pairs: Annotated[Positional[str], arg(metavar="PAIRS", help=pairs_help), _pairs_there],
        map: Annotated[tuple[Path, ...], arg(help=maps_help), _paths_there] = (),
        owner: Annotated[str | None, arg(help=owner_help)] = None,
        resamples: Annotated[int, arg(help="Of the bootstrap over images.")] = 1000,
        seed: Annotated[int, arg(help="Of bootstrap and splits.")] = 42,
        out: Annotated[Path | None, arg(help="JSON file for the scores.")] = None,
        overwrite: Annotated[bool, OVERWRITE] = False,
        json: Annotated[bool, JSON] = False,
    ) -> None:
        """Gap, retrieval, mixed search and separation of stored pairs, as they are and mapped."""
        from clip_refine.report.tables import suite_tables
        from clip_refine.roads.vectors import evaluate_vectors

        scores = evaluate_vectors(
            pairs, map, owner=owner, resamples=resamples, seed=seed, out=out, overwrite=overwrite
        )
        if _wants_tables(scores, json):
            _show(*suite_tables(scores))

    def apply(
        maps: Annotated[Positional[Path], arg(help=maps_help), _paths_there],
        stored: Annotated[Positional[Path], arg(help=stored_help), _paths_there],
        side: Annotated[Literal["image", "text"], arg(help="Whose vectors are mapped.")],
        out: Annotated[Path, arg(help="The new file or folder.")],
        column: Annotated[str | None, arg(help="Their array or column. Else as found.")] = None,
        overwrite: Annotated[bool, OVERWRITE] = False,
        json: Annotated[bool, JSON] = False,
    ) -> None:
        """Map a stored index a block at a time: same layout, ids, order and type."""
        from clip_refine.vectors.files import load_peer
        from clip_refine.vectors.stored import apply_stored
        from clip_refine.vectors.transforms import Procrustes

        count = apply_stored(maps, stored, out, side=side, column=column, overwrite=overwrite)
        other = "text" if side == "image" else "image"
        then = (
            "They lie in the old index's space: search it with them as it is."
            if isinstance(load_peer(maps), Procrustes)
            else "Now rebuild the ANN index on them. What they are compared with needs its own "
            f"map: --side {other} for stored {other} vectors, `clip-refine vectors fold` for the "
            "model that encodes new queries."
        )
        text = f"{count:,} {side} vectors through {maps}: {out}. {then}"
        _say(text, json, vectors=count, side=side, maps=maps, out=out)

    def align(
        old: Annotated[Positional[Path], arg(help=old_help), _paths_there],
        new: Annotated[Positional[Path], arg(help=new_help), _paths_there],
        out: Annotated[Path, arg(help="Folder for the map.")],
        overwrite: Annotated[bool, OVERWRITE] = False,
        json: Annotated[bool, JSON] = False,
    ) -> None:
        """Fit the rotation that takes a new model's vectors into an old index's space."""
        from clip_refine.roads.vectors import align_vectors

        fitted = align_vectors(old, new, out, overwrite=overwrite)
        text = f"{fitted.name}, fitted on {fitted.image_count:,} items: {out}"
        _say(text, json, map=fitted.name, items=fitted.image_count, out=out)

    def isoclip(
        out: Annotated[Path, arg(help="Folder for the maps.")],
        top: Annotated[int, arg(help="Directions of the largest singular values to drop.")],
        bottom: Annotated[int, arg(help="Directions of the smallest to drop.")],
        model: ModelConfig = ModelConfig(),  # noqa: B008
        overwrite: Annotated[bool, OVERWRITE] = False,
        json: Annotated[bool, JSON] = False,
    ) -> None:
        """Compute IsoCLIP's maps from a model's projections, for search within one modality."""
        from clip_refine.roads.vector_maps import isoclip_maps

        made = isoclip_maps(model, out, top=top, bottom=bottom, overwrite=overwrite)
        text = f"{made.name} of {model.name} without {top} and {bottom} directions: {out}"
        _say(text, json, map=made.name, dim=made.dim, top=top, bottom=bottom, out=out)

    def fold(
        maps: Annotated[Positional[Path], arg(help=maps_help), _paths_there],
        out: Annotated[Path, MODEL_OUT],
        model: ModelConfig = ModelConfig(),  # noqa: B008
        overwrite: Annotated[bool, OVERWRITE] = False,
    ) -> None:
        """Multiply the maps into a model's two output layers, for new queries."""
        from clip_refine.models.checkpoints import how_to_load
        from clip_refine.roads.vector_maps import fold_vectors

        fold_vectors(maps, model, out, overwrite=overwrite)
        say(f"{model.name} with {maps} in its output layers: {out}{how_to_load(out)}")

    tyro.extras.subcommand_cli_from_dict(
        {
            verb.__name__: _looking(verb)
            for verb in (refine, compare, evaluate, apply, align, isoclip, fold)
        },
        prog="clip-refine vectors",
        description=f"{vectors.__doc__}\n\n`clip-refine vectors refine --help` lists the "
        "settings with their defaults. See docs/vectors.md.",
        args=split_lists(arguments),
    )


# --------------------------------------------------------------------------------------------------
# The other verbs.


def report(
    runs: Annotated[
        Positional[tuple[Path, ...]],
        arg(help="Folders that refine or compare wrote, JSON files of evaluate --suite."),
    ],
) -> None:
    """Make the page of a refinement, comparison or suite again; of several runs one side by side.

    A page is report.html in its folder, the suite's name with .html, or side-by-side.html beside
    the first of several refinements. The verbs make all but the last by default.
    """
    from clip_refine.report.comparison_page import (
        write_comparison_report,
        write_runs_report,
        write_suite_report,
    )
    from clip_refine.report.run_page import write_run_report

    if not runs:
        raise ConfigError("which run? Give folders that refine or compare wrote.")
    makers = []
    for path in runs:
        compared = (path / "comparison.json").is_file()
        if not (compared or path.is_file() or (path / "scores.json").is_file()):
            raise ConfigError(
                f"{path}: neither scores.json nor comparison.json is there. Give a folder "
                "that refine or compare wrote."
            )
        one = write_suite_report if path.is_file() else write_run_report
        makers.append(write_comparison_report if compared else one)
    if len(runs) > 1 and set(makers) == {write_run_report}:
        say(write_runs_report(runs))
        return
    for path, make in zip(runs, makers, strict=True):
        say(make(path))


IMAGES_HELP = (
    "A folder of images, or captioned images as for refine --data.train. Without it: "
    "the run's held-out images. Of stored vectors: the pairs they were made of, to be shown."
)

FACTORY_HELP = "Function that makes the run's base model, where one did: MODULE:FUNCTION."


def explore(
    run: Annotated[
        Positional[Path], arg(help="Folder that refine or vectors refine wrote."), _paths_there
    ],
    images: Annotated[str | None, arg(help=IMAGES_HELP), _pairs_there] = None,
    limit: Annotated[int, arg(help="Images at most, the first ones.")] = 2000,
    factory: Annotated[str | None, arg(help=FACTORY_HELP)] = None,
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    port: Annotated[int | None, arg(help="Of localhost; the first free one from 7860.")] = None,
    browser: Annotated[bool, arg(help="Open the page in a browser.")] = True,
) -> None:
    """Search your own images with the base model and the refined one side by side.

    Serves a page on this machine only; Ctrl-C stops it. Needs the extra [app].
    """
    if port is not None and not 0 < port < 2**16:  # before all images are encoded
        raise ConfigError(f"--port {port}: must be 1 to {2**16 - 1}.")
    from clip_refine.roads import explore as road

    explorer = road.open_explorer(run, images, factory=factory, limit=limit, device=device)
    road.launch(explorer, port=port, browser=browser)


def interpolate(
    base: Annotated[Positional[str], arg(help=MODEL_HELP), _model_there],
    refined: Annotated[
        Positional[str], arg(help="The same, of the same architecture."), _model_there
    ],
    out: Annotated[Path, MODEL_OUT],
    weight: Annotated[float, arg(help="0 gives the first model, 1 the second.")] = 0.5,
    overwrite: Annotated[bool, OVERWRITE] = False,
) -> None:
    """Write a model on the line between two, often the best of both."""
    from clip_refine.roads import weights as road

    road.interpolate(base, refined, weight=weight, out=out, overwrite=overwrite)
    say(f"{weight:g} of the way from {base} to {refined}: {out}")


def export(
    source: Annotated[Positional[str], arg(metavar="RUN", help=MODEL_HELP), _model_there],
    to: Annotated[
        Literal["open_clip", "transformers", "sentence-transformers", "onnx", "immich"],
        arg(help="The library that is to load it."),
    ],
    out: Annotated[Path, MODEL_OUT],
    precision: Annotated[
        Literal["fp32", "fp16", "int8"], arg(help="Of the weights in ONNX files.")
    ] = "fp32",
    push_to_hub: Annotated[str | None, arg(help="Upload it there, too: YOU/NAME.")] = None,
    private: Annotated[bool, arg(help="Whether a new repository there is.")] = True,
    overwrite: Annotated[bool, OVERWRITE] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Write a model in another library's format, checked by loading it back.

    The features of 16 images and captions must be the same as before, up to 1e-5 of their norm
    (ONNX: 1e-4, with fp16 5e-3, with int8 5e-2); else nothing is written.
    """
    from clip_refine.roads import export as road

    check = road.export(
        source,
        to=to,
        out=out,
        precision=precision,
        overwrite=overwrite,
        push_to_hub=push_to_hub,
        private=private,
    )
    where = f"{out} and {push_to_hub} on the Hub" if push_to_hub else out
    _say(f"{source} for {to}: {where}. Loaded back, {check}.", json, **asdict(check), out=out)
    if not json and min(check.image_cosine, check.text_cosine) < 0.999:
        say(
            f"Left to itself, {to} resizes images and cleans captions a little differently: "
            f"the lowest cosine is {check.image_cosine:.4f} (images) and "
            f"{check.text_cosine:.4f} (texts). See docs/models.md."
        )


def cache(
    action: Annotated[
        Positional[Literal["show", "prune"]], arg(help="prune removes what show lists.")
    ] = "show",
    folder: Annotated[Path | None, arg(help="Without it: $XDG_CACHE_HOME/clip-refine.")] = None,
    unused_days: Annotated[
        float | None, arg(help="Only what nobody has used for so long; 0 prunes all.")
    ] = None,
) -> None:
    """Show what teachers' features, features of suites and pixels take on the disk, or remove it.

    All of it is made again when it is needed.
    """
    if action == "prune" and unused_days is None:
        raise ConfigError(
            "cache prune: say what may go: --unused-days 30 what nobody has used for so long, "
            "--unused-days 0 all of it."
        )
    from clip_refine.support.cache import KeptRows
    from clip_refine.support.folder import default_cache, size_text

    folder = folder or default_cache()
    found = [kept for kept in KeptRows.all_in(folder) if kept.unused_days >= (unused_days or 0)]
    for kept in found:
        gone = "" if action == "show" else "removed  " if kept.remove() else "in use  "
        name = kept.folder.relative_to(folder)
        used = f"unused for {kept.unused_days:.1f} days"
        say(f"{gone}{size_text(kept.size):>9}  {kept.rows:>10,} rows  {used}  {name}")
    say(f"{size_text(sum(kept.size for kept in found))} in {folder}")


def doctor(json: Annotated[bool, JSON] = False) -> None:
    """Look at libraries, devices, precision, memory, disk and hub; exits with 1 on a fault."""
    from clip_refine.roads.doctor import examine

    found = examine()
    if json:
        print(json_format.dumps([asdict(one) for one in found], indent=2))
    else:
        width = max(len(one.about) for one in found)
        for one in found:
            say(f"{'!' if one.advice else ' '} {one.about:<{width}}  {one.found}")
            if one.advice:
                say(f"  {'':<{width}}  {one.advice}")
    amiss = [one.about for one in found if one.advice]
    if not json:
        say(f"{len(amiss)} to see to: {', '.join(amiss)}." if amiss else "Nothing to see to.")
    if amiss:
        raise SystemExit(1)


def with_flags(verb: Callable[..., None], arguments: list[str]) -> None:
    """Call a verb with flags as its signature says."""
    tyro.cli(_looking(verb), prog=f"clip-refine {verb.__name__}", args=arguments)


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

  clip-refine tune --data.train captions.csv --trials 20 --out runs/tuned
      The recipe, learning rate and weights that fit this model and these pairs; or only a rate,
      with refine --train.learning-rate auto.

  clip-refine report runs/mine
      Make the page again that refine and compare end with: runs/mine/report.html, one file to look
      at and share. Of several runs (report runs/a runs/b) one page, side by side.

  clip-refine explore runs/mine --images photos
      Search your own images with the base model and the refined one side by side.

  clip-refine data check captions.csv --sheet pairs.png
      What is in a source, before a run is spent on it: bad rows, unreadable images, duplicates,
      captions too long for the model, and ten pairs to look at.

  clip-refine interpolate ViT-B-32 runs/mine --weight 0.5 --out runs/half
      A model on the line between two: most of the gain, less of the loss.

  clip-refine fold ViT-B-32 --data.train captions.csv --out models/folded
      Nearly all of the gap closed by the weights alone, untrained; refine --recipe centred begins
      with it.

  clip-refine export runs/mine --to transformers --out exported
      The model for another library: open_clip, transformers, sentence-transformers, onnx or
      immich, checked by loading it back there.

  clip-refine posthoc fit mean-centring FEATURES.safetensors --out peers/centred
  clip-refine posthoc apply peers/centred OTHERS.safetensors --out centred.safetensors
      What needs no training, fitted on features of held-out training pairs and applied to others;
      `clip-refine evaluate --save-features FILE` writes features.

  clip-refine vectors refine PAIRS.npz --out maps/mine
  clip-refine vectors apply maps/mine STORED.npy --side image --out NEW.npy
  clip-refine vectors fold maps/mine --model.name ViT-B-32 --out model
      For those who have only the vectors: learns a linear map a modality in seconds, maps a whole
      index, and puts the same maps into the model for new queries.

  clip-refine cache prune --unused-days 30
      What features and pixels that are kept take on the disk (`cache` alone shows it), and rid of.

  clip-refine doctor
      Libraries, devices, precision, memory, disk and hub, before a run trips over one of them.

`clip-refine VERB --help` lists every setting with its default. Settings can also come from a
YAML file, --config run.yaml, and --print-config shows them without running anything. --dry-run
says what refine and compare would do and how long it takes. --quiet prints results and errors
only, --verbose a line of progress every second. eval "$(clip-refine --print-completion bash)"
completes verbs and settings; for zsh write it to a file _clip-refine on its fpath.
"""

VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": partial(with_flags, demo),
    "refine": partial(with_settings, refine),
    "evaluate": partial(with_settings, evaluate),
    "compare": partial(with_settings, compare),
    "tune": partial(with_settings, tune),
    "report": partial(with_flags, report),
    "cache": partial(with_flags, cache),
    "doctor": partial(with_flags, doctor),
    "explore": partial(with_flags, explore),
    "data": data,
    "interpolate": partial(with_flags, interpolate),
    "fold": fold,
    "export": partial(with_flags, export),
    "posthoc": posthoc,
    "vectors": vectors,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; where something is wrong say it in one message, without a traceback.

    Exits with 2 for usage and input, 1 for a failure, 3 for a worse model, 130 after Ctrl-C.
    `--debug` shows the traceback of a failure, `--quiet` is silent but for results and errors,
    `--verbose` prints a line of progress every second.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    talk(quiet="--quiet" in arguments, verbose="--verbose" in arguments)
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows few letters shows the rest
    try:
        try:
            _run([argument for argument in arguments if argument not in _FOR_ALL])
        finally:
            sys.stdout.flush()  # here, since Python's own flush at the end would be too late
    except SystemExit:
        raise
    except BaseException as error:  # Ctrl-C and panics of parsers in Rust are no `Exception`
        verb = " ".join(arguments[:1])
        told = isinstance(error, KeyboardInterrupt | ClipRefineError | OSError)
        if stop_asked() and not told:
            error = Stopped(stop_asked())  # what came of it in the middle of another library
        message, status = _explain(error, verb)
        _discard_output()
        if debug:
            raise
        if message:
            cut = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."
            start = "\n" * isinstance(error, KeyboardInterrupt)  # behind the terminal's ^C
            print(printable(f"{start}clip-refine {verb:.60}: {cut}"), file=sys.stderr)
        raise SystemExit(status) from None


# verbs that several processes may run
_TOGETHER = ("refine", "demo", "evaluate", "doctor", "vectors apply")
_FOR_ALL = ("--debug", "--quiet", "--verbose")  # flags of every verb
_LONGEST = 8000  # letters of a message


def _explain(error: BaseException, verb: str) -> tuple[str, int]:
    """What to say of an error that nobody handled, and the status to exit with."""
    match error:
        case ClipRefineError():
            return str(error), error.status
        case KeyboardInterrupt():
            kept = {"compare": "finished runs are kept", "evaluate": "features of a suite are kept"}
            left = getattr(error, "left", None) or kept.get(verb, "nothing was written")
            return f"stopped; {left}.", getattr(error, "status", 130)  # a signal has its own
        case BrokenPipeError() if _reader_is_gone():
            return "", 1
        case RecursionError():
            return "something that was given is nested too deeply to be read.", 2
        case _ if ran_out(error):
            return "out of memory. Use smaller batches, fewer --train.workers or less data.", 1
        case OSError():
            named = f"{error.filename}: " if error.filename else ""
            full = " Free some space, or choose another folder." if error.errno == ENOSPC else ""
            return f"{named}{error.strerror or first_line(error)}.{full}", 1
        case RuntimeError() if type(error).__name__ == "DistBackendError" or "gloo" in str(error):
            return str(EndedError()), 1
    return (
        f"failed: {type(error).__name__}: {first_line(error)}. This should not happen; --debug "
        "shows where it did, for a report."
    ), 1


def _discard_output() -> None:
    """Let what cannot be written go nowhere, so that Python does not complain again at the end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # no file of the system's
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe whose reader, such as `head`, has seen enough."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except (OSError, ValueError):  # no file of the system's
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _completion(shell: str = "bash") -> str:
    """A script that completes all verbs: tyro makes one for each, and the last loaded would win."""
    if shell not in ("bash", "zsh"):
        raise ConfigError(f"--print-completion {shell}: there is none. Allowed: bash, zsh.")
    specs, script, line, verb, marker = {}, "", "", "", "COMPLETION_SPEC = "

    def add(spec: dict[str, Any], flags: Sequence[str], kind: str = "flag") -> None:
        for one in (spec, *spec["subcommands"].values()):
            one["options"] += [{"flags": [flag], "description": "", "type": kind} for flag in flags]

    for verb, run in VERBS.items():
        with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
            run([*(["check"] * (verb == "data")), "--tyro-print-completion", shell])
        script = printed.getvalue()
        line = next(line for line in script.splitlines() if line.startswith(marker))
        spec = ast.literal_eval(line.removeprefix(marker)) | {"description": verb}
        nested = {"options": [], "subcommands": {"check": spec}} if verb == "data" else {}
        add(spec, _FOR_ALL)
        if isinstance(run, partial) and run.func is with_settings:
            add(spec, _switches(verb))
            add(spec, ["--config"], "path")
        specs[verb] = spec | nested
    whole = {**specs[verb], "prog": "clip-refine", "options": [], "subcommands": specs}
    script = script.replace(line, f"{marker}{whole}").replace(f"clip_refine_{verb}", "clip_refine")
    # where nothing of ours fits, files do: what stands without a flag has no other completion
    some, files = "    for completion in completions", "__TYRO_COMPLETE_FILES__"
    script = script.replace(f"{some}:", f'{some} or ["{files}"]:')
    # by the word alone, which tyro's script joins to those before it; folders go on with a slash
    match = 'COMPREPLY=($(compgen -f -- "$cur"))'
    by_word = match.replace("$cur", "${COMP_WORDS[COMP_CWORD]}")
    before = "compopt -o filenames 2>/dev/null\n    local IFS=$'\\n'"  # names may have blanks
    script = script.replace(match, f"{before}\n    {by_word}")
    return script.replace(f"clip-refine {verb}", "clip-refine")


def _run(arguments: list[str]) -> None:
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if any(printable(word) != word.replace("\t", "\ufffd") for word in arguments):
        raise ConfigError(
            "an argument holds control characters, which could change what a terminal shows. "
            "Rename what is called so."
        )
    verb, *rest = arguments
    if verb == "--version":
        from clip_refine import __version__

        print(__version__)
        return
    if verb == "--print-completion":
        print(_completion(*rest[:1]))
        return
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no such verb.{hint} The verbs are {', '.join(VERBS)}.")
    helps = not {"--help", "-h"}.isdisjoint(rest)
    named = " ".join(arguments[:2]) if verb == "vectors" else verb
    if named not in _TOGETHER and not helps and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            f"{named} runs in one process: several would all do the same. Start it without "
            "torchrun or accelerate."
        )
    VERBS[verb](rest)
