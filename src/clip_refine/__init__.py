"""Post-pre-training for CLIP-style models: a smaller modality gap, nothing forgotten."""

import inspect
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_refine.config import EvaluateConfig, RefineConfig
    from clip_refine.config.runs import CompareConfig
    from clip_refine.models import DualEncoder, load_open_clip
    from clip_refine.results import Comparison, RunScores, Scores, SuiteScores
    from clip_refine.roads.check import check_data
    from clip_refine.roads.compare import compare
    from clip_refine.roads.evaluate import evaluate
    from clip_refine.roads.refine import refine
    from clip_refine.roads.suites import evaluate_suite
    from clip_refine.support.errors import ClipRefineError

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
    "ClipRefineError": "support.errors",
    "CompareConfig": "config.runs",
    "Comparison": "results",
    "DualEncoder": "models",
    "EvaluateConfig": "config",
    "RefineConfig": "config",
    "RunScores": "results",
    "Scores": "results",
    "SuiteScores": "results",
    "check_data": "roads.check",
    "compare": "roads.compare",
    "evaluate": "roads.evaluate",
    "evaluate_suite": "roads.suites",
    "load_open_clip": "models",
    "refine": "roads.refine",
}


def __getattr__(name: str) -> Any:
    # Looked up when first used, so that `clip-refine --help` need not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if _HOMES[name].startswith("roads."):
        found = _in_python(found)
    return globals().setdefault(name, found)


def _in_python(road: Callable[..., Any]) -> Callable[..., Any]:
    """The road with settings of another kind refused, and errors that call them as in Python."""
    from clip_refine.support.errors import ClipRefineError, ConfigError, in_python

    signature = inspect.signature(road)

    @wraps(road)
    def call(*given: Any, **named: Any) -> Any:
        settings = signature.bind(*given, **named).arguments
        config, kind = settings.get("config"), signature.parameters["config"].annotation
        if "config" in settings and not isinstance(config, kind):
            raise ConfigError(
                f"the settings are of type {type(config).__name__}; {road.__name__} takes a "
                f"{kind.__name__}. Call {road.__name__}({kind.__name__}(**settings))."
            )
        try:
            return road(*given, **named)
        except ClipRefineError as error:
            error.args = tuple(in_python(str(said)) for said in error.args)
            raise

    call.__module__ = __name__  # where pickle finds it, for processes that are spawned
    return call
