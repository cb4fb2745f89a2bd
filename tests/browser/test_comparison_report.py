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
    assert len(set(places)) == 2


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_names_stand_at_their_marks_and_not_on_one_another(
    report: Path, open_page: Open, size: dict[str, int]
):
    page = open_page(report, size).page
    page.click("#tab-trade")
    names = page.locator(".plot.trade-off-mean-recall .annotation-text")
    names.first.wait_for()
    page.wait_for_timeout(300)
    boxes = page.evaluate(
        """() => [...document.querySelectorAll(".plot.trade-off-mean-recall .annotation")]
          .filter((note) => note.textContent.trim())
          .map((note) => note.querySelector(".annotation-text").getBoundingClientRect())
          .map(({ left, top, right, bottom }) => [left, top, right, bottom])"""
    )
    assert len(boxes) == 3
    for index, one in enumerate(boxes):
        assert 0 <= one[0] < one[2] <= size["width"]
        for other in boxes[index + 1 :]:
            assert (
                one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            )


def test_wide_tables_keep_their_heads_and_say_that_they_scroll(report: Path, open_page: Open):
    page = open_page(report, PHONE).page
    page.click("#tab-tables")
    table = page.locator("#tables .wide").first
    hint = "element => getComputedStyle(element, '::before').content"
    assert "scroll" in table.evaluate(hint)
    before = table.locator("tbody td").first.bounding_box()
    table.evaluate("element => element.scrollTo(200, 0)")
    assert table.evaluate("element => element.scrollLeft") > 0
    assert table.locator("tbody td").first.bounding_box() == before
    page.click("#tab-trade")
    page.set_viewport_size({"width": 1600, "height": 900})
    page.locator("#trade details summary").first.click()
    small = page.locator("#trade .wide").first
    page.wait_for_function(
        "element => element.clientWidth >= element.scrollWidth", arg=small.element_handle()
    )
    page.wait_for_timeout(200)
    assert "scroll" not in small.evaluate(hint)
