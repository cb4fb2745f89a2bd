"""2. Student and teacher."""

from clip_refine.models.encoder import DualEncoder, Teacher, call_factory, check_dual_encoder
from clip_refine.models.open_clip import OpenClipEncoder, load_open_clip, load_weights_file
from clip_refine.models.transformers import TransformersEncoder, load_transformers
from clip_refine.models.weights import FeatureScale, RawNorms

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
