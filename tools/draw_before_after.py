"""Draw `docs/before_after.svg` from a demo run: `python tools/draw_before_after.py runs/demo`.

Held-out images and captions of the toy world in the plane of the first two principal components of
both models' unit features together, so that the two panels share their axes.
"""

import sys
from pathlib import Path

import torch
from sklearn.decomposition import PCA
from torch.nn.functional import normalize

from clip_refine.models import load_open_clip
from clip_refine.models.embed import Embedder, embed_pairs
from clip_refine.results import RunScores, read
from clip_refine.toy import ToyPairs, model_directory

DOCS = Path(__file__).parents[1] / "docs"
SIDE, MARGIN, SHOWN = 340, 20, 400
IMAGE_COLOUR, TEXT_COLOUR = "#2b6cb0", "#dd6b20"


def unit_features(name: str, pairs: ToyPairs) -> tuple[torch.Tensor, torch.Tensor]:
    embedder = Embedder(load_open_clip(name), torch.device("cpu"), 256)
    embedded = embed_pairs(embedder, pairs)
    return normalize(embedded.image_features, dim=-1), normalize(embedded.text_features, dim=-1)


def panel(left: float, title: str, points: list[tuple[torch.Tensor, str]], bounds) -> str:
    low, high = bounds
    marks = []
    for rows, colour in points:
        for across, up in ((rows - low) / (high - low)).tolist():
            x, y = left + across * SIDE, MARGIN + 30 + (1 - up) * SIDE
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}"/>')
    frame = f'<rect x="{left}" y="{MARGIN + 30}" width="{SIDE}" height="{SIDE}" class="frame"/>'
    heading = f'<text x="{left}" y="{MARGIN + 14}" class="title">{title}</text>'
    return frame + heading + f'<g fill-opacity="0.55">{"".join(marks)}</g>'


def main(run: Path) -> None:
    scores = read(RunScores, run / "scores.json")
    pairs = ToyPairs("val", SHOWN)
    before = unit_features(f"local-dir:{model_directory()}", pairs)
    after = unit_features(f"local-dir:{run / 'model'}", pairs)
    together = torch.cat([*before, *after])
    plane = torch.from_numpy(PCA(2).fit_transform(together.numpy()))
    low, high = plane.min(dim=0).values - 0.03, plane.max(dim=0).values + 0.03
    parts = plane.split(SHOWN)
    panels = ""
    for number, (name, side) in enumerate((("before", scores.before), ("after", scores.after))):
        image, text = parts[2 * number], parts[2 * number + 1]
        gap = side.geometry["centroid_distance"]
        recall = side.retrieval["image_to_text_recall@1"]
        title = f"{name}: gap {gap:.2f}, image to text R@1 {recall:.3f}"
        left = MARGIN + number * (SIDE + 2 * MARGIN)
        points = [(image, IMAGE_COLOUR), (text, TEXT_COLOUR)]
        panels += panel(left, title, points, (low, high))
    width, height = 2 * SIDE + 4 * MARGIN, SIDE + 2 * MARGIN + 56
    legend = (
        f'<text x="{MARGIN}" y="{height - 12}" class="legend">'
        f'<tspan fill="{IMAGE_COLOUR}">● images</tspan>  '
        f'<tspan fill="{TEXT_COLOUR}">● captions</tspan></text>'
    )
    style = (
        "<style>.title{font:600 14px sans-serif;fill:#444}.legend{font:13px sans-serif}"
        ".frame{fill:#fff;stroke:#ccc}</style>"
    )
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        "<title>Image and caption features of the toy world before and after refinement</title>"
        f'{style}<rect width="{width}" height="{height}" fill="#fafafa"/>{panels}{legend}</svg>'
    )
    (DOCS / "before_after.svg").write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
