"""2. Student and teacher."""

from clip_refine.models.dual_encoder import DualEncoder
from clip_refine.models.feature_scale import FeatureScale, RawNorms
from clip_refine.models.open_clip_encoder import OpenClipEncoder, load_open_clip
from clip_refine.models.teacher import Teacher

__all__ = [
    "DualEncoder",
    "FeatureScale",
    "OpenClipEncoder",
    "RawNorms",
    "Teacher",
    "load_open_clip",
]
