"""The `README.md` of a saved model, as the Hugging Face Hub shows it."""

import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from clip_refine.report.tables import signed
from clip_refine.results import Provenance, RunScores, Scores
from clip_refine.results.metrics import metric

OPEN_CLIP, TRANSFORMERS = "open_clip", "transformers"
SENTENCE_TRANSFORMERS, ONNX, WEIGHTS = "sentence-transformers", "onnx", "pytorch"

_GEOMETRY = ("centroid_distance", "true_pair_cosine", "text_first_share")
_SPECIAL = re.compile(r"([\\`*_\[\]{}<>|~&#$])")


class Verbatim(str):
    """Text that stands in the card as it is; any other is escaped."""

    __slots__ = ()


def model_card(
    provenance: Provenance, formats: Sequence[str], scores: RunScores | None = None
) -> str:
    """The card in Markdown with the Hub's YAML block."""
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
    text = environment.get_template("model_card.md.jinja").render(
        dict(provenance),
        title=f"{provenance.base.name}, {kinds.get(provenance.made, 'converted')}",
        front_matter=Verbatim(_front_matter(provenance, formats)),
        rows=_score_rows(scores) if scores else [],
        intervals=bool(scores and scores.difference),
        held_out_text=Verbatim(_held_out_text(provenance, scores.after)) if scores else "",
        formats=formats,
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


def _front_matter(provenance: Provenance, formats: Sequence[str]) -> str:
    facts = ModelCardData(
        library_name=formats[0],
        pipeline_tag="zero-shot-image-classification",
        license=provenance.base.licence or "unknown",
        tags=["clip", "clip-refine", "zero-shot-image-classification", *formats],
        base_model=provenance.base.hub_id,
    )
    return facts.to_yaml()


def _held_out_text(provenance: Provenance, scores: Scores) -> str:
    counts = f"{scores.pairs:,} held-out images with {scores.captions:,} captions"
    name = provenance.held_out and markdown_escape(provenance.held_out.name)
    return f"{counts} ({name})" if name else counts


def _score_rows(scores: RunScores) -> list[tuple[str, str, str, str]]:
    """Heading, before, after and change of the lines before → after."""
    before, after = scores.before, scores.after
    rows = []

    def add(heading: str, path: str, was: float, now: float) -> None:
        interval = scores.difference.get(path)
        change = signed(now - was)
        if interval:
            change += f" ({signed(interval.low)} to {signed(interval.high)})"
        rows.append((heading, f"{was:.3f}", f"{now:.3f}", change))

    for name in _GEOMETRY:
        if name in before.geometry:
            add(
                metric(name).heading,
                f"geometry.{name}",
                before.geometry[name],
                after.geometry[name],
            )
    for name, was in before.retrieval.items():
        add(metric(name).heading, f"retrieval.{name}", was, after.retrieval[name])
    for task, values in before.zero_shot.items():
        now = after.zero_shot[task]["top1"]
        add(f"zero-shot top-1, {task}", f"zero_shot.{task}.top1", values["top1"], now)
    return rows
