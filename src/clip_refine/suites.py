"""Measuring models side by side on a suite: sources → features → tasks → differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from clip_refine import build
from clip_refine.build.suite_parts import expand_models
from clip_refine.clock import Clock
from clip_refine.config import EvaluateConfig, load_suite
from clip_refine.config.tasks import Task
from clip_refine.data.content import fingerprint
from clip_refine.environment import describe_environment
from clip_refine.errors import ConfigError
from clip_refine.evaluation.bootstrap import interval
from clip_refine.evaluation.outcome import Outcome, higher_is_better, mean_of
from clip_refine.run_folder import check_free, write_file
from clip_refine.suite_bench import EncodedModel, SuiteBench, read_sources
from clip_refine.suite_results import Difference, EvaluatedModel, Measured, Score, SuiteScores

MEAN = "mean of zero-shot tasks"


def evaluate_suite(config: EvaluateConfig) -> SuiteScores | None:
    """Measure one or several models on every task of `config.suite`.

    Features are kept in `config.cache` and only computed where they are not there, so a run that
    was stopped goes on. Several processes share that work.

    Args:
        config: Every setting.

    Returns:
        All numbers, also written to `config.out`; None on processes other than the first.

    Raises:
        ClipRefineError: Bad settings, suite, data or model, or an output file that exists. Data
            that are not there are listed before anything runs.
    """
    clock = Clock()
    if config.save_features is not None:
        raise ConfigError("--save-features does not go with --suite, which keeps them in --cache.")
    suite = load_suite(config.suite or "")
    if config.out is not None:
        check_free(config.out, overwrite=config.overwrite, folder=False)
    models = expand_models(config)
    accelerator = build.build_accelerator(config.device)
    contents, missing = read_sources(config, suite, accelerator)
    bench = SuiteBench(config, suite, contents, accelerator)
    evaluated: list[EvaluatedModel] = []
    found: dict[str, dict[str, Outcome]] = {}
    for label, model in models.items():
        encoded = bench.encode(label, model)
        evaluated.append(
            EvaluatedModel(
                label=label,
                name=model.name,
                pretrained=model.pretrained,
                fingerprint=encoded.fingerprint,
            )
        )
        if accelerator.is_main_process:
            found[label] = _measure(bench, encoded)
    if not accelerator.is_main_process:
        return None
    measured = [
        _record(bench, task, model, found[model.label][task.title])
        for task in bench.tasks
        for model in evaluated
    ]
    measured += [
        _mean_record(model, measured, found[model.label][MEAN])
        for model in evaluated
        if MEAN in found[model.label]
    ]
    scores = SuiteScores(
        suite=suite.name,
        models=tuple(evaluated),
        measured=tuple(measured),
        differences=tuple(_differences(found)),
        missing=missing,
        resamples=suite.resamples,
        seed=config.seed,
        seconds=clock.seconds["total"],
        environment=describe_environment(str(accelerator.device)),
    )
    if config.out is not None:
        write_file(Path(config.out), scores.model_dump_json(indent=2) + "\n")
    return scores


def _measure(bench: SuiteBench, model: EncodedModel) -> dict[str, Outcome]:
    """Every task, and where there are several of zero-shot classification, their mean."""
    found = {task.title: bench.measure(task, model) for task in bench.tasks}
    zero_shot = {t.title: found[t.title] for t in bench.tasks if t.kind == "zero-shot"}
    return found | ({MEAN: mean_of(zero_shot, "top1")} if len(zero_shot) > 1 else {})


def _record(bench: SuiteBench, task: Task, model: EvaluatedModel, outcome: Outcome) -> Measured:
    """The numbers with everything that they depend on."""
    source, counts = bench.contents[task.source].source, dict(outcome.counts)
    prompts, templates, names = None, (), None
    if task.kind == "zero-shot":
        prompts, templates = bench.templates(task)
        names = source.names_from
        counts["prompts_a_class"] = len(templates)
    return Measured(
        task=task.title,
        kind=task.kind,
        model=model.label,
        protocol=outcome.protocol,
        source=source.place,
        note=source.note,
        counts=counts,
        prompts=prompts,
        templates=templates,
        class_names=names,
        model_fingerprint=model.fingerprint,
        data_fingerprint=bench.data_fingerprint(task),
        scores={name: _score(name, outcome) for name in outcome.scores},
        details=outcome.details,
    )


def _mean_record(model: EvaluatedModel, measured: Sequence[Measured], outcome: Outcome) -> Measured:
    """The mean over zero-shot tasks, whose own records say how they were taken."""
    parts = [one for one in measured if one.kind == "zero-shot" and one.model == model.label]
    prompts = {str(one.prompts) for one in parts}
    return Measured(
        task=MEAN,
        kind="zero-shot",
        model=model.label,
        protocol=outcome.protocol,
        source=f"{len(parts)} sources",
        note=None,
        counts=outcome.counts,
        prompts=" and ".join(sorted(prompts)),
        templates=(),
        class_names=None,
        model_fingerprint=model.fingerprint,
        data_fingerprint=fingerprint(*(one.data_fingerprint.encode() for one in parts)),
        scores={"top1": _score("top1", outcome)},
        details={},
    )


def _score(name: str, outcome: Outcome) -> Score:
    low, high = None, None
    if name in outcome.resampled:
        low, high = interval(outcome.resampled[name])
    return Score(
        value=outcome.scores[name], low=low, high=high, higher_is_better=higher_is_better(name)
    )


def _differences(found: Mapping[str, Mapping[str, Outcome]]) -> list[Difference]:
    """Every other model less the first, both with the same images drawn."""
    first, *others = found
    differences = []
    for label in others:
        for task, outcome in found[label].items():
            base = found[first][task]
            for name, value in outcome.scores.items():
                low, high = None, None
                if name in outcome.resampled:
                    low, high = interval(outcome.resampled[name] - base.resampled[name])
                differences.append(
                    Difference(
                        task=task,
                        score=name,
                        model=label,
                        against=first,
                        mean=value - base.scores[name],
                        low=low,
                        high=high,
                        higher_is_better=higher_is_better(name),
                    )
                )
    return differences
