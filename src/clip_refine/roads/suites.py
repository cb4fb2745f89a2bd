"""`evaluate --suite`: sources, prompts and models of a suite → its scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from pydantic import ValidationError
from torch import Tensor

from clip_refine.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    Suite,
    as_recorded,
    explain,
    load_suite,
    named_model,
    refuse_idle,
)
from clip_refine.config.suites import (
    CaptionsSource,
    PromptedTask,
    RowsSource,
    Source,
    SuiteSource,
    Task,
    shipped,
)
from clip_refine.data import open_pairs
from clip_refine.data.images import DECODING
from clip_refine.data.labelled import (
    OPEN_CLIP,
    choose_names,
    read_cub,
    read_labelled_rows,
    read_listed_folders,
    read_mixbench,
    read_sugarcrepe,
    read_texts,
    read_torchvision,
    read_winoground,
)
from clip_refine.data.loader import preprocess_fingerprint
from clip_refine.data.pairs import Images, fingerprint
from clip_refine.evaluation.bootstrap import Bootstrap, Resampled, interval
from clip_refine.evaluation.scores import Outcome, against, mean_of
from clip_refine.evaluation.separation import nonsense
from clip_refine.evaluation.tasks import SourceFeatures, measure_task
from clip_refine.models.embed import FeatureStore, image_fingerprints
from clip_refine.models.encoder import identity
from clip_refine.report.comparison_page import suite_page, write_suite_report
from clip_refine.results import Difference, EvaluatedModel, Score, SuiteScores, TaskScores
from clip_refine.results.metrics import metric
from clip_refine.roads import build
from clip_refine.support.console import Clock, console
from clip_refine.support.errors import ConfigError, DataError, first_line
from clip_refine.support.folder import check_free, default_cache, describe_environment, write_file
from clip_refine.support.limits import parse_yaml, read_text
from clip_refine.toy import toy_composition, toy_tasks, toy_val


class NotThereError(DataError):
    """A source that has not been laid out, which a run may leave out."""


@dataclass(frozen=True)
class OpenedSource:
    """A suite's source whose images can be loaded."""

    images: Images  # what to encode
    place: str  # where it was found
    note: str | None  # what the suite says about it
    # the texts of each image; None where it has classes
    captions: Sequence[Sequence[str]] | None = None
    layout: Any = None  # how a benchmark's images and texts belong together
    labels: Sequence[int] = ()  # the class of each image; empty where it has captions
    class_names: Sequence[str] = ()  # for prompts
    names_from: str | None = None  # which list those are
    fingerprints: Sequence[str] = ()  # what is in each image; empty until that was looked at

    @property
    def texts(self) -> list[str]:
        """All captions, image by image."""
        return [text for texts in self.captions or () for text in texts]

    @property
    def owners(self) -> Tensor:
        """(M,) the image of each caption."""
        counts = torch.tensor([len(texts) for texts in self.captions or ()], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    def fingerprint(self, *more: str) -> str:
        """Of images with captions or classes, and what else counts."""
        described = self.captions or [(str(label),) for label in self.labels]
        parts = [
            "\0".join((name, *texts))
            for name, texts in zip(self.fingerprints, described, strict=True)
        ]
        layout = [repr(self.layout)] if self.layout else []
        return fingerprint(*(part.encode() for part in (*parts, *layout, *more)))


@dataclass(frozen=True)
class SuitePlaces:
    """Where a suite's relative paths start."""

    data: Path  # for images
    # for lists, class names and prompts: the suite file's folder, then that for images
    files: tuple[Path, ...]
    download: bool  # whether torchvision may fetch what is missing

    @classmethod
    def of(cls, config: EvaluateConfig) -> "SuitePlaces":
        """By `data_root` and by where the suite's file is."""
        suite = Path(config.suite or "")
        beside = suite.parent if suite.is_file() else Path()
        data = config.data_root or beside
        return cls(data, (beside, data, Path()), config.download)

    def file(self, name: str) -> str:
        """The first file of this name; the name itself where there is none."""
        return next((str(at / name) for at in self.files if (at / name).is_file()), name)


def read_sources(
    config: EvaluateConfig, suite: Suite, accelerator: Accelerator
) -> tuple[dict[str, OpenedSource], dict[str, str]]:
    """Open all sources before anything is computed; also what is missing, with how to get it."""
    places = SuitePlaces.of(config)
    opened: dict[str, OpenedSource] = {}
    missing: dict[str, str] = {}
    for name in dict.fromkeys(name for task in suite.tasks for name in task.sources().values()):
        try:
            opened[name] = open_suite_source(suite.sources[name], places)
        except NotThereError as absent:
            missing[name] = str(absent)
    visible = accelerator.is_main_process
    if missing:
        listed = "\n".join(f"  {name}: {why}" for name, why in missing.items())
        none_left = all(set(task.sources().values()) & set(missing) for task in suite.tasks)
        if config.missing == "stop" or none_left:
            raise DataError(
                f"suite {suite.name}: {len(missing)} of {len(missing) + len(opened)} sources are "
                f"not there.\n{listed}\nLay them out (docs/evaluation.md), say where they are with "
                "--data-root, or pass --missing skip to measure on the others."
            )
        if visible:
            console.print(f"Left out, not there:\n{listed}", style="yellow", markup=False)
    for name, source in opened.items():
        found = image_fingerprints(source.images, f"Reading {name}", visible=visible)
        opened[name] = replace(source, fingerprints=found)
    return opened, missing


def open_suite_source(source: SuiteSource, places: SuitePlaces) -> OpenedSource:
    """The first of a source's places that is there."""
    tried = []
    for place in source.at:
        try:
            images, where = _open(place, places)
        except NotThereError as absent:
            tried.append(str(absent))
            continue
        if source.holds != "classes":
            layout = None if source.holds == "captions" else images.layout
            return OpenedSource(images, where, source.note, images.captions, layout)
        asked = source.class_names
        if isinstance(asked, str) and asked != OPEN_CLIP:
            asked = places.file(asked)
        names = choose_names(images.class_names, asked, naming=source.naming)
        return OpenedSource(images, where, source.note, None, None, images.labels, *names)
    advice = f" {source.how_to_get}" if source.how_to_get else ""
    raise NotThereError(f"looked for {', '.join(tried)}.{advice}")


def _open(place: Source, places: SuitePlaces) -> tuple[Any, str]:
    """The images of a place, and what to call it."""
    match place.kind:
        case "toy" if place.task is None:
            return toy_val(), "toy"
        case "toy" if place.task == "toy_composition":
            return toy_composition(), f"toy {place.task}"
        case "toy":
            tasks = {task.name: task for task in toy_tasks()}
            if place.task not in tasks:
                raise DataError(f"toy: has no task {place.task!r}, only {', '.join(tasks)}.")
            return tasks[place.task], f"toy {place.task}"
        case "rows" | "captions" if place.path.startswith("hf:"):
            try:
                return _read(place, place.path), place.path
            except DataError as error:  # out of reach, which is as good as not there
                raise NotThereError(f"{place.path} ({error})") from error
    file, mark, part = place.path.partition("#")
    path = places.data / file
    if not path.exists() and not any(mark in file for mark in "{*"):  # else several files
        raise NotThereError(str(path))
    where = f"{path}{mark}{part}"
    match place.kind:
        case "folder":
            only = Path(places.file(place.only)) if place.only else None
            return read_listed_folders(path, only), where
        case "cub":
            return read_cub(path, split=place.split), f"{where} {place.split}"
        case "torchvision":
            where = f"torchvision {place.dataset} {place.split or ''} in {path}".replace("  ", " ")
            # torchvision makes this folder, there or not
            made = path / "caltech101"
            if place.dataset == "Caltech101" and not made.is_dir() and not places.download:
                raise NotThereError(str(made))
            try:
                found = read_torchvision(
                    place.dataset, path, split=place.split, download=places.download
                )
            except DataError as error:
                raise NotThereError(f"torchvision's {place.dataset} in {path}") from error
            return found, where
        case "mixbench":
            return read_mixbench(path), where
        case "sugarcrepe":
            if not (places.data / place.images).is_dir():
                raise NotThereError(str(places.data / place.images))
            return read_sugarcrepe(path, places.data / place.images), where
        case "winoground":
            return read_winoground(path), where
        case "rows":
            return _read(place, str(path)), where
        case "captions":
            return _read(place, where), where


def _read(place: RowsSource | CaptionsSource, where: str) -> Images:
    if isinstance(place, RowsSource):
        return read_labelled_rows(
            where, split=place.split, subset=place.subset, image=place.image, label=place.label
        )
    try:
        config = DataConfig.model_validate({"train": where, **place.options})
    except ValidationError as error:
        raise ConfigError(explain(error, where=f"{where}: options.")) from error
    return open_pairs(where, config, training=False)


# --------------------------------------------------------------------------------------------------
# A suite's settings → prompts and models.


def build_templates(
    task: PromptedTask, override: str | None, places: SuitePlaces
) -> tuple[str, tuple[str, ...]]:
    """A task's prompt set: its name and its templates."""
    asked = override or task.prompts
    if not isinstance(asked, str):
        return "the suite's", asked
    match asked:
        case "paper":
            return asked, ("a photo of a {}",)
        case "openai-imagenet":
            return asked, tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
        case "simple-imagenet":
            return asked, tuple(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES)
        case "short":
            sets = parse_yaml(shipped("prompts.yaml"))
            return asked, tuple(sets.get(task.source, sets["any"]))
    if not Path(asked).suffix:
        raise ConfigError(
            f"prompts: there is no set {asked!r}. There are paper, short, openai-imagenet and "
            "simple-imagenet; or give a .txt, .yaml or .json file."
        )
    found = read_texts(Path(places.file(asked)))
    templates = tuple(found.values() if isinstance(found, dict) else found)
    bad = [template for template in templates if "{}" not in template]
    if bad or not templates:
        what = f"{bad[0]!r} has no {{}} for the class name" if bad else "holds no prompts"
        raise ConfigError(f"{asked}: {what}.")
    return asked, templates


def expand_models(config: EvaluateConfig) -> dict[str, ModelConfig]:
    """Label → model; a run's folder gives its base and its model."""
    if not config.models:
        return {config.model.title: config.model}
    found: dict[str, ModelConfig] = {}
    for name in config.models:
        model = named_model(name)
        folder = Path(model.place)
        if (folder / "config.yaml").is_file() and (folder / "model").is_dir():
            base = _base_of(folder / "config.yaml")
            if base.name == model.name:  # the function that was named for its refinement
                base = base.model_copy(update={"factory": model.factory})
            if base not in found.values():
                found.setdefault(base.title, base)
        found[name] = model
    return found


def _base_of(path: Path) -> ModelConfig:
    """The model in a run's settings; the others may be of another version."""
    try:
        stored = parse_yaml(read_text(path))["model"]
        return as_recorded(ModelConfig.model_validate(stored))
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path}: its model, from which the run started, cannot be read "
            f"({first_line(error)}). Name both models, base and {path.parent / 'model'}."
        ) from error


# --------------------------------------------------------------------------------------------------
# What the models of a suite are measured on: sources that were looked at, and their tasks.


@dataclass(frozen=True)
class EncodedModel:
    """A model's features, when the model itself is gone."""

    fingerprint: str  # of the model
    features: FeatureStore  # on disk
    logit_scale: float  # the model's


@dataclass(frozen=True)
class SuiteBench:
    """What all models are measured on."""

    config: EvaluateConfig  # every setting
    suite: Suite  # sources and tasks
    sources: Mapping[str, OpenedSource]  # those that are there
    accelerator: Accelerator  # which process this is

    @property
    def tasks(self) -> list[Task]:
        """Those whose sources are there."""
        return [
            task
            for task in self.suite.tasks
            if all(name in self.sources for name in task.sources().values())
        ]

    def encode(self, label: str, model: ModelConfig) -> EncodedModel:
        """Put all features of a model into the cache."""
        group, encoder = self.accelerator, build.build_model(model)
        embedder = build.build_embedder(encoder, group, self.config.evaluation, self.config.workers)
        pixels = preprocess_fingerprint(encoder.preprocess).encode()
        made_by = fingerprint(
            str(DECODING).encode(), pixels, *identity(encoder, "fp32", group.device)
        )
        store = FeatureStore((self.config.cache or default_cache()) / "features" / made_by)
        for name, source in self.sources.items():
            title = f"{label}: {name}"
            store.add_images(embedder, source.images, source.fingerprints, title)
            if source.captions is not None:
                store.add_texts(embedder, source.texts, f"{title} captions")
        for task in self.tasks:
            if isinstance(task, PromptedTask):
                prompts = self._prompts(task)
                store.add_texts(embedder, prompts, f"{label}: {task.source} prompts")
        if any(task.kind == "separation" for task in self.tasks):
            store.add_texts(embedder, nonsense(), f"{label}: nonsense")
        scale = float(torch.as_tensor(embedder.model.logit_scale).detach())
        return EncodedModel(made_by, store, scale)

    def measure(self, task: Task, model: EncodedModel, first: Outcome | None = None) -> Outcome:
        """One task from the features in the cache; `first` is what the first model did in it."""
        source, features = self.sources[task.source], model.features
        prompted = self._prompts(task) if isinstance(task, PromptedTask) else []
        texts = prompted if source.captions is None else source.texts
        images = features.images(source.fingerprints)
        try:
            found = SourceFeatures(
                images,
                features.texts(texts) if texts else images[:0],
                source.owners,
                torch.tensor(list(source.labels)),
                class_names=source.class_names,
                training=self._training(task, model),
                layout=source.layout,
                logit_scale=model.logit_scale,
                nonsense_features=features.texts(nonsense()) if task.kind == "separation" else None,
                first=first,
            )
            return measure_task(task, found, bootstrap=self.bootstrap(task))
        except ValueError as error:
            raise DataError(f"task {task.title}: {error}.") from error

    def bootstrap(self, task: Task) -> Bootstrap:
        """Tasks on one source draw the same images."""
        return Bootstrap(self.suite.resamples, self.config.seed, task.source)

    def templates(self, task: PromptedTask) -> tuple[str, tuple[str, ...]]:
        """The name of a task's prompt set, and the set."""
        return build_templates(task, self.config.prompts, SuitePlaces.of(self.config))

    def data_fingerprint(self, task: Task) -> str:
        """Of images with captions or classes, of class names, prompts and training images."""
        source, more = self.sources[task.source], []
        if isinstance(task, PromptedTask):
            more = [*source.class_names, *self.templates(task)[1]]
        train = task.sources().get("train")
        return source.fingerprint(*more, *([self.sources[train].fingerprint()] if train else []))

    def _training(self, task: Task, model: EncodedModel) -> tuple[Tensor, Tensor] | None:
        train = task.sources().get("train")
        if train is None:
            return None
        source = self.sources[train]
        if source.class_names != self.sources[task.source].class_names:
            raise ValueError(f"{train} and {task.source} have other classes")
        return model.features.images(source.fingerprints), torch.tensor(list(source.labels))

    def _prompts(self, task: PromptedTask) -> list[str]:
        """Every class name in every template, class by class."""
        names, templates = self.sources[task.source].class_names, self.templates(task)[1]
        return [template.replace("{}", name) for name in names for template in templates]


# --------------------------------------------------------------------------------------------------
# Measuring models side by side on a suite: sources → features → tasks → differences.


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
    refuse_idle(config)
    suite = load_suite(config.suite or "")
    if config.out is not None:
        for path in (config.out, suite_page(config.out)):
            check_free(path, overwrite=config.overwrite, folder=False)
    models = expand_models(config)
    for model in models.values():
        build.check_model(model)
    accelerator = build.build_accelerator(config.device)
    sources, missing = read_sources(config, suite, accelerator)
    bench = SuiteBench(config, suite, sources, accelerator)
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
            first = next(iter(found.values()), {})
            found[label] = {
                task.title: bench.measure(task, encoded, first.get(task.title))
                for task in bench.tasks
            }
            zero_shot = {
                t.title: found[label][t.title] for t in bench.tasks if t.kind == "zero-shot"
            }
            if len(zero_shot) > 1:
                found[label][MEAN] = mean_of(zero_shot, "top1")
    if not accelerator.is_main_process:
        return None
    if len(found) > 1:  # what changed since the first model
        first, *_ = (dict(outcomes) for outcomes in found.values())
        for outcomes in found.values():
            for task in bench.tasks:
                title = task.title
                outcomes[title] = against(first[title], outcomes[title], bench.bootstrap(task))
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
        differences=tuple(differences(found)),
        missing=missing,
        resamples=suite.resamples,
        seed=config.seed,
        seconds=clock.seconds["total"],
        environment=describe_environment(str(accelerator.device)),
    )
    if config.out is not None:
        write_file(Path(config.out), scores.text)
        write_suite_report(config.out)
    return scores


def _record(bench: SuiteBench, task: Task, model: EvaluatedModel, outcome: Outcome) -> TaskScores:
    """The numbers with everything that they depend on."""
    source, counts = bench.sources[task.source], dict(outcome.counts)
    prompts, templates, names = None, (), None
    if isinstance(task, PromptedTask):
        prompts, templates = bench.templates(task)
        names = source.names_from
        counts["prompts_a_class"] = len(templates)
    return TaskScores(
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
        scores={name: score(name, number) for name, number in outcome.numbers.items()},
        details=outcome.details,
    )


def _mean_record(
    model: EvaluatedModel, measured: Sequence[TaskScores], outcome: Outcome
) -> TaskScores:
    """The mean over zero-shot tasks, whose own records say how they were taken."""
    parts = [one for one in measured if one.kind == "zero-shot" and one.model == model.label]
    prompts = {str(one.prompts) for one in parts}
    return TaskScores(
        task=MEAN,
        kind="zero-shot",
        model=model.label,
        protocol=outcome.protocol,
        source=f"{len(parts)} sources",
        counts=outcome.counts,
        prompts=" and ".join(sorted(prompts)),
        model_fingerprint=model.fingerprint,
        data_fingerprint=fingerprint(*(one.data_fingerprint.encode() for one in parts)),
        scores={"top1": score("top1", outcome.numbers["top1"])},
    )


def score(name: str, number: Resampled) -> Score:
    """A number as the JSON has it."""
    low, high = interval(number)
    up = metric(name).higher_is_better
    return Score(value=number.value, low=low, high=high, higher_is_better=up)


def differences(found: Mapping[str, Mapping[str, Outcome]]) -> list[Difference]:
    """Every other model less the first, both with the same images drawn."""
    first, *others = found
    changes = []
    for label in others:
        for task, outcome in found[label].items():
            for name, number in outcome.numbers.items():
                change = number - found[first][task].numbers[name]
                low, high = interval(change)
                changes.append(
                    Difference(
                        task=task,
                        score=name,
                        model=label,
                        against=first,
                        mean=change.value,
                        low=low,
                        high=high,
                        higher_is_better=metric(name).higher_is_better,
                    )
                )
    return changes
