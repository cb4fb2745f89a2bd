"""The `README.md` of a saved model, as the Hugging Face Hub shows it."""

import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from clip_refine.report.tables import signed
from clip_refine.results import Provenance, RunScores
from clip_refine.results.metrics import metric

OPEN_CLIP, TRANSFORMERS = "open_clip", "transformers"
SENTENCE_TRANSFORMERS, ONNX, IMMICH = "sentence-transformers", "onnx", "immich"
WEIGHTS = "pytorch"

_GEOMETRY = ("centroid_distance", "true_pair_cosine", "text_first_share")
_SPECIAL = re.compile(r"([\\`*_\[\]{}<>|~&#$])")


class Verbatim(str):
    """Text that stands in the card as it is; any other is escaped."""

    __slots__ = ()


def model_card(
    provenance: Provenance,
    formats: Sequence[str],
    scores: RunScores | None = None,
    *,
    hub_id: str | None = None,
    fed: bool = True,
) -> str:
    """The card in Markdown with the Hub's YAML block.

    Its code runs in the model's folder as it stands, `fed` saying whether files there make pixels
    and tokens for ONNX; `hub_id` is where the folder goes.
    """
    environment = Environment(
        loader=PackageLoader("clip_refine.report"),
        undefined=StrictUndefined,
        finalize=_escaped,
        autoescape=False,  # noqa: S701 - this is Markdown, and `finalize` escapes what comes from users
        keep_trailing_newline=True,
    )
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
    held_out = ""
    if scores:
        count, captions = scores.after.pairs, scores.after.captions
        held_out = f"{count:,} held-out images with {captions:,} captions"
        if provenance.held_out and provenance.held_out.name:
            held_out += f" ({markdown_escape(provenance.held_out.name)})"
    text = environment.get_template("model_card.md.jinja").render(
        dict(provenance),
        title=f"{provenance.base.name}, {kinds.get(provenance.made, 'converted')}",
        front_matter=Verbatim(facts.to_yaml()),
        rows=_score_rows(scores) if scores else [],
        intervals=bool(scores and scores.difference),
        held_out_text=Verbatim(held_out),
        formats=formats,
        hub_id=hub_id and Verbatim(hub_id),
        fed=fed,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


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
