"""6. Frozen features → numbers."""

from clip_refine.evaluation.embed import Embedder
from clip_refine.evaluation.geometry import geometry
from clip_refine.evaluation.probe import linear_probe
from clip_refine.evaluation.retrieval import retrieval
from clip_refine.evaluation.scores import score_model
from clip_refine.evaluation.zero_shot import class_vectors, zero_shot_scores

__all__ = [
    "Embedder",
    "class_vectors",
    "geometry",
    "linear_probe",
    "retrieval",
    "score_model",
    "zero_shot_scores",
]
