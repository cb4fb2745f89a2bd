"""What a comparison looks like."""

from rich.console import Console

from clip_refine.report.comparison import (
    RULE,
    comparison_csv,
    comparison_markdown,
    comparison_tables,
)
from clip_refine.results import (
    Comparison,
    ComparisonRow,
    Interval,
    LearningRateChoice,
    RecipeSummary,
    Spread,
)


def line(recipe: str, *, best: bool, deviation: float | None, low: float | None) -> RecipeSummary:
    names = ("gap", "image_to_text_recall@1", "text_to_image_recall@1", "mean_recall@10")
    names += ("mean_recall@1",)
    difference = (
        {}
        if low is None
        else {
            "gap": Interval(mean=-0.2, low=-0.3, high=-0.1),
            "mean_recall@1": Interval(mean=0.01, low=low, high=0.02),
        }
    )
    return RecipeSummary(
        recipe=recipe,
        runs=9,
        learning_rate=1e-5 if low is not None else None,
        scores={name: Spread(mean=0.5, deviation=deviation) for name in names},
        seconds=Spread(mean=12.34, deviation=None),
        peak_memory=Spread(mean=0.0 if low is None else 1.5, deviation=None),
        difference=difference,
        pareto_best=best,
    )


COMPARISON = Comparison(
    rows=(
        ComparisonRow(
            recipe="pre-trained",
            seed=1,
            learning_rate=None,
            steps=0,
            pairs=0,
            geometry={"centroid_distance": 0.5},
            retrieval={"image_to_text_recall@1": 0.5},
            zero_shot={"birds": {"top1": 0.25}},
            linear_probe={"birds": 0.75},
            selection=0.5,
            seconds=0.0,
            peak_memory=0.0,
        ),
    ),
    summary=(
        line("pre-trained", best=False, deviation=None, low=None),
        line("hycd[loss.alpha=0]", best=True, deviation=0.01, low=0.005),
        line("rafa", best=False, deviation=0.0, low=-0.005),
    ),
    learning_rates=(
        LearningRateChoice(
            recipe="rafa", chosen=1e-5, tried={"1e-05": 0.5, "0.1": None}, at_edge=True
        ),
    ),
)


def test_markdown_by_hand():
    lines = comparison_markdown(COMPARISON).splitlines()
    lines = lines[lines.index(RULE) + 2 :]
    assert lines[0] == "|  | gap ↓ | R@1 i→t ↑ | R@1 t→i ↑ | mean R@10 ↑ | lr | s | GB |"
    assert lines[2] == "| pre-trained | 0.500 | 0.500 | 0.500 | 0.500 |  | 12.3 |  |"
    cell = "0.500 ± 0.010"
    assert lines[3] == f"| hycd[loss.alpha=0] \\* |{f' {cell} |' * 4} 1e-05 | 12.3 | 1.50 |"
    assert "| hycd[loss.alpha=0] | −0.200 [−0.300, −0.100] + | +0.010 [+0.005, +0.020] + |" in lines
    assert "| rafa | −0.200 [−0.300, −0.100] + | +0.010 [−0.005, +0.020] |" in lines
    assert "| rafa | 1e-05 ! | 1e-05: 0.500, 0.1: failed |" in lines


def test_csv_has_every_number_by_its_path():
    header, row = comparison_csv(COMPARISON).splitlines()
    cells = dict(zip(header.split(","), row.split(","), strict=True))
    assert cells["recipe"] == "pre-trained"
    assert cells["zero_shot.birds.top1"] == "0.25"
    assert cells["linear_probe.birds"] == "0.75"
    assert cells["learning_rate"] == ""


def test_names_with_brackets_are_shown():
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as shown:
        console.print(*comparison_tables(COMPARISON))
    assert "hycd[loss.alpha=0] *" in shown.get()
    assert "−0.200 [−0.300, −0.100] +" in shown.get()
    assert "pre-trained" in shown.get()
