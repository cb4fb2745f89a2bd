"""Linear maps of stored vectors: learnt on pairs, compared, put into the model of new queries."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from clip_refine import __version__
from clip_refine.config import LossConfig, ModelConfig, TrainConfig
from clip_refine.config.runs import VectorsConfig, recipe_settings
from clip_refine.data import PairBatch
from clip_refine.evaluation.evidence import gather_evidence
from clip_refine.evaluation.scores import (
    LINE,
    ModelFeatures,
    measure,
    paired_differences,
    score_features,
    selection_score,
    summarise,
)
from clip_refine.evaluation.tasks import NEIGHBOURS
from clip_refine.losses import Objective, PairFeatures
from clip_refine.losses.objective import check_objective
from clip_refine.models import DualEncoder, FeatureScale, OpenClipEncoder, Teacher
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.models.encoder import PROBES
from clip_refine.models.weights import (
    fitted_logit_scale,
    fold_towers,
    output_projection,
    set_logit_scale,
)
from clip_refine.priors import StandardNormal
from clip_refine.report.run_page import write_run_report
from clip_refine.results import Comparison, Provenance, RunScores, SuiteScores
from clip_refine.roads import build
from clip_refine.roads.compare import UNTOUCHED as PRE_TRAINED
from clip_refine.roads.compare import Training, score_row, transformed, write_comparison
from clip_refine.roads.refine import SELECTION_FRACTION
from clip_refine.roads.vectors import UNTOUCHED, given_pairs, measure_transforms, unit_pairs
from clip_refine.saving import base_model, save_model
from clip_refine.support.console import Clock, PeakMemory, quietly, remark
from clip_refine.support.errors import ConfigError, DataError, ModelError
from clip_refine.support.folder import check_free, complete_folder, write_environment
from clip_refine.train import StepLog, StudentTowers, Trainer, make_optimiser, make_schedule
from clip_refine.train.towers import TowerPrecision
from clip_refine.vectors.files import FeatureSet, load_peer, save_peer, write_peer
from clip_refine.vectors.transforms import (
    Fold,
    IsoClip,
    LinearMaps,
    Peer,
    RefinedMaps,
    VectorStudent,
    check_name,
    fit_peer,
)

# --------------------------------------------------------------------------------------------------
# `vectors refine`: two linear maps, learnt on stored pairs as a model's last layers would be.


REFINED, FOLDED = "refined", "fold alone"
_SCALE_SAMPLE = 512  # training pairs that the student's logit scale is fitted on


def refine_vectors(
    pairs: str | Path | FeatureSet,
    config: VectorsConfig,
    out: Path | None = None,
    *,
    overwrite: bool = False,
) -> tuple[RefinedMaps, SuiteScores]:
    """Learn a linear map a modality on a part of some stored pairs and measure them on the rest.

    Args:
        pairs: A file or folder of docs/vectors.md, or the vectors themselves.
        config: Every setting.
        out: Folder for what any refinement leaves, and `evaluation.json`; None writes nothing.
        overwrite: Replace `out`.

    Returns:
        The maps, and what they, the fold alone and the vectors as they are come to on the rest.

    Raises:
        ClipRefineError: Pairs that cannot be read or are too few, settings that do not go
            together, `out` that exists.
    """
    clock = Clock()
    if out is not None:
        check_free(out, overwrite=overwrite)
    loss = recipe_loss(config, config.recipe)
    found, source = given_pairs(pairs, config.owner)
    train, held_out = hold_out_pairs(unit_pairs(found), config)
    accelerator = build.build_accelerator(config.device)
    opened = nullcontext() if out is None else complete_folder(out, overwrite=overwrite)
    with opened as folder:
        with clock("train"), StepLog(folder / "log.jsonl" if folder else None) as log:
            learnt = learn_maps(train, config, loss, config.seed, accelerator, log)
        models: dict[str, Peer | None] = {UNTOUCHED: None}
        if loss.fold:
            models[FOLDED] = Fold.fit(train.image_features, train.text_features)
        models[REFINED] = learnt.maps
        with clock("evaluate"):
            scores = measure_transforms(
                models, held_out, source, config.resamples, config.seed, clock
            )
        if folder:
            write_peer(learnt.maps, folder)
            scores.write(folder / "evaluation.json")
            _write_run(folder, source, config, loss, learnt, train, held_out, clock)
    return learnt.maps, scores


def recipe_loss(config: VectorsConfig, recipe: str) -> LossConfig:
    """A recipe's `loss`; the raw norms here are canonical, whatever was stored."""
    try:
        loss = recipe_settings(recipe, "projections")  # which is what a pair of maps is
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if loss.get("feature_scale") == "canonical":
        loss = {**loss, "normalize": True, "temperature": None}
    weight = {} if config.rafa_weight is None else {"rafa_weight": config.rafa_weight}
    found = LossConfig(**{**loss, **weight})
    check_objective(found, None)
    return found


def hold_out_pairs(
    pairs: EmbeddedPairs, config: VectorsConfig
) -> tuple[EmbeddedPairs, EmbeddedPairs]:
    """By image, so that no held-out image has a caption that was learnt from."""
    train, held_out = (pairs.part(rows) for rows in _halves(len(pairs.image_features), config))
    return train, held_out


def _halves(count: int, config: VectorsConfig) -> tuple[list[int], list[int]]:
    """The images to learn from and those held out."""
    order = torch.randperm(count, generator=build.seeded_generator(config.seed, "held out"))
    held_out = round(config.held_out * count)
    fewest = 4 if config.interpolate == "auto" else 2  # auto holds two of them out
    if held_out <= NEIGHBOURS or count - held_out < fewest:
        raise DataError(
            f"{count} images are too few to hold {config.held_out:g} of them out: it takes more "
            f"than {NEIGHBOURS} to measure on, since hubs are counted among so many neighbours, "
            f"and {fewest} or more to learn from."
        )
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())


@dataclass(frozen=True)
class Learnt:
    """Two maps and how they came about."""

    maps: RefinedMaps
    train: TrainConfig  # how steps were taken
    # as `interpolate_student` gives it: weight and selection scores
    interpolation: dict[str, Any] | None


def learn_maps(
    pairs: EmbeddedPairs,
    config: VectorsConfig,
    loss: LossConfig,
    seed: int,
    accelerator: Accelerator,
    log: StepLog,
) -> Learnt:
    """One training, at the norm at which dot products are the logit scale times a cosine."""
    selection = None
    if config.interpolate == "auto":
        order = torch.randperm(
            len(pairs.image_features), generator=build.seeded_generator(config.seed, "selection")
        )
        kept = max(2, round(SELECTION_FRACTION * len(order)))
        selection, pairs = (pairs.part(sorted(p.tolist())) for p in (order[:kept], order[kept:]))
    norm, dim = config.logit_scale**0.5, pairs.image_features.shape[1]
    eye = torch.eye(dim)
    starts = [eye, eye]
    fitted_scale = config.logit_scale
    if loss.fold:
        fold = Fold.fit(pairs.image_features, pairs.text_features, share=loss.fold)
        starts = [fold.matrix("image"), fold.matrix("text")]
        some = torch.randperm(
            len(pairs.image_features), generator=build.seeded_generator(config.seed, "scale")
        )[:_SCALE_SAMPLE]
        image, text = pairs.image_features[some], pairs.first_caption_features[some]
        folded = fold.transform_image(image), fold.transform_text(text)
        fitted_scale = fitted_logit_scale(folded, (image, text), config.logit_scale)
    device = accelerator.device
    student = VectorStudent(
        starts[0],
        starts[1],
        logit_scale=fitted_scale,
        rank=config.rank,
        generator=build.seeded_generator(seed, "training"),
    ).to(device)
    teacher = Teacher(VectorStudent(eye, eye, logit_scale=config.logit_scale).to(device))
    settings = TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        precision="fp32",
    )
    optimiser = make_optimiser(
        student.named_parameters(),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        decay="all",
        device=device,
    )
    precision = TowerPrecision.from_name("fp32")
    features = PairFeatures(norm * pairs.image_features, norm * pairs.first_caption_features)
    trainer = Trainer(
        accelerator=accelerator,
        towers=StudentTowers(student, precision),
        teacher=teacher,
        objective=Objective(loss),
        precision=precision,
        prior=StandardNormal(),
        generator=build.seeded_generator(seed, "references"),
        schedule=make_schedule(optimiser, schedule="constant", warmup_steps=0, steps=config.steps),
        config=settings,
        teacher_scale=config.logit_scale if loss.fold else None,
        centroid_gap=FeatureScale().gap(features).to(device),
    )
    batches = _batches(pairs, config, norm, build.seeded_generator(seed, "order"))
    trainer.train(batches, steps=config.steps, log=log)
    counts = len(pairs.image_features), len(pairs.text_features)
    at = partial(student.maps, *counts, logit_scale=fitted_scale)
    if config.interpolate is None:
        return Learnt(at(), settings, None)
    tried = (
        {} if selection is None else {w: selection_score(_moved(selection, at(w))) for w in LINE}
    )
    weight = (
        float(config.interpolate)
        if selection is None
        else max(tried, key=lambda weight: (tried[weight], -weight))
    )
    shown = {f"{at:g}": score for at, score in tried.items()}
    return Learnt(at(weight), settings, {"weight": weight, "tried": shown})


def _batches(
    pairs: EmbeddedPairs, config: VectorsConfig, norm: float, generator: torch.Generator
) -> Iterator[PairBatch]:
    """Each epoch newly shuffled, with one caption an image drawn anew; the last few wait."""
    count = len(pairs.image_features)
    size = min(config.batch_size, count)
    first = pairs.first_caption
    captions = torch.bincount(pairs.text_to_image, minlength=count)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(config.steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        chosen, order = order[:size], order[size:]
        drawn = (torch.rand(size, generator=generator) * captions[chosen]).long()
        texts = pairs.text_features[first[chosen] + drawn]
        yield PairBatch(norm * pairs.image_features[chosen], norm * texts, chosen.tolist())


def _moved(pairs: EmbeddedPairs, peer: Peer) -> EmbeddedPairs:
    """Pairs behind a transform that gives unit vectors."""
    return transformed(ModelFeatures(pairs, ()), peer).pairs


# --------------------------------------------------------------------------------------------------
# The same files as of any refinement, so that the same page shows them.


@dataclass(frozen=True)
class _Rows:
    """Held-out vectors as a report names them: by their rows, which have no picture."""

    name: str
    rows: Sequence[int]  # of the images, in the order of the file
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.rows)

    def image_name(self, index: int) -> str:
        return f"image {self.rows[index]}"


def _write_run(
    folder: Path,
    source: str,
    config: VectorsConfig,
    loss: LossConfig,
    learnt: Learnt,
    train: EmbeddedPairs,
    held_out: EmbeddedPairs,
    clock: Clock,
) -> None:
    was, now = (
        measure(ModelFeatures(pairs, ())) for pairs in (held_out, _moved(held_out, learnt.maps))
    )
    plain = {"train": learnt.train.model_dump(mode="json"), "loss": loss.model_dump(mode="json")}
    RunScores(
        before=score_features(was.features, seed=config.seed),
        after=score_features(now.features, seed=config.seed),
        difference=paired_differences(was, now, seed=config.seed, resamples=config.resamples),
        recipe={
            "name": config.recipe,
            "model": "stored vectors",
            "pairs": len(train.image_features),
            "steps": config.steps,
            "seed": config.seed,
            "logit_scale": learnt.maps.logit_scale,
            "interpolation": learnt.interpolation,
            **plain,
        },
        seconds=clock.seconds,
    ).write(folder / "scores.json")
    settings = {**config.model_dump(mode="json"), "data": {"train": source}, **plain}
    settings["model"] = {"name": "stored vectors"}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    write_environment(folder / "environment.json", config.device)
    _, rows = _halves(len(train.image_features) + len(held_out.image_features), config)
    captions = [
        [f"text {number} of image {row}" for number in range(1, int(count) + 1)]
        for row, count in zip(rows, torch.bincount(held_out.text_to_image), strict=True)
    ]
    named: Any = _Rows(source, rows, captions)
    gather_evidence(was, now, named, (), seed=config.seed, pictures=False).write(
        folder / "report.json"
    )
    write_run_report(folder)


# --------------------------------------------------------------------------------------------------
# `vectors compare`: recipes and seeds beside what needs no training, in `compare`'s own table.


def compare_vectors(
    pairs: str | Path | FeatureSet,
    config: VectorsConfig,
    out: Path,
    *,
    recipes: Sequence[str],
    seeds: int = 3,
    peers: Sequence[str] = (),
    overwrite: bool = False,
) -> Comparison:
    """Learn maps by several recipes on the same pairs and batches, and score all of them alike.

    Args:
        pairs: As for `refine`.
        config: Every setting but the recipe.
        out: Folder for `compare`'s files.
        recipes: What is learnt by.
        seeds: Trainings of each, with `config.seed`, `config.seed` + 1, ... on one split.
        peers: What needs no training, fitted on the pairs that are learnt from.
        overwrite: Replace `out`.

    Returns:
        What `comparison.json` holds.

    Raises:
        ClipRefineError: As for `refine`; a recipe or peer that there is not.
    """
    check_free(out, overwrite=overwrite)
    defaults, given = VectorsConfig().model_dump(mode="json"), config.model_dump(mode="json")
    if config.recipe != defaults["recipe"]:
        raise ConfigError(f"recipe {config.recipe}: a comparison takes --recipes. Name it there.")
    if seeds < 1:
        raise ConfigError(f"seeds: {seeds} trainings of each recipe; give 1 or more.")
    losses = {recipe: recipe_loss(config, recipe) for recipe in recipes}
    for peer in peers:
        check_name(peer)
    found, source = given_pairs(pairs, config.owner)
    train, held_out = hold_out_pairs(unit_pairs(found), config)
    accelerator = build.build_accelerator(config.device)
    features = ModelFeatures(held_out, ())
    score = partial(score_row, selection=None, seed=config.seed, resamples=config.resamples)
    found_rows = [score(PRE_TRAINED, Training(seed=config.seed), features)]
    for name in peers:
        clock = Clock()
        with clock("fit"):
            peer = fit_peer(name, train.image_features, train.text_features)
            moved = transformed(features, peer)
        training = Training(seed=config.seed, seconds=clock.seconds["fit"])
        found_rows.append(score(name, training, moved))
    for recipe, loss in losses.items():
        for seed in range(config.seed, config.seed + seeds):
            clock, memory = Clock(), PeakMemory(accelerator.device)
            with quietly(), clock("train"):
                learnt = learn_maps(train, config, loss, seed, accelerator, StepLog(None))
            training = Training(
                seed=seed,
                learning_rate=config.learning_rate,
                steps=config.steps,
                pairs=len(train.image_features),
                seconds=clock.seconds["train"],
                peak_memory=memory.gigabytes,
            )
            found_rows.append(score(recipe, training, transformed(features, learnt.maps)))
    rows = tuple(row for row, _ in found_rows)
    result = Comparison(
        rows=rows,
        summary=summarise(rows, [draws for _, draws in found_rows], untouched=PRE_TRAINED),
        learning_rates=(),
        held_out=len(held_out.image_features),
        vectors=source,
        vectors_settings={name: value for name, value in given.items() if value != defaults[name]},
    )
    del given["recipe"]
    settings = {**given, "recipes": [*recipes], "peers": [*peers], "seeds": seeds}
    with complete_folder(out, overwrite=overwrite) as folder:
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        write_comparison(folder, result, accelerator.device, shown_as=out)
    return result


# --------------------------------------------------------------------------------------------------
# `vectors fold`: the same maps in the checkpoint, for new queries.


def fold_vectors(maps: Path, config: ModelConfig, out: Path, *, overwrite: bool = False) -> None:
    """Write a model with linear maps of `vectors refine` or a fold's in its output layers.

    Args:
        maps: Their folder.
        config: The model that made the vectors.
        out: Folder for the model.
        overwrite: Replace `out`.

    Raises:
        ClipRefineError: Maps that are not linear, a model with no place for them, `out` that
            exists.
    """
    check_free(out, overwrite=overwrite)
    peer = load_peer(maps)
    if isinstance(peer, Fold):
        peer = LinearMaps.of(peer)
    if not isinstance(peer, LinearMaps):
        raise DataError(
            f"{maps}: {peer.name} is no linear map, and what stands before or behind the "
            "normalisation cannot go into a layer. Linear are `vectors refine`, and `posthoc fit "
            "fold`, which does nearly what mean-centring does."
        )
    encoder: Any = build.build_model(config)
    encoder.float().eval()
    if isinstance(encoder, OpenClipEncoder):
        encoder.add_projection()
    fold_model(encoder, peer)
    provenance = Provenance(
        version=__version__,
        made="folded",
        base=base_model(config.name, config.pretrained),
        recipe=f"linear maps ({peer.kind}) in both output layers",
    )
    with complete_folder(out, overwrite=overwrite) as folder:
        save_model(encoder, folder, provenance)


def fold_model(encoder: Any, maps: LinearMaps) -> None:
    """Multiply maps into a model's output layers, in place; checked by its features."""
    fold_towers(encoder, *try_inputs(encoder), maps.image_map, maps.text_map)
    if not isinstance(maps, RefinedMaps):
        return
    try:
        set_logit_scale(encoder, maps.logit_scale)
    except ModelError:
        remark(
            f"The model's logit scale stays {float(encoder.logit_scale):.3g}; softmax over cosines "
            f"of the mapped features is calibrated at {maps.logit_scale:.3g}."
        )


def try_inputs(encoder: Any) -> tuple[Tensor, Tensor]:
    """Pixels and tokens to try output layers with."""
    image = Image.linear_gradient("L").convert("RGB")
    photos = [image, image.rotate(90), image.resize((64, 200)).convert("RGB")]
    pixels = torch.stack([encoder.preprocess(photo) for photo in photos])
    return pixels, encoder.tokenizer(PROBES)


def output_projections(encoder: Any) -> tuple[Tensor, Tensor]:
    """The last layers of both towers, (d, d_image) and (d, d_text)."""
    pixels, tokens = try_inputs(encoder)
    image, text = (lambda: encoder.encode_image(pixels)), (lambda: encoder.encode_text(tokens))
    return (
        output_projection(encoder, image, "image", other=text),
        output_projection(encoder, text, "text", other=image),
    )


def isoclip_maps(
    config: ModelConfig,
    out: Path,
    *,
    top: int,
    bottom: int,
    model: DualEncoder | None = None,
    overwrite: bool = False,
) -> IsoClip:
    """Write IsoCLIP's maps (arXiv 2603.19862) from a model's projections: search in one modality.

    Args:
        config: The model.
        out: Folder for the maps.
        top: How many directions of the largest singular values to drop.
        bottom: How many of the smallest.
        model: Used instead of loading `config`.
        overwrite: Replace `out`.

    Raises:
        ClipRefineError: No linear projections, too many directions, `out` that exists.
    """
    check_free(out, overwrite=overwrite)
    encoder: Any = build.build_model(config, model)
    encoder.float().eval()
    projections = output_projections(encoder)
    try:
        maps = IsoClip.from_projections(*projections, top=top, bottom=bottom)
    except ValueError as error:
        raise ConfigError(f"{config.name}: {error}.") from error
    save_peer(maps, out, overwrite=overwrite)
    return maps
