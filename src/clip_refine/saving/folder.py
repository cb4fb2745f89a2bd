"""A model's folder: weights, provenance and card."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.markup import escape

from clip_refine import __version__
from clip_refine.config import RefineConfig
from clip_refine.data import ImageCaptions, Stream
from clip_refine.data.pairs import pairs_fingerprint
from clip_refine.models import OpenClipEncoder, TransformersEncoder
from clip_refine.models.checkpoints import MADE_BY, PROVENANCE, maker_of
from clip_refine.models.encoder import OPEN_CLIP, OWN, TRANSFORMERS, files_of
from clip_refine.report.tables import rolled_back, signed
from clip_refine.results import BaseModelFacts, DataFacts, Provenance, RunScores, read
from clip_refine.results.metrics import metric
from clip_refine.saving.exchange import clip_to_open_clip, preprocessing_to_open_clip
from clip_refine.support.console import console, printable
from clip_refine.support.errors import DataError, ModelError
from clip_refine.support.limits import parse_yaml, read_text

# --------------------------------------------------------------------------------------------------
# The `README.md` of a saved model, as the Hugging Face Hub shows it.


SENTENCE_TRANSFORMERS, ONNX, IMMICH = "sentence-transformers", "onnx", "immich"


_GEOMETRY = ("centroid_distance", "true_pair_cosine", "text_first_share")
_SPECIAL = re.compile(r"([\\`*_\[\]{}<>|~&#$])")


class Verbatim(str):
    """Text that stands in the card as it is; any other is escaped."""

    __slots__ = ()


def model_card(
    provenance: Provenance,
    formats: Sequence[str],
    *,
    hub_id: str | None = None,
    onnx: Mapping[str, Any] | None = None,
    own_files: bool = False,
) -> str:
    """The card in Markdown with the Hub's YAML block.

    Its code runs in the model's folder as it stands. `onnx` is its `onnx_config.json`, `own_files`
    whether the files there are of no library, `hub_id` where they go.
    """
    kinds = {
        "refined": "refined with CLIP-Refine",
        "interpolated": "interpolated",
        "folded": "centred",
    }
    facts = ModelCardData(
        library_name=formats[0],
        pipeline_tag="zero-shot-image-classification",
        license=provenance.base.licence or "unknown",
        tags=["clip", "clip-refine", "zero-shot-image-classification", *formats],
        base_model=provenance.base.hub_id,
    )
    held_out, scores = "", provenance.scores
    if scores:
        count, captions = scores.after.pairs, scores.after.captions
        held_out = f"{count:,} held-out images with {captions:,} captions"
        if provenance.held_out and provenance.held_out.name:
            held_out += f" ({markdown_escape(provenance.held_out.name)})"
    maker = maker_of(provenance.base.name)
    text = (
        _templates()
        .get_template("model_card.md.jinja")
        .render(
            dict(provenance),
            title=f"{provenance.base.name}, {kinds.get(provenance.made, 'converted')}"
            + ("" if provenance.precision == "fp32" else f", {provenance.precision}"),
            front_matter=Verbatim(facts.to_yaml()),
            rows=_score_rows(scores) if scores else [],
            went_back=rolled_back(scores) if scores else "",
            intervals=bool(scores and scores.difference),
            held_out_text=Verbatim(held_out),
            formats=formats,
            hub_id=hub_id and Verbatim(hub_id),
            onnx=onnx,
            own_files=own_files,
            maker=maker and [*map(Verbatim, maker.split(":"))],
        )
    )
    return printable(re.sub(r"\n{3,}", "\n\n", text))


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("clip_refine.report"),
        undefined=StrictUndefined,
        finalize=_escaped,
        autoescape=False,  # noqa: S701 - this is Markdown, and `finalize` escapes what comes from users
        keep_trailing_newline=True,
    )


def markdown_escape(text: str) -> str:
    r"""User text as Markdown that shows exactly this, in one line.

    >>> print(markdown_escape("a*b* <script>|x"))
    a\*b\* \<script\>\|x
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _escaped(value: Any) -> Any:
    if isinstance(value, Verbatim):
        return str(value)
    return markdown_escape(value) if isinstance(value, str) else value


def _score_rows(scores: RunScores) -> list[tuple[str, str, str, str]]:
    """Heading, before, after and change of the lines before → after."""
    before, after = scores.before, scores.after
    lines = [
        (metric(name).heading, f"geometry.{name}", before.geometry[name], after.geometry[name])
        for name in _GEOMETRY
        if name in before.geometry
    ]
    lines += [
        (metric(name).heading, f"retrieval.{name}", was, after.retrieval[name])
        for name, was in before.retrieval.items()
    ]
    for task, values in before.zero_shot.items():
        path, now = f"zero_shot.{task}.top1", after.zero_shot[task]["top1"]
        lines.append((f"zero-shot top-1, {task}", path, values["top1"], now))
    rows = []
    for heading, path, was, now in lines:
        interval = scores.difference.get(path)
        span = f" ({signed(interval.low)} to {signed(interval.high)})" if interval else ""
        rows.append((heading, f"{was:.3f}", f"{now:.3f}", signed(now - was) + span))
    return rows


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
        return BaseModelFacts(name=f"{MADE_BY}{identifier}")
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
            with suppress(OSError, ValueError):  # whatever else it is, it is no card
                text = read_text(path)
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


def saved_size(model: Any) -> int:
    """Bytes of the weights that `save_model` writes; Transformers' may have both formats."""
    formats = 2 if files_of(model).format == TRANSFORMERS else 1
    return 4 * formats * sum(weight.numel() for weight in model.state_dict().values())


def write_card(
    folder: Path,
    provenance: Provenance,
    *,
    hub_id: str | None = None,
) -> None:
    """Write the model card for whatever formats the folder holds, and its facts as JSON."""
    formats = [name for file, name in _FILES_OF_FORMATS.items() if (folder / file).is_file()]
    if (folder / "visual").is_dir():  # whose config.json is immich's
        formats = [IMMICH]
    onnx = folder / "onnx_config.json"
    text = model_card(
        provenance,
        formats or [OWN],
        hub_id=hub_id,
        onnx=json.loads(onnx.read_text(encoding="utf-8")) if onnx.is_file() else None,
        own_files=not (formats or (folder / "model.safetensors").is_file()),
    )
    (folder / CARD).write_text(text, encoding="utf-8")
    provenance.write(folder / PROVENANCE)


def read_provenance(folder: Path) -> Provenance | None:
    """What was written beside a saved model; None where there is nothing of this version."""
    try:
        return read(Provenance, folder / PROVENANCE)
    except DataError:
        return None


_PROBES = ["a photo of a dog on a beach.", "Two Words!", "it's 12:30 at the caf\u00e9"]


def write_open_clip(model: Any, folder: Path, header: Mapping[str, str]) -> None:
    """Write what open_clip's `local-dir:` loads; the file names are none of Transformers'."""
    match files_of(model).format:
        case "open_clip":
            model.save(folder, metadata=header)
        case "transformers":
            _write_converted(model, folder, header)
        case _:
            raise ModelError(f"open_clip builds no {type(model).__name__}. Export it --to onnx.")


def _write_converted(encoder: TransformersEncoder, folder: Path, header: Mapping[str, str]) -> None:
    kind = encoder.model.config.model_type
    if kind != "clip":
        raise ModelError(f"open_clip builds no {kind} model that these weights would fit.")
    config, state = clip_to_open_clip(encoder.model.config.to_dict(), encoder.model.state_dict())
    preprocessing = preprocessing_to_open_clip(encoder.processor.image_processor.to_dict())
    ours = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    for text in _PROBES:  # the folder will name open_clip's own tokenizer
        ids = encoder.processor.tokenizer(text)["input_ids"]
        if ids != [ours.sot_token_id, *ours.encode(text), ours.eot_token_id]:
            raise ModelError("its tokenizer is not open_clip's.")
    clip = open_clip.CLIP(**config)
    clip.load_state_dict(state)
    open_clip.set_model_preprocess_cfg(clip, preprocessing)
    OpenClipEncoder(clip, None, ours, config).save(folder, metadata=header)
