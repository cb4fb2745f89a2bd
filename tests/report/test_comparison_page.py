"""A comparison's page: ranks, fronts and words by hand; names stay names."""

from pathlib import Path

import pytest
from plotly.graph_objects import Figure

from clip_refine.cli import main
from clip_refine.report.comparison_page import front, rankings, trade_off_charts
from clip_refine.results import Comparison, ComparisonRow, Interval, RecipeSummary, Spread
from tests.report.test_page import in_black

HARM = "hycd[<script>alert(1)</script>]"


def row(recipe: str, seed: int, gap: float, recall: float) -> ComparisonRow:
    return ComparisonRow(
        recipe=recipe,
        seed=seed,
        learning_rate=1e-5 if recipe == HARM else None,
        steps=3,
        pairs=100,
        geometry={"centroid_distance": gap},
        retrieval={
            f"{way}_recall@{k}": recall
            for way in ("image_to_text", "text_to_image")
            for k in (1, 10)
        },
        zero_shot={"birds": {"top1": 0.5}},
        linear_probe={},
        selection=None,
        seconds=1.0,
        peak_memory=1.0,
    )


def line(recipe: str, gap: float, recall: float, *, differs: bool = True) -> RecipeSummary:
    numbers = {
        "gap": gap,
        "image_to_text_recall@1": recall,
        "text_to_image_recall@1": recall,
        "mean_recall@1": recall,
        "mean_recall@10": recall,
        "zero_shot_top1": 0.5,
    }
    difference = {
        "gap": Interval(mean=gap - 1, low=gap - 1.1, high=gap - 0.9),
        "mean_recall@1": Interval(mean=recall - 0.2, low=recall - 0.3, high=recall - 0.1),
        "zero_shot_top1": Interval(mean=0, low=-0.1, high=0.1),
    }
    return RecipeSummary(
        recipe=recipe,
        runs=1,
        learning_rate=1e-5 if recipe == HARM else None,
        scores={
            name: Spread(mean=value, deviation=0.01 if recipe == HARM else None)
            for name, value in numbers.items()
        },
        seconds=Spread(mean=1, deviation=None),
        peak_memory=Spread(mean=1, deviation=None),
        difference=difference if differs else {},
        pareto_best=differs,
    )


COMPARISON = Comparison(
    rows=(
        row("pre-trained", 1, 1.0, 0.2),
        row("mean-centring", 1, 0.1, 0.2),
        row(HARM, 1, 0.7, 0.3),
        row(HARM, 2, 0.7, 0.4),
    ),
    summary=(
        line("pre-trained", 1.0, 0.2, differs=False),
        line("mean-centring", 0.1, 0.2),
        line(HARM, 0.7, 0.35),
    ),
    learning_rates=(),
)


def write_comparison(folder: Path) -> Path:
    COMPARISON.write(folder / "comparison.json")
    (folder / "config.yaml").write_text("model: {name: toy}\ndata: {train: toy}\n")
    return folder


def test_rankings():
    recall, gap, zero_shot = rankings(COMPARISON)
    assert [found.recipe for found in recall.lines] == [HARM, "pre-trained", "mean-centring"]
    assert [found.recipe for found in gap.lines] == ["mean-centring", HARM, "pre-trained"]
    best = recall.lines[0]
    assert (best.kind, best.dots, best.mean, best.mark) == ("trained", [50, 100], 75, "better")
    assert recall.lines[2].mark == "no clear change"
    assert (recall.untouched, gap.untouched) == (0, 100)
    assert {found.kind for found in zero_shot.lines} == {"untouched", "free", "trained"}


def test_the_front_is_beaten_by_none():
    points = [(1.0, 0.2), (0.1, 0.2), (0.7, 0.35), (0.8, 0.3)]
    assert front(points) == [1, 2]


def test_figures_are_what_plotly_knows():
    charts = trade_off_charts(COMPARISON)
    assert [chart.name for chart in charts] == ["trade-off-mean-recall", "trade-off-zero-shot-top1"]
    for chart in charts:
        Figure(in_black(chart.panels[0].figure))
        assert "mean-centring" in chart.alternative


def test_the_page_is_written_and_names_stay_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["report", str(write_comparison(tmp_path))])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text
    assert "hycd[&lt;script&gt;alert(1)" in text
    # the decision stands first
    assert "<h1>Take hycd[&lt;script&gt;alert(1)" in text
    assert "--config &#39;" in text or f"--config …/{tmp_path.name}/config.yaml" in text
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "is no comparison.json" in capsys.readouterr().err
