"""Weights, settings and tokenizers between open_clip and Transformers, as pure functions."""

from clip_refine.exchange.clip import clip_to_open_clip, clip_to_transformers
from clip_refine.exchange.links import Converted
from clip_refine.exchange.siglip import is_siglip, siglip_to_transformers

__all__ = [
    "Converted",
    "clip_to_open_clip",
    "clip_to_transformers",
    "is_siglip",
    "siglip_to_transformers",
]
