"""Take `docs/report.png` and `docs/report_phone.png` from a demo run: needs chromium.

`clip-refine demo && python tools/take_screenshots.py runs/demo`
"""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parents[1] / "docs"


def open_tab(page: Page, report: Path, tab: str) -> None:
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready='true']")
    page.click(f"#tab-{tab}")
    page.wait_for_timeout(800)


def hover_pair(page: Page, index: int) -> None:
    at = page.evaluate(
        """(index) => {
          const plot = document.querySelector("[data-figure=clouds-after]");
          const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
          return [box.x + xaxis._offset + xaxis.d2p(plot.data[0].x[index]),
                  box.y + yaxis._offset + yaxis.d2p(plot.data[0].y[index])];
        }""",
        index,
    )
    page.mouse.move(at[0] - 2, at[1])
    page.mouse.move(*at)
    page.wait_for_timeout(400)


def save(page: Page, name: str) -> None:
    path = DOCS / name
    page.screenshot(path=path)
    Image.open(path).convert("RGB").save(path, optimize=True)


def main(run: Path) -> None:
    report = (run / "report.html").resolve()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 1260})
        open_tab(page, report, "space")
        hover_pair(page, 3)
        save(page, "report.png")
        size = {"width": 360, "height": 760}
        page = browser.new_page(viewport=size, color_scheme="dark", device_scale_factor=1.5)
        open_tab(page, report, "retrieval")
        page.locator("#retrieval .way").first.evaluate(
            "heading => window.scrollBy(0, heading.getBoundingClientRect().top - 64)"
        )
        page.wait_for_timeout(300)
        save(page, "report_phone.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
