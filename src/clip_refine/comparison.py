"""The same road for several recipes and seeds: one table, and nobody favoured."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from clip_refine import build
from clip_refine.compare_config import RUNS, CompareConfig
from clip_refine.console import remark
from clip_refine.data import ImageCaptions, LabelledImages, Stream, Subset, hold_out
from clip_refine.data.content import fingerprint, image_fingerprint
from clip_refine.data.pairs import Images
from clip_refine.data.split import MINIMUM_HELD_OUT
from clip_refine.environment import write_environment
from clip_refine.errors import ConfigError, DataError
from clip_refine.evaluation.summary import summarise
from clip_refine.models import DualEncoder
from clip_refine.posthoc.kinds import check_name
from clip_refine.report.comparison import comparison_csv, comparison_markdown
from clip_refine.report.comparison_page import write_comparison_report
from clip_refine.results import Comparison
from clip_refine.row_store import RowStore, digest
from clip_refine.run_folder import write_file
from clip_refine.runs import UNTOUCHED, Runs
from clip_refine.train import TowerPrecision
from clip_refine.train.teacher_cache import TeacherCache, model_fingerprint
from clip_refine.variants import list_variants, split_combination
from clip_refine.workbench import Workbench


def compare(
    config: CompareConfig,
    *,
    model: DualEncoder | None = None,
    train_pairs: ImageCaptions | None = None,
    held_out: ImageCaptions | None = None,
    tasks: Sequence[LabelledImages] | None = None,
) -> Comparison:
    """Train every recipe with every seed on the same batches and score all of them alike.

    Writes `comparison.json`, `comparison.csv` and `comparison.md` to `config.out`, and each
    finished run to `config.out`/rows, from where a comparison that stopped goes on.

    Args:
        config: Every setting.
        model: Used instead of loading `config.model`; has its own weights back in the end.
        train_pairs: Used instead of opening `config.data.train`; goes with `held_out`.
        held_out: Used instead of opening `config.data.val`.
        tasks: Used instead of opening `config.evaluation.zero_shot`.

    Returns:
        What `comparison.json` holds.

    Raises:
        ClipRefineError: Bad settings, data or model, an output folder that holds something else,
            or a recipe that cannot be trained at any of its learning rates.
    """
    # what is compared
    variants = list_variants(config.refinement(), recipes=config.recipes, sweeps=config.sweep)
    combined = _combined(config)
    RowStore.check(config.out, _shared_settings(config), overwrite=config.overwrite)

    # images and captions, the untouched model, its features of the training pairs
    if train_pairs is None or held_out is None:
        train_pairs, held_out = _open_data(config)
    tasks = build.build_tasks(config.evaluation) if tasks is None else tasks
    store, bench = _set_up(config, model, train_pairs, held_out, tasks)

    # run after run
    content = _content(bench, train_pairs)
    runs = Runs(config, bench, store, content=content, combined=combined)
    stored, choices = runs.untouched(), []
    for variant in variants:
        choice = runs.choose_learning_rate(variant)
        choices.append(choice)
        for seed in config.run_seeds:
            stored += runs.chosen(variant, seed, choice.chosen)
    bench.restore(config.refinement())

    # numbers → something to look at
    finished = [(found.row, found.resampled) for found in stored if found.row]
    rows = tuple(row for row, _ in finished)
    summary = summarise(rows, [resampled for _, resampled in finished], untouched=UNTOUCHED)
    result = Comparison(rows=rows, summary=summary, learning_rates=tuple(choices))
    _say_what_is_left_out(config.out / "comparison.json", result)
    write_file(config.out / "comparison.json", result.model_dump_json(indent=2) + "\n")
    write_file(config.out / "comparison.csv", comparison_csv(result))
    write_file(config.out / "comparison.md", comparison_markdown(result))
    device = build.device_name(bench.accelerator.device)
    write_environment(config.out / "environment.json", device)
    if config.report:
        write_comparison_report(config.out)
    return result


def _say_what_is_left_out(earlier: Path, result: Comparison) -> None:
    """Name the recipes that an earlier call showed in this folder and this one does not."""
    try:
        before = Comparison.model_validate_json(earlier.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return
    shown = {line.recipe for line in result.summary}
    left_out = [line.recipe for line in before.summary if line.recipe not in shown]
    if left_out:
        remark(
            f"Not shown any more, as this call does not name them: {', '.join(left_out)}. Their "
            "runs are kept and stand in the table again when they are named.",
            style="yellow",
        )


def _open_data(config: CompareConfig) -> tuple[ImageCaptions, ImageCaptions]:
    train_pairs, held_out = build.build_data(config.data, seed=config.seed)
    if isinstance(train_pairs, Stream):
        raise ConfigError(
            "data.streaming: compare reads the training pairs many times, so they cannot be "
            "streamed. Leave it out."
        )
    return train_pairs, held_out


def _combined(config: CompareConfig) -> dict[str, list[str]]:
    """Recipe → the peers behind it, all names checked before anything is trained."""
    combined: dict[str, list[str]] = {}
    for peer in config.peers:
        check_name(peer)
    for name in config.combine:
        recipe, peer = split_combination(name, config.recipes)
        check_name(peer)
        combined.setdefault(recipe, []).append(peer)
    for names in (config.peers, config.combine):
        if len(set(names)) < len(names):
            raise ConfigError(f"{', '.join(names)}: one of these comes twice. Name each once.")
    return combined


def _shared_settings(config: CompareConfig) -> dict[str, Any]:
    """What the numbers of every run depend on, as plain data; a cache changes none."""
    settings = config.model_dump(mode="json", exclude=set(RUNS))
    kept = {name: value for name, value in settings["data"].items() if "cache" not in name}
    return {**settings, "data": kept}


def _set_up(
    config: CompareConfig,
    model: DualEncoder | None,
    train_pairs: ImageCaptions,
    held_out: ImageCaptions,
    tasks: Sequence[LabelledImages],
) -> tuple[RowStore, Workbench]:
    """Everything that the runs share; the folder is cleared once data and model are there."""
    base = config.refinement()
    accelerator = build.build_accelerator(config.train.device)
    if accelerator.num_processes > 1:
        raise ConfigError("compare runs in one process. Start it without accelerate or torchrun.")
    training, selection = _set_aside(config, train_pairs)
    build.count_steps(config.train, training, 1)
    encoder = model or build.build_model(config.model)
    student = build.build_student(encoder, config.train, accelerator.device)
    student.eval()  # until it is trained, so that no statistics move
    weights = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
    store = RowStore.open(config.out, _shared_settings(config), overwrite=config.overwrite)
    precision = _precision(config, store, student, training, accelerator)
    reader = build.build_reader(
        config.data,
        encoder,
        [train_pairs, held_out, *tasks],
        workers=config.train.workers,
        folder=config.cache,
    )
    embedder = replace(build.build_embedder(base, encoder, accelerator, reader), visible=False)
    cache = TeacherCache(
        config.cache or build.default_cache(),
        encoder,
        precision,
        accelerator.device,
        config.evaluation.batch_size,
        embedder.workers,
        reader,
    )
    return store, Workbench(
        encoder=encoder,
        weights=weights,
        training=training,
        selection=selection,
        held_out=held_out,
        tasks=tasks,
        teacher=cache.features(training),
        accelerator=accelerator,
        embedder=embedder,
        precision=precision,
        seed=config.seed,
        resamples=config.resamples,
    )


def _set_aside(config: CompareConfig, pairs: ImageCaptions) -> tuple[ImageCaptions, Subset]:
    """What is trained on, and the selection pairs."""
    if len(pairs) < 2 * MINIMUM_HELD_OUT:
        raise DataError(
            f"{pairs.name}: {len(pairs)} training images, too few to set {MINIMUM_HELD_OUT} aside "
            f"for choosing learning rates and fitting peers. Give at least {2 * MINIMUM_HELD_OUT}."
        )
    return hold_out(pairs, fraction=config.selection_fraction, seed=config.seed)


def _precision(
    config: CompareConfig,
    store: RowStore,
    student: nn.Module,
    pairs: ImageCaptions,
    accelerator: Any,
) -> TowerPrecision:
    """One for all runs: what `auto` was measured to be stays so when a comparison goes on."""

    def measure() -> str:
        return build.build_precision(config.train, student, pairs, accelerator).name

    return TowerPrecision.from_name(store.once("precision", measure))  # pyright: ignore


def _content(bench: Workbench, train_pairs: ImageCaptions) -> str:
    """Fingerprint of the untouched model and of every image, caption and class."""
    return digest(
        [
            model_fingerprint(bench.encoder, bench.precision),
            *(_pairs_content(pairs) for pairs in (train_pairs, bench.held_out)),
            *(
                [
                    task.name,
                    list(task.class_names),
                    list(task.templates),
                    list(task.labels),
                    _images_content(task),
                ]
                for task in bench.tasks
            ),
        ]
    )


def _pairs_content(pairs: ImageCaptions) -> list[Any]:
    return [_images_content(pairs), [list(captions) for captions in pairs.captions]]


def _images_content(images: Images) -> str:
    found = (image_fingerprint(images, index).encode() for index in range(len(images)))
    return fingerprint(*found)
