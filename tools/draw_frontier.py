"""Draw `docs/results/photo-centred.svg` from the table of photo-centred.md beside it.

What a smaller gap costs in zero-shot and brings in mixed search, walked by the learning rate, by
RaFA's weight and by the share that is folded: `python tools/draw_frontier.py`.
"""

from html import escape
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SIDE, MARGIN, LEGEND, WIDEST = 360, 56, 150, 1.0
TEXT, LATE, ALL = "text tower, image projection", "late blocks, text tower", "all weights"
RATES = [f"`centred`, {rate}, no RaFA" for rate in ("3e-5", "1e-4", "3e-4")]
WALKS = {  # what is walked: colour, rows of the table, and the word at each mark
    "learning rate, text tower": ("#2b6cb0", TEXT, RATES, ("3e-5", "1e-4", "3e-4")),
    "learning rate, late blocks and text tower": (
        "#2f855a",
        LATE,
        [RATES[0], "`centred`, 7e-5, no RaFA", RATES[1]],
        ("3e-5", "7e-5", "1e-4"),
    ),
    "RaFA's weight, text tower at 1e-4": (
        "#c53030",
        TEXT,
        [RATES[1], "`centred`, 1e-4", "`centred`, 1e-4, RaFA × 4", "`centred`, 1e-4, RaFA × 8"],
        ("", "× 1", "× 4", "× 8"),
    ),
    "RaFA's weight, projections at 1e-3": (
        "#b7791f",
        "projections",
        [f"`centred`, 1e-3{more}" for more in (", no RaFA", "", ", RaFA × 4", ", RaFA × 8")],
        ("× 0", "× 1", "× 4", "× 8"),
    ),
    "share folded, text tower at 3e-5": (
        "#6b46c1",
        TEXT,
        [RATES[0], f"{RATES[0]}, shares .9", f"{RATES[0]}, shares .8"],
        ("", ".9", ".8"),
    ),
    "all weights": ("#000", ALL, [RATES[0]], ("3e-5",)),
    "nothing trained": (
        "#718096",
        "",
        ["untouched", "mean-centring", "fold alone", "`balanced`, 1e-4"],
        ("untouched", "mean-centring", "fold", "balanced"),
    ),
}


class Row(NamedTuple):
    """The means of one row of the table."""

    gap: float
    zero_shot: float
    ndcg: float


def read_rows() -> dict[tuple[str, str], Row]:
    """(trained part, run) → its means, from the page's first table."""
    rows = {}
    for line in (RESULTS / "photo-centred.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) > 10 and cells[3][:1] in ".0123456789":
            numbers = [float(cells[at].split()[0]) for at in (3, 6, 7)]
            rows[cells[0], cells[1]] = Row(*numbers)
    return rows


def panel(left: float, title: str, which: str, rows: dict, allowed: float, most: tuple) -> str:
    """Gap across, `which` up; the dashed corner is where the bar is met."""
    low, high = most

    def place(row: Row) -> tuple[float, float]:
        up = (getattr(row, which) - low) / (high - low)
        return left + row.gap / WIDEST * SIDE, MARGIN + (1 - up) * SIDE

    untouched = rows["", "untouched"]
    x, y = place(untouched._replace(gap=0.45 * untouched.gap, **{which: allowed}))
    parts = [
        f'<rect x="{left}" y="{MARGIN}" width="{SIDE}" height="{SIDE}" class="frame"/>',
        f'<text x="{left}" y="{MARGIN - 14}" class="title">{escape(title)}</text>',
        f'<path d="M{left:.1f} {y:.1f}H{x:.1f}V{MARGIN}" class="bar"/>',
    ]
    for at in range(5):
        value, across = low + at * (high - low) / 4, at * 0.25
        parts.append(
            f'<text x="{left - 6}" y="{MARGIN + SIDE * (1 - at / 4) + 4:.0f}" class="end">'
            f"{value:.2f}</text>"
            f'<text x="{left + SIDE * across / WIDEST:.0f}" y="{MARGIN + SIDE + 18}" '
            f'class="middle">{across:.2f}</text>'
        )
    for colour, trained, names, words in WALKS.values():
        keys = [(TEXT if "balanced" in name else trained, name) for name in names]
        known = [(rows[key], word) for key, word in zip(keys, words, strict=True) if key in rows]
        found = [(place(row), word) for row, word in known]
        if trained:
            line = " ".join(f"{px:.1f},{py:.1f}" for (px, py), _ in found)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        for (px, py), word in found:
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>'
                f'<text x="{px + 6:.1f}" y="{py - 5:.1f}" fill="{colour}">{word}</text>'
            )
    return "".join(parts)


def main() -> None:
    rows = read_rows()
    bar = rows["", "untouched"].zero_shot - 0.01, 0.7 * rows["", "mean-centring"].ndcg
    drawn = panel(MARGIN, "zero-shot over the gap", "zero_shot", rows, bar[0], (0.34, 0.42))
    second = 2 * MARGIN + SIDE + 20
    drawn += panel(second, "mixed search, NDCG@10, over the gap", "ndcg", rows, bar[1], (0, 0.12))
    bottom = MARGIN + SIDE + 46
    for at, (name, (colour, *_)) in enumerate(WALKS.items()):
        drawn += (
            f'<text x="{MARGIN}" y="{bottom + 18 * at}" fill="{colour}">● {escape(name)}</text>'
        )
    notes = "Dashed: the gap at least 55 % smaller and", "the bar of zero-shot or mixed search met"
    for at, note in enumerate(notes):
        drawn += f'<text x="{second}" y="{bottom + 18 * at}">{note}</text>'
    width, height = second + SIDE + MARGIN, bottom + LEGEND
    style = (
        "<style>text{font:12px sans-serif}.title{font:600 14px sans-serif}"
        ".end{text-anchor:end}.middle{text-anchor:middle}.frame{fill:#fff;stroke:#ccc}"
        ".bar{fill:none;stroke:#888;stroke-dasharray:5 4}</style>"
    )
    (RESULTS / "photo-centred.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'fill="#444">'
        f"<title>What a smaller gap costs and brings</title>{style}"
        f'<rect width="{width}" height="{height}" fill="#fafafa"/>{drawn}</svg>',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
