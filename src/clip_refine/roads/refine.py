"""THE ROAD: what happens to a model and its pairs, top to bottom."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from clip_refine import build
from clip_refine.config import DataConfig, RefineConfig, dump_config, override
from clip_refine.data import ImageCaptions, Stream
from clip_refine.data.rows import skipped_rows, write_skipped
from clip_refine.evaluation.evidence import gather_evidence
from clip_refine.evaluation.scores import embed_model, measure, paired_differences, score_features
from clip_refine.models import DualEncoder, Teacher
from clip_refine.report.run_page import write_run_report
from clip_refine.results import Provenance, RunScores
from clip_refine.roads.interpolate import interpolate_student, set_aside
from clip_refine.saving import refinement, save_model, write_card
from clip_refine.support.console import Clock, console
from clip_refine.support.environment import write_environment
from clip_refine.support.folder import check_free, complete_folder
from clip_refine.train import StepLog
from clip_refine.train.log import check_tracker, track_run


def refine(
    config: RefineConfig,
    *,
    model: DualEncoder | None = None,
    train_pairs: ImageCaptions | Stream | None = None,
    held_out: ImageCaptions | None = None,
) -> RunScores:
    """Refine a model, measure it before and after, and save it.

    Writes `scores.json`, `model/`, `config.yaml`, `log.jsonl`, `environment.json`, where rows were
    skipped `skipped.jsonl`, and, unless `config.report` is off, `report.html` and its data
    `report.json` to `config.out`, which appears when the run is complete.

    Args:
        config: Every setting.
        model: Refined in place instead of loading `config.model`.
        train_pairs: Used instead of opening `config.data.train`.
        held_out: Used instead of opening `config.data.val` or holding a part out.

    Returns:
        The scores before and after, as in `scores.json`.

    Raises:
        ClipRefineError: Bad settings, data or model, a loss that is not finite, or an output
            folder that exists. Nothing is left at `config.out` then.
    """
    clock = Clock()
    check_free(config.out, overwrite=config.overwrite)
    check_tracker(config.log)
    accelerator = build.build_accelerator(config.train.device)

    with clock("load"):
        # 1 images and captions
        train_pairs, held_out = build.build_data(
            config.data, seed=config.seed, train_pairs=train_pairs, held_out=held_out
        )
        train_pairs, selection = set_aside(config, train_pairs)
        tasks = build.build_tasks(config.evaluation)
        steps = build.count_steps(config.train, train_pairs, accelerator.num_processes)
        # 2 student and teacher
        if model is not None:
            name = f"python:{type(model).__name__}"
            config = override(config, model={"name": name, "pretrained": None, "factory": None})
        encoder = build.build_model(config.model, model)
        student = build.build_student(encoder, config.train, accelerator.device)
        reader = build.build_reader(
            config.data,
            encoder,
            [train_pairs, held_out, *tasks],
            workers=config.train.workers,
            visible=accelerator.is_main_process,
        )

    with _output(config, accelerator) as folder, track_run(config, folder) as tracking:
        embedder = build.build_embedder(config, encoder, accelerator, reader)
        with clock("evaluate_before"):
            features_before = embed_model(embedder, held_out, tasks)
            before = score_features(features_before, seed=config.seed)
            tracking.scores(before, step=0)

        # 3 references, 4 losses, 5 one epoch
        with clock("train"), StepLog(folder and folder / "log.jsonl", tracking.step) as log:
            features = build.measure_features(config, embedder, train_pairs)
            config, scale = build.build_scale(config, student, features, train_pairs)
            precision = build.build_precision(config.train, student, train_pairs, accelerator)
            config = override(config, train={"precision": precision.name})
            prior = build.build_prior(config.prior, features, scale)
            teacher = Teacher(student)
            with build.build_part(config, student, accelerator):
                trainer = build.build_trainer(
                    config,
                    student,
                    teacher,
                    precision,
                    prior,
                    accelerator,
                    steps=steps,
                    features=features,
                    scale=scale,
                )
                batches = build.build_batches(config, train_pairs, encoder, accelerator, reader)
                trainer.train(batches, steps=steps, log=log)
            way = interpolate_student(config, student, teacher, embedder, selection)
            scale.undo()

        # 6 frozen features → numbers
        with clock("evaluate_after"):
            features_after = embed_model(embedder, held_out, tasks)
            after = score_features(features_after, seed=config.seed)
            tracking.scores(after, step=steps)
            was, now = measure(features_before), measure(features_after)
            difference = paired_differences(was, now, seed=config.seed)

        # 7 results
        provenance = refinement(config, train_pairs, held_out, steps=steps)
        pairs = build.count_pairs(config.train, train_pairs, steps)
        recipe = _recipe(config, provenance, pairs=pairs, steps=steps)
        recipe["interpolation"] = way
        if folder:
            with clock("save"):
                save_model(student, folder / "model", provenance)
                _save(folder, config, accelerator.device)
                write_skipped(skipped_rows([train_pairs, held_out]), folder / "skipped.jsonl")
        scores = RunScores(
            before=before,
            after=after,
            difference=difference,
            recipe=recipe,
            seconds=clock.seconds,
        )
        if folder:
            scores.write(folder / "scores.json")
            write_card(folder / "model", provenance, scores)
        if folder and config.report:
            _report(folder, was, now, held_out, tasks, seed=config.seed)
    return scores


def _report(folder: Path, *evidence: Any, seed: int) -> None:
    """Write `report.json` and `report.html`; a run is worth keeping without them, too."""
    try:
        gather_evidence(*evidence, seed=seed).write(folder / "report.json")
        write_run_report(folder)
    except Exception as error:  # whatever is wrong with it, hours of training are not thrown away
        console.print(f"No report: {error}", style="yellow", markup=False)


def _output(config: RefineConfig, accelerator: Accelerator) -> Any:
    """The folder to write to on the first process, None on others."""
    if not accelerator.is_main_process:
        return nullcontext()
    return complete_folder(config.out, overwrite=config.overwrite)


def _recipe(
    config: RefineConfig, provenance: Provenance, *, pairs: int, steps: int
) -> dict[str, Any]:
    """What was done, for the record beside the scores."""
    return {
        "name": config.recipe,
        "model": config.model.name,
        "pairs": pairs,
        "steps": steps,
        "seed": config.seed,
        "train": config.train.model_dump(mode="json"),
        "loss": config.loss.model_dump(mode="json"),
        "prior": config.prior.model_dump(mode="json"),
        "provenance": provenance.model_dump(mode="json"),
    }


def _from_anywhere(config: RefineConfig) -> RefineConfig:
    """The settings with absolute paths, so that they repeat the run from another folder."""

    def absolute(name: str | None) -> str | None:
        is_path = name and name != build.TOY and Path(name).exists()
        return str(Path(name).resolve()) if name and is_path else name

    kind, identifier = build.model_source(config.model.name)
    name = config.model.name
    if kind in ("folder", "file", "local-dir", "transformers"):
        name = f"{name.removesuffix(identifier)}{absolute(identifier)}"
    return override(
        config,
        model={"name": name, "pretrained": absolute(config.model.pretrained)},
        data=_data_from_anywhere(config.data),
        evaluation={"zero_shot": [absolute(task) for task in config.evaluation.zero_shot]},
        out=config.out.resolve(),
    )


def _data_from_anywhere(data: DataConfig) -> dict[str, Any]:
    paths = {name: getattr(data, name) for name in ("image_folder", "split_file", "cache_folder")}
    train = tuple(map(build.absolute_source, data.sources))
    return {
        "train": train[0] if isinstance(data.train, str) else train or None,
        "val": data.val and build.absolute_source(data.val),
        **{key: path and path.resolve() for key, path in paths.items()},
    }


def _save(folder: Path, config: RefineConfig, device: torch.device) -> None:
    """Write the settings that repeat the run, and what it ran on."""
    settings = dump_config(_from_anywhere(override(config, overwrite=False)))
    (folder / "config.yaml").write_text(settings, encoding="utf-8")
    write_environment(folder / "environment.json", build.device_name(device))
