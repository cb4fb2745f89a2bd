"""A comparison's page: ranks, fronts and words by hand; names stay names."""

import re
from pathlib import Path

import pytest
from plotly.graph_objects import Figure

from clip_refine.cli import main
from clip_refine.report.comparison import decide, differences_cells, marks
from clip_refine.report.comparison_page import (
    colours,
    front,
    rankings,
    trade_off_charts,
    write_comparison_report,
    write_runs_report,
    write_suite_report,
)
from clip_refine.results import (
    Comparison,
    ComparisonRow,
    Difference,
    EvaluatedModel,
    Interval,
    RecipeSummary,
    Score,
    Spread,
    SuiteScores,
    TaskScores,
)
from clip_refine.support.errors import DataError
from tests.report.test_page import fit, in_black
from tests.report.test_score_lines import MEASURED, side

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
    assert (best.kind, best.mark) == ("trained", "better")
    assert best.dots[0] < best.mean < best.dots[1]
    low, high = best.noise or (0, 0)
    assert recall.untouched < low < best.mean < high
    assert recall.lines[2].mark == "no clear change"
    assert {found.kind for found in zero_shot.lines} == {"untouched", "free", "trained"}


def test_scales_do_not_make_much_of_little():
    near = line("a", 0.99, 0.201)
    tight = {name: Interval(mean=0.001, low=0.0, high=0.002) for name in near.difference}
    near = near.model_copy(update={"difference": tight})
    made = Comparison(
        rows=(row("pre-trained", 1, 1.0, 0.2), row("a", 1, 0.99, 0.201)),
        summary=(COMPARISON.summary[0], near),
        learning_rates=(),
    )
    recall, gap, _ = rankings(made)
    assert recall.high - recall.low == pytest.approx(0.1)
    assert gap.low == 0.0
    assert abs(recall.lines[0].mean - recall.untouched) < 2  # percent of the width
    low, high = trade_off_charts(made)[0].panels[0].figure["layout"]["yaxis"]["range"]
    assert high - low == pytest.approx(0.1)


def test_rows_say_what_the_head_says():
    # clear on these images, but seeds differ more: 0.15 < 2 · 0.2 / √2
    found = COMPARISON.summary[2]
    wide = {name: Spread(mean=spread.mean, deviation=0.2) for name, spread in found.scores.items()}
    unsure = found.model_copy(update={"scores": wide, "runs": 2})
    made = COMPARISON.model_copy(update={"summary": (*COMPARISON.summary[:2], unsure)})
    assert marks(unsure, made.summary[0])["mean_recall@1"] == "no clear change"
    assert rankings(made)[0].lines[0].mark == "no clear change"
    cells = {name: cells for name, *cells in differences_cells(made)[1]}
    assert not cells[HARM][1].endswith("+")
    assert decide(made).taken == "mean-centring"


def test_the_front_is_beaten_by_none():
    points = [(1.0, 0.2), (0.1, 0.2), (0.7, 0.35), (0.8, 0.3)]
    assert front(points) == [1, 2]


def test_figures_are_what_plotly_knows():
    charts = trade_off_charts(COMPARISON)
    assert [chart.name for chart in charts] == ["trade-off-mean-recall", "trade-off-zero-shot-top1"]
    for chart in charts:
        Figure(in_black(chart.panels[0].figure))
        assert "mean-centring" in chart.alternative


def test_every_mark_is_named_and_reached_by_an_arrow():
    runs = COMPARISON.summary[2].model_copy(update={"runs": 2})
    made = COMPARISON.model_copy(update={"summary": (*COMPARISON.summary[:2], runs)})
    hues = colours(made)
    assert len(set(hues.values())) == 3
    for chart in trade_off_charts(made):
        figure = chart.panels[0].figure
        notes = figure["layout"]["annotations"]
        names = [note for note in notes if note["text"]]
        assert [note["text"] for note in names[:2]] == ["pre-trained", "mean-centring"]
        assert names[2]["text"].startswith("hycd[&lt;script&gt;")
        assert [note["font"]["color"] for note in names] == list(hues.values())
        arrows = [note for note in notes if note["showarrow"]]
        assert [(arrow["ax"], arrow["x"]) for arrow in arrows] == [(1.0, 0.1), (1.0, 0.7)]
        *_, seeds, mean = figure["data"]
        assert len(seeds["x"]) == 2
        assert mean["x"] == [0.7]
        assert seeds["marker"]["color"] == mean["marker"]["color"] == hues[HARM]


def test_the_page_says_how_and_not_where(tmp_path: Path):
    folder = tmp_path / "some one" / "secret" / "compared"
    folder.mkdir(parents=True)
    write_comparison(folder)
    (folder / "config.yaml").write_text(
        "model: {name: '/home/some one/a/model'}\n"
        "data: {train: '/home/some one/a b/train.csv', val: '/home/some one/a b/val.csv'}\n"
        "train: {batch_size: 64}\n"
    )
    (folder / "environment.json").write_text(
        f'{{"command": ["clip-refine", "compare", "--out", "{folder}"]}}'
    )
    text = write_comparison_report(folder).read_text(encoding="utf-8")
    assert "some one" not in text
    assert "--config compared/config.yaml" in text
    assert "From the folder that holds compared." in text
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts["Steps"] == "3 of 64 pairs"
    assert facts["Learning rates"].endswith(" 1e-05")
    assert facts["Held-out images"] == "from …/a b/val.csv"
    heads = re.findall(r"<thead><tr><th scope=\"col\">(.*?)</th>", text)
    assert set(heads) <= {"recipe", "package"}  # none is empty


def test_the_page_is_written_and_names_stay_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["report", str(write_comparison(tmp_path))])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text
    assert "hycd[&lt;script&gt;alert(1)" in text
    # the decision stands first
    assert "<h1>Take hycd[&lt;script&gt;alert(1)" in text
    assert f"--config {tmp_path.name}/config.yaml" in text
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "is no comparison.json" in capsys.readouterr().err


def write_scores(folder: Path, recipe: str, **changes: object) -> Path:
    """A run's scores, of which the page of several runs is made."""
    folder.mkdir(parents=True)
    about = {"name": recipe, "model": "toy", "pairs": 500, "steps": 7, "seed": 3}
    about["train"] = {"learning_rate": 2e-5}
    MEASURED.model_copy(update={"recipe": about, **changes}).write(folder / "scores.json")
    return folder


def test_runs_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [write_scores(tmp_path / "some one" / name, "rafa") for name in ("a", HARM[5:13])]
    main(["report", *map(str, runs)])
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "some one" / "side-by-side.html"
    text = page.read_text(encoding="utf-8")
    assert "<h1>Take a: it is better in mean R@1 0.250 against 0.200" in text
    assert "some one" not in text
    assert "<script>" not in text.replace("<script>\n", "", 1)
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts["a"] == "rafa, 500 training images, 7 steps, learning rate 2e-05, seed 3"
    assert facts.keys() == {"a", "&lt;script&gt;"}


def test_runs_of_other_models_are_not_put_side_by_side(tmp_path: Path):
    runs = [write_scores(tmp_path / "a", "rafa")]
    runs += [write_scores(tmp_path / "b", "rafa", before=side(0.9, 0.2, 0.75))]
    with pytest.raises(DataError, match=r"b: before its refinement it scored otherwise than a"):
        write_runs_report(runs)
    without = MEASURED.before.model_copy(update={"zero_shot": {}})
    runs[1] = write_scores(tmp_path / "c", "rafa", before=without)
    for both in (runs, runs[::-1]):
        with pytest.raises(DataError, match=r"c: was not measured by zero_shot_top1, which a was"):
            write_runs_report(both)
    with pytest.raises(DataError, match="two runs of one name"):
        write_runs_report([runs[0], runs[0]])


def test_a_run_that_is_called_as_the_untouched_model_is(tmp_path: Path):
    runs = [write_scores(tmp_path / "x" / name, "rafa") for name in ("pre-trained", "b")]
    text = write_runs_report(runs).read_text(encoding="utf-8")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts.keys() == {"x/pre-trained", "x/b"}


def test_runs_whose_recipes_are_none_are_named(tmp_path: Path):
    runs = [write_scores(tmp_path / name, "rafa") for name in ("a", "b")]
    MEASURED.model_copy(update={"recipe": {"pairs": "many"}}).write(runs[1] / "scores.json")
    with pytest.raises(DataError, match=r"/b: its results do not fit each other"):
        write_runs_report(runs)


def suite_scores() -> SuiteScores:
    def task(model: str, name: str, value: float) -> TaskScores:
        score = Score(value=value, low=value - 0.05, high=value + 0.05, higher_is_better=True)
        return TaskScores(
            task=name,
            kind="zero-shot",
            model=model,
            protocol="",
            source="/home/some one/x/birds",
            note=None,
            counts={"images": 1234},
            prompts="/home/some one/x/mine.txt",
            templates=(),
            class_names=None,
            model_fingerprint="",
            data_fingerprint="",
            scores={"top1": score},
            details={},
        )

    values = {"toy": (0.5, 0.6), "/home/some one/runs/<b>mine": (0.7, 0.605)}
    models = tuple(
        EvaluatedModel(label=label, name=label, pretrained=None, fingerprint="") for label in values
    )
    changes = (("birds", 0.2, 0.1, 0.3), ("cars, old", 0.005, -0.04, 0.05))
    return SuiteScores(
        suite="mine",
        models=models,
        measured=tuple(
            task(label, name, own[at])
            for label, own in values.items()
            for at, name in enumerate(("birds", "cars, old"))
        ),
        differences=tuple(
            Difference(
                task=name,
                score="top1",
                model=models[1].label,
                against="toy",
                mean=mean,
                low=low,
                high=high,
                higher_is_better=True,
            )
            for name, mean, low, high in changes
        ),
        missing={"planes": "looked for /home/some one/x/planes. Or images as CLASS/NAME.png."},
        resamples=1000,
        seed=1,
        seconds=2.0,
        environment={},
    )


def test_suites_have_the_same_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    suite_scores().write(tmp_path / "scores.json")
    main(["report", str(tmp_path / "scores.json")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "scores.html")
    text = (tmp_path / "scores.html").read_text(encoding="utf-8")
    head = re.findall("<h1>(.*?)</h1>", text)
    assert head == ["&lt;b&gt;mine against toy: better in 1 (birds) and worse in none of 2 tasks."]
    assert text.count('aria-label="better than') == 1
    assert text.count('aria-label="no clear change"') == 1
    assert "0.700 (+0.200 [+0.100, +0.300]) +" in text
    assert "Left out, as not found: planes." in text
    assert "<td>…/x/mine.txt</td>" in text
    assert "some one" not in text
    assert 'id="trade"' not in text  # one number a task has none


def test_thresholds_of_a_suite_are_drawn_and_said(tmp_path: Path):
    scores = suite_scores()
    of_fit = {"fit": fit(0.25, 0.9).model_dump(mode="json")}
    measured = tuple(
        one.model_copy(update={"details": of_fit} if one.task == "birds" else {})
        for one in scores.measured
    )
    scores.model_copy(update={"measured": measured}).write(tmp_path / "s.json")
    text = write_suite_report(tmp_path / "s.json").read_text(encoding="utf-8")
    assert 'id="tab-thresholds"' in text
    assert text.count("take a pair as fitting from cosine 0.250 on") == 2
    assert "&lt;b&gt;mine: So that 90% of what you take fits" in text
    assert re.findall(r'data-figure="(fit-\d)"', text) == ["fit-0"]
    scores.write(tmp_path / "none.json")
    assert 'id="thresholds"' not in write_suite_report(tmp_path / "none.json").read_text()


def test_a_suite_of_one_model_has_its_own_intervals(tmp_path: Path):
    both = suite_scores()
    alone = both.model_copy(
        update={"models": both.models[:1], "measured": both.measured[:2], "differences": ()}
    )
    alone.write(tmp_path / "one")
    text = write_suite_report(tmp_path / "one").read_text(encoding="utf-8")
    assert "<h1>toy on the suite mine.</h1>" in text
    assert "0.500 [0.450, 0.550]" in text
    assert text.count('class="noise"') == 2
