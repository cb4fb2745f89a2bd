"""The folder of a comparison → its `report.html`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_refine.report.comparison import (
    INTERVALS,
    LEGEND,
    RATES_LEGEND,
    differences_cells,
    rates_cells,
    scores_cells,
)
from clip_refine.report.comparison_view import (
    KINDS,
    comparison_verdict,
    rankings,
    trade_off_charts,
)
from clip_refine.report.files import read_mapping
from clip_refine.report.making import all_settings, command, short_paths, versions
from clip_refine.report.page import write_page
from clip_refine.results import Comparison, read_comparison


def write_comparison_report(folder: Path) -> Path:
    """Write `report.html` from the other files of a comparison.

    Args:
        folder: What `compare` wrote.

    Returns:
        The file.

    Raises:
        DataError: A file is missing or holds something else.
    """
    comparison = read_comparison(folder / "comparison.json")
    settings = read_mapping(folder / "config.yaml")
    environment_file = folder / "environment.json"
    environment = read_mapping(environment_file) if environment_file.is_file() else {}
    charts = trade_off_charts(comparison)
    path = folder / "report.html"
    write_page(
        path,
        "comparison.html.j2",
        charts=charts,
        title="Comparison",
        about=_about(comparison, settings),
        verdict=comparison_verdict(comparison),
        rankings=rankings(comparison),
        kinds={key: name for key, (name, *_) in KINDS.items()},
        trade_offs=[chart.name for chart in charts],
        scores=_numbered(*scores_cells(comparison)),
        differences=differences_cells(comparison),
        rates=rates_cells(comparison) if comparison.learning_rates else None,
        legend=LEGEND,
        intervals=INTERVALS,
        rates_legend=RATES_LEGEND,
        facts=_facts(comparison, settings),
        command=command(environment),
        versions=versions(environment),
        all_settings=all_settings(settings),
    )
    return path


def _numbered(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return ["recipe", *head[1:]], [
        [f"{n} {row[0]}", *row[1:]] for n, row in enumerate(rows, start=1)
    ]


def _about(comparison: Comparison, settings: Mapping[str, Any]) -> str:
    trained = sum(bool(line.learning_rate) for line in comparison.summary)
    model = settings.get("model", {}).get("name")
    free = len(comparison.summary) - 1 - trained
    return f"{trained} trained and {free} training-free rows · model {model}"


def _facts(comparison: Comparison, settings: Mapping[str, Any]) -> dict[str, str]:
    data, train = settings.get("data", {}), settings.get("train", {})
    seeds = sorted({row.seed for row in comparison.rows})
    pairs = max(row.pairs for row in comparison.rows)
    facts = {
        "Model": settings.get("model", {}).get("name"),
        "Training images": f"{pairs:,} from {data.get('train')}",
        "Held-out data": data.get("val"),
        "Batch size": train.get("batch_size"),
        "Epochs": train.get("epochs"),
        "Seeds": ", ".join(str(seed) for seed in seeds),
        "Bootstrap resamples": settings.get("resamples"),
    }
    return {name: short_paths(str(value)) for name, value in facts.items() if value is not None}
