"""A task of a suite on features that a test makes."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from clip_refine.config.suites import Task
from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.scores import Outcome
from clip_refine.evaluation.tasks import SourceFeatures, measure_task
from clip_refine.models.embed import EmbeddedPairs

NONE = torch.empty(0, dtype=torch.int64)


def task_on_pairs(kind: str, pairs: EmbeddedPairs, drawn: Bootstrap, **settings: Any) -> Outcome:
    """Images with their captions."""
    task = TypeAdapter(Task).validate_python({"kind": kind, "source": "?", **settings})
    sides = pairs.image_features, pairs.text_features, pairs.text_to_image
    return measure_task(task, SourceFeatures(*sides, NONE), bootstrap=drawn)


def task_on_classes(
    kind: str,
    images: Tensor,
    labels: Tensor,
    drawn: Bootstrap,
    *,
    prompts: Tensor | None = None,
    class_names: Sequence[str] = (),
    logit_scale: float = 100.0,
    training: tuple[Tensor, Tensor] | None = None,
    **settings: Any,
) -> Outcome:
    """Images with classes, and what names those."""
    task = TypeAdapter(Task).validate_python({"kind": kind, "source": "?", **settings})
    source = SourceFeatures(
        images,
        images[:0] if prompts is None else prompts,
        NONE,
        labels,
        class_names=class_names,
        logit_scale=logit_scale,
        training=training,
    )
    return measure_task(task, source, bootstrap=drawn)


def task_on_layout(
    kind: str, images: Tensor, texts: Tensor, layout: Any, drawn: Bootstrap, **settings: Any
) -> Outcome:
    """Images and texts of a benchmark."""
    task = TypeAdapter(Task).validate_python({"kind": kind, "source": "?", **settings})
    found = SourceFeatures(images, texts, NONE, NONE, layout=layout)
    return measure_task(task, found, bootstrap=drawn)
