"""A model's folder: weights, provenance and card."""

import json
import re
from pathlib import Path
from typing import Any

import open_clip
from rich.markup import escape

from clip_refine import __version__
from clip_refine.config import RefineConfig
from clip_refine.data import ImageCaptions, Stream
from clip_refine.data.pairs import pairs_fingerprint
from clip_refine.models.checkpoints import PROVENANCE
from clip_refine.models.encoder import files_of
from clip_refine.report.card import (
    IMMICH,
    ONNX,
    OPEN_CLIP,
    SENTENCE_TRANSFORMERS,
    TRANSFORMERS,
    WEIGHTS,
    model_card,
)
from clip_refine.results import BaseModelFacts, DataFacts, Provenance, RunScores, read
from clip_refine.saving.open_clip import write_open_clip
from clip_refine.support.console import console
from clip_refine.support.errors import DataError, ModelError
from clip_refine.support.limits import parse_yaml

# --------------------------------------------------------------------------------------------------
# What a saved model's card and header say about it: plain facts without local paths.


CARD = "README.md"
STREAM_SAMPLE = 512  # images at the beginning of a stream that its fingerprint is taken of


def refinement(
    config: RefineConfig,
    train_pairs: ImageCaptions | Stream,
    held_out: ImageCaptions,
    *,
    steps: int,
) -> Provenance:
    """Where a refined model comes from."""
    if isinstance(train_pairs, Stream):
        used = steps * config.train.batch_size
        fingerprint = pairs_fingerprint(train_pairs.prefix(STREAM_SAMPLE))
        train = DataFacts(
            name=_public(train_pairs.name), images=used, captions=used, fingerprint=fingerprint
        )
    else:
        train = data_facts(train_pairs)
    # what was set in these groups, without what is off and what is this machine's
    settings: dict[str, str | int | float | bool] = {"steps": steps, "seed": config.seed}
    for group in ("train", "loss", "prior"):
        for name, value in getattr(config, group).model_dump(mode="json").items():
            off = name.endswith("_weight") and not value
            if value is not None and not off and name not in ("device", "workers", "save_every"):
                plain = isinstance(value, str | int | float | bool)
                settings[f"{group}.{name}"] = value if plain else json.dumps(value)
    return Provenance(
        version=__version__,
        made="refined",
        base=base_model(config.model.name, config.model.pretrained),
        recipe=config.recipe,
        train=train,
        held_out=data_facts(held_out),
        settings=settings,
    )


def base_model(name: str, pretrained: str | None = None) -> BaseModelFacts:
    """What to tell others about a model that settings name."""
    found = re.match(r"([a-z]+(?:-[a-z]+)*):(.*)", name)
    schema, identifier = (found[1], found[2]) if found else (None, name)
    if schema == "python":
        return BaseModelFacts(name=f"a Python object of class {identifier}")
    if schema == "factory":
        return BaseModelFacts(name=f"a model made by {identifier}")
    if identifier == "toy":
        return BaseModelFacts(
            name="clip-refine's small model of a drawn world", licence="apache-2.0"
        )
    folder = Path(identifier)
    if schema == "local-dir" or folder.is_dir():
        return _folder_facts(folder.resolve())
    if folder.is_file():
        return BaseModelFacts(name=folder.name)
    if schema or "/" in identifier:
        return BaseModelFacts(name=identifier, hub_id=identifier)
    tag = pretrained or "openai"
    if Path(tag).is_file():
        return BaseModelFacts(name=f"{identifier} ({Path(tag).name})")
    hub = open_clip.get_pretrained_cfg(identifier, tag).get("hf_hub") or ""
    return BaseModelFacts(name=f"{identifier} ({tag})", hub_id=hub.rstrip("/") or None)


def data_facts(pairs: ImageCaptions) -> DataFacts:
    """What to tell others about pairs: no local paths."""
    captions = sum(len(texts) for texts in pairs.captions)
    fingerprint = pairs_fingerprint(pairs)
    return DataFacts(
        name=_public(pairs.name), images=len(pairs), captions=captions, fingerprint=fingerprint
    )


def _public(name: str) -> str:
    """The name of a source, or of several that are mixed, without folders."""
    parts = name.split(" + ")
    if len(parts) > 1:
        return " + ".join(map(_public, parts))
    if Path(name).is_absolute() or re.search(r"\.\w+( \(|$)", name):  # a file, or a part of one
        return Path(name).name
    return name


def _folder_facts(folder: Path) -> BaseModelFacts:
    """A folder's last part, or the run's where it is called model, and what its card says."""
    name = folder.parent.name if folder.name == "model" else folder.name
    text = ""
    for path in (folder / CARD, folder / "model" / CARD):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            break
    front_matter = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        values = parse_yaml(front_matter[1]) if front_matter else {}
    except ValueError:
        values = {}
    licence = values.get("license") if isinstance(values, dict) else None
    known = isinstance(licence, str) and licence not in ("unknown", "other")
    return BaseModelFacts(name=name, licence=licence if known else None)


_FILES_OF_FORMATS = {  # the main one of a folder that several libraries load comes first
    "modules.json": SENTENCE_TRANSFORMERS,
    "config.json": TRANSFORMERS,
    "open_clip_config.json": OPEN_CLIP,
    "onnx_config.json": ONNX,
}


def save_model(model: Any, folder: Path, provenance: Provenance) -> None:
    """Write a model in its own format, with a card; in open_clip's as well where it converts."""
    header = provenance.header()
    files = files_of(model)
    files.save(folder, metadata=header)
    if files.format == TRANSFORMERS:
        try:
            write_open_clip(model, folder, header)
        except ModelError as error:
            console.print(f"Not saved in open_clip's format, too: {escape(str(error))}")
    write_card(folder, provenance)


def write_card(
    folder: Path,
    provenance: Provenance,
    scores: RunScores | None = None,
    *,
    hub_id: str | None = None,
) -> None:
    """Write the model card for whatever formats the folder holds, and its facts as JSON."""
    formats = [name for file, name in _FILES_OF_FORMATS.items() if (folder / file).is_file()]
    if (folder / "visual").is_dir():  # whose config.json is immich's
        formats = [IMMICH]
    fed = (folder / "tokenizer_config.json").is_file()
    if formats == [ONNX]:
        settings = json.loads((folder / "onnx_config.json").read_text(encoding="utf-8"))
        fed = fed and "open_clip" in settings["image"]["preprocessing"]
    text = model_card(provenance, formats or [WEIGHTS], scores, hub_id=hub_id, fed=fed)
    (folder / CARD).write_text(text, encoding="utf-8")
    provenance.write(folder / PROVENANCE)


def read_provenance(folder: Path) -> Provenance | None:
    """What was written beside a saved model; None where there is nothing of this version."""
    try:
        return read(Provenance, folder / PROVENANCE)
    except DataError:
        return None
