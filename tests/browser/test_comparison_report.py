"""The report of a comparison in a browser."""

from pathlib import Path

import pytest

from clip_refine.cli import main
from tests.browser.conftest import DESKTOP, PHONE, Open
from tests.report.test_comparison_page import write_comparison


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_comparison(tmp_path_factory.mktemp("comparison"))
    main(["report", str(folder)])
    return folder / "report.html"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_part_opens_without_a_complaint_and_fits(
    report: Path, open_page: Open, size: dict[str, int]
):
    opened = open_page(report, size)
    for name in ("ranking", "trade", "tables", "made"):
        opened.page.click(f"#tab-{name}")
        for plot in opened.page.locator(f"#{name} .plot").all():
            plot.locator("svg.main-svg").first.wait_for()
        assert opened.width() <= size["width"], name
    assert opened.page.locator(".trade-off-mean-recall .scatterlayer .point").count() >= 3
    assert opened.trouble == []


def test_seeds_are_dots_where_they_belong(report: Path, open_page: Open):
    page = open_page(report).page
    lane = page.locator(".ranking").first.locator("li.trained .lane").first
    assert lane.locator(".dot").count() == 2
    places = [dot.get_attribute("style") for dot in lane.locator(".dot").all()]
    assert places == ["left: 50.0%", "left: 100.0%"]
