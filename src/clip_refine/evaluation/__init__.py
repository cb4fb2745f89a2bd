"""6. Frozen features → numbers."""

from clip_refine.evaluation.classify import (
    class_vectors,
    confusion_pairs,
    expected_calibration_error,
    linear_probe,
    per_class_recall,
    zero_shot_predictions,
    zero_shot_scores,
)
from clip_refine.evaluation.geometry import geometry
from clip_refine.evaluation.retrieval import mixed_search, retrieval
from clip_refine.evaluation.scores import score_model
from clip_refine.evaluation.separation import separation
from clip_refine.models.embed import Embedder

__all__ = [
    "Embedder",
    "class_vectors",
    "confusion_pairs",
    "expected_calibration_error",
    "geometry",
    "linear_probe",
    "mixed_search",
    "per_class_recall",
    "retrieval",
    "score_model",
    "separation",
    "zero_shot_predictions",
    "zero_shot_scores",
]
