"""`compare`: the same road for several recipes and seeds: one table, and nobody favoured."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from rich.markup import escape
from torch import Tensor, nn

from clip_refine import build
from clip_refine.config import RefineConfig, dump_config
from clip_refine.config.runs import RUNS, CompareConfig
from clip_refine.data import (
    ImageCaptions,
    LabelledImages,
    PairBatch,
    PairLoader,
    Stream,
    Subset,
    hold_out,
)
from clip_refine.data.pairs import MINIMUM_HELD_OUT, Images, fingerprint, image_fingerprint
from clip_refine.errors import ConfigError, DataError, TrainingError
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.scores import (
    ModelFeatures,
    TaskFeatures,
    embed_model,
    probe_features,
    resampled_headline,
    score_features,
    selection_score,
    summarise,
)
from clip_refine.models import DualEncoder
from clip_refine.models.embed import EmbeddedPairs, embed_pairs
from clip_refine.models.embed import EmbeddedPairs as TeacherFeatures
from clip_refine.report.comparison_page import write_comparison_report
from clip_refine.report.tables import comparison_csv, comparison_markdown
from clip_refine.results import Comparison, ComparisonRow, LearningRateChoice
from clip_refine.roads.sweeps import Variant, list_variants, split_combination
from clip_refine.saving import refinement, save_model
from clip_refine.support.console import Clock, PeakMemory, console, remark
from clip_refine.support.environment import write_environment
from clip_refine.support.finished import FinishedRun as StoredRow
from clip_refine.support.finished import FinishedRuns as RowStore
from clip_refine.support.finished import digest
from clip_refine.support.folder import write_file
from clip_refine.train import StepLog, TowerPrecision
from clip_refine.train.teacher_cache import (
    CachedTeacher,
    TeacherCache,
    model_fingerprint,
)
from clip_refine.vectors.transforms import Peer, check_name, fit_peer

# --------------------------------------------------------------------------------------------------
# What all runs of a comparison share, and one run on it: train, score, fit peers, score.


@dataclass(frozen=True, eq=False)
class Training:
    """What was done to the model before it is scored."""

    seed: int  # of the run
    learning_rate: float | None = None  # none for the untouched model
    steps: int = 0  # taken
    pairs: int = 0  # training images
    seconds: float = 0.0  # of training
    peak_memory: float = 0.0  # GB while it trained


@dataclass(frozen=True, eq=False)
class Workbench:
    """One model and one set of pairs, on which recipe after recipe is tried."""

    encoder: Any  # the model; every training begins from `weights`
    weights: Mapping[str, Tensor]  # its weights as they came, on the CPU
    training: ImageCaptions  # what every recipe is trained on
    # held-out training pairs: peers are fitted and learning rates chosen on them
    selection: ImageCaptions
    held_out: ImageCaptions  # what everything is scored on
    tasks: Sequence[LabelledImages]  # zero-shot tasks, also for linear probes
    teacher: TeacherFeatures  # features of `training` from the untouched model
    accelerator: Accelerator  # accelerate's
    embedder: Embedder  # the way to feed the model, without progress bars
    precision: TowerPrecision  # of every run
    seed: int  # of splits in the evaluation and of the bootstrap; one for all runs
    resamples: int  # of the bootstrap

    def restore(self, config: RefineConfig) -> nn.Module:
        """The untouched model, ready to be trained with these settings."""
        student = build.build_student(self.encoder, config.train, self.accelerator.device)
        student.load_state_dict(self.weights)
        return student

    def train(self, config: RefineConfig, *, fraction: float) -> Training:
        """Refine the model in place, from its untouched weights.

        The same steps as `refine` takes with these settings, but for the teacher, which is read
        from `teacher`.
        """
        clock, memory = Clock(), PeakMemory(self.accelerator.device)
        student = self.restore(config)
        pairs = self.part(fraction)
        steps = build.count_steps(config.train, pairs, 1)
        with quiet(), clock("train"):
            features = build.measure_features(config, self.embedder, pairs)
            config, scale = build.build_scale(config, student, features, pairs)
            prior = build.build_prior(config.prior, features, scale)
            teacher = CachedTeacher(
                self.teacher.part(pairs.indices),
                image_factor=scale.image_factor,
                text_factor=scale.text_factor,
            )
            with build.build_part(config, student, self.accelerator):
                trainer = build.build_trainer(
                    config,
                    student,
                    teacher,
                    self.precision,
                    prior,
                    self.accelerator,
                    steps=steps,
                    features=features,
                    scale=scale,
                )
                batches = islice(self._batches(config, pairs, teacher), steps)
                trainer.train(batches, steps=steps, log=StepLog(None))
            scale.undo()
        self.accelerator.free_memory()
        return Training(
            seed=config.seed,
            learning_rate=config.train.learning_rate,
            steps=steps,
            pairs=len(pairs),
            seconds=clock.seconds["train"],
            peak_memory=memory.gigabytes,
        )

    def part(self, fraction: float) -> Subset:
        """A share of the training pairs, the same ones for every recipe and seed."""
        return Subset(self.training, self._chosen(fraction), self.training.name)

    def embed(self) -> tuple[ModelFeatures, EmbeddedPairs]:
        """What the model as it now is makes of all it is scored on, and of the selection pairs."""
        self.encoder.eval()
        return (
            embed_model(self.embedder, self.held_out, self.tasks),
            embed_pairs(self.embedder, self.selection),
        )

    def score(
        self, name: str, training: Training, features: ModelFeatures, *, selection: float | None
    ) -> tuple[ComparisonRow, dict[str, list[float]]]:
        """A row of the table, and its headline resampled."""
        scores = score_features(features, seed=self.seed)
        row = ComparisonRow(
            recipe=name,
            seed=training.seed,
            learning_rate=training.learning_rate,
            steps=training.steps,
            pairs=training.pairs,
            geometry=scores.geometry,
            retrieval=scores.retrieval,
            zero_shot=scores.zero_shot,
            linear_probe=probe_features(features, seed=self.seed),
            selection=selection,
            seconds=training.seconds,
            peak_memory=training.peak_memory,
        )
        return row, resampled_headline(features, resamples=self.resamples, seed=self.seed)

    def apply_peer(
        self, peer_name: str, training: Training, features: ModelFeatures, fitted_on: EmbeddedPairs
    ) -> tuple[Training, ModelFeatures]:
        """Fit a peer on the selection pairs and put it behind the model."""
        clock, memory = Clock(), PeakMemory(self.accelerator.device)
        try:
            with clock("peer"):
                peer = fit_peer(peer_name, fitted_on.image_features, fitted_on.text_features)
                moved = transformed(features, peer)
        except ValueError as error:
            raise DataError(
                f"{self.selection.name}: {peer_name} cannot be fitted. {error}."
            ) from error
        seconds = training.seconds + clock.seconds["peer"]
        peak = max(training.peak_memory, memory.gigabytes)
        return replace(training, seconds=seconds, peak_memory=peak), moved

    def _chosen(self, fraction: float) -> list[int]:
        """Positions of the training pairs that a run uses; a smaller part lies in a larger one."""
        count = len(self.training)
        generator = build.seeded_generator(self.seed, "fraction")
        order = torch.randperm(count, generator=generator).tolist()
        return sorted(order[: max(1, round(fraction * count))])

    def _batches(
        self, config: RefineConfig, pairs: ImageCaptions, teacher: CachedTeacher
    ) -> Iterator[PairBatch]:
        """The batches of `build_batches`, with the teacher told which they are."""
        loader = PairLoader(
            pairs,
            batch_size=config.train.batch_size,
            preprocess=self.embedder.reader or self.encoder.preprocess,
            tokenizer=self.encoder.tokenizer,
            workers=self.embedder.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        for plan in build.epoch_plans(config, pairs):
            yield from teacher.follow(loader.epoch(plan), plan)


def transformed(features: ModelFeatures, peer: Peer) -> ModelFeatures:
    """The features behind a peer; a class is a text, its vector the mean over its prompts."""
    pairs = EmbeddedPairs(
        peer.transform_image(features.pairs.image_features),
        peer.transform_text(features.pairs.text_features),
        features.pairs.text_to_image,
    )
    tasks = [
        TaskFeatures(
            task.name,
            peer.transform_image(task.image_features),
            peer.transform_text(task.class_features),
            task.labels,
        )
        for task in features.tasks
    ]
    return ModelFeatures(pairs, tasks, normalize=False, dim=peer.dim)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and remarks of single runs, of which a comparison has many."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


# --------------------------------------------------------------------------------------------------
# One run after another on a workbench; those that are finished already are read instead.


UNTOUCHED = "pre-trained"


class Runs:
    """All runs of a comparison.

    Attributes:
        config: Every setting.
        bench: What the runs share.
        store: Where finished rows are.
        content: Fingerprint of model and data.
        combined: Recipe → the peers that its results are also scored behind.
    """

    def __init__(
        self,
        config: CompareConfig,
        bench: Workbench,
        store: RowStore,
        *,
        content: str,
        combined: dict[str, list[str]],
    ) -> None:
        """Nothing is run yet."""
        self.config = config
        self.bench = bench
        self.store = store
        self.content = content
        self.combined = combined
        self._trained = ""  # what the model's weights are at the moment

    def untouched(self) -> list[StoredRow]:
        """The model as it came, alone and behind every peer."""
        names = {UNTOUCHED: None, **{peer: peer for peer in self.config.peers}}
        base = self.config.refinement()

        def train() -> Training:
            self.bench.restore(base)
            self._trained = UNTOUCHED
            return Training(seed=self.config.seed)

        return self._run(names, f"{self.config.seed}", {}, train)

    def choose_learning_rate(self, variant: Variant) -> LearningRateChoice:
        """Train with the first seed at every learning rate of the grid, and take the best."""
        grid = self.config.grid if variant.fixed_rate is None else (variant.fixed_rate,)
        tried: dict[str, float | None] = {}
        best: tuple[float, float] | None = None
        for rate in grid:
            row = self._train_variant(variant, self.config.seed, rate)[0].row
            score = row.selection if row else None
            tried[f"{rate:g}"] = score
            if score is not None and (best is None or score > best[1]):
                best = rate, score
        if best is None:
            raise TrainingError(
                f"{variant.name}: training failed at every learning rate tried "
                f"({', '.join(tried)}). Pass lower --learning-rates."
            )
        at_edge = len(grid) > 1 and best[0] in (grid[0], grid[-1])
        choice = LearningRateChoice(
            recipe=variant.name, chosen=best[0], tried=tried, at_edge=at_edge
        )
        if len(grid) > 1:
            edge = ", at the edge of the grid" if at_edge else ""
            _say(f"{variant.name}: learning rate {best[0]:g} of {', '.join(tried)}{edge}")
        return choice

    def chosen(self, variant: Variant, seed: int, learning_rate: float) -> list[StoredRow]:
        """The rows of a recipe with one seed at its learning rate; saves the model if asked to."""
        stored = self._train_variant(variant, seed, learning_rate)
        if stored[0].row is None:
            raise TrainingError(
                f"{variant.name}: training failed with seed {seed} at learning rate "
                f"{learning_rate:g}. Pass lower --learning-rates."
            )
        if self.config.save_models:
            self._save_model(variant, seed, learning_rate)
        return stored

    def _train_variant(self, variant: Variant, seed: int, rate: float) -> list[StoredRow]:
        names: dict[str, str | None] = {variant.name: None}
        names |= {f"{variant.name}+{peer}": peer for peer in self.combined.get(variant.recipe, [])}
        settings = _plain(variant.at(seed=seed, learning_rate=rate)) | {
            "fraction": variant.fraction
        }
        return self._run(
            names, f"{seed}-{rate!r}", settings, partial(self._train, variant, seed, rate)
        )

    def _train(self, variant: Variant, seed: int, rate: float) -> Training:
        self._trained = ""  # until it has ended well
        config = variant.at(seed=seed, learning_rate=rate)
        training = self.bench.train(config, fraction=variant.fraction)
        self._trained = f"{variant.name}-{seed}-{rate!r}"
        return training

    def _run(
        self,
        names: dict[str, str | None],
        label: str,
        settings: dict[str, Any],
        train: Callable[[], Training],
    ) -> list[StoredRow]:
        """The rows of one training: read where all are there, else made and written."""
        depends_on = {
            name: digest({"content": self.content, "settings": settings, "peer": peer})
            for name, peer in names.items()
        }
        read = [self.store.read(f"{name}-{label}", key) for name, key in depends_on.items()]
        found = [stored for stored in read if stored]
        if len(found) == len(names):
            return found
        made = self._make(names, depends_on, train)
        for name, stored in made.items():
            self.store.write(f"{name}-{label}", stored)
            _say(_describe(name, label, stored))
        return list(made.values())

    def _make(
        self,
        names: dict[str, str | None],
        depends_on: dict[str, str],
        train: Callable[[], Training],
    ) -> dict[str, StoredRow]:
        try:
            training = train()
        except TrainingError:
            # a learning rate that is too high is a result, too
            return {
                name: StoredRow(depends_on=key, row=None, resampled={})
                for name, key in depends_on.items()
            }
        features, selection = self.bench.embed()
        made = {}
        for name, peer in names.items():
            scored, at = features, training
            if peer:
                at, scored = self.bench.apply_peer(peer, training, features, selection)
            score = None if peer else selection_score(selection)
            row, resampled = self.bench.score(name, at, scored, selection=score)
            made[name] = StoredRow.model_validate(
                {"depends_on": depends_on[name], "row": row, "resampled": resampled}
            )
        return made

    def _save_model(self, variant: Variant, seed: int, rate: float) -> None:
        """Save the model once more only if it is not there with these settings."""
        name = re.sub(r"[^\w.=+-]+", "_", variant.name)
        folder = self.store.folder / "models" / f"{name}-{seed}"
        config = variant.at(seed=seed, learning_rate=rate)
        settings = dump_config(config)
        note = folder / "config.yaml"
        if note.is_file() and note.read_text(encoding="utf-8") == settings:
            return
        if self._trained != f"{variant.name}-{seed}-{rate!r}":
            self._train(variant, seed, rate)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        pairs = self.bench.part(variant.fraction)
        steps = build.count_steps(config.train, pairs, 1)
        made = refinement(config, pairs, self.bench.held_out, steps=steps)
        save_model(self.bench.encoder, folder, made)
        note.write_text(settings, encoding="utf-8")


def _plain(config: RefineConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"out", "log", "report", "overwrite"})


def _describe(name: str, label: str, stored: StoredRow) -> str:
    if stored.row is None:
        return f"{name} ({label}): training failed, the loss or its gradient was not finite"
    row, numbers = stored.row, stored.row.headline
    rate = "" if row.learning_rate is None else f", learning rate {row.learning_rate:g}"
    zero_shot = f", zero-shot {numbers['zero_shot_top1']:.3f}" if row.zero_shot else ""
    return (
        f"{name}, seed {row.seed}{rate}: gap {numbers['gap']:.3f}, mean R@1 "
        f"{numbers['mean_recall@1']:.3f}{zero_shot}, {row.seconds:.1f} s"
    )


def _say(text: str) -> None:
    console.print(escape(text), soft_wrap=True)


# --------------------------------------------------------------------------------------------------
# The same road for several recipes and seeds: one table, and nobody favoured.


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
