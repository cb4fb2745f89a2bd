"""2. Student and teacher."""

from clip_refine.models.dual_encoder import DualEncoder, check_dual_encoder
from clip_refine.models.factory import call_factory
from clip_refine.models.feature_scale import FeatureScale, RawNorms
from clip_refine.models.open_clip_encoder import OpenClipEncoder
from clip_refine.models.open_clip_loading import load_open_clip, load_weights_file
from clip_refine.models.teacher import Teacher
from clip_refine.models.transformers_encoder import TransformersEncoder
from clip_refine.models.transformers_loading import load_transformers

__all__ = [
    "DualEncoder",
    "FeatureScale",
    "OpenClipEncoder",
    "RawNorms",
    "Teacher",
    "TransformersEncoder",
    "call_factory",
    "check_dual_encoder",
    "load_open_clip",
    "load_transformers",
    "load_weights_file",
]
