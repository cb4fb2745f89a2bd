"""Features that are stored already: files in, files out.

`posthoc fit` and `apply` are about transforms that need no training, `vectors` about linear maps:
learnt on pairs, applied to whole indexes, folded into the model that new queries go through.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from clip_refine import __version__
from clip_refine.config import LossConfig, ModelConfig, PosthocConfig, TrainConfig
from clip_refine.config.runs import VectorsConfig, recipe_settings
from clip_refine.data import PairBatch
from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.scores import Outcome
from clip_refine.evaluation.tasks import (
    geometry_task,
    mixed_search_task,
    retrieval_task,
    separation_task,
)
from clip_refine.losses import Objective, PairFeatures
from clip_refine.models import DualEncoder, FeatureScale, Teacher
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.models.text_length import PROBES
from clip_refine.models.weights import fitted_logit_scale, fold_towers, set_logit_scale
from clip_refine.priors import StandardNormal
from clip_refine.results import EvaluatedModel, Provenance, SuiteScores, TaskScores
from clip_refine.roads import build
from clip_refine.roads.suites import differences, score
from clip_refine.saving import base_model, save_model
from clip_refine.support.console import Clock, remark
from clip_refine.support.errors import ConfigError, DataError, ModelError
from clip_refine.support.folder import check_free, complete_folder, describe_environment, write_file
from clip_refine.train import StepLog, StudentTowers, Trainer, make_optimiser, make_schedule
from clip_refine.train.precision import TowerPrecision
from clip_refine.vectors.files import (
    FeatureSet,
    check_features_path,
    load_peer,
    read_features,
    save_peer,
    write_features,
    write_peer,
)
from clip_refine.vectors.maps import LinearMaps, Procrustes, RefinedMaps, VectorStudent
from clip_refine.vectors.stored import apply_stored, open_npy, read_pairs
from clip_refine.vectors.transforms import (
    DEFAULTS,
    Fold,
    Modality,
    Peer,
    check_name,
    fit_peer,
    unit_rows,
)

# --------------------------------------------------------------------------------------------------
# Transforms that need no training: `posthoc fit` and `posthoc apply`.


def fit_file(
    name: str,
    features: Path,
    out: Path,
    settings: PosthocConfig = DEFAULTS,
    *,
    overwrite: bool = False,
) -> Peer:
    """Fit a peer on a file of features and save it."""
    check_name(name)
    check_free(out, overwrite=overwrite)
    found = read_features(features)
    try:
        peer = fit_peer(name, found.image_features, found.text_features, settings)
    except ValueError as error:
        raise DataError(f"{features}: {name} cannot be fitted. {error}.") from error
    save_peer(peer, out, overwrite=overwrite)
    return peer


def apply_file(peer_folder: Path, features: Path, out: Path, *, overwrite: bool = False) -> Peer:
    """Transform a file of features by a saved peer.

    The written features are compared by their dot product as they are; the file's note names the
    peer and how many score columns stand behind the features (2 for `nnn`).
    """
    check_features_path(out, overwrite=overwrite)
    peer = load_peer(peer_folder)
    found = read_features(features)
    try:
        moved = FeatureSet(
            peer.transform_image(found.image_features),
            peer.transform_text(found.text_features),
            found.text_to_image,
        )
    except ValueError as error:
        raise DataError(f"{features}: {peer.name} cannot be applied. {error}.") from error
    note = {
        "peer": peer.name,
        "similarity": "dot product, without scaling to norm 1",
        "score_columns": peer.score_columns,
    }
    write_features(out, moved, note=note, overwrite=overwrite)
    return peer


# --------------------------------------------------------------------------------------------------
# `vectors refine`: two linear maps, learnt on stored pairs as a model's last layers would be.


UNTOUCHED, REFINED, FOLDED = "untouched", "refined", "fold alone"
_SCALE_SAMPLE = 512  # training pairs that the student's logit scale is fitted on


def refine_vectors(
    pairs: str | FeatureSet, config: VectorsConfig, out: Path | None, *, overwrite: bool = False
) -> tuple[RefinedMaps, SuiteScores]:
    """Learn both maps on a part of some stored pairs and measure them on the rest.

    Args:
        pairs: What `read_pairs` reads, or the vectors themselves.
        config: Every setting.
        out: Folder for the maps and `scores.json`; None writes nothing.
        overwrite: Replace `out` where it exists.

    Returns:
        The maps of the first seed, and the scores of all on the pairs held out.

    Raises:
        ConfigError: There is no such recipe.
        DataError: The vectors are no pairs, or too few.
    """
    clock = Clock()
    if out is not None:
        check_free(out, overwrite=overwrite)
    objective_of = LossConfig(**_loss(config))
    found = read_pairs(pairs, owner=config.owner) if isinstance(pairs, str) else pairs
    train, held_out = hold_out_pairs(unit_pairs(found), config)
    accelerator = build.build_accelerator(config.device)
    maps = [
        _train(train, config, objective_of, seed, accelerator)
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    models: dict[str, Peer | None] = {UNTOUCHED: None}
    if objective_of.fold:
        models[FOLDED] = Fold.fit(train.image_features, train.text_features)
    for number, one in enumerate(maps):
        models[f"{REFINED}{f', seed {config.seed + number}' if config.seeds > 1 else ''}"] = one
    source = pairs if isinstance(pairs, str) else "python"
    scores = _scores(models, held_out, source, config.resamples, config.seed, clock)
    if out is not None:
        with complete_folder(out, overwrite=overwrite) as folder:
            write_peer(maps[0], folder)
            scores.write(folder / "scores.json")
            settings = config.model_dump_json(indent=2) + "\n"
            (folder / "config.json").write_text(settings, encoding="utf-8")
    return maps[0], scores


def _loss(config: VectorsConfig) -> dict[str, Any]:
    """The recipe's settings of `loss`; the raw norms here are canonical, whatever was stored."""
    try:
        loss = recipe_settings(config.recipe)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if loss.get("feature_scale") == "canonical":
        loss = {**loss, "normalize": True, "temperature": None}
    return loss if config.rafa_weight is None else {**loss, "rafa_weight": config.rafa_weight}


def unit_pairs(found: FeatureSet) -> EmbeddedPairs:
    """Unit vectors with the captions in order of their images."""
    image = unit_rows("image_features", found.image_features)
    text = unit_rows("text_features", found.text_features)
    if found.text_to_image is None:
        return EmbeddedPairs(image, text, torch.arange(len(image)))
    owners, order = found.text_to_image.long().sort(stable=True)
    return EmbeddedPairs(image, text[order], owners)


def hold_out_pairs(
    pairs: EmbeddedPairs, config: VectorsConfig
) -> tuple[EmbeddedPairs, EmbeddedPairs]:
    """By image, so that no held-out image has a caption that was learnt from."""
    count = len(pairs.image_features)
    order = torch.randperm(count, generator=build.seeded_generator(config.seed, "held out"))
    held_out = round(config.held_out * count)
    if held_out < 2 or count - held_out < 2:
        raise DataError(
            f"{count} images are too few to hold {config.held_out:g} of them out: at least two "
            "must be on either side."
        )
    parts = order[held_out:], order[:held_out]
    train, rest = (pairs.part(sorted(part.tolist())) for part in parts)
    return train, rest


def _train(
    pairs: EmbeddedPairs,
    config: VectorsConfig,
    loss: LossConfig,
    seed: int,
    accelerator: Accelerator,
) -> RefinedMaps:
    """One training, at the norm at which dot products are the logit scale times a cosine."""
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
    trainer.train(batches, steps=config.steps, log=StepLog(None))
    counts = len(pairs.image_features), len(pairs.text_features)
    return student.maps(*counts, logit_scale=fitted_scale)


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


# --------------------------------------------------------------------------------------------------
# `vectors evaluate`: gap, retrieval, mixed search and separation, side by side.


def evaluate_vectors(
    pairs: str,
    maps: Sequence[Path] = (),
    *,
    owner: str | None = None,
    resamples: int = 1000,
    seed: int = 42,
    out: Path | None = None,
    overwrite: bool = False,
) -> SuiteScores:
    """Measure stored pairs as they are, and through maps or other transforms.

    Args:
        pairs: What `read_pairs` reads.
        maps: Folders of `vectors refine`, `vectors align` or `posthoc fit`.
        owner: As for `read_pairs`.
        resamples: Of the bootstrap over images.
        seed: Of bootstrap and splits.
        out: JSON file for the scores.
        overwrite: Replace `out` where it exists.
    """
    clock = Clock()
    if out is not None:
        check_free(out, overwrite=overwrite, folder=False)
    found = unit_pairs(read_pairs(pairs, owner=owner))
    models: dict[str, Peer | None] = {UNTOUCHED: None}
    models |= {str(folder): load_peer(folder) for folder in maps}
    scores = _scores(models, found, pairs, resamples, seed, clock)
    if out is not None:
        write_file(out, scores.text)
    return scores


def _scores(
    models: Mapping[str, Peer | None],
    pairs: EmbeddedPairs,
    source: str,
    resamples: int,
    seed: int,
    clock: Clock,
) -> SuiteScores:
    """Every transform on the same pairs, with differences from the first."""
    found = {
        label: _outcomes(peer, pairs, source, resamples, seed) for label, peer in models.items()
    }
    measured = [
        TaskScores(
            task=task,
            kind=task,
            model=label,
            protocol=found[label][task].protocol,
            source=source,
            note=None,
            counts=found[label][task].counts,
            prompts=None,
            templates=(),
            class_names=None,
            model_fingerprint="",
            data_fingerprint="",
            scores={name: score(name, n) for name, n in found[label][task].numbers.items()},
            details=found[label][task].details,
        )
        for task in next(iter(found.values()))
        for label in models
    ]
    return SuiteScores(
        suite="vectors",
        models=tuple(
            EvaluatedModel(label=label, name=label, pretrained=None, fingerprint="")
            for label in models
        ),
        measured=tuple(measured),
        differences=tuple(differences(found)),
        missing={},
        resamples=resamples,
        seed=seed,
        seconds=clock.seconds["total"],
        environment=describe_environment("cpu"),
    )


def _outcomes(
    peer: Peer | None, pairs: EmbeddedPairs, source: str, resamples: int, seed: int
) -> dict[str, Outcome]:
    if peer is not None:
        if not peer.returns_unit:
            raise DataError(
                f"{peer.name}: scores by dot products of features whose lengths mean something, "
                "which geometry and mixed search do not take. Compare it with `compare`."
            )
        try:
            moved = (
                peer.transform_image(pairs.image_features),
                peer.transform_text(pairs.text_features),
            )
        except ValueError as error:
            raise DataError(f"{source}: {peer.name} cannot be applied. {error}.") from error
        pairs = EmbeddedPairs(*moved, pairs.text_to_image)
    bootstrap = Bootstrap(resamples, seed)
    return {
        "geometry": geometry_task(pairs, bootstrap=bootstrap),
        "retrieval": retrieval_task(pairs, protocol="all-captions", bootstrap=bootstrap),
        "mixed-search": mixed_search_task(pairs, protocol="all-captions", bootstrap=bootstrap),
        "separation": separation_task(
            pairs, protocol="all-captions", false_positive_rate=0.01, bootstrap=bootstrap
        ),
    }


# --------------------------------------------------------------------------------------------------
# `vectors apply` and `vectors align`: a stored index through a map, a new model's vectors into it.


def apply_vectors(
    maps: Path,
    stored: Path,
    out: Path,
    *,
    side: Modality,
    column: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a copy of a stored index with one side mapped; how many vectors those are."""
    return apply_stored(load_peer(maps), stored, out, side=side, column=column, overwrite=overwrite)


def align_vectors(old: Path, new: Path, out: Path, *, overwrite: bool = False) -> Procrustes:
    """Fit the rotation that brings a new model's vectors into an old index's space.

    Args:
        old: `.npy`, or a file of image and text features, which are then taken together.
        new: The same items in the same order, from the new model.
        out: Folder for the map.
        overwrite: Replace `out` where it exists.
    """
    check_free(out, overwrite=overwrite)
    sides = [_all_rows(path) for path in (old, new)]
    try:
        aligned = Procrustes.align(*sides)
    except ValueError as error:
        raise DataError(f"{old} and {new}: {error}.") from error
    save_peer(aligned, out, overwrite=overwrite)
    return aligned


def _all_rows(path: Path) -> Tensor:
    if path.suffix == ".npy":
        return open_npy(path).read()
    found = read_pairs(str(path))
    return torch.cat([found.image_features, found.text_features])


# --------------------------------------------------------------------------------------------------
# `vectors fold`: the same maps in the checkpoint, for new queries.


def fold_vectors(
    maps: Path,
    config: ModelConfig,
    out: Path,
    *,
    model: DualEncoder | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model whose output layers hold the maps, so that its features are mapped ones.

    Args:
        maps: Folder of linear maps: of `vectors refine`, or a fold of `posthoc fit`.
        config: The model that made the vectors.
        out: Folder for the new one.
        model: Folded in place instead of loading `config`.
        overwrite: Replace `out` where it exists.

    Raises:
        DataError: The transform is not linear, as means and NNN are not.
        ModelError: A tower does not end in a linear layer of its own.
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
    encoder: Any = build.build_model(config, model)
    encoder.float().eval()
    fold_model(encoder, peer)
    name = config.name if model is None else f"python:{type(model).__name__}"
    provenance = Provenance(
        version=__version__,
        made="folded",
        base=base_model(name, config.pretrained),
        recipe=f"linear maps ({peer.kind}) in both output layers",
    )
    with complete_folder(out, overwrite=overwrite) as folder:
        save_model(encoder, folder, provenance)


def fold_model(encoder: Any, maps: LinearMaps) -> None:
    """Multiply maps into a model's output layers, in place; checked by its features."""
    image = Image.linear_gradient("L").convert("RGB")
    photos = [image, image.rotate(90), image.resize((64, 200)).convert("RGB")]
    pixels = torch.stack([encoder.preprocess(photo) for photo in photos])
    fold_towers(encoder, pixels, encoder.tokenizer(PROBES), maps.image_map, maps.text_map)
    if not isinstance(maps, RefinedMaps):
        return
    try:
        set_logit_scale(encoder, maps.logit_scale)
    except ModelError:
        remark(
            f"The model's logit scale stays {float(encoder.logit_scale):.3g}; softmax over cosines "
            f"of the mapped features is calibrated at {maps.logit_scale:.3g}."
        )
