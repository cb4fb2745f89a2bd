"""Measuring a model as it stands: the numbers that a refinement takes before and after."""

from torch import nn

from clip_refine.config import EvaluateConfig, refuse_idle
from clip_refine.evaluation import Embedder, score_model
from clip_refine.evaluation.scores import embed_tasks, score_tasks
from clip_refine.evaluation.threshold import fit_probability, nonsense
from clip_refine.models import DualEncoder
from clip_refine.models.embed import embed_pairs
from clip_refine.results import Scores
from clip_refine.roads import build
from clip_refine.support.errors import ConfigError, DataError
from clip_refine.support.folder import check_free, write_file
from clip_refine.vectors.files import FeatureSet, check_features_path, write_features


def evaluate(config: EvaluateConfig, *, model: DualEncoder | None = None) -> Scores:
    """Measure a model as it stands: the same numbers as before and after a refinement.

    With zero-shot tasks and no pairs only the tasks; geometry and retrieval are empty then.

    Args:
        config: Every setting.
        model: Measured instead of loading `config.model`.

    Raises:
        ClipRefineError: Bad settings, data or model, or an output file that exists.
    """
    if config.suite is not None:
        raise ConfigError("suite: call evaluate_suite for it.")
    refuse_idle(config)
    if config.out is not None:
        check_free(config.out, overwrite=config.overwrite, folder=False)
    if config.save_threshold is not None:
        check_free(config.save_threshold, overwrite=config.overwrite, folder=False)
    if config.save_features is not None:
        check_features_path(config.save_features, overwrite=config.overwrite)
    accelerator = build.build_accelerator(config.device)
    device = accelerator.device
    tasks = build.build_tasks(config.evaluation, links=config.data.allow_outside)
    tasks_alone = bool(tasks) and config.data.val is None and not config.data.sources
    for name in ("save_features", "save_threshold"):
        if tasks_alone and getattr(config, name) is not None:
            raise ConfigError(f"{name}: there are no pairs to save. Give them: --data.val")
    held_out = [] if tasks_alone else [build.build_held_out(config.data, seed=config.seed)]
    encoder = model or build.build_model(config.model)
    build.warn_of_marks(encoder, *held_out)
    if isinstance(encoder, nn.Module):
        encoder.float().eval().to(device)
    workers = build.count_workers(config.workers, device)
    reader = build.build_reader(config.data, encoder, [*held_out, *tasks], workers=config.workers)
    batch_size = config.evaluation.batch_size
    embedder = Embedder(encoder, device, batch_size, workers, reader=reader)
    pairs = embed_pairs(embedder, held_out[0]) if held_out else None
    if pairs is None:
        features = embed_tasks(embedder, tasks)
        scores = Scores(
            zero_shot=score_tasks(features), geometry={}, retrieval={}, pairs=0, captions=0
        )
    else:
        scores = score_model(embedder, held_out[0], tasks, seed=config.seed, pairs=pairs)
    if config.out is not None and accelerator.is_main_process:
        write_file(config.out, scores.text)
    if config.save_features is not None and pairs is not None and accelerator.is_main_process:
        features = FeatureSet(pairs.image_features, pairs.text_features, pairs.text_to_image)
        note = {"model": config.model.name}
        write_features(config.save_features, features, note=note, overwrite=config.overwrite)
    if config.save_threshold is not None and pairs is not None and accelerator.is_main_process:
        try:
            found = fit_probability(
                pairs.image_features,
                pairs.text_features,
                pairs.text_to_image,
                precision=config.precision,
                false_positive_rate=config.false_positive_rate,
                seed=config.seed,
                nonsense_features=embedder.texts(nonsense(), "Encoding nonsense"),
            )
        except ValueError as error:
            raise DataError(f"{held_out[0].name}: save_threshold: {error}.") from error
        write_file(config.save_threshold, found.text)
    return scores
