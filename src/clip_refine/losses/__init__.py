"""Pure functions of tensors, and the weighted sum that a recipe is."""

from clip_refine.losses.alignment import (
    RafaReduction,
    alignment_loss,
    centroid_uniformity_loss,
    covariance_loss,
    rafa_loss,
)
from clip_refine.losses.matching import (
    contrastive_loss,
    feature_distillation_loss,
    geodesic_mix,
    hybrid_targets,
    hycd_loss,
    logit_distillation_loss,
    m2_mix_loss,
    sigmoid_contrastive_loss,
)
from clip_refine.losses.objective import LossTerms, Objective, PairFeatures

__all__ = [
    "LossTerms",
    "Objective",
    "PairFeatures",
    "RafaReduction",
    "alignment_loss",
    "centroid_uniformity_loss",
    "contrastive_loss",
    "covariance_loss",
    "feature_distillation_loss",
    "geodesic_mix",
    "hybrid_targets",
    "hycd_loss",
    "logit_distillation_loss",
    "m2_mix_loss",
    "rafa_loss",
    "sigmoid_contrastive_loss",
]
