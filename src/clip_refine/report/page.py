"""Charts and tables → one self-contained HTML file."""

import base64
import gzip
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from clip_refine import __version__
from clip_refine.report.chart import Chart
from clip_refine.report.score_lines import interval_text, number, signed
from clip_refine.run_folder import write_file


def write_page(path: Path, template: str, *, charts: Sequence[Chart], **values: Any) -> None:
    """Fill a template in and write it; the file is there whole or not at all.

    Args:
        path: The HTML file.
        template: A file of `templates/`.
        charts: All figures on the page; the template draws them by name.
        values: What else the template asks for; `island` goes to the page's program.
    """
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
