"""Lines, marks and the verdict; colours only where the interval excludes zero."""

import pytest
from rich.console import Console

from clip_refine.report.tables import (
    answer,
    before_after_table,
    doubts,
    headline_lines,
    interval_text,
    mark_of,
    score_lines,
    signed,
    verdict,
)
from clip_refine.results import Interval, RunScores, Scores


def side(gap: float, recall: float, top1: float) -> Scores:
    geometry = dict.fromkeys(
        (
            *("true_pair_cosine", "alignment", "uniformity_log", "relative_modality_gap"),
            *("text_first_share", "linear_separability", "hubness_skewness", "effective_rank"),
        ),
        0.5,
    )
    return Scores(
        geometry={"centroid_distance": gap, **geometry},
        retrieval={"image_to_text_recall@1": recall, "text_to_image_recall@1": recall},
        zero_shot={"[bold]birds": {"top1": top1, "top5": 1.0}},
        pairs=1000,
        captions=2000,
    )


def run(**difference: tuple[float, float, float]) -> RunScores:
    return RunScores(
        before=side(1.0, 0.2, 0.75),
        after=side(0.7, 0.25, 0.74),
        difference={
            path.replace("__", "."): Interval(mean=mean, low=low, high=high)
            for path, (mean, low, high) in difference.items()
        },
        recipe={},
        seconds={},
    )


MEASURED = run(
    **{
        "geometry__centroid_distance": (-0.3, -0.4, -0.2),
        "mean_recall@1": (0.05, 0.01, 0.09),
        "zero_shot_top1": (-0.01, -0.03, 0.01),
        "retrieval__image_to_text_recall@1": (-0.05, -0.09, -0.01),
    }
)


def test_marks():
    marks = {line.heading: line.mark for line in score_lines(MEASURED)}
    assert marks["centroid distance (the gap)"] == "better"  # it fell
    assert marks["image to text R@1"] == "worse"
    assert marks["text to image R@1"] == ""  # nothing is known of it
    assert [line.mark for line in headline_lines(MEASURED)][2] == "no clear change"


def test_verdict():
    assert verdict(MEASURED) == (
        "The gap fell from 1.000 to 0.700 (−30%), mean R@1 rose from 0.200 to 0.250, and mean "
        "zero-shot top-1 did not clearly change (0.750 to 0.740), on 1,000 held-out images."
    )
    assert verdict(run()).startswith("The gap went from 1.000 to 0.700 (−30%), mean R@1 went")


def test_the_answer_in_a_few_words():
    assert answer(MEASURED) == "Better in the gap and mean R@1, but image to text R@1 is worse."
    lost = {"mean_recall@1": (-0.05, -0.09, -0.01), "zero_shot_top1": (-0.01, -0.03, 0.01)}
    assert answer(run(**lost)) == "Worse in mean R@1."
    gap = {"geometry__centroid_distance": (-0.3, -0.4, -0.2)}
    assert answer(run(**gap, **lost)) == "Better in the gap, worse in mean R@1."
    assert answer(run()) == "Nothing clearly changed."


def test_what_three_places_do_not_show_is_no_clear_change():
    scores = run(geometry__centroid_distance=(-0.0001, -0.0002, -0.0001))
    same = scores.model_copy(update={"after": side(0.9999, 0.2, 0.75)})
    assert score_lines(same)[0].mark == "no clear change"
    assert verdict(same).startswith("The gap did not clearly change (1.000 to 1.000), mean R@1")


@pytest.mark.parametrize(
    ("interval", "higher_is_better", "mark"),
    [
        # shown as [−0.016, 0.000], so it is not called worse
        ((-0.007, -0.0163, -0.0002), True, "no clear change"),
        ((-0.007, -0.0163, -0.0006), True, "worse"),  # [−0.016, −0.001]
        ((0.0072, 0.0004999, 0.014), True, "no clear change"),
        ((0.0072, 0.0005001, 0.014), True, "better"),
        ((0.0004, 0.001, 0.002), True, "no clear change"),  # the change is shown as 0.000
        ((-0.1, -0.2, -0.05), None, ""),
    ],
)
def test_what_is_judged_is_what_is_shown(
    interval: tuple[float, float, float], higher_is_better: bool | None, mark: str
):
    mean, low, high = interval
    found = Interval(mean=mean, low=low, high=high)
    assert mark_of(found, mean, higher_is_better) == mark
    shown = interval_text(found).strip("[]").split(", ")
    if mark == "no clear change":
        assert signed(mean) == "0.000" or "0.000" in shown
    elif mark:
        assert {text[0] for text in shown} in ({"+"}, {"−"})


@pytest.mark.parametrize("colour", ["32", "31"])
def test_the_terminal_colours_only_what_is_clear(colour: str):
    console = Console(width=120, force_terminal=True, color_system="standard", _environ={})
    with console.capture() as shown:
        console.print(before_after_table(MEASURED))
    coloured = [line for line in shown.get().splitlines() if f"\x1b[{colour}m" in line]
    assert len(coloured) == 1
    assert ("the gap" if colour == "32" else "image to text") in coloured[0]
    assert "[bold]birds top1" in shown.get()


def test_why_nothing_changed_and_what_would_show_more():
    unclear = run(
        geometry__centroid_distance=(0.0, -0.001, 0.001), **{"mean_recall@1": (0.01, -0.01, 0.03)}
    )
    said = "On 1,000 images a mean R@1 that changes by less than 0.029 passes for noise more than "
    said += "one time in five; to see +0.01, about 8,200 are needed."
    assert doubts(unclear) == said
    recipe = {"steps": 3, "train": {"learning_rate": 1e-6}}
    found = doubts(unclear.model_copy(update={"recipe": recipe}))
    assert found.startswith(
        "3 steps at learning rate 1e-06 move no weight by more than about 3e-06, which can hardly "
        "change this model: more pairs"
    )
    assert found.endswith(said)
    far = {"steps": 300, "train": {"learning_rate": 1e-3}}
    found = doubts(unclear.model_copy(update={"recipe": far}))
    assert "compare would say whether another recipe does more here." in found
    # where it did change there is nothing to excuse
    assert doubts(MEASURED.model_copy(update={"recipe": recipe})) == ""


def test_a_line_without_a_mark_says_why():
    why = {line.heading: line.unjudged for line in score_lines(run())}
    assert why["cosine of true pairs"] == "neither way is better by itself"
    assert why["image to text R@1"] == "not resampled, so no interval"
