"""The public names and signatures as a whole: `api.txt` is the record.

After a deliberate change run this file with `UPDATE_SNAPSHOTS=1` and read the difference.
"""

import importlib
import inspect
import os
import pickle
from pathlib import Path

RECORD = Path(__file__).parent / "api.txt"
ROOMS = (
    "clip_refine",
    "clip_refine.config",
    "clip_refine.data",
    "clip_refine.models",
    "clip_refine.priors",
    "clip_refine.losses",
    "clip_refine.train",
    "clip_refine.evaluation",
    "clip_refine.vectors",
    "clip_refine.results",
    "clip_refine.toy",
)


def public_names(room: str) -> list[str]:
    module = importlib.import_module(room)
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == room
    ]
    return sorted(names)


def signature(value: object) -> str:
    if inspect.isclass(value) and hasattr(value, "model_fields"):
        return "(" + ", ".join(value.model_fields) + ")"
    try:
        parameters = inspect.signature(value).parameters.values()  # pyright: ignore
    except (TypeError, ValueError):
        return ""
    shown, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        shown.append(parameter.name + default)
    return "(" + ", ".join(shown) + ")"


def test_public_names_and_signatures():
    lines = []
    for room in ROOMS:
        module = importlib.import_module(room)
        lines.append(f"# {room}")
        lines += [f"{name}{signature(getattr(module, name))}" for name in public_names(room)]
    written = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        RECORD.write_text(written, encoding="utf-8")
    assert written == RECORD.read_text(encoding="utf-8")


def test_public_names_are_documented():
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in public_names(room):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), f"{room}.{name} has no docstring"


def test_roads_can_be_handed_to_processes_that_are_spawned():
    import clip_refine
    from clip_refine import vectors

    names = ("refine", "evaluate", "compare")
    for road in (getattr(room, name) for room in (clip_refine, vectors) for name in names):
        assert pickle.loads(pickle.dumps(road)) is road
