"""Post-pre-training for CLIP-style models: a smaller modality gap, nothing forgotten."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_refine.config import EvaluateConfig, RefineConfig
    from clip_refine.config.runs import CompareConfig, TuneConfig
    from clip_refine.models import DualEncoder, load_open_clip
    from clip_refine.results import Comparison, RunScores, Scores, SuiteScores, Tuned
    from clip_refine.roads.check import check_data
    from clip_refine.roads.compare import compare
    from clip_refine.roads.evaluate import evaluate
    from clip_refine.roads.refine import refine
    from clip_refine.roads.suites import evaluate_suite
    from clip_refine.roads.tune import tune
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
    "TuneConfig",
    "Tuned",
    "check_data",
    "compare",
    "evaluate",
    "evaluate_suite",
    "load_open_clip",
    "refine",
    "tune",
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
    "TuneConfig": "config.runs",
    "Tuned": "results",
    "check_data": "roads.check",
    "compare": "roads.compare",
    "evaluate": "roads.evaluate",
    "evaluate_suite": "roads.suites",
    "load_open_clip": "models",
    "refine": "roads.refine",
    "tune": "roads.tune",
}


def __getattr__(name: str) -> Any:
    return globals().setdefault(name, look_up(name, __name__, _HOMES))


def look_up(name: str, room: str, homes: Mapping[str, str]) -> Any:
    """What a public name of a room stands for: `homes` has files, and names there that differ.

    Looked up when first used, so that `clip-refine --help` need not wait for torch.
    """
    if name not in homes:
        raise AttributeError(f"module {room!r} has no attribute {name!r}")
    home, _, own_name = homes[name].partition(":")
    found = getattr(import_module(f"clip_refine.{home}"), own_name or name)
    if not inspect.isfunction(found):
        return found
    found = _in_python(found, name)
    found.__module__, found.__qualname__ = room, name  # where pickle finds it, to spawn processes
    return found


def _in_python(road: Callable[..., Any], name: str) -> Callable[..., Any]:
    """With settings of another kind refused, paths as text, and errors that speak as Python."""
    from clip_refine.support.errors import ClipRefineError, ConfigError, in_python

    signature = inspect.signature(road)

    @wraps(road)
    def call(*given: Any, **named: Any) -> Any:
        settings = signature.bind(*given, **named)
        for argument, value in settings.arguments.items():
            kind = signature.parameters[argument].annotation
            if argument == "config" and not isinstance(value, kind):
                raise ConfigError(
                    f"the settings are of type {type(value).__name__}; {name} takes a "
                    f"{kind.__name__}. Call {name}({kind.__name__}(**settings))."
                )
            if isinstance(value, str) and kind in (Path, Path | None):
                settings.arguments[argument] = Path(value)
        try:
            return road(*settings.args, **settings.kwargs)
        except ClipRefineError as error:
            error.args = tuple(in_python(str(said)) for said in error.args)
            raise

    return call
