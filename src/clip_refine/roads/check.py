"""Look a source of captioned images over before a run is spent on it."""

import random
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from clip_refine.config import DataConfig, ModelConfig
from clip_refine.data import ImageCaptions
from clip_refine.data.images import decode_image, opened
from clip_refine.data.loader import PixelReader, in_parallel
from clip_refine.data.pairs import MINIMUM_HELD_OUT, Images, fingerprint, image_bytes
from clip_refine.data.sources import read_all_rows
from clip_refine.models.encoder import CountingTokenizer
from clip_refine.results import CaptionFindings, Findings, ImageFindings, NumberSpread, Problem
from clip_refine.roads import build
from clip_refine.support.console import Bar, console, printable
from clip_refine.support.errors import ConfigError, DataError
from clip_refine.support.folder import check_free, complete_file

# --------------------------------------------------------------------------------------------------
# What can be said of each image of a source by decoding it once.


HASHED_SIDE = 128
"""Pixels a side that are enough for a perceptual hash, which looks at 32."""
DRAWN = "drawn"


@dataclass(frozen=True)
class ImageFacts:
    """One readable image."""

    content: str  # fingerprint of its file
    look: int  # 64-bit perceptual hash
    width: int  # in pixels, as stored
    height: int  # in pixels, as stored
    kind: str  # its format, as in JPEG
    odd: tuple[str, ...] = ()  # what had to be done to see it as it is meant


def scan_images(images: Images, *, workers: int) -> list[ImageFacts | str]:
    """Decode every image once; of those that cannot be a sentence that says what to do."""
    scan, title = partial(_scan, images), "Decoding images"
    return list(in_parallel(scan, len(images), title, workers=workers, visible=True))


def _scan(images: Images, index: int) -> ImageFacts | str:
    name = images.image_name(index)
    try:
        data = image_bytes(images, index)
        if data is None:
            image = images.load_image(index)
            content = fingerprint(image.tobytes())
            return ImageFacts(content, _look(image), *image.size, DRAWN)
        return scan_image(data, name)
    except DataError as error:
        return str(error)


def scan_image(data: bytes, name: str) -> ImageFacts:
    """Everything about one image file."""
    image = decode_image(data, name, side=HASHED_SIDE)
    with opened(data) as header:
        width, height = header.size
        kind = "JPEG" if header.format == "MPO" else header.format or "unknown"
        odd = tuple(_oddities(header))
    return ImageFacts(fingerprint(data), _look(image), width, height, kind, odd)


def _look(image: Image.Image) -> int:
    bits = np.packbits(imagehash.phash(image).hash.flatten())
    return int.from_bytes(bits.tobytes(), "big")


def _oddities(header: Image.Image) -> list[str]:
    try:
        orientation = int(header.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF, as in images.py
        orientation = 1
    found = {
        "turned by EXIF": orientation > 1,
        "transparent": header.has_transparency_data,
        "CMYK": header.mode == "CMYK",
        "16 bits": header.mode.startswith("I"),
        "animated": header.format != "MPO" and getattr(header, "n_frames", 1) > 1,
    }
    return [name for name, is_so in found.items() if is_so]


# --------------------------------------------------------------------------------------------------
# Images that look the same, by perceptual hash.


BITS = 64
_ROWS = 1024  # hashes compared with their whole bucket at once; bounds the memory


def near_groups(hashes: NDArray[np.uint64], distance: int) -> list[list[int]]:
    """Groups of positions of 64-bit hashes that differ in few bits, directly or over others."""
    unique, group_of = np.unique(hashes, return_inverse=True)
    edges = [pairs for pairs in _near_pairs(unique, distance) if len(pairs)]
    ends = np.concatenate(edges).T if edges else np.empty((2, 0), np.int64)
    links = coo_array((np.ones(ends.shape[1], np.int8), tuple(ends)), shape=(len(unique),) * 2)
    component = connected_components(links, directed=False)[1][group_of]
    order = np.argsort(component, kind="stable")
    starts = np.flatnonzero(np.diff(component[order])) + 1
    groups = [group.tolist() for group in np.split(order, starts) if len(group) > 1]
    return sorted(groups)


def _near_pairs(unique: NDArray[np.uint64], distance: int) -> Iterator[NDArray[np.int64]]:
    """(P, 2) positions of pairs of different hashes; a pair may come several times."""
    # Hashes at a distance of d agree in one of d + 1 parts, so only those that share a part are
    # compared: about a second for 100,000 images that look different.
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for low, high in pairwise(edges):
        part = (unique >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.diff(part[order])) + 1
        for bucket in np.split(order, starts):
            for at in range(0, len(bucket) - 1, _ROWS):
                yield _compare(unique, bucket[at : at + _ROWS], bucket[at:], distance)


def _compare(
    unique: NDArray[np.uint64], rows: NDArray[np.int64], others: NDArray[np.int64], distance: int
) -> NDArray[np.int64]:
    differing = np.bitwise_count(unique[rows, None] ^ unique[None, others])
    row, other = np.nonzero(differing <= distance)
    pairs = np.stack([rows[row], others[other]], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


# --------------------------------------------------------------------------------------------------
# A few pairs on one sheet, to see at a glance whether captions belong to their images.


COLUMNS = 5
PICTURE = 240
FONTS = (
    *("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "NotoSans-Regular.ttf"),
    *("LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf"),
)
"""Looked for among the system's, those with most letters first; Pillow's own has only ASCII."""
_MARGIN = 12
_LINES = 6
_LETTERS = 500
_LINE = 17
_INK, _GREY, _PAPER, _FRAME = "#1a1a1a", "#808080", "white", "#e6e6e6"


@dataclass(frozen=True)
class Sample:
    """A pair on the sheet."""

    image: Image.Image  # in RGB, of any size
    name: str  # what the image is called
    caption: str  # one of its texts


def draw_sheet(samples: Sequence[Sample]) -> Image.Image:
    """Pictures in rows of five, each with its name and its caption underneath."""
    font = _font(12)
    texts = [_lines(sample, font) for sample in samples]
    rows = [range(at, min(at + COLUMNS, len(samples))) for at in range(0, len(samples), COLUMNS)]
    heights = [PICTURE + 3 * _MARGIN + _LINE * max(len(texts[i]) for i in row) for row in rows]
    width = PICTURE + 2 * _MARGIN
    sheet = Image.new("RGB", (width * max(map(len, rows), default=1), sum(heights) or 1), _PAPER)
    for number, row in enumerate(rows):
        for column, index in enumerate(row):
            corner = (column * width + _MARGIN, sum(heights[:number]) + _MARGIN)
            _draw(sheet, samples[index].image, texts[index], corner, font)
    return sheet


def _draw(
    sheet: Image.Image, image: Image.Image, lines: Sequence[str], corner: tuple[int, int], font: Any
) -> None:
    left, top = corner
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left, top, left + PICTURE - 1, top + PICTURE - 1), fill=_FRAME)
    picture = ImageOps.contain(image, (PICTURE, PICTURE))
    across, down = (PICTURE - picture.width) // 2, (PICTURE - picture.height) // 2
    sheet.paste(picture, (left + across, top + down))
    for number, line in enumerate(lines):
        place = (left, top + PICTURE + _MARGIN // 2 + number * _LINE)
        pen.text(place, line, fill=_INK if number else _GREY, font=font)


def _lines(sample: Sample, font: Any) -> list[str]:
    """The name in one line, and the caption in a few."""
    name, caption = _drawable(sample.name)[-_LETTERS:], _drawable(sample.caption)[:_LETTERS]
    while font.getlength(name) > PICTURE:
        name = f"…{name[2:]}"
    lines = [""]
    for part in re.findall(r"\S+\s*", caption):
        word = part
        while font.getlength(lines[-1] + word.rstrip()) > PICTURE:
            if lines[-1]:
                lines.append("")
                continue
            fits = _letters_that_fit(word, font)  # one long word, or a script without spaces
            lines[-1], word = word[:fits], word[fits:]
            lines.append("")
        lines[-1] += word
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1][:-2]}…"]
    return [name, *lines]


def _letters_that_fit(word: str, font: Any) -> int:
    counts = range(1, len(word) + 1)
    return max(1, bisect_right(counts, PICTURE, key=lambda count: font.getlength(word[:count])))


def _drawable(text: str) -> str:
    """One line, without control characters and halves of characters."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "�" for letter in line)


def _font(size: int) -> Any:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except (OSError, ImportError):  # not here, or Pillow without FreeType
            continue
    return ImageFont.load_default(size)


# --------------------------------------------------------------------------------------------------
# The findings of `data check`.


SAMPLES = 10
"""Pairs on the sheet."""
LONG_SHOWN = 10
"""Captions at most that are given as examples of too long ones."""


def check_data(
    source: str,
    data: DataConfig | None = None,
    *,
    model: ModelConfig | None = None,
    near: int = 4,
    out: Path | None = None,
    sheet: Path | None = None,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> Findings:
    """Count, measure and decode everything in a source, and stop at nothing that is wrong with it.

    Args:
        source: As `data.train`.
        data: How to read it, where the defaults do not do.
        model: Whose tokenizer counts tokens; OpenAI's CLIP without it.
        near: Bits of 64 in which the perceptual hashes of near duplicates may differ.
        out: JSON file for the findings.
        sheet: PNG file for ten pairs.
        seed: Which pairs those are.
        workers: Processes that decode; one a core, up to 8, without it.
        overwrite: Replace `out` and `sheet` where they exist.

    Raises:
        ConfigError: A setting is out of range.
        DataError: The source cannot be read at all.
        ModelError: The model has no tokenizer that can be loaded.
        OutputError: `out` or `sheet` exists, or cannot be written.
    """
    if not 0 <= near <= 16:
        raise ConfigError(f"near {near}: must be from 0 to 16 bits.")
    data = data or DataConfig()
    if data.train or data.val:
        raise ConfigError("data check takes the source itself. Leave --data.train and .val out.")
    for path in (out, sheet):
        if path is not None:
            check_free(path, overwrite=overwrite, folder=False)
    tokenizer = build.build_tokenizer(model or ModelConfig())
    found = read_all_rows(source, data)
    facts = scan_images(found.images, workers=build.count_free_workers(workers))
    findings = Findings(
        source=source,
        kind=found.kind,
        rows=found.rows,
        bad_rows=tuple(Problem(where=row.where, problem=row.problem) for row in found.bad),
        broken_off=found.broken_off,
        images=_images(found.images, facts, near),
        captions=_captions(found.images.captions, tokenizer),
    )
    if out is not None:
        with complete_file(out) as partial:
            partial.write_text(findings.text, encoding="utf-8")
    if sheet is not None:
        samples = _samples(found.images, facts, seed)
        if not samples:
            console.print("No sheet: no pair has a readable image and a caption.")
        else:
            with complete_file(sheet) as partial:
                draw_sheet(samples).save(partial, "PNG")
    return findings


def _images(images: ImageCaptions, facts: Sequence[ImageFacts | str], near: int) -> ImageFindings:
    names = [images.image_name(index) for index in range(len(images))]
    readable = {i: fact for i, fact in enumerate(facts) if isinstance(fact, ImageFacts)}
    by_content: dict[str, list[int]] = defaultdict(list)
    for index, fact in readable.items():
        by_content[fact.content].append(index)
    # one image a content: copies are listed as such already
    firsts = [group[0] for group in by_content.values()]
    looks = np.array([readable[index].look for index in firsts], dtype=np.uint64)
    alike = near_groups(looks, near) if firsts else []
    return ImageFindings(
        count=len(images),
        kinds=dict(Counter(fact.kind for fact in readable.values()).most_common()),
        odd=dict(Counter(odd for fact in readable.values() for odd in fact.odd).most_common()),
        short_side=NumberSpread.of([min(fact.width, fact.height) for fact in readable.values()]),
        long_side=NumberSpread.of([max(fact.width, fact.height) for fact in readable.values()]),
        unreadable=tuple(
            Problem(where=name, problem=fact)
            for name, fact in zip(names, facts, strict=True)
            if isinstance(fact, str)
        ),
        without_captions=tuple(
            name for name, texts in zip(names, images.captions, strict=True) if not texts
        ),
        duplicates=tuple(
            tuple(names[index] for index in group)
            for group in by_content.values()
            if len(group) > 1
        ),
        near_duplicates=tuple(tuple(names[firsts[at]] for at in group) for group in alike),
    )


def _captions(captions: Sequence[Sequence[str]], tokenizer: Any) -> CaptionFindings:
    texts = [text for own in captions for text in own]
    counting = isinstance(tokenizer, CountingTokenizer)  # others do not tell
    # a thousand at a time, so that the bar moves on
    blocks = [texts[start : start + 1000] for start in range(0, len(texts), 1000)] * counting
    bar = Bar("Counting tokens", len(blocks), transient=True)
    tokens: list[int] = []
    special: list[str] = []
    for block in bar.over(blocks):
        tokens += tokenizer.token_counts(block) or ()
        special += compress(block, tokenizer.are_special(block))
    limit = tokenizer.context_length if counting else None
    counted = zip(tokens, texts, strict=False)
    long = [(count, text) for count, text in counted if limit is not None and count > limit]
    long.sort(key=lambda found: -found[0])
    shared = Counter(text for own in captions for text in set(own))
    return CaptionFindings(
        count=len(texts),
        per_image=NumberSpread.of([len(own) for own in captions if own]),
        characters=NumberSpread.of([len(text) for text in texts]),
        words=NumberSpread.of([len(text.split()) for text in texts]),
        tokens=NumberSpread.of(tokens),
        context_length=limit,
        too_long=len(long),
        too_long_examples=tuple(text for _, text in long[:LONG_SHOWN]),
        shared={text: count for text, count in shared.most_common() if count > 1},
        special=tuple(special),
    )


def _samples(images: ImageCaptions, facts: Sequence[ImageFacts | str], seed: int) -> list[Sample]:
    """Pairs drawn at random from those that can be shown, in the order of the source."""
    generator = random.Random(seed)
    shown = [
        index
        for index, fact in enumerate(facts)
        if isinstance(fact, ImageFacts) and images.captions[index]
    ]
    chosen = sorted(generator.sample(shown, min(SAMPLES, len(shown))))
    reader = PixelReader(lambda image: image, PICTURE)  # pyright: ignore - it only loads
    return [
        Sample(
            reader.load(images, index),
            Path(images.image_name(index)).name,
            generator.choice(images.captions[index]),
        )
        for index in chosen
    ]


# --------------------------------------------------------------------------------------------------
# What was found, as a table for the terminal.


LISTED = 5
_LONGEST = 160
_PROBLEM = 500  # letters; what to do stands at its end


def findings_table(findings: Findings, data: DataConfig | None = None) -> RenderableType:
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
    sections = (_row_lines(findings), _image_lines(findings), _caption_lines(findings))
    for section in sections:
        for name, number, remark in section:
            table.add_row(name, number, escape(remark))
        table.add_section()
    return Group(table, *_examples(findings), Text(findings_verdict(findings, data)))


def findings_verdict(findings: Findings, data: DataConfig | None = None) -> str:
    """Whether a run on the source, read as `data` says, would start, in a sentence."""
    if findings.broken_off:
        return "Reading broke off, so a run would stop there."
    bad = len(findings.bad_rows) + len(findings.images.unreadable)
    if bad:
        most = (data or DataConfig()).max_bad
        few = bad <= most * max(findings.rows, findings.images.count)
        return "A run stops before training because of the bad rows and unreadable images; " + (
            "--data.skip-bad leaves them out."
            if few
            else f"mend them: --data.skip-bad leaves out up to {most:.0%} of all (--data.max-bad)."
        )
    if not findings.images.count:
        return "A run stops, since there are no pairs. Give rows with an image and a caption each."
    images = findings.images.count - _grouped(findings.images.duplicates)[0]
    if images < 2 * MINIMUM_HELD_OUT:
        return (
            f"Every row can be read, but a run without --data.val stops: of {images:,} different "
            f"images it cannot hold out {MINIMUM_HELD_OUT} and train on as many. Give more, or "
            "with --data.val other pairs to score on."
        )
    return "Nothing here stops a run."


Line = tuple[str, str, str]


def _row_lines(findings: Findings) -> Iterator[Line]:
    yield _count("rows", findings.rows)
    if findings.broken_off:
        yield "reading broke off", "", findings.broken_off
    yield _count("bad rows", len(findings.bad_rows))


def _image_lines(findings: Findings) -> Iterator[Line]:
    images = findings.images
    yield _count("images", images.count, _counted(images.kinds))
    yield _count("unreadable", len(images.unreadable))
    yield _count("without captions", len(images.without_captions))
    yield _count("exact duplicates", *_grouped(images.duplicates))
    yield _count("near duplicates", *_grouped(images.near_duplicates))
    if images.odd:
        yield _count("odd ones, decoded right", sum(images.odd.values()), _counted(images.odd))
    yield from _number_spread("shorter side, pixels", images.short_side)
    yield from _number_spread("longer side, pixels", images.long_side)


def _caption_lines(findings: Findings) -> Iterator[Line]:
    captions = findings.captions
    yield _count("captions", captions.count)
    yield from _number_spread("an image", captions.per_image)
    yield from _number_spread("words", captions.words)
    yield from _number_spread("tokens", captions.tokens)
    if captions.tokens and captions.context_length:
        share = captions.too_long / max(1, captions.count)
        remark = f"{share:.1%} are cut to the {captions.context_length} tokens that the model reads"
        yield _count("too long", captions.too_long, remark)
    if captions.special:
        remark = "the tokenizer reads marks in them, such as an end of text, as its own"
        yield _count("with special tokens", len(captions.special), remark)
    texts = _number(len(captions.shared), "text") if captions.shared else ""
    yield _count("on several images", sum(captions.shared.values()), texts)


def _examples(findings: Findings) -> Iterator[Text]:
    images, captions = findings.images, findings.captions
    bad = [f"{row.where}: {row.problem}" for row in findings.bad_rows]
    yield from _listed("Bad rows", bad, longest=_PROBLEM)
    unreadable = [problem.problem for problem in images.unreadable]
    yield from _listed("Unreadable", unreadable, longest=_PROBLEM)
    yield from _listed("Without captions", images.without_captions)
    yield from _listed("Exact duplicates", [" = ".join(group) for group in images.duplicates])
    yield from _listed("Near duplicates", [" ~ ".join(group) for group in images.near_duplicates])
    shared = [f"{count:,} times: {text}" for text, count in captions.shared.items()]
    yield from _listed("On several images", shared)
    yield from _listed("Too long", captions.too_long_examples, captions.too_long)
    yield from _listed("With special tokens", captions.special)


def _listed(
    title: str, items: Sequence[str], count: int | None = None, longest: int = _LONGEST
) -> Iterator[Text]:
    """A few of them and how many more there are; as plain text, since it comes from data."""
    if not items:
        return
    more = (len(items) if count is None else count) - LISTED
    lines = [_short(item, longest) for item in items[:LISTED]]
    lines += [f"... and {more:,} more."] if more > 0 else []
    yield Text(f"{title}:", style="bold")
    yield Text("\n".join(f"  {line}" for line in lines))


def _short(text: str, longest: int) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest - 2]} …"


def _count(name: str, count: int, remark: str = "") -> Line:
    return name, f"{count:,}", remark


def _grouped(groups: Sequence[Sequence[str]]) -> tuple[int, str]:
    """How many images there are besides the first of each group."""
    surplus = sum(len(group) - 1 for group in groups)
    return surplus, f"beside {_number(len(groups), 'other')}" if groups else ""


def _number_spread(name: str, spread: NumberSpread | None) -> Iterator[Line]:
    if spread is not None:
        yield (
            name,
            f"{spread.mean:,.1f}",
            f"{spread.smallest:,} to {spread.largest:,}, median {spread.median:,}, "
            f"95 % up to {spread.high:,}",
        )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
