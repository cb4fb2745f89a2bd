"""One model, held-out pairs and labelled images → all the numbers."""

from collections.abc import Sequence

import torch

from clip_refine.data import ImageCaptions, LabelledImages
from clip_refine.evaluation.embed import EmbeddedPairs, Embedder, embed_pairs, embed_prompts
from clip_refine.evaluation.geometry import geometry
from clip_refine.evaluation.retrieval import retrieval
from clip_refine.evaluation.zero_shot import class_vectors, zero_shot_scores
from clip_refine.results import Scores


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
    pairs = pairs or embed_pairs(embedder, held_out)
    return Scores(
        geometry=geometry(pairs.image_features, pairs.first_caption_features, seed=seed),
        retrieval=retrieval(pairs.image_features, pairs.text_features, pairs.text_to_image),
        zero_shot={task.name: _zero_shot(embedder, task) for task in tasks},
        pairs=len(held_out),
        captions=len(pairs.text_features),
    )


def _zero_shot(embedder: Embedder, task: LabelledImages) -> dict[str, float]:
    prompt_features = embed_prompts(embedder, task.class_names, task.templates)
    image_features = embedder.images(task, f"Encoding {task.name}")
    return zero_shot_scores(
        image_features, class_vectors(prompt_features), torch.tensor(task.labels)
    )
