"""A real browser, and runs that reports are made of; captions and names mean harm."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clip_refine.config.runs import RefineConfig
from clip_refine.models import load_open_clip
from clip_refine.roads.refine import refine
from clip_refine.toy import ToyClasses, ToyPairs
from tests.conftest import needs

playwright = needs("playwright.sync_api", "dev")

DESKTOP = {"width": 1180, "height": 900}
PHONE = {"width": 360, "height": 760}
HARM = "<script>alert(1)</script>"
MORE_HARM = "</script><img src=x onerror=alert(2)> \" ' & {{ 7 * 7 }} ${7} \\"


class HarmfulPairs(ToyPairs):
    """Drawn pairs whose captions and file names try to break out of the page."""

    def __init__(self, split: str, size: int) -> None:
        super().__init__(split, size, captions_per_image=2)
        self.name = MORE_HARM
        self.captions = tuple(
            (f"{HARM}{first}", f"{MORE_HARM}{second}") for first, second in self.captions
        )

    def image_name(self, index: int) -> str:
        return f"a \"quoted\" <b>'name'</b> {index}.png"


@dataclass
class Opened:
    """A page with everything it complained about or asked the network for."""

    page: "playwright.Page"
    trouble: list[str] = field(default_factory=list)

    def width(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth")


Open = Callable[..., Opened]


@pytest.fixture(scope="session")
def browser() -> Iterator["playwright.Browser"]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine (Debian and Ubuntu: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: "playwright.Browser") -> Iterator[Open]:
    """Open a file at a size and in light or dark; every complaint is kept."""
    contexts = []

    def open_file(path: Path, size: dict[str, int] = DESKTOP, scheme: str = "light") -> Opened:
        context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=size is PHONE)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("console", lambda message: opened.trouble.append(message.text))
        opened.page.on("pageerror", lambda error: opened.trouble.append(str(error)))
        opened.page.on("dialog", lambda dialog: opened.trouble.append(f"dialog {dialog.message}"))

        def seen(request: "playwright.Request") -> None:
            if not request.url.startswith((path.as_uri(), "data:", "blob:")):
                opened.trouble.append(f"asked for {request.url}")

        opened.page.on("request", seen)
        opened.page.goto(path.as_uri())
        opened.page.wait_for_selector("html[data-ready='true']")
        return opened

    yield open_file
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def harmful_run(tiny_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refinement of 64 pairs, scored on 40."""
    folder = tmp_path_factory.mktemp("harm")
    out, shapes = folder / "run", ToyClasses("toy_shape", size=24)
    for index, label in enumerate(shapes.labels):
        of_class = (
            folder / "tasks" / (f"<img src=x onerror=alert({label})>" if label < 4 else f"{label}")
        )
        of_class.mkdir(parents=True, exist_ok=True)
        shapes.load_image(index).save(of_class / f"{index}.png")
    config = RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "train": {"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"},
            "evaluation": {"zero_shot": (str(folder / "tasks"),)},
            "out": out,
        }
    )
    refine(
        config,
        model=load_open_clip(tiny_name),
        train_pairs=HarmfulPairs("harm", 64),
        held_out=HarmfulPairs("harm-held-out", 40),
    )
    return out
