"""Features that are stored already: files in, transformed files or scores out.

How maps are learnt, compared and put into a model stands in `vector_maps`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from clip_refine.config import PosthocConfig
from clip_refine.config.suites import Task
from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.scores import Outcome
from clip_refine.evaluation.tasks import SourceFeatures, measure_task
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.results import EvaluatedModel, SuiteScores, TaskScores
from clip_refine.roads.suites import differences, score
from clip_refine.support.console import Clock, remark
from clip_refine.support.errors import ConfigError, DataError
from clip_refine.support.folder import check_free, check_sums, describe_environment, write_file
from clip_refine.support.limits import parse_yaml, read_text
from clip_refine.vectors.files import (
    FeatureSet,
    check_features_path,
    features_note,
    load_peer,
    read_features,
    save_peer,
    write_features,
)
from clip_refine.vectors.stored import open_npy, read_pairs
from clip_refine.vectors.transforms import (
    DEFAULTS,
    Peer,
    Procrustes,
    check_name,
    fit_peer,
    settings_of,
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
    idle = [
        setting
        for setting, value in settings
        if value != getattr(DEFAULTS, setting) and setting not in settings_of(name)
    ]
    if idle:
        raise ConfigError(f"{idle[0]}: {name} takes no such setting. Leave it out.")
    check_free(out, overwrite=overwrite)
    found = read_features(features)
    try:
        peer = fit_peer(name, found.image_features, found.text_features, settings)
    except ValueError as error:
        raise DataError(f"{features}: {name} cannot be fitted. {error}.") from error
    save_peer(peer, out, overwrite=overwrite)
    images, texts = peer.fitted_on
    if "neighbours" in settings_of(name) and settings.neighbours > min(images, texts):
        remark(
            f"neighbours {settings.neighbours}: all references are taken where there are fewer, "
            f"which are {images} images and {texts} texts."
        )
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
        "similarity": "cosine" if peer.returns_unit else "dot product, without scaling to norm 1",
        "score_columns": peer.score_columns,
        "returns_unit": peer.returns_unit,
    }
    write_features(out, moved, note=note, overwrite=overwrite)
    return peer


# --------------------------------------------------------------------------------------------------
# `vectors evaluate`: gap, retrieval, mixed search, separation, clusters and storage, side by side.


UNTOUCHED = "untouched"
_NO_UNIT = (
    "scores by dot products of features whose lengths mean something, which geometry and mixed "
    "search do not take."
)
FEW = 20
"""Images below which mixed documents, clusters and storage are not measured, nor items unseen."""


def unit_pairs(found: FeatureSet) -> EmbeddedPairs:
    """Unit vectors with the captions in order of their images."""
    image = unit_rows("image_features", found.image_features)
    text = unit_rows("text_features", found.text_features)
    if found.text_to_image is None:
        return EmbeddedPairs(image, text, torch.arange(len(image)))
    owners, order = found.text_to_image.long().sort(stable=True)
    return EmbeddedPairs(image, text[order], owners)


def given_pairs(pairs: str | Path | FeatureSet, owner: str | None) -> tuple[FeatureSet, str]:
    """Stored pairs and what to call them, from where they are or from Python."""
    if isinstance(pairs, FeatureSet):
        return pairs, "python"
    if not isinstance(pairs, str | Path):
        raise DataError(
            f"pairs must be a file or folder of docs/vectors.md, or a FeatureSet of both sides, "
            f"got {type(pairs).__name__}."
        )
    note = features_note(Path(pairs))
    if note.get("score_columns") or not note.get("returns_unit", True):
        raise DataError(
            f"{pairs}: was made by {note.get('peer')}, which {_NO_UNIT} Give what it was made "
            f"from, and compare with `clip-refine vectors compare --peers {note.get('peer')}`."
        )
    return read_pairs(str(pairs), owner=owner), str(pairs)


def evaluate_vectors(
    pairs: str | Path | FeatureSet,
    maps: str | Path | Peer | Sequence[str | Path | Peer] = (),
    *,
    owner: str | None = None,
    resamples: int = 1000,
    seed: int = 42,
    out: Path | None = None,
    overwrite: bool = False,
) -> SuiteScores:
    """Measure stored pairs as they are, and through maps or other transforms.

    Args:
        pairs: A file or folder of docs/vectors.md, or the vectors themselves.
        maps: What is measured beside: transforms, or folders that hold them.
        owner: Column that says which image a row is of, where images have several rows.
        resamples: Of the bootstrap over images.
        seed: Of bootstrap and splits.
        out: JSON file for the scores; None writes nothing.
        overwrite: Replace `out`.

    Returns:
        Every score of the vectors as they are and through each transform; differences from the
        former.

    Raises:
        ClipRefineError: Pairs or maps that cannot be read or do not fit, `out` that exists.
    """
    clock = Clock()
    if isinstance(maps, str | Path | Peer):
        maps = (maps,)
    if out is not None:
        check_free(out, overwrite=overwrite, folder=False)
    given, source = given_pairs(pairs, owner)
    models: dict[str, Peer | None] = {UNTOUCHED: None}
    for each in maps:
        if isinstance(each, Peer):
            models[f"{each.name} {len(models)}" if each.name in models else each.name] = each
        else:
            models[str(each)] = load_peer(Path(each))
            _say_if_learnt_from(Path(each), source)
    found = unit_pairs(given)
    scores = measure_transforms(models, found, source, resamples, seed, clock, clusters=True)
    if out is not None:
        write_file(out, scores.text)
    return scores


def _say_if_learnt_from(folder: Path, pairs: str) -> None:
    """Maps do better on the pairs that they were learnt from than on any others."""
    try:
        learnt_from = str(parse_yaml(read_text(folder / "config.yaml"))["data"]["train"])
    except (OSError, TypeError, KeyError, ValueError):  # of transforms without settings
        return
    if Path(learnt_from).name == Path(pairs).name:
        remark(
            f"{folder} was learnt from {learnt_from}: if these are the same pairs, its scores here "
            "are better than on new ones. `vectors refine` measured it on the pairs it held out: "
            f"{folder}/scores.json.",
            style="yellow",
        )


def measure_transforms(
    models: Mapping[str, Peer | None],
    pairs: EmbeddedPairs,
    source: str,
    resamples: int,
    seed: int,
    clock: Clock,
    *,
    clusters: bool = False,
) -> SuiteScores:
    """Every transform on the same pairs, with differences from the first; None leaves them.

    `clusters` adds those of pairs, whose bootstrap takes longer than all else.
    """
    tasks = _tasks(pairs, clusters=clusters)
    found: dict[str, dict[str, Outcome]] = {}
    for label, peer in models.items():
        first, drawn = next(iter(found.values()), {}), Bootstrap(resamples, seed)
        found[label] = _outcomes(peer, pairs, source, tasks, drawn, first)
    measured = [
        TaskScores(
            task=task,
            kind=task,
            model=label,
            protocol=found[label][task].protocol,
            source=source,
            counts=found[label][task].counts,
            scores={name: score(name, n) for name, n in found[label][task].numbers.items()},
            details=found[label][task].details,
        )
        for task in next(iter(found.values()))
        for label in models
    ]
    return SuiteScores(
        suite="vectors",
        models=tuple(EvaluatedModel(label=label, name=label) for label in models),
        measured=tuple(measured),
        differences=tuple(differences(found)),
        missing={},
        resamples=resamples,
        seed=seed,
        seconds=clock.seconds["total"],
        environment=describe_environment("cpu"),
    )


def _outcomes(
    peer: Peer | None,
    pairs: EmbeddedPairs,
    source: str,
    tasks: Sequence[Task],
    bootstrap: Bootstrap,
    first: Mapping[str, Outcome],
) -> dict[str, Outcome]:
    if peer is not None:
        if not peer.returns_unit:
            raise DataError(
                f"{peer.name}: {_NO_UNIT} Compare it with `clip-refine vectors compare --peers "
                f"{peer.name}`, or `compare` of a model."
            )
        try:
            moved = (
                peer.transform_image(pairs.image_features),
                peer.transform_text(pairs.text_features),
            )
        except ValueError as error:
            raise DataError(f"{source}: {peer.name} cannot be applied. {error}.") from error
        pairs = EmbeddedPairs(*moved, pairs.text_to_image)
    sides = (pairs.image_features, pairs.text_features, pairs.text_to_image, torch.zeros(0))
    try:
        return {
            task.kind: measure_task(
                task, SourceFeatures(*sides, first=first.get(task.kind)), bootstrap=bootstrap
            )
            for task in tasks
        }
    except ValueError as error:
        raise DataError(f"{source}: {error}.") from error


def _tasks(pairs: EmbeddedPairs, *, clusters: bool) -> list[Task]:
    """What stored pairs are measured by: the last three only where there is enough of them."""
    all_captions = {"protocol": "all-captions"}
    images, dim = pairs.image_features.shape
    enough = images >= FEW and dim >= 4  # storage looks at a quarter of the dimensions
    settings = {
        "geometry": {},
        **dict.fromkeys(("retrieval", "mixed-search", "separation"), all_captions),
    }
    if enough:
        settings |= {"mixed-documents": {}, "storage": all_captions}
    if enough and clusters:
        settings["pair-clustering"] = {}
    return TypeAdapter(list[Task]).validate_python(
        [{"kind": kind, "source": "", **more} for kind, more in settings.items()]
    )


# --------------------------------------------------------------------------------------------------
# `vectors align`: a new model's vectors into an old index's space.


def align_vectors(old: Path, new: Path, out: Path, *, overwrite: bool = False) -> Procrustes:
    """Fit the rotation that brings a new model's vectors into an old index's space, row by row.

    Args:
        old: Vectors of some items in the old index: `.npy`, or pairs as for `evaluate`.
        new: The same items, in order, of the new model.
        out: Folder for the map.
        overwrite: Replace `out`.

    Raises:
        ClipRefineError: Files that cannot be read, hold other counts, or `out` that exists.
    """
    check_free(out, overwrite=overwrite)
    sides = [_all_rows(path) for path in (old, new)]
    try:
        aligned = Procrustes.align(*sides)
    except ValueError as error:
        raise DataError(f"{old} and {new}: {error}.") from error
    order = torch.randperm(len(sides[0]), generator=torch.Generator().manual_seed(0))
    unseen, others = order[: len(order) // 10], order[len(order) // 10 :]
    if len(unseen) >= FEW:
        tried = Procrustes.align(*(side[others] for side in sides))
        on = f"that a map of the other {len(others):,} has not seen; the saved one is of all"
    else:
        tried, unseen = aligned, order
        on = "of the fit, too few to keep any aside, so others fit worse"
    was = unit_rows("old features", sides[0][unseen])
    found = float((tried.transform_image(sides[1][unseen]) * was).sum(dim=1).mean())
    save_peer(aligned, out, overwrite=overwrite)
    remark(
        f"Mean cosine of an item's old vector and its new one, mapped: {found:.3f}, on "
        f"{len(unseen):,} items {on}."
    )
    return aligned


def _all_rows(path: Path) -> Tensor:
    if path.suffix == ".npy":
        check_sums(path)
        return open_npy(path).read()
    found = read_pairs(str(path))
    return torch.cat([found.image_features, found.text_features])
