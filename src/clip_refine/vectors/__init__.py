"""Vectors that are stored already: the verbs of `clip-refine vectors` from Python, and files."""

from typing import TYPE_CHECKING, Any

from clip_refine import look_up

if TYPE_CHECKING:
    from clip_refine.config.runs import VectorsConfig
    from clip_refine.roads.vector_maps import compare_vectors as compare
    from clip_refine.roads.vector_maps import fold_vectors as fold
    from clip_refine.roads.vector_maps import isoclip_maps as isoclip
    from clip_refine.roads.vector_maps import refine_vectors as refine
    from clip_refine.roads.vectors import align_vectors as align
    from clip_refine.roads.vectors import evaluate_vectors as evaluate
    from clip_refine.vectors.files import FeatureSet
    from clip_refine.vectors.files import load_peer as load
    from clip_refine.vectors.stored import apply_stored as apply
    from clip_refine.vectors.stored import read_pairs as read

__all__ = [
    "FeatureSet",
    "VectorsConfig",
    "align",
    "apply",
    "compare",
    "evaluate",
    "fold",
    "isoclip",
    "load",
    "read",
    "refine",
]

_HOMES = {
    "FeatureSet": "vectors.files",
    "VectorsConfig": "config.runs",
    "align": "roads.vectors:align_vectors",
    "apply": "vectors.stored:apply_stored",
    "compare": "roads.vector_maps:compare_vectors",
    "evaluate": "roads.vectors:evaluate_vectors",
    "fold": "roads.vector_maps:fold_vectors",
    "isoclip": "roads.vector_maps:isoclip_maps",
    "load": "vectors.files:load_peer",
    "read": "vectors.stored:read_pairs",
    "refine": "roads.vector_maps:refine_vectors",
}


def __getattr__(name: str) -> Any:
    return globals().setdefault(name, look_up(name, __name__, _HOMES))
