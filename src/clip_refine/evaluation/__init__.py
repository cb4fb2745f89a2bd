"""6. Frozen features → numbers."""

from clip_refine.evaluation.confusion import (
    confusion_pairs,
    expected_calibration_error,
    per_class_recall,
    zero_shot_predictions,
)
from clip_refine.evaluation.embed import Embedder
from clip_refine.evaluation.geometry import geometry
from clip_refine.evaluation.mixed_search import mixed_search
from clip_refine.evaluation.probe import linear_probe
from clip_refine.evaluation.retrieval import retrieval
from clip_refine.evaluation.scores import score_model
from clip_refine.evaluation.separation import separation
from clip_refine.evaluation.zero_shot import class_vectors, zero_shot_scores

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
