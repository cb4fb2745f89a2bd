"""Measuring a model as it stands: the numbers that a refinement takes before and after."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from clip_refine.config import EvaluateConfig, RefineConfig, load_config, refuse_idle
from clip_refine.data import ImageCaptions, Stream
from clip_refine.data.pairs import GivenPairs, image_groups, pairs_fingerprint
from clip_refine.data.sources import TOY, absolute_source, split_name
from clip_refine.evaluation import score_model
from clip_refine.evaluation.scores import embed_tasks, score_tasks
from clip_refine.evaluation.separation import fit_probability, nonsense
from clip_refine.models import DualEncoder
from clip_refine.models.embed import embed_pairs
from clip_refine.results import Scores
from clip_refine.roads import build
from clip_refine.saving import read_provenance
from clip_refine.support.console import quietly, remark
from clip_refine.support.errors import ClipRefineError, ConfigError, DataError
from clip_refine.support.folder import check_free, write_file
from clip_refine.vectors.files import FeatureSet, check_features_path, write_features


def evaluate(
    config: EvaluateConfig,
    *,
    model: DualEncoder | None = None,
    held_out: GivenPairs | None = None,
) -> Scores:
    """Measure a model as it stands: the same numbers as before and after a refinement.

    With zero-shot tasks and no pairs only the tasks; geometry and retrieval are empty then.

    Args:
        config: Every setting.
        model: Measured instead of loading `config.model`.
        held_out: In place of `config.data.val`: a list of (image or path, caption or
            captions), a `datasets.Dataset`, or an object that fits `ImageCaptions`.

    Returns:
        Geometry, retrieval and zero-shot scores.

    Raises:
        ClipRefineError: Bad settings, data or model, or an output file that exists.
    """
    if config.suite is not None:
        raise ConfigError("suite: call evaluate_suite for it.")
    refuse_idle(config)
    for path in (config.out, config.save_threshold):
        if path is not None:
            check_free(path, overwrite=config.overwrite, folder=False)
    if config.save_features is not None:
        check_features_path(config.save_features, overwrite=config.overwrite)
    accelerator = build.build_accelerator(config.device)
    build.check_model(config.model, model)
    tasks = build.build_tasks(config.evaluation, links=config.data.allow_outside)
    named = config.data.val is not None or bool(config.data.sources)
    tasks_alone = bool(tasks) and held_out is None and not named
    for name in ("save_features", "save_threshold"):
        if tasks_alone and getattr(config, name) is not None:
            raise ConfigError(f"{name}: there are no pairs to save. Give them: --data.val")
    given = (
        [] if tasks_alone else [build.build_held_out(config.data, seed=config.seed, given=held_out)]
    )
    encoder = model or build.build_model(config.model)
    build.warn_of_marks(encoder, *given)
    if given and model is None:
        _warn_of_trained_on(config, given[0])
    reader = build.build_reader(config.data, encoder, [*given, *tasks], workers=config.workers)
    embedder = build.build_embedder(encoder, accelerator, config.evaluation, config.workers, reader)
    pairs = embed_pairs(embedder, given[0]) if given else None
    if pairs is None:
        features = embed_tasks(embedder, tasks)
        scores = Scores(
            zero_shot=score_tasks(features), geometry={}, retrieval={}, pairs=0, captions=0
        )
    else:
        scores = score_model(embedder, given[0], tasks, seed=config.seed, pairs=pairs)
    noise = embedder.texts(nonsense(), "Encoding nonsense") if config.save_threshold else None
    if not accelerator.is_main_process:
        return scores
    if config.out is not None:
        write_file(config.out, scores.text)
    if config.save_features is not None and pairs is not None:
        features = FeatureSet(pairs.image_features, pairs.text_features, pairs.text_to_image)
        note = {"model": config.model.name}
        write_features(config.save_features, features, note=note, overwrite=config.overwrite)
    if config.save_threshold is not None and pairs is not None:
        try:
            found = fit_probability(
                pairs.image_features,
                pairs.text_features,
                pairs.text_to_image,
                precision=config.precision,
                false_positive_rate=config.false_positive_rate,
                seed=config.seed,
                nonsense_features=noise,
            )
        except ValueError as error:
            raise DataError(f"{given[0].name}: save_threshold: {error}.") from error
        write_file(config.save_threshold, found.text)
    return scores


def _warn_of_trained_on(config: EvaluateConfig, pairs: ImageCaptions) -> None:
    """Say how many of the pairs the model was trained on, as far as its folder tells."""
    model = config.model
    folder = Path(model.place if model.factory else build.model_source(model.name)[1])
    if folder.is_dir() and (shared := _trained_on(folder, config, pairs)):
        remark(
            f"Beware: {config.model.name} was trained on {len(shared):,} of these {len(pairs):,} "
            f"images, so these are no held-out scores. The first: {pairs.image_name(shared[0])}. "
            "A run's scores.json has held-out ones; else give pairs of their own.",
            "yellow",
        )


def _trained_on(folder: Path, config: EvaluateConfig, pairs: ImageCaptions) -> Sequence[int]:
    """Positions of the pairs that a saved model was trained on.

    All where its provenance has their fingerprint; where its run's settings name their source,
    those that are in the part of it which was not held out.
    """
    known = {
        made.train.fingerprint
        for place in (folder, folder / "model")
        if (made := read_provenance(place)) and made.train
    }
    if known and pairs_fingerprint(pairs) in known:
        return range(len(pairs))
    named = [config.data.val] if config.data.val else config.data.sources
    measured = {split_name(absolute_source(name))[0] for name in named} - {TOY}
    for place in (folder, folder.parent):
        with suppress(ClipRefineError), quietly():  # of a version or on a machine that is gone
            run = load_config(RefineConfig, place / "config.yaml")
            if measured.isdisjoint(split_name(absolute_source(n))[0] for n in run.data.sources):
                continue
            listed = run.data.model_copy(update={"streaming": False})
            trained, _ = build.build_data(listed, seed=run.seed)
            if isinstance(trained, Stream):
                continue
            held, used = image_groups(pairs, trained)
            among = set(used)
            return [index for index, group in enumerate(held) if group in among]
    return ()
