"""A suite's settings → prompts and models."""

from pathlib import Path

import yaml
from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from clip_refine.build.suites import SuitePlaces
from clip_refine.config import EvaluateConfig, ModelConfig
from clip_refine.config.suites import shipped
from clip_refine.config.tasks import ZeroShotTask
from clip_refine.data.class_names import read_texts
from clip_refine.errors import ConfigError

PAPER_TEMPLATE = "a photo of a {}"


def build_templates(
    task: ZeroShotTask, override: str | None, places: SuitePlaces
) -> tuple[str, tuple[str, ...]]:
    """A task's prompt set: its name and its templates.

    Raises:
        ConfigError: There is no such set, or a template has no place for the class name.
        DataError: A file of prompts cannot be read.
    """
    asked = override or task.prompts
    if not isinstance(asked, str):
        return "the suite's", asked
    match asked:
        case "paper":
            return asked, (PAPER_TEMPLATE,)
        case "openai-imagenet":
            return asked, tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
        case "simple-imagenet":
            return asked, tuple(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES)
        case "short":
            sets = yaml.safe_load(shipped("prompts.yaml"))
            return asked, tuple(sets.get(task.source, sets["any"]))
    if not Path(asked).suffix:
        raise ConfigError(
            f"prompts: there is no set {asked!r}. There are paper, short, openai-imagenet and "
            "simple-imagenet; or give a .txt, .yaml or .json file."
        )
    found = read_texts(Path(places.file(asked)))
    templates = tuple(found.values() if isinstance(found, dict) else found)
    bad = [template for template in templates if "{}" not in template]
    if bad or not templates:
        what = f"{bad[0]!r} has no {{}} for the class name" if bad else "holds no prompts"
        raise ConfigError(f"{asked}: {what}.")
    return asked, templates


def expand_models(config: EvaluateConfig) -> dict[str, ModelConfig]:
    """Label → model; a run's folder gives its base and its model.

    Raises:
        ConfigError: A run's settings cannot be read.
    """
    if not config.models:
        model = config.model
        label = f"{model.name}@{model.pretrained}" if model.pretrained else model.name
        return {label: model}
    found: dict[str, ModelConfig] = {}
    for name in config.models:
        folder = Path(name)
        if (folder / "config.yaml").is_file() and (folder / "model").is_dir():
            base = _base_of(folder / "config.yaml")
            if base not in found.values():
                tag = f"@{base.pretrained}" if base.pretrained else ""
                found[f"{base.name}{tag}"] = base
        architecture, mark, tag = name.rpartition("@")
        if mark and not folder.exists():
            found[name] = ModelConfig(name=architecture, pretrained=tag)
        else:
            found[name] = ModelConfig(name=name)
    return found


def _base_of(path: Path) -> ModelConfig:
    """The model in a run's settings; the others may be of another version."""
    try:
        return ModelConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path}: its model, from which the run started, cannot be read "
            f"({str(error).splitlines()[0]}). Name both models, base and {path.parent / 'model'}."
        ) from error
