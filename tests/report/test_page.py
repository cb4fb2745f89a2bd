"""The page as a file: small, whole, and of figures that Plotly knows."""

import base64
import json
import os
import re
from pathlib import Path

import pytest

from clip_refine.cli import main
from clip_refine.config import RefineConfig, dump_config
from clip_refine.report.page import reliability_chart
from clip_refine.report.run_page import (
    clouds_chart,
    cosines_chart,
    spectra_chart,
    training_charts,
    write_run_report,
)
from clip_refine.results import (
    ClassChange,
    Clouds,
    ConfusionChange,
    Cutoff,
    Evidence,
    FitProbability,
    Histograms,
    Pair,
    Query,
    Ranking,
    Spectra,
    TaskChange,
)
from tests.report.test_score_lines import MEASURED

STEPS = [
    {"step": number, "loss_rafa": 1.0, "loss_total": 2.0, "image_norm": 9.0, "text_norm": 8.0}
    for number in (1, 2, 3)
]


def fit(at: float, precision: float) -> FitProbability:
    cutoff = Cutoff(
        wished=0.9,
        cosine=at,
        precision=precision,
        recall=0.5,
        false_positive_rate=0.05,
        nonsense_found=0.25,
    )
    return FitProbability(
        slope=20.0,
        intercept=-5.0,
        calibration_error=0.0123,
        calibration_interval=(0.0, 0.02),
        reliability=((0.1, 0.12, 50), (0.9, 0.88, 60)),
        cutoffs={"precision": cutoff},
        images=(40, 41),
        nonsense=50,
    )


def evidence(pairs: int, thumbnails: int, *, thumbnail_bytes: int = 30) -> Evidence:
    points = tuple((number / pairs, 0.5) for number in range(pairs))
    described = tuple(
        Pair(
            image=number,
            name=f"images/{number:06}.jpg",
            caption="a man rides a horse along a beach while two dogs run behind him",
            cosine_before=0.25,
            cosine_after=0.5,
            rank_before=3,
            rank_after=1,
        )
        for number in range(pairs)
    )
    spectrum = tuple(1 / number for number in range(1, 769))
    return Evidence(
        source="captions.csv",
        clouds=Clouds(
            pairs=described,
            image_before=points,
            text_before=points,
            image_after=points,
            text_after=points,
            explained=(0.5, 0.25),
            fitted_on=pairs,
        ),
        histograms=Histograms(
            edges=(0.0, 0.5, 1.0),
            true_before=(0.5, 0.5),
            wrong_before=(1.0, 0.0),
            true_after=(0.0, 1.0),
            wrong_after=(1.0, 0.0),
            auc=(0.9, 0.8),
            threshold=(0.3, 0.2),
            recall=(0.5, 0.6),
        ),
        spectra=Spectra(
            image_before=spectrum, text_before=spectrum, image_after=spectrum, text_after=spectrum
        ),
        images=Ranking[str](
            queries=pairs,
            improved=1,
            worsened=1,
            most_improved=(
                Query[str](
                    image=0,
                    caption="a dog",
                    rank_before=9,
                    rank_after=1,
                    first_before="a cat",
                    first_after="a dog",
                ),
            ),
            most_worsened=(),
        ),
        captions=Ranking[int](
            queries=pairs,
            improved=1,
            worsened=0,
            most_improved=(),
            most_worsened=(
                Query[int](
                    caption="a cat",
                    image=1,
                    rank_before=1,
                    rank_after=12,
                    first_before=1,
                    first_after=2,
                ),
            ),
        ),
        tasks=(
            TaskChange(
                name="birds",
                classes=(
                    ClassChange(name="wren", images=10, before=0.5, after=0.75, low=0.1, high=0.4),
                    ClassChange(
                        name="robin", images=10, before=0.5, after=0.25, low=-0.5, high=0.1
                    ),
                    ClassChange(name="heron", images=10, before=0.5, after=0.5, low=0.0, high=0.0),
                ),
                confusions=(
                    ConfusionChange(label="wren", predicted="robin", images=10, before=4, after=1),
                ),
            ),
        ),
        fits=(fit(0.25, 0.9), fit(0.5, 0.9)),
        kept={"precision": fit(0.25, 0.6).cutoffs["precision"]},
        thumbnails={
            number: base64.b64encode(os.urandom(thumbnail_bytes)).decode()
            for number in range(thumbnails)
        },
    )


def write_run(folder: Path, found: Evidence) -> Path:
    run = MEASURED.model_copy(update={"recipe": {"model": "toy", "pairs": 5000, "steps": 3}})
    run.write(folder / "scores.json")
    found.write(folder / "report.json")
    (folder / "config.yaml").write_text(dump_config(RefineConfig()))
    (folder / "environment.json").write_text("{}")
    (folder / "log.jsonl").write_text("".join(f"{step}\n".replace("'", '"') for step in STEPS))
    return folder


def test_figures_are_what_plotly_knows():
    from plotly.graph_objects import Figure

    found = evidence(12, 3)
    charts = [
        *(
            clouds_chart(found.clouds),
            cosines_chart(found.histograms),
            spectra_chart(found.spectra),
            reliability_chart(
                "reliability", "?", dict(zip("ab", found.fits or (), strict=True)), ("red",) * 2
            ),
        ),
        *training_charts(STEPS),
    ]
    for chart in charts:
        for panel in chart.panels:
            figure = Figure(in_black(panel.figure))  # raises where a name or value is unknown
            assert len(figure.data) == len(panel.figure["data"])  # pyright: ignore


def test_singular_values_end_where_they_end():
    few = (1e-3, 5e-4, 2e-8, 1e-9)  # two directions, then rounding
    many = (1.0, 0.5, 2e-3, 1.5e-4)
    chart = spectra_chart(
        Spectra(image_before=few, text_before=few, image_after=many, text_after=many)
    )
    lengths = [len(line["y"]) for line in chart.panels[0].figure["data"]]
    assert lengths == [2, 4, 2, 4]  # each by its own first value, and no axis beyond
    assert chart.rows[2] == ("3", "", "0.002", "", "0.002")


def test_bars_stand_whole_within_their_axis():
    for panel in cosines_chart(evidence(12, 3).histograms).panels:
        low, high = panel.figure["layout"]["xaxis"]["range"]
        for bars in panel.figure["data"]:
            width = bars["x"][1] - bars["x"][0]
            assert bars["type"] == "bar"
            assert (bars["x"][0] - width / 2, bars["x"][-1] + width / 2) == (low, high)


def test_axes_of_steps_begin_at_zero_and_count_whole_steps():
    steps = [{**step, "gradient_norm": 5.01, "centroid_distance": 0.9} for step in STEPS]
    for chart in training_charts(steps):
        drawn = chart.panels[0].figure
        assert drawn["layout"]["yaxis"]["rangemode"] == "tozero"
        assert (drawn["layout"]["xaxis"]["dtick"], drawn["layout"]["xaxis"]["tickformat"]) == (
            1,
            ",d",
        )
        assert {line["mode"] for line in drawn["data"]} == {"lines+markers"}  # one step is no line


def in_black(value):
    """Plotly's checks know no colours by the page's names."""
    if isinstance(value, dict):
        return {key: in_black(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [in_black(inner) for inner in value]
    return "black" if isinstance(value, str) and value.startswith("var(--") else value


def test_a_run_of_5000_pairs_stays_under_10_megabytes(tmp_path: Path):
    # as many pairs and thumbnails as are ever drawn, and thumbnails as large as photographs give
    run = write_run(tmp_path, evidence(5000, 500, thumbnail_bytes=4500))
    assert write_run_report(run).stat().st_size < 10e6


def test_rows_without_a_verdict_say_why(tmp_path: Path):
    text = write_run_report(write_run(tmp_path, evidence(12, 3))).read_text(encoding="utf-8")
    rows = re.findall(r"<tr>.*?</tr>", text.split('<table class="scores">')[1], re.DOTALL)
    said = [re.sub(r"<[^>]+>", "", row.split("<td>")[-1]).strip() for row in rows if "<td>" in row]
    assert all(said)
    assert {"▲ better", "not resampled, so no interval", "neither way is better by itself"} <= {
        *said
    }
    tiles = re.findall(r"<li>.*?</li>", text.split('<ul class="tiles">')[1], re.DOTALL)[:4]
    assert "not resampled, so no interval" in tiles[3]


def test_an_interval_that_ends_at_its_number_is_explained(tmp_path: Path):
    run = write_run(tmp_path, evidence(12, 3))
    explained = "An interval that ends at the change itself"
    assert explained not in write_run_report(run).read_text(encoding="utf-8")
    scores = json.loads((run / "scores.json").read_text())
    scores["difference"]["geometry.centroid_distance"]["low"] = -0.3
    (run / "scores.json").write_text(json.dumps(scores))
    assert explained in write_run_report(run).read_text(encoding="utf-8")


def test_the_answer_stands_first(tmp_path: Path):
    text = write_run_report(write_run(tmp_path, evidence(12, 3))).read_text(encoding="utf-8")
    assert "<h1>Better in the gap and mean R@1, but image to text R@1 is worse.</h1>" in text
    assert text.index("<h1>") < text.index("The gap fell from 1.000") < text.index("<table")


def test_improved_most_is_said_beyond_chance_only(tmp_path: Path):
    found = evidence(12, 3)
    # of captions two an image: 28 against 12 would be beyond chance if each moved for itself
    captions = found.captions.model_copy(update={"improved": 28, "worsened": 12})
    images = found.images.model_copy(update={"improved": 28, "worsened": 12})
    found = found.model_copy(update={"captions": captions, "images": images})
    text = write_run_report(write_run(tmp_path, found)).read_text(encoding="utf-8")
    assert re.findall(r"<h4>(.*? most)</h4>", text) == [
        *("Up most", "Down most", "Improved most", "Down most", "Gained most")
    ]
    assert text.count("That is within chance") == text.count("More moved up than chance") == 1
    [query] = images.most_improved
    near = images.model_copy(
        update={"most_improved": (query.model_copy(update={"rank_before": 2}),)}
    )
    write_run(tmp_path, found.model_copy(update={"images": near}))
    text = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert "rank 2 → 1" not in text


def test_classes_are_shown_beyond_chance_only(tmp_path: Path):
    text = write_run_report(write_run(tmp_path, evidence(12, 3))).read_text(encoding="utf-8")
    assert "2 of 3 classes moved, 1 up and none down beyond chance." in text
    assert re.findall(r'<span class="class">(\w+)', text) == ["wren"]
    assert "<td>−0.250 [−0.500, +0.100]</td>" in text


def test_whether_the_old_threshold_still_holds(tmp_path: Path):
    found = evidence(12, 3)
    text = write_run_report(write_run(tmp_path, found)).read_text(encoding="utf-8")
    assert "The old thresholds after refinement, measured on 41 images: from" in text
    assert "from cosine 0.250 on, 60.0% of what is taken fits (90.0% before), and 50.0% of" in text
    assert "of the true ones are taken: set it to 0.500.</p>" in text
    assert "So that 90% of what you take fits, take a pair as fitting from cosine 0.500 on:" in text
    assert "25% of 50 nonsense texts find an image.</p>" in text
    assert "before: off by 0.012 (0.000 to 0.020); after: off by" in text
    assert "<td>after</td><td>90.0%</td><td>88.0%</td><td>60</td>" in text
    same = {"precision": fit(0.25, 0.885).cutoffs["precision"]}
    write_run(tmp_path, found.model_copy(update={"kept": same}))
    assert "are taken: it still holds.</p>" in write_run_report(tmp_path).read_text()
    idle = fit(0.25, 0.0)
    none = {"precision": idle.cutoffs["precision"].model_copy(update={"recall": 0.0})}
    idle = idle.model_copy(update={"cutoffs": none})
    write_run(tmp_path, found.model_copy(update={"fits": (idle, idle), "kept": none}))
    text = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert "are taken: no threshold finds anything here, before or after.</p>" in text
    write_run(tmp_path, found.model_copy(update={"fits": None, "kept": {}}))
    assert "chart-reliability" not in write_run_report(tmp_path).read_text(encoding="utf-8")


def test_what_an_older_version_did_not_keep_is_unknown(tmp_path: Path):
    run = write_run(tmp_path, evidence(12, 3))
    found = json.loads((run / "report.json").read_text())
    for of_class in found["tasks"][0]["classes"]:
        del of_class["low"], of_class["high"]
    (run / "report.json").write_text(json.dumps(found))
    text = write_run_report(run).read_text(encoding="utf-8")
    assert "<td>−0.250 [unknown]</td>" in text
    assert "2 of 3 classes moved, how many beyond chance is unknown: an older version" in text


def test_folders_of_whoever_made_it_are_left_out(tmp_path: Path):
    found = evidence(12, 3)
    pairs = tuple(
        pair.model_copy(update={"name": f"/home/some one/photos/{pair.image}.png"})
        for pair in found.clouds.pairs
    )
    clouds = found.clouds.model_copy(update={"pairs": pairs})
    source = "/home/some one/photos/captions.csv"
    write_run(tmp_path, found.model_copy(update={"clouds": clouds, "source": source}))
    text = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert "some one" not in text
    assert "…/photos/captions.csv" in text


def test_the_verb_makes_the_page_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path, evidence(12, 3))
    main(["report", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    first = (tmp_path / "report.html").read_bytes()
    main(["report", str(tmp_path)])
    assert (tmp_path / "report.html").read_bytes() == first


def test_a_run_without_its_data_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path, evidence(12, 3))
    (tmp_path / "report.json").unlink()
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "report.json: cannot be read (No such file or directory). A run writes it unless" in (
        capsys.readouterr().err
    )
