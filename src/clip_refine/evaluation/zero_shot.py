"""Classifying images by the captions of the classes, without an example of any."""

import torch
from torch import Tensor

from clip_refine.evaluation.chunks import (
    CHUNK_SIZE,
    best_partner,
    longest_row,
    measured,
    row_blocks,
    tie_width,
    unit_rows,
    unit_sides,
)


@measured
def class_vectors(prompt_features: Tensor) -> Tensor:
    """One unit vector a class from the features of its prompts.

    w_c = normalise(1/T Σ_t normalise(prompt_ct)), as in Radford et al., ICML 2021,
    arXiv 2103.00020, section 3.1.4 (ensembling over embedding space).

    Args:
        prompt_features: (C, T, d), raw or unit: C classes in T templates.

    Returns:
        (C, d), rows of norm 1.

    Raises:
        ValueError: If the shape is another, a prompt is zero or not finite, or the prompts of a
            class cancel.

    Example:
        >>> class_vectors(torch.tensor([[[3.0, 0.0], [0.0, 0.5]]]))
        tensor([[0.7071, 0.7071]])
    """
    if prompt_features.ndim != 3:
        raise ValueError(
            f"prompt features must be (classes, templates, dim), got {tuple(prompt_features.shape)}"
        )
    class_count, template_count, dim = prompt_features.shape
    prompts = unit_rows("prompt features", prompt_features.reshape(-1, dim))
    means = prompts.reshape(class_count, template_count, dim).mean(dim=1)
    return unit_rows("mean of a class's prompts", means)


@measured
def zero_shot_scores(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    *,
    normalize: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """How often the true class is the nearest, or among the nearest five.

    Of equally similar classes (nearer than rounding) the lower index stands first. Higher is
    better.

    Args:
        image_features: (N, d), raw or unit.
        class_features: (C, d), raw or unit, for example from `class_vectors`.
        labels: (N,) whole numbers, the true class of each image.
        normalize: Whether similarity is the cosine; if not, the dot product of features as given,
            for transforms whose lengths mean something.
        chunk_size: Images compared at once; bounds the memory, not the result.

    Returns:
        `top1`; `top5`, with fewer than five classes necessarily 1; `mean_per_class_recall`, top1
        within each class that has images, averaged over those classes. All in 0–1.

    Raises:
        ValueError: If shapes do not fit, a label names no class, or a row is zero or not finite.

    Example:
        Class 0: one of two images right; class 1: its one image right.

        >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> scores = zero_shot_scores(image, torch.eye(2), torch.tensor([0, 0, 1]))
        >>> {name: round(score, 3) for name, score in scores.items()}
        {'top1': 0.667, 'top5': 1.0, 'mean_per_class_recall': 0.75}
    """
    ranks = zero_shot_ranks(
        image_features, class_features, labels, normalize=normalize, chunk_size=chunk_size
    )
    labels = labels.to(ranks.device).long()
    is_top = (ranks == 0).double()
    images_per_class = labels.bincount(minlength=len(class_features))
    hits_per_class = labels.bincount(weights=is_top, minlength=len(class_features))
    seen = images_per_class > 0
    return {
        "top1": is_top.mean().item(),
        "top5": (ranks < 5).double().mean().item(),
        "mean_per_class_recall": (hits_per_class[seen] / images_per_class[seen]).mean().item(),
    }


@measured
def zero_shot_ranks(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    *,
    normalize: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """(N,) 0-based rank of each image's true class among all classes; 0 is a hit.

    Arguments and errors as in `zero_shot_scores`.

    Example:
        >>> zero_shot_ranks(torch.eye(2), torch.eye(2), torch.tensor([0, 0])).tolist()
        [0, 1]
    """
    images, classes = unit_sides(image_features, class_features, names=("image", "class"))
    labels = _checked_labels(labels, images, classes)
    tie = tie_width(images.dtype)
    if not normalize:
        images, classes = image_features.to(images), class_features.to(classes)
        tie *= longest_row(images) * longest_row(classes)
    return torch.cat(
        [
            best_partner(images[rows] @ classes.T, labels[rows, None], tie=tie).rank
            for rows in row_blocks(len(images), chunk_size)
        ]
    )


def _checked_labels(labels: Tensor, image_unit: Tensor, class_unit: Tensor) -> Tensor:
    if labels.shape != (len(image_unit),) or labels.is_floating_point():
        raise ValueError(
            f"labels must be ({len(image_unit)},) whole numbers, one an image; "
            f"got {tuple(labels.shape)} of {labels.dtype}"
        )
    if labels.min() < 0 or labels.max() >= len(class_unit):
        raise ValueError(
            f"labels must be from 0 to {len(class_unit) - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    return labels.to(image_unit.device).long()
