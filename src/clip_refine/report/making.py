"""How a run was made, as names and values."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from clip_refine.results import RunScores

_PATH = re.compile(r"(?<![\w./])/(?:[^/\s'\"]+/)*([^/\s'\"]+/[^/\s'\"]+)")

_LOSSES = {"rafa_weight": "RaFA", "hycd_weight": "HyCD", "m2_mix_weight": "m²-mix"}


def making_facts(
    scores: RunScores, settings: Mapping[str, Any], environment: Mapping[str, Any], source: str
) -> dict[str, str]:
    """What was trained on what, how, with which seed, where."""
    recipe, train = scores.recipe, settings.get("train", {})
    loss = settings.get("loss", {})
    weights = {
        _LOSSES.get(name, name.removesuffix("_weight").replace("_", " ")): value
        for name, value in loss.items()
        if name.endswith("_weight") and value
    }
    prior = settings.get("prior", {})
    rate = f"{train.get('learning_rate', 0):g}, {train.get('schedule')}"
    facts = {
        "Model": _named(settings.get("model", {})),
        "Recipe": settings.get("recipe"),
        "Losses": ", ".join(f"{name} × {value:g}" for name, value in weights.items()),
        "References": f"{prior.get('kind')}, scale {prior.get('scale'):g}" if prior else None,
        "Feature scale in training": loss.get("feature_scale"),
        "Training images": f"{recipe['pairs']:,} from {settings.get('data', {}).get('train')}",
        "Steps": f"{recipe['steps']:,} of {train.get('batch_size')} pairs, {_epochs(train)}",
        "Interpolation": _way(recipe.get("interpolation")),
        "Learning rate": rate,
        "Precision": train.get("precision"),
        "Held-out images": f"{scores.after.pairs:,} from {source}",
        "Seed": settings.get("seed"),
        "Device": environment.get("device"),
        "Machine": environment.get("platform"),
        "Commit": str(environment.get("git_commit") or "")[:12],
    }
    return {
        name: short_paths(str(value)) for name, value in facts.items() if value not in (None, "")
    }


def versions(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Python's and those of the packages that numbers depend on."""
    packages = {"python": environment.get("python"), **environment.get("packages", {})}
    return [(name, str(version)) for name, version in packages.items() if version]


def seconds(scores: RunScores) -> list[tuple[str, str]]:
    """Of each part of the run."""
    return [(name.replace("_", " "), f"{value:.1f}") for name, value in scores.seconds.items()]


def command(environment: Mapping[str, Any]) -> str:
    """The command line that made the run; empty where it was made from Python."""
    words: Sequence[str] = environment.get("command", ())
    if not words or not words[0].endswith(("clip-refine", "clip_refine/__main__.py")):
        return ""
    return short_paths(shlex.join(["clip-refine", *words[1:]]))


def all_settings(settings: Mapping[str, Any]) -> str:
    """As in `config.yaml`."""
    return short_paths(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def short_paths(text: str) -> str:
    """Without the folders above the last, which are nobody's business where a report is shared.

    >>> short_paths("--data.train /home/someone/secret/photos/captions.csv")
    '--data.train …/photos/captions.csv'
    """
    return _PATH.sub(r"…/\1", text)


def short_name(name: str) -> str:
    """The same for a name that is a path as a whole, spaces and all.

    >>> short_name("/home/some one/photos/a dog.jpg")
    '…/photos/a dog.jpg'
    """
    return f"…/{'/'.join(name.split('/')[-2:])}" if name.startswith("/") else name


def _named(model: Mapping[str, Any]) -> str:
    tag = f" ({model['pretrained']})" if model.get("pretrained") else ""
    return f"{model.get('name')}{tag}"


def _way(interpolation: Mapping[str, Any] | None) -> str:
    """How far from the model to its refinement the result lies; empty where that is all the way."""
    if interpolation is None:
        return ""
    chosen = ", chosen on held-out training pairs" if interpolation.get("tried") else ""
    return f"{interpolation['weight']:g} of the way from the model to its refinement{chosen}"


def _epochs(train: Mapping[str, Any]) -> str:
    if train.get("steps"):
        return "as many as were asked for"
    count = train.get("epochs", 1)
    return f"{count} epoch{'' if count == 1 else 's'}"
