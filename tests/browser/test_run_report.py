"""The report of a refinement as a reader has it: in a browser, offline."""

from pathlib import Path

import pytest

from clip_refine.results import Evidence, read
from tests.browser.conftest import DESKTOP, HARM, MORE_HARM, PHONE, Open, Opened


def tabs(opened: Opened) -> list[str]:
    return [
        tab.get_attribute("aria-controls") or "" for tab in opened.page.locator("[role=tab]").all()
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_part_opens_without_a_complaint_and_fits(
    harmful_run: Path, open_page: Open, size: dict[str, int], scheme: str
):
    opened = open_page(harmful_run / "report.html", size, scheme)
    for name in tabs(opened):
        opened.page.click(f"#tab-{name}")
        panel = opened.page.locator(f"#{name}")
        assert panel.is_visible()
        assert opened.page.locator("[role=tabpanel]:visible").count() == 1
        for plot in panel.locator(".plot").all():
            plot.locator("svg.main-svg").first.wait_for()
        assert opened.width() <= size["width"], name
    assert opened.trouble == []


def test_hovering_a_dot_shows_its_pair_in_both_clouds(harmful_run: Path, open_page: Open):
    opened = open_page(harmful_run / "report.html")
    page = opened.page
    page.click("#tab-space")
    page.locator("[data-figure=clouds-before] svg.main-svg").first.wait_for()
    page.locator("[data-figure=clouds-before]").scroll_into_view_if_needed()
    at = page.evaluate(
        """() => {
          const plot = document.querySelector("[data-figure=clouds-before]");
          const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
          return [box.x + xaxis._offset + xaxis.d2p(plot.data[0].x[3]),
                  box.y + yaxis._offset + yaxis.d2p(plot.data[0].y[3])];
        }"""
    )
    page.mouse.move(at[0] - 2, at[1])
    page.mouse.move(*at)
    page.wait_for_selector("#pair[data-pair]")
    shown = int(page.get_attribute("#pair", "data-pair") or -1)
    for cloud in ("before", "after"):
        ends, images, texts = page.evaluate(
            f"""() => {{
              const data = document.querySelector("[data-figure=clouds-{cloud}]").data;
              return [data[3].x, data[0].x, data[1].x];
            }}"""
        )
        assert ends == [images[shown], texts[shown]]
    assert page.locator("#pair .caption").inner_text().startswith(HARM)
    assert page.locator("#pair img").evaluate("image => image.naturalWidth") == 48
    assert opened.trouble == []


def test_the_theme_switch_recolours_page_and_charts(harmful_run: Path, open_page: Open):
    opened = open_page(harmful_run / "report.html")
    page = opened.page
    page.click("#tab-space")
    line = page.locator("[data-figure=spectra] .scatterlayer path.js-line").first
    line.wait_for()
    before = (
        page.evaluate("getComputedStyle(document.body).backgroundColor"),
        line.get_attribute("style"),
    )
    page.click("#theme")
    page.wait_for_timeout(200)
    after = (
        page.evaluate("getComputedStyle(document.body).backgroundColor"),
        line.get_attribute("style"),
    )
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert opened.trouble == []


def test_tabs_by_keyboard(harmful_run: Path, open_page: Open):
    opened = open_page(harmful_run / "report.html")
    opened.page.focus("#tab-scores")
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.get_attribute("#tab-space", "aria-selected") == "true"
    assert opened.page.locator("#scores").is_hidden()


def test_every_chart_has_words_and_a_table(harmful_run: Path, open_page: Open):
    page = open_page(harmful_run / "report.html").page
    charts = page.locator("figure.chart").all()
    assert len(charts) >= 6
    for chart in charts:
        assert chart.locator("figcaption").text_content()
        assert chart.locator("details tbody tr").count() > 0
        for plot in chart.locator(".plot").all():
            assert len(plot.get_attribute("aria-label") or "") > 30


def test_both_sides_of_queries_are_shown_alike(harmful_run: Path, open_page: Open):
    evidence = read(Evidence, harmful_run / "report.json")
    page = open_page(harmful_run / "report.html").page
    page.click("#tab-retrieval")
    for position, ranking in enumerate((evidence.captions, evidence.images)):
        said = page.locator(".balance + .balanced").nth(position).inner_text()
        assert f"{ranking.improved:,} improved" in said
        assert f"{ranking.worsened:,} worsened" in said
        columns = page.locator("#retrieval .charts").nth(position).locator(".examples")
        shown = [columns.nth(side).locator("article:visible").count() for side in (0, 1)]
        assert shown == [
            sum(not 0.5 <= query.rank_after / query.rank_before <= 2 for query in queries)
            for queries in (ranking.most_improved, ranking.most_worsened)
        ]
    assert page.locator("#retrieval img").first.evaluate("image => image.naturalWidth") > 0


def test_the_first_screen_of_a_phone_shows_verdict_and_numbers(harmful_run: Path, open_page: Open):
    opened = open_page(harmful_run / "report.html", PHONE)
    for part in ("h1", ".tiles", ".tabs"):
        box = opened.page.locator(part).first.bounding_box()
        assert box
        assert box["y"] + box["height"] <= PHONE["height"], part
    # names, numbers and verdicts of a row of the table are all to be seen
    row = opened.page.locator(".scores tbody tr:not(.group)").first
    for cell in row.locator("th, td").all():
        box = cell.bounding_box()
        assert box
        assert 0 <= box["x"] < box["x"] + box["width"] <= PHONE["width"]


def test_text_from_data_stays_text(harmful_run: Path):
    text = (harmful_run / "report.html").read_text(encoding="utf-8")
    assert HARM not in text
    assert MORE_HARM[:20] not in text
    assert "<b>'name'" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in text  # in the table
    assert "\\u003cscript\\u003ealert(1)" in text  # in the island
