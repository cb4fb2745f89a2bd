"""What was found in a source, as a table for the terminal."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clip_refine.console import printable
from clip_refine.findings import Findings, Problem, Spread

LISTED = 5
_LONGEST = 160


def findings_table(findings: Findings) -> RenderableType:
    """Counts first, then examples of what is wrong or doubtful, then a sentence."""
    table = Table(
        title=escape(f"{findings.source}: {findings.kind}"),
        title_justify="left",
        title_style="bold",
        show_header=False,
    )
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("")
    sections = (_rows(findings), _images(findings), _captions(findings))
    for section in sections:
        for name, number, remark in section:
            table.add_row(name, number, escape(remark))
        table.add_section()
    return Group(table, *_examples(findings), Text(verdict(findings)))


def verdict(findings: Findings) -> str:
    """Whether a run on the source would start, in a sentence."""
    if findings.broken_off:
        return "Reading broke off, so a run would stop there."
    bad = len(findings.bad_rows) + len(findings.images.unreadable)
    if bad:
        return (
            "A run stops before training because of the bad rows and unreadable images; "
            "--data.skip-bad leaves them out."
        )
    return "Nothing here stops a run."


Line = tuple[str, str, str]


def _rows(findings: Findings) -> Iterator[Line]:
    yield _count("rows", findings.rows)
    if findings.broken_off:
        yield "reading broke off", "", findings.broken_off
    yield _count("bad rows", len(findings.bad_rows))


def _images(findings: Findings) -> Iterator[Line]:
    images = findings.images
    yield _count("images", images.count, _counted(images.kinds))
    yield _count("unreadable", len(images.unreadable))
    yield _count("without captions", len(images.without_captions))
    yield _count("exact duplicates", *_grouped(images.duplicates))
    yield _count("near duplicates", *_grouped(images.near_duplicates))
    if images.odd:
        yield _count("odd ones, decoded right", sum(images.odd.values()), _counted(images.odd))
    yield from _spread("shorter side, pixels", images.short_side)
    yield from _spread("longer side, pixels", images.long_side)


def _captions(findings: Findings) -> Iterator[Line]:
    captions = findings.captions
    yield _count("captions", captions.count)
    yield from _spread("an image", captions.per_image)
    yield from _spread("words", captions.words)
    yield from _spread("tokens", captions.tokens)
    if captions.tokens and captions.context_length:
        share = captions.too_long / max(1, captions.count)
        remark = f"{share:.1%} are cut to the {captions.context_length} tokens that the model reads"
        yield _count("too long", captions.too_long, remark)
    yield _count("on several images", sum(captions.shared.values()), _shared(captions.shared))


def _examples(findings: Findings) -> Iterator[Text]:
    images, captions = findings.images, findings.captions
    yield from _listed("Bad rows", _told(findings.bad_rows))
    yield from _listed("Unreadable", [problem.problem for problem in images.unreadable])
    yield from _listed("Without captions", images.without_captions)
    yield from _listed("Exact duplicates", [" = ".join(group) for group in images.duplicates])
    yield from _listed("Near duplicates", [" ~ ".join(group) for group in images.near_duplicates])
    shared = [f"{count:,} times: {text}" for text, count in captions.shared.items()]
    yield from _listed("On several images", shared)
    yield from _listed("Too long", captions.too_long_examples, captions.too_long)


def _told(problems: Sequence[Problem]) -> list[str]:
    return [f"{problem.where}: {problem.problem}" for problem in problems]


def _listed(title: str, items: Sequence[str], count: int | None = None) -> Iterator[Text]:
    """A few of them and how many more there are; as plain text, since it comes from data."""
    if not items:
        return
    more = (len(items) if count is None else count) - LISTED
    lines = [_short(item) for item in items[:LISTED]]
    lines += [f"... and {more:,} more."] if more > 0 else []
    yield Text(f"{title}:", style="bold")
    yield Text("\n".join(f"  {line}" for line in lines))


def _short(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 2]} …"


def _count(name: str, count: int, remark: str = "") -> Line:
    return name, f"{count:,}", remark


def _grouped(groups: Sequence[Sequence[str]]) -> tuple[int, str]:
    """How many images there are besides the first of each group."""
    surplus = sum(len(group) - 1 for group in groups)
    return surplus, f"beside {_number(len(groups), 'other')}" if groups else ""


def _spread(name: str, spread: Spread | None) -> Iterator[Line]:
    if spread is not None:
        yield (
            name,
            f"{spread.mean:,.1f}",
            f"{spread.smallest:,} to {spread.largest:,}, median {spread.median:,}, "
            f"95 % up to {spread.high:,}",
        )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _shared(shared: Mapping[str, int]) -> str:
    return _number(len(shared), "text") if shared else ""


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
