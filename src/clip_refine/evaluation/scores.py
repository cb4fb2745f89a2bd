"""One model, held-out pairs and labelled images → all the numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_refine.data import ImageCaptions, LabelledImages
from clip_refine.evaluation.embed import EmbeddedPairs, Embedder, embed_pairs, embed_prompts
from clip_refine.evaluation.geometry import geometry
from clip_refine.evaluation.probe import linear_probe
from clip_refine.evaluation.retrieval import retrieval
from clip_refine.evaluation.zero_shot import class_vectors, zero_shot_scores
from clip_refine.results import Scores


@dataclass(frozen=True, eq=False)
class TaskFeatures:
    """What a model makes of a zero-shot task.

    Attributes:
        name: The task.
        image_features: (N, d).
        class_features: (C, d), from `class_vectors`.
        labels: (N,) int64, the class of each image.
    """

    name: str
    image_features: Tensor
    class_features: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class ModelFeatures:
    """What a model makes of everything it is scored on; a peer may have transformed it.

    Attributes:
        pairs: The held-out pairs.
        tasks: The zero-shot tasks.
        normalize: Whether similarity is the cosine, or the dot product of features as they are.
        dim: Columns that are a place in the space; those behind them only add to scores.
    """

    pairs: EmbeddedPairs
    tasks: Sequence[TaskFeatures]
    normalize: bool = True
    dim: int | None = None


def score_model(
    embedder: Embedder,
    held_out: ImageCaptions,
    tasks: Sequence[LabelledImages],
    *,
    seed: int,
    pairs: EmbeddedPairs | None = None,
) -> Scores:
    """Geometry and retrieval on the held-out pairs, zero-shot classification on each task.

    Geometry takes each image with its first caption; retrieval takes all captions.

    Args:
        embedder: The model to score.
        held_out: Pairs that were not trained on.
        tasks: May be empty.
        seed: Of the split that `linear_separability` is measured with.
        pairs: The features of `held_out`, where they are at hand already.
    """
    return score_features(embed_model(embedder, held_out, tasks, pairs=pairs), seed=seed)


def embed_model(
    embedder: Embedder,
    held_out: ImageCaptions,
    tasks: Sequence[LabelledImages],
    *,
    pairs: EmbeddedPairs | None = None,
) -> ModelFeatures:
    """Encode everything that the numbers are taken from once; arguments as in `score_model`."""
    return ModelFeatures(
        pairs or embed_pairs(embedder, held_out), [_embed_task(embedder, task) for task in tasks]
    )


def score_features(features: ModelFeatures, *, seed: int) -> Scores:
    """All the numbers of `score_model` from features that are at hand."""
    pairs, normalize = features.pairs, features.normalize
    return Scores(
        geometry=geometry(
            pairs.image_features[:, : features.dim],
            pairs.first_caption_features[:, : features.dim],
            seed=seed,
        ),
        retrieval=retrieval(
            pairs.image_features, pairs.text_features, pairs.text_to_image, normalize=normalize
        ),
        zero_shot={
            task.name: zero_shot_scores(
                task.image_features, task.class_features, task.labels, normalize=normalize
            )
            for task in features.tasks
        },
        pairs=len(pairs.image_features),
        captions=len(pairs.text_features),
    )


def probe_features(features: ModelFeatures, *, seed: int) -> dict[str, float]:
    """Task name → accuracy of a linear probe on its images."""
    return {
        task.name: linear_probe(task.image_features[:, : features.dim], task.labels, seed=seed)
        for task in features.tasks
    }


def _embed_task(embedder: Embedder, task: LabelledImages) -> TaskFeatures:
    prompt_features = embed_prompts(embedder, task.class_names, task.templates)
    return TaskFeatures(
        task.name,
        embedder.images(task, f"Encoding {task.name}"),
        class_vectors(prompt_features),
        torch.tensor(task.labels),
    )
