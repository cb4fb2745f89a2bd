"""The folder of a refinement → its `report.html`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_refine.evidence import Evidence, read_evidence
from clip_refine.report.chart import Chart
from clip_refine.report.class_view import task_view
from clip_refine.report.feature_charts import clouds_chart, cosines_chart, spectra_chart
from clip_refine.report.files import read_mapping, read_steps
from clip_refine.report.making import (
    all_settings,
    command,
    making_facts,
    seconds,
    short_name,
    short_paths,
    versions,
)
from clip_refine.report.page import write_page
from clip_refine.report.score_lines import headline_lines, score_lines, verdict
from clip_refine.report.training_charts import training_charts
from clip_refine.results import RunScores, read_run_scores


def write_run_report(run: Path) -> Path:
    """Write `report.html` from the other files of a run.

    Args:
        run: The folder that `refine` wrote, with `report.json` in it.

    Returns:
        The file.

    Raises:
        DataError: A file is missing or holds something else.
    """
    scores = read_run_scores(run / "scores.json")
    evidence = read_evidence(run / "report.json")
    settings = read_mapping(run / "config.yaml")
    environment = read_mapping(run / "environment.json")
    training = training_charts(read_steps(run / "log.jsonl"))
    features = [
        clouds_chart(evidence),
        cosines_chart(evidence.histograms),
        spectra_chart(evidence.spectra),
    ]
    path = run / "report.html"
    write_page(
        path,
        "run.html.j2",
        charts=[*features, *training],
        title=f"{settings.get('recipe', 'refinement')} on {short_paths(scores.recipe['model'])}",
        about=_about(scores, settings),
        verdict=verdict(scores),
        headline=headline_lines(scores),
        lines=score_lines(scores),
        scores=scores,
        source=short_name(evidence.source),
        training=[chart.name for chart in training],
        tab_names=_tab_names(evidence, training),
        rankings={"captions": evidence.captions, "images": evidence.images},
        thumbnails=evidence.thumbnails,
        tasks=[task_view(task) for task in evidence.tasks],
        facts=making_facts(scores, settings, environment, short_name(evidence.source)),
        command=command(environment),
        versions=versions(environment),
        seconds=seconds(scores),
        all_settings=all_settings(settings),
        island={
            "pairs": [
                {**pair.model_dump(), "name": short_name(pair.name)}
                for pair in evidence.clouds.pairs
            ],
            "thumbnails": evidence.thumbnails,
        },
    )
    return path


def _tab_names(evidence: Evidence, training: Sequence[Chart]) -> dict[str, str]:
    """Part of the page → what its tab is called."""
    names = {"scores": "Scores", "space": "Feature space", "retrieval": "Retrieval"}
    names |= {"classes": "Zero-shot"} if evidence.tasks else {}
    names |= {"training": "Training"} if training else {}
    return {**names, "made": "How it was made"}


def _about(scores: RunScores, settings: Mapping[str, Any]) -> str:
    """What was done, in a line."""
    recipe = scores.recipe
    return (
        f"Recipe {settings.get('recipe', 'unknown')} · model {short_paths(recipe['model'])} · "
        f"{recipe['pairs']:,} training images · {recipe['steps']:,} steps"
    )
