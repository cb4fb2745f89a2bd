"""THE ROAD: what happens to a model and its pairs, top to bottom."""

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from clip_refine.config import (
    DataConfig,
    LossConfig,
    RefineConfig,
    dump_config,
    load_config,
    override,
)
from clip_refine.config.runs import unused_settings
from clip_refine.data import ImageCaptions, LabelledImages, Stream, Subset, hold_out
from clip_refine.data.pairs import GivenPairs, pairs_fingerprint, skipped_rows, write_skipped
from clip_refine.data.sources import TOY, absolute_source
from clip_refine.data.streams import WatchedStream
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.evidence import gather_evidence
from clip_refine.evaluation.geometry import centroid_distance
from clip_refine.evaluation.scores import (
    Measured,
    embed_model,
    measure,
    paired_differences,
    score_features,
    scores_along_line,
    selection_score,
    task_changes,
)
from clip_refine.evaluation.separation import nonsense
from clip_refine.evaluation.similarity import unit_sides
from clip_refine.losses import PairFeatures
from clip_refine.losses.objective import OwnLoss, check_objective
from clip_refine.models import DualEncoder, FeatureScale, RawNorms, Teacher
from clip_refine.models.checkpoints import is_run
from clip_refine.models.embed import EmbeddedPairs, embed_pairs
from clip_refine.models.weights import (
    Heads,
    fitted_logit_scale,
    fold_matrix,
    fold_towers,
    interpolate_weights,
    set_logit_scale,
)
from clip_refine.report.run_page import write_run_report
from clip_refine.report.tables import threshold_change
from clip_refine.results import THRESHOLD, Provenance, RunScores, flat, read
from clip_refine.roads import build
from clip_refine.roads.guard import Guard, build_guard, check_trained
from clip_refine.roads.plan import (
    MOST_RATES,
    SHORT,
    best_rate,
    choose_micro_batch,
    choose_precision,
    keeps_teacher,
    next_rate,
    say_plan,
)
from clip_refine.saving import refinement, save_model, saved_size, write_card
from clip_refine.support.console import Bar, Clock, console, quietly, remark
from clip_refine.support.errors import (
    ConfigError,
    FailedError,
    ModelError,
    TrainingError,
    first_line,
)
from clip_refine.support.folder import (
    SPARE,
    WORK,
    check_free,
    check_room,
    complete_folder,
    default_cache,
    hidden_work,
    recover,
    seal,
    size_text,
    write_environment,
)
from clip_refine.train import StepLog
from clip_refine.train.log import check_tracker, track_run
from clip_refine.train.state import (
    KEPT,
    SavedState,
    States,
    check_same,
    fitting,
    newest_state,
    tensor_sum,
)
from clip_refine.train.teacher_cache import CachedTeacher, kept_features

NORM_SAMPLE = (
    512  # training pairs for mean raw norms; photo-clip's vary by 17 %, so 17 / √512 < 1 %
)
HIGH_RATE = 1e-2  # ten times the largest rate that any study here used (docs/results/, docs/log.md)
_ROWS = 65_536  # of features that a head takes at once
SCALE_SAMPLE = 512  # training pairs among which the logit scale is fitted after a fold
MOMENT_SAMPLE = 4096  # pairs of a stream for moments of its features; their images are in memory


def refine(
    config: RefineConfig,
    *,
    model: DualEncoder | None = None,
    train_pairs: GivenPairs | Stream | None = None,
    held_out: GivenPairs | None = None,
    objective: OwnLoss | None = None,
) -> RunScores:
    """Refine a model, measure it before and after, and save it.

    Writes `scores.json`, `model/`, `config.yaml`, `log.jsonl`, `environment.json`, where rows were
    skipped `skipped.jsonl`, and, unless `config.report` is off, `report.html` and its data
    `report.json` to `config.out`, which appears when the run is complete.

    Args:
        config: Every setting.
        model: Refined in place instead of loading `config.model`.
        train_pairs: In place of `config.data.train`, which is then left out.
        held_out: In place of `config.data.val`, or of a part of the training pairs.
        objective: A loss of your own, which `config.loss.own_weight` weighs; recipe `own` has it
            alone. Called with the raw features of student and teacher, each a `PairFeatures` of
            (B, d), over all processes and at the scale of training, and with the logit scale.

    Returns:
        The scores before and after, as in `scores.json`.

    Raises:
        ClipRefineError: Bad settings, data or model, a loss that is not finite, or an output
            folder that exists. Nothing is left at `config.out` then. With `config.dry_run`
            `Planned`, once the plan is said.
    """
    clock = Clock()
    finished = find_finished(config)
    if finished is not None:
        return finished
    check_free(config.out, overwrite=config.overwrite)
    check_tracker(config.log)
    check_objective(config.loss, objective)
    saved = find_state(config)
    if config.train.rate > HIGH_RATE:
        remark(
            f"train.learning_rate {config.train.rate:g} is far above what such models "
            "bear: the paper has 1e-6, small models up to 1e-3.",
            style="yellow",
        )
    if config.loss.fold and config.loss.rafa_weight and config.train.parameters != "projections":
        remark(
            "Behind the fold RaFA closes more of the gap where only projections are trained. Where "
            "the towers are, they answer it with smaller norms and more gap: "
            "--loss.rafa-weight 0, the recipe's own, closed more (docs/results/photo-centred.md)."
        )
    for name, why in unused_settings(config).items():
        remark(f"{name} changes nothing here: {why}.", style="yellow")
    accelerator = build.build_accelerator(config.train.device)

    build.check_model(config.model, model)
    with clock("load"):
        # 1 images and captions
        train_pairs, held_out = build.build_data(
            config.data, seed=config.seed, train_pairs=train_pairs, held_out=held_out
        )
        train_pairs, selection = set_aside(config, train_pairs)
        tasks = build.build_tasks(config.evaluation, links=config.data.allow_outside)
        # 2 the student
        if model is not None:
            name = f"python:{type(model).__name__}"
            config = override(config, model={"name": name, "pretrained": None, "factory": None})
        steps = build.count_steps(config.train, train_pairs, accelerator.num_processes)
        encoder = build.build_model(config.model, model)
        build.warn_of_marks(encoder, train_pairs, held_out)
        student = build.build_student(encoder, config, accelerator.device)
        reader = build.build_reader(
            config.data,
            encoder,
            [train_pairs, held_out, *tasks],
            workers=config.train.workers,
            visible=accelerator.is_main_process,
        )
        scored = {"held-out images": len(held_out), "of zero-shot tasks": sum(map(len, tasks))}
        asked = config.train.workers
        workers = say_plan(config, student, train_pairs, scored, accelerator, reader)

    with (
        _output(config, accelerator, student, saved) as folder,
        track_run(config, folder) as tracking,
    ):
        states = states_of(config, folder, saved, student, train_pairs, steps, accelerator)
        embedder = build.build_embedder(encoder, accelerator, config.evaluation, asked, reader)
        config = override(config, train={"workers": workers})
        guard = build_guard(config, embedder, selection, tasks)
        with clock("evaluate_before"):
            features_before = embed_model(embedder, held_out, tasks)
            nonsense_before = embedder.texts(nonsense(), "Encoding nonsense")
            before = score_features(features_before, seed=config.seed)
            tracking.scores(before, step=0)

        with clock("teacher"):
            features = known_features(config, student, train_pairs, embedder, accelerator, saved)
        with clock("learning_rate"):
            config = choose_rate(
                config,
                student,
                train_pairs,
                selection,
                embedder,
                accelerator,
                saved,
                objective,
                features,
            )
        # 3 teacher and references, 4 losses, 5 one epoch
        log = StepLog(
            folder and folder / "log.jsonl",
            tracking.step,
            earlier=saved and saved.log,
            steps=states.start,
        )
        with clock("train"), log:
            trained = train_student(
                config,
                student,
                train_pairs,
                embedder,
                accelerator,
                log=log,
                teacher_features=features,
                selection=selection,
                states=states,
                guard=guard,
                objective=objective,
            )
            config = override(trained.config, train={"workers": asked})  # elsewhere others do
        if isinstance(train_pairs, Stream) and config.data.own_files:
            _join(train_pairs, accelerator)

        # 6 frozen features → numbers
        with clock("evaluate_after"):
            features_after = embed_model(embedder, held_out, tasks)
            nonsense_features = (nonsense_before, embedder.texts(nonsense(), "Encoding nonsense"))
            after = score_features(features_after, seed=config.seed)
            tracking.scores(after, step=steps)
            was, now = measure(features_before), measure(features_after)
            check_trained(was, now)
            difference = paired_differences(was, now, seed=config.seed)

        # 7 results; a guard may have kept the weights of an earlier step
        if trained.guard:
            steps = trained.guard["kept"]
        provenance = refinement(config, train_pairs, held_out, steps=steps)
        pairs = build.count_pairs(config.train, train_pairs, steps)
        scores = RunScores(
            before=before,
            after=after,
            difference=difference,
            recipe=_recipe(config, provenance, trained, pairs=pairs, steps=steps),
            seconds=clock.seconds,
        )
        if folder:
            with clock("save"):
                _save_model(student, folder, provenance)
                _save(folder, config, accelerator.device)
                write_skipped(skipped_rows([train_pairs, held_out]), folder / "skipped.jsonl")
            scores = scores.model_copy(update={"seconds": clock.seconds})
            scores.write(folder / "scores.json")
            write_card(folder / "model", provenance.measured(scores))
        if folder and config.report:
            _report(folder, was, now, held_out, tasks, nonsense_features, seed=config.seed)
    if folder:
        shutil.rmtree(config.out / WORK, ignore_errors=True)  # once nothing more depends on it
    return scores


# --------------------------------------------------------------------------------------------------
# A run that goes on where an earlier one stopped, and is the same as if none had.


HOW_IT_RUNS = frozenset({"out", "log", "report", "overwrite", "dry_run", "resume"}) | frozenset(
    f"train.{name}" for name in ("workers", "device", "save_every", "micro_batch")
)
"""Settings that a run's results do not follow from."""
MAY_DIFFER = HOW_IT_RUNS | frozenset(
    {"recipe", "evaluation", "interpolate", "model", "train.steps", "train.epochs"}
)
"""Settings that may be others when a run goes on; model and pairs are known by what is in them."""
_OF_PAIRS = ("captions", "streaming", "shuffle_buffer", "weights", "draft")


def find_finished(config: RefineConfig) -> RunScores | None:
    """The scores of a run that is complete, for which nothing is done again; same settings only."""
    recover(config.out)
    if config.resume != "auto" or not is_run(config.out) or config.overwrite:
        return None
    earlier = load_config(RefineConfig, config.out / "config.yaml")
    was, now = (flat(one.model_dump(mode="json")) for one in (earlier, _from_anywhere(config)))
    # a function that gave the model, and what was left to be found, stand there as what they became
    open_still = {name for name in now if now[name] == "auto" or name.startswith("model.")}
    if config.loss.feature_scale != "as-is":  # what `scale_features` decides
        open_still |= {"loss.normalize", "loss.temperature"}
    for name in sorted({*was, *now} - HOW_IT_RUNS - open_still):
        if was.get(name) != now.get(name):
            raise ConfigError(
                f"{config.out}: a complete run with {name} {was.get(name)!r}, now it is "
                f"{now.get(name)!r}. Choose another --out, or pass --overwrite to make it again."
            )
    remark(f"{config.out}: this run is complete.")
    return read(RunScores, config.out / "scores.json")


def find_state(config: RefineConfig) -> SavedState | None:
    """The state that `resume` asks for."""
    if config.resume is None:
        return None
    named = config.out if config.resume == "auto" else Path(config.resume)
    for folder in (hidden_work(named), named):
        if saved := newest_state(folder):
            remark(f"Going on at step {saved.step} of {folder}.")
            return saved
    if config.resume == "auto":
        remark(f"{config.out}: no state to go on from, so the run begins anew.")
        return None
    raise ConfigError(
        f"resume {config.resume!r}: no state of a run is there. Name the folder that was given as "
        "--out, or leave --resume out to begin anew."
    )


def as_it_was(config: RefineConfig, saved: SavedState) -> RefineConfig:
    """With what was measured when the run began, and would not be the same twice."""
    measured = {
        "precision": saved.plain["decided"]["precision"],
        "micro_batch": saved.plain["micro_batch"] or "auto",
    }
    auto = {k: v for k, v in measured.items() if getattr(config.train, k) == "auto"}
    return override(config, train=auto)


def states_of(
    config: RefineConfig,
    folder: Path | None,
    saved: SavedState | None,
    student: Any,
    pairs: ImageCaptions | Stream,
    steps: int,
    accelerator: Accelerator,
) -> States:
    """Where states of this run go, and the one that it goes on from, if that is of the same run."""
    stream, processes = pairs if isinstance(pairs, Stream) else None, accelerator.num_processes
    own = config.data.own_files and processes > 1
    given = config.model_dump(mode="json")
    length = {"train.steps", "train.epochs"}
    changing = config.loss.contrastive_scale_end or config.loss.rafa_decay != "none"
    fixed = config.train.schedule == "constant" and not changing
    about = {
        "settings": {
            name: value
            for name, value in flat(
                {**given, "data": {n: given["data"][n] for n in _OF_PAIRS}}
            ).items()
            if (name not in MAY_DIFFER and name.partition(".")[0] not in MAY_DIFFER)
            or (name in length and not fixed)
        },
        "model": tensor_sum(student.state_dict().values()),
        "pairs": pairs_fingerprint(
            pairs.prefix(NORM_SAMPLE) if isinstance(pairs, Stream) else pairs, in_order=True
        ),
    }
    if stream and own:  # whose numbers say which pairs have been read
        about["data.own_files"] = f"of {processes} processes"
    if saved:
        with fitting(saved):
            check_same(saved, about)
            if stream:
                read = saved.plain["progress"]
                stream.go_on(read[accelerator.process_index] if own else read)
        if saved.step > steps:
            raise ConfigError(
                f"{saved.folder}: step {saved.step} is taken, but this run is to end after {steps}."
                " Give more --train.steps or --train.epochs, or leave --resume out to begin anew."
            )
    progress = stream and (partial(_read_by_all, stream) if own else stream.progress)
    return States(folder, config.train.save_every, about, progress, saved)


def _read_by_all(pairs: Stream) -> list[Any]:
    """What each process has read of its files; every one has to ask."""
    return gather_object([pairs.progress()])


def _join(pairs: Stream, accelerator: Accelerator) -> None:
    """Know what the other processes read of their files; say which held-out images came."""
    if accelerator.num_processes > 1:
        for rank, progress in enumerate(_read_by_all(pairs)):
            if rank != accelerator.process_index:
                pairs.join(progress)
        if isinstance(pairs, WatchedStream):
            pairs.warn()


# --------------------------------------------------------------------------------------------------
# The training road, the same for `refine` and for every run of `compare`.


@dataclass(frozen=True)
class Trained:
    """What was decided on the way, for the record."""

    config: RefineConfig  # with `auto` replaced by what was chosen
    interpolation: Mapping[str, Any] | None  # weight and selection scores; None where not asked for
    logit_scale: float | None  # fitted to the folded towers; None where it is the model's own
    guard: Mapping[str, Any] | None = None  # at which step it stopped, whose weights were kept


def train_student(
    config: RefineConfig,
    student: Any,
    pairs: ImageCaptions | Stream,
    embedder: Embedder,
    accelerator: Accelerator,
    *,
    log: StepLog,
    teacher_features: EmbeddedPairs | None = None,
    of_trunk: bool = True,
    selection: ImageCaptions | None = None,
    states: States | None = None,
    guard: Guard | None = None,
    objective: OwnLoss | None = None,
) -> Trained:
    """Refine a model in place, from the scale of its features to the last step.

    `teacher_features`, those of `pairs` from the untouched model, or, if `of_trunk`, from its trunk
    where only heads are trained, are looked up instead of running it; with `selection` the weight
    of the interpolation is chosen; a `guard` may end it.
    Where `states` has one to go on from, what comes before the first step is made again, and then
    put in its place.
    """
    steps = build.count_steps(config.train, pairs, accelerator.num_processes)
    heads = None
    if teacher_features is None or of_trunk:
        # what was looked up is known to be read alike
        unread = pairs if teacher_features is None else None
        heads = build.find_heads(student, config.train, accelerator, unread)
    features = measure_features(config, embedder, pairs, teacher_features, heads)
    warn_of_one(features, pairs.name)
    teacher, fitted = None, None

    def teach(scale: FeatureScale) -> Teacher:
        if teacher_features is None:  # a copy of the student as it now is
            return Teacher(student, heads)
        if heads:  # which are at its scale
            return CachedTeacher(teacher_features, heads=heads)
        return CachedTeacher(
            teacher_features, image_factor=scale.image_factor, text_factor=scale.text_factor
        )

    teacher_scale = float(student.logit_scale.detach())
    if config.loss.fold or config.loss.fold_text:
        # the teacher keeps its means; HyCD compares unit features, so that its scale is free
        teacher = teach(FeatureScale())
        folded = fold_student(config, student, features, pairs)
        features, fitted = folded.features, folded.logit_scale
    config, scale = scale_features(config, student, features, pairs)
    try:
        if fitted is not None:
            set_logit_scale(student, fitted)
        if states and states.saved:
            config = as_it_was(config, states.saved)
        precision = choose_precision(config.train, student, pairs, accelerator)
        config = override(config, train={"precision": precision.name})
        prior = build.build_prior(config.prior, features, scale)
        teacher = teacher or teach(scale)  # at the student's scale
        start = {} if config.interpolate is None else copy.deepcopy(student.state_dict())
        with build.build_part(config, student, accelerator):
            size = choose_micro_batch(config, student, precision, pairs, accelerator)
            config = override(config, train={"micro_batch": size})
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
                teacher_scale=None if fitted is None else teacher_scale,
                objective=objective,
            )
            if states:
                searched = states.about["settings"].get("train.learning_rate") == "auto"
                begin = tensor_sum([*student.state_dict().values(), *features])
                decided = {
                    **({"learning_rate": config.train.rate} if searched else {}),
                    **({} if teacher_features is None else {"teacher": KEPT_ONCE}),
                    "precision": precision.name,
                    "micro_batch": size,
                    "begin": begin,
                    "processes": accelerator.num_processes,
                    "shared_weights": trainer.student is not None,
                    "device": build.device_name(accelerator.device),
                }
                states.decide(decided)
            batches = build.build_batches(
                config,
                pairs,
                embedder.model,
                accelerator,
                embedder.reader,
                teacher,
                states.start if states else 0,
                pixels=trainer.needs_pixels,
            )
            if guard:
                guard.begin(steps)
                trainer.keep_best(0, -1.0)  # any probe within the bound is preferred
            watch = guard and guard.after
            trainer.train(batches, steps=steps, log=log, states=states, guard=watch)
            # memory may have been too little for it
            config = override(config, train={"micro_batch": trainer.micro_batch})
        interpolation = interpolate_student(config, student, start, embedder, selection)
    finally:  # also of a model that was handed in, when training fails
        scale.undo()
    return Trained(config, interpolation, fitted, guard and guard.stopped)


KEPT_ONCE = "computed once"
"""What a state says of a teacher whose features are looked up."""


def known_features(
    config: RefineConfig,
    student: Any,
    pairs: ImageCaptions | Stream,
    embedder: Embedder,
    accelerator: Accelerator,
    saved: SavedState | None,
) -> EmbeddedPairs | None:
    """Features of all pairs from the untouched model, where that is less work than a teacher.

    They are kept on the disk beside those of `compare`. A run that goes on does as it did.
    """
    if saved:
        config = as_it_was(config, saved)
        keeps = saved.plain["decided"].get("teacher") == KEPT_ONCE
    else:
        keeps = keeps_teacher(config, student, pairs, accelerator)
    if not keeps or isinstance(pairs, Stream):
        return None
    with quietly():  # training says it
        precision = choose_precision(config.train, student, pairs, accelerator)
    folder = config.data.cache_folder or default_cache()
    heads = build.find_heads(student, config.train, accelerator)
    return kept_features(pairs, embedder, precision, folder, heads)


def measure_features(
    config: RefineConfig,
    embedder: Embedder,
    pairs: ImageCaptions | Stream,
    known: EmbeddedPairs | None = None,
    heads: Heads | None = None,
) -> PairFeatures:
    """Raw features of training pairs: of all for a prior with their moments, else of a sample.

    `known` ones of all pairs, which `heads` make of what a trunk gives, are looked up.
    """
    fitted = config.prior.fitted
    sample = MOMENT_SAMPLE if fitted or config.loss.fold or config.loss.fold_text else NORM_SAMPLE
    if isinstance(pairs, Stream):
        pairs = pairs.prefix(sample)  # which stand for all
    generator = build.seeded_generator(config.seed, "norms")
    order = torch.randperm(len(pairs), generator=generator).tolist()
    chosen = order if fitted else order[:sample]
    if known is not None:
        found = PairFeatures(known.image_features[chosen], known.first_caption_features[chosen])
        if heads is None:
            return found
        device = heads[0].layer[0].device
        with torch.no_grad():
            return PairFeatures(
                *(
                    torch.cat([head(rows.to(device)).cpu() for rows in side.split(_ROWS)])
                    for head, side in zip(heads, found, strict=True)
                )
            )
    first = [str(pairs.captions[index][0]) for index in chosen]  # an image may have a million
    return PairFeatures(
        embedder.images(Subset(pairs, chosen, "pairs to measure"), "Encoding images"),
        embedder.texts(first, "Encoding captions"),
    )


def warn_of_one(features: PairFeatures, name: str) -> None:
    """Say where all images, or all captions, of the sample are one: nothing is learnt from them."""
    for what, side in zip(("images", "captions"), features, strict=True):
        if len(side) > 1 and bool((side == side[0]).all()):
            remark(
                f"{name}: the model makes the same of all {len(side)} {what} sampled, so nothing "
                "can be learnt from them. Look at the column that they come from.",
                "yellow",
            )


class Folded(NamedTuple):
    """What a fold made of the features of training pairs."""

    features: PairFeatures
    logit_scale: float  # fitted
    gap: tuple[float, float]  # before and after, of the pairs that the means were not taken of
    pairs: int  # how many those are


def fold_student(
    config: RefineConfig, student: Any, features: PairFeatures, pairs: ImageCaptions | Stream
) -> Folded:
    """Fold both towers' mean features out of their output layers, in place.

    The means are those of three quarters of the pairs, the logit scale is fitted on the others.
    """
    loss = config.loss
    shares = (loss.fold, loss.fold if loss.fold_text is None else loss.fold_text)
    held_back = min(SCALE_SAMPLE, len(features.image_features) // 4)
    maps = [
        fold_matrix(functional.normalize(side[held_back:].double(), dim=1).mean(dim=0), share)
        for side, share in zip(features, shares, strict=True)
    ]
    folded = PairFeatures(
        *((side.double() @ at).float() for side, at in zip(features, maps, strict=True))
    )
    device = next(student.parameters()).device
    pixels, tokens = (sample.to(device) for sample in build.sample_pairs(student, pairs, 2))
    own = float(student.logit_scale.detach())
    fold_towers(student, pixels, tokens, *maps)
    after, before = (
        (side.image_features[:held_back], side.text_features[:held_back])
        for side in (folded, features)
    )
    scale = fitted_logit_scale(after, before, own)
    gap = (centroid_distance(*unit_sides(*before)), centroid_distance(*unit_sides(*after)))
    console.print(
        f"Folded {shares[0]:.0%} of the images' mean feature and {shares[1]:.0%} of the captions' "
        f"out of the output layers, fitted on {len(features.image_features) - held_back:,} pairs "
        f"of training; logit scale {scale:.1f} instead of {own:.1f} (docs/method.md)."
    )
    return Folded(folded, scale, gap, held_back)


def scale_features(
    config: RefineConfig, student: Any, features: PairFeatures, pairs: ImageCaptions | Stream
) -> tuple[RefineConfig, FeatureScale]:
    """Bring the student's raw features to the paper's scale where the settings ask for it."""
    loss = config.loss
    norms = RawNorms(
        image=float(features.image_features.norm(dim=-1).mean()),
        text=float(features.text_features.norm(dim=-1).mean()),
        logit_scale=float(student.logit_scale.detach()),
    )
    compares_raw = bool(loss.rafa_weight or loss.hycd_weight) and not loss.normalize
    chosen = loss.temperature != LossConfig.model_fields["temperature"].get_default()
    if loss.feature_scale == "as-is" or (
        loss.feature_scale == "auto" and (norms.near_the_papers or not compares_raw or chosen)
    ):
        return override(config, loss={"feature_scale": "as-is"}), FeatureScale()
    pixels, tokens = build.sample_pairs(student, pairs, 2)
    device = next(student.parameters()).device
    canonical = {"feature_scale": "canonical", "normalize": True, "temperature": None}
    try:
        scale = FeatureScale.canonical(student, pixels.to(device), tokens.to(device), norms)
    except ModelError as error:
        if loss.feature_scale == "canonical":
            raise
        console.print(f"{error} HyCD runs on unit features, RaFA on raw ones as they are.")
        return override(config, loss={**canonical, "feature_scale": "as-is"}), FeatureScale()
    why = "therefore runs" if loss.feature_scale == "auto" else "runs, as asked for,"
    others = (
        " The published form is --recipe clip-refine-paper; --recipe balanced closes more of the "
        "gap on such models."
    )
    console.print(
        f"Raw norms are {norms.image:.1f} (image) and {norms.text:.1f} (text) at logit scale "
        f"{norms.logit_scale:.0f}; the paper's settings belong to {norms.canonical:.1f}. Training "
        f"{why} at that scale, HyCD on unit features (docs/method.md)."
        f"{others if loss.feature_scale == 'auto' else ''}"
    )
    return override(config, loss=canonical), scale


# --------------------------------------------------------------------------------------------------
# What is chosen on training pairs that are held out: the learning rate, and how far the refined
# weights go from where they came from (WiSE-FT, arXiv 2109.01903).


SELECTION_FRACTION = 0.1
"""Share of the training images (at least 100) that `auto` chooses on instead of training on it."""


def set_aside(
    config: RefineConfig, pairs: ImageCaptions | Stream
) -> tuple[ImageCaptions | Stream, ImageCaptions | None]:
    """What is trained on, and the pairs that weights and rates are chosen and watched on."""
    named = {
        "interpolate auto": config.interpolate == "auto",
        "train.learning_rate auto": config.train.learning_rate == "auto",
        "guard.every": config.guard.every is not None and config.guard.pairs is None,
    }
    asked = next((name for name, given in named.items() if given), None)
    if asked is None:
        return pairs, None
    if isinstance(pairs, Stream):
        raise ConfigError(
            f"{asked} holds a part of the training pairs out, which a stream does not allow. "
            f"Give {'--guard.pairs' if asked == 'guard.every' else 'a number'}, or leave it or "
            "--data.streaming out."
        )
    return hold_out(pairs, fraction=SELECTION_FRACTION, seed=config.seed)


def choose_rate(
    config: RefineConfig,
    student: Any,
    pairs: ImageCaptions | Stream,
    selection: ImageCaptions | None,
    embedder: Embedder,
    accelerator: Accelerator,
    saved: SavedState | None,
    objective: OwnLoss | None,
    features: EmbeddedPairs | None = None,
) -> RefineConfig:
    """`learning_rate` auto replaced by the rate whose short run does best on the selection pairs.

    Each begins with the student's weights, which are its own again in the end.
    """
    if config.train.learning_rate != "auto" or selection is None:
        return config
    if saved:
        return override(config, train={"learning_rate": saved.plain["decided"]["learning_rate"]})
    train = config.train
    steps = min(SHORT, build.count_steps(train, pairs, accelerator.num_processes))
    short = {"steps": steps, "warmup_steps": min(train.warmup_steps, steps // 2)}
    base = copy.deepcopy(student.state_dict())
    silent = replace(embedder, visible=False)
    before = selection_score(embed_pairs(silent, selection))
    bar = Bar("Learning rates", MOST_RATES, visible=embedder.visible, transient=True)
    tried: dict[float, float | None] = {}
    with bar.progress:
        while rate := next_rate(tried, train.rate):
            trial = override(config, interpolate=None, train={**short, "learning_rate": rate})
            try:
                with quietly():
                    log = StepLog(None)
                    train_student(
                        *(trial, student, pairs, silent, accelerator),
                        log=log,
                        teacher_features=features,
                        objective=objective,
                    )
                score = [selection_score(embed_pairs(silent, selection))]
                broadcast_object_list(score)  # or rounding could part what the processes try
                tried[rate] = score[0]
            except TrainingError:
                tried[rate] = None
            accelerator.free_memory()
            build.build_student(student, config, accelerator.device).load_state_dict(base)
            bar.advance()
    best = best_rate(tried)
    if best is None:
        raise TrainingError(
            f"train.learning_rate auto: training failed at all of {', '.join(map(str, tried))}."
        )
    if embedder.visible:
        found = ", ".join(
            f"{rate:g}: {'failed' if score is None else f'{score:.3f}'}"
            for rate, score in sorted(tried.items())
        )
        console.print(
            f"Learning rate {best:g}: {steps} steps each, mean recall on {len(selection):,} "
            f"held-out training images {found}; {before:.3f} untouched."
        )
    return override(config, train={"learning_rate": best})


def interpolate_student(
    config: RefineConfig,
    student: nn.Module,
    base: Mapping[str, Tensor],
    embedder: Embedder,
    selection: ImageCaptions | None,
) -> dict[str, Any] | None:
    """Move the student's weights toward its start; of equally good weights the lowest is taken."""
    if config.interpolate is None:
        return None
    refined = student.state_dict()
    if selection is None or config.interpolate != "auto":
        weight, tried = float(config.interpolate), {}
    else:
        tried = scores_along_line(embedder, student, base, selection)
        weight = max(tried, key=lambda weight: (tried[weight], -weight))
        if embedder.visible:
            console.print(
                f"Interpolation: {weight:g} of the way from the model to its refinement, chosen on "
                f"{len(selection):,} held-out training images (mean recall {tried[0.0]:.3f} at 0, "
                f"{tried[weight]:.3f} at {weight:g}, {tried[1.0]:.3f} at 1)."
            )
    student.load_state_dict(interpolate_weights(base, refined, weight))
    return {"weight": weight, "tried": {f"{at:g}": score for at, score in tried.items()}}


# --------------------------------------------------------------------------------------------------
# What is kept of a run.


def _report(
    folder: Path,
    was: Measured,
    now: Measured,
    held_out: ImageCaptions,
    tasks: Sequence[LabelledImages],
    nonsense_features: tuple[Tensor, Tensor],
    *,
    seed: int,
) -> None:
    """Write `report.json`, `report.html` and the model's `threshold.json`.

    A run is worth keeping without them, too.
    """
    try:
        changes = task_changes(was, now, tasks)
        more = {"seed": seed, "nonsense": nonsense_features}
        found = gather_evidence(was, now, held_out, changes, **more)
        found.write(folder / "report.json")
        if found.fits:
            found.fits[1].write(folder / "model" / THRESHOLD)
            remark(threshold_change(found))
        write_run_report(folder)
    except Exception as error:  # whatever is wrong with it, hours of training are not thrown away
        console.print(f"No report: {error}", style="yellow", markup=False)


def _output(
    config: RefineConfig, accelerator: Accelerator, student: nn.Module, saved: SavedState | None
) -> Any:
    """The folder to write to on the first process, None on others."""
    if not accelerator.is_main_process:
        return nullcontext()
    size = 4 * sum(weight.numel() for weight in student.state_dict().values())
    advice = "Make room, or choose another --out."
    free = check_room(config.out, saved_size(student), "the refined model's weights", advice)
    # weights, two moments and a guard's best weights each, one more while it is written
    states = (3 + (config.guard.every is not None)) * (KEPT + 1) * size
    if config.train.save_every != "never" and free < size + states + SPARE:
        remark(
            f"{config.out}: the states that --resume goes on from may take up to "
            f"{size_text(states)}, only {size_text(free)} are free.",
            "yellow",
        )
    go_on = saved is not None and saved.folder.parents[1] == hidden_work(config.out)
    return complete_folder(config.out, overwrite=config.overwrite, go_on=go_on)


def _save_model(student: Any, folder: Path, provenance: Provenance) -> None:
    """Save the trained model, if need be in place of old states or elsewhere; never lose it."""
    there = (folder / "log.jsonl").is_file()
    last = sorted((folder / WORK).glob("step-*"))[-1:]

    def save(place: Path) -> None:
        shutil.rmtree(place / "model", ignore_errors=True)
        (place / "model").mkdir(parents=True)
        save_model(student, place / "model", provenance)
        seal(place / "model")

    try:
        save(folder)
    except (OSError, SafetensorError) as error:
        for old in sorted((folder / WORK).glob("step-*")):
            if old not in last:
                shutil.rmtree(old, ignore_errors=True)
        elsewhere = Path(tempfile.mkdtemp(prefix="clip-refine-"))
        for place in (folder, elsewhere):
            with suppress(OSError, SafetensorError):
                save(place)
                break
        else:
            raise FailedError(
                f"{folder}: the refined model cannot be written ({first_line(error)}), nor to "
                f"{elsewhere}. Make room; --resume auto goes on from the last state."
            ) from error
        if place == elsewhere:
            raise FailedError(
                f"{folder}: the refined model cannot be written there ({first_line(error)}), so it "
                f"is in {elsewhere}/model, without its scores. Move it to a place of your own."
            ) from error
    if not there:
        raise FailedError(
            f"{folder}: was removed while the run wrote to it. The refined model is in "
            f"{folder}/model; log and report are lost."
        )


def _recipe(
    config: RefineConfig, provenance: Provenance, trained: Trained, *, pairs: int, steps: int
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
        "interpolation": trained.interpolation,
        "logit_scale": trained.logit_scale,
        "guard": trained.guard,
    }


def _from_anywhere(config: RefineConfig) -> RefineConfig:
    """The settings with absolute paths, so that they repeat the run from another folder."""

    def absolute(name: str | None) -> str | None:
        is_path = name and name != TOY and Path(name).exists()
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
        guard={
            "pairs": config.guard.pairs and absolute_source(config.guard.pairs),
            "bystanders": config.guard.bystanders and absolute_source(config.guard.bystanders),
        },
        out=config.out.resolve(),
    )


def _data_from_anywhere(data: DataConfig) -> dict[str, Any]:
    names = ("image_folder", "split_file", "val_split_file", "cache_folder")
    paths = {name: getattr(data, name) for name in names}
    train = tuple(map(absolute_source, data.sources))
    return {
        "train": train[0] if isinstance(data.train, str) else train or None,
        "val": data.val and absolute_source(data.val),
        **{key: path and path.resolve() for key, path in paths.items()},
    }


def _save(folder: Path, config: RefineConfig, device: torch.device) -> None:
    """Write the settings that repeat the run, and what it ran on."""
    settings = dump_config(_from_anywhere(override(config, overwrite=False, resume=None)))
    (folder / "config.yaml").write_text(settings, encoding="utf-8")
    write_environment(folder / "environment.json", build.device_name(device))
