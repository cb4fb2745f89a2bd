"""A run's folder → its page."""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from clip_refine import __version__
from clip_refine.errors import DataError
from clip_refine.report.charts import (
    Chart,
    clouds_chart,
    cosines_chart,
    spectra_chart,
    training_charts,
)
from clip_refine.report.tables import (
    all_settings,
    command,
    headline_lines,
    interval_text,
    making_facts,
    number,
    score_lines,
    seconds,
    short_name,
    short_paths,
    signed,
    verdict,
    versions,
)
from clip_refine.results import (
    ClassChange,
    Evidence,
    RunScores,
    TaskChange,
    read,
)
from clip_refine.support.folder import write_file

# --------------------------------------------------------------------------------------------------
# Reading the small files of a run.


def read_mapping(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON mapping; JSON is YAML, too."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not valid. {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected names and values, got {found!r:.60}.")
    return found


def read_steps(path: Path) -> list[dict[str, float]]:
    """The records of `log.jsonl`."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path}: is no log of a run ({error}).") from error


# --------------------------------------------------------------------------------------------------
# Charts and tables → one self-contained HTML file.


def write_page(path: Path, template: str, *, charts: Sequence[Chart], **values: Any) -> None:
    """Fill a template in and write it; the file is there whole or not at all."""
    figures = {panel.name: panel.figure for chart in charts for panel in chart.panels}
    island: Mapping[str, Any] = values.pop("island", {})
    text = (
        _environment()
        .get_template(template)
        .render(
            **values,
            chart={chart.name: chart for chart in charts},
            island={**island, "figures": figures},
            plotly=_plotly(),
            version=__version__,
        )
    )
    write_file(path, text)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("clip_refine.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "interval": interval_text}
    return environment


@cache
def _plotly() -> str:
    """plotly.js as the Python package has it, 4.8 MB, as gzip and base64: 2 MB."""
    code = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(code, compresslevel=9, mtime=0)).decode("ascii")


# --------------------------------------------------------------------------------------------------
# A zero-shot task as the page shows it.


SHOWN = 8
"""Classes at most on each side; all are in the table."""


@dataclass(frozen=True)
class TaskView:
    """A task with its classes sorted."""

    name: str  # the task
    classes: Sequence[ClassChange]  # all
    gained: Sequence[ClassChange]  # those that gained most, first the most
    lost: Sequence[ClassChange]  # those that lost most, first the most
    rows: Sequence[Sequence[str]]  # all classes as cells of a table, by change
    confusions: Sequence[Sequence[str]]  # as cells of a table


def task_view(task: TaskChange) -> TaskView:
    """Sort the classes by what they gained."""
    by_gain = sorted(task.classes, key=lambda found: found.before - found.after)
    return TaskView(
        name=task.name,
        classes=task.classes,
        gained=[found for found in by_gain if found.after > found.before][:SHOWN],
        lost=[found for found in reversed(by_gain) if found.after < found.before][:SHOWN],
        rows=[
            (
                found.name,
                str(found.images),
                f"{found.before:.3f}",
                f"{found.after:.3f}",
                signed(found.after - found.before),
            )
            for found in by_gain
        ],
        confusions=[
            (pair.label, pair.predicted, str(pair.images), str(pair.before), str(pair.after))
            for pair in task.confusions
        ],
    )


# --------------------------------------------------------------------------------------------------
# The folder of a refinement → its `report.html`.


def write_run_report(run: Path) -> Path:
    """Write `report.html` from the other files of a run."""
    scores = read(RunScores, run / "scores.json")
    evidence = read(Evidence, run / "report.json")
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
