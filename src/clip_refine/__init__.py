"""Post-pre-training for CLIP-style models: a smaller modality gap, nothing forgotten."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_refine.compare_config import CompareConfig
    from clip_refine.comparison import compare
    from clip_refine.config import EvaluateConfig, RefineConfig
    from clip_refine.data_check import check_data
    from clip_refine.errors import ClipRefineError
    from clip_refine.measure import evaluate
    from clip_refine.models import DualEncoder, load_open_clip
    from clip_refine.results import Comparison, RunScores, Scores
    from clip_refine.road import refine
    from clip_refine.suite_results import SuiteScores
    from clip_refine.suites import evaluate_suite

__version__ = "0.1.0"

__all__ = [
    "ClipRefineError",
    "CompareConfig",
    "Comparison",
    "DualEncoder",
    "EvaluateConfig",
    "RefineConfig",
    "RunScores",
    "Scores",
    "SuiteScores",
    "check_data",
    "compare",
    "evaluate",
    "evaluate_suite",
    "load_open_clip",
    "refine",
]

_HOMES = {
    "ClipRefineError": "errors",
    "CompareConfig": "compare_config",
    "Comparison": "results",
    "DualEncoder": "models",
    "EvaluateConfig": "config",
    "RefineConfig": "config",
    "RunScores": "results",
    "Scores": "results",
    "SuiteScores": "suite_results",
    "check_data": "data_check",
    "compare": "comparison",
    "evaluate": "measure",
    "evaluate_suite": "suites",
    "load_open_clip": "models",
    "refine": "road",
}


def __getattr__(name: str) -> Any:
    # Looked up when first used, so that `clip-refine --help` need not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
