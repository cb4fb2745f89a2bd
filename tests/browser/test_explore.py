"""`clip-refine explore` as its user has it: a server on this machine, a page, no network."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from clip_refine.config.runs import RefineConfig
from clip_refine.roads.refine import refine
from clip_refine.toy import ToyPairs
from tests.browser.conftest import HARM, PHONE
from tests.conftest import needs

needs("gradio", "app")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server prints, beside everything else of it."""
    return tmp_path_factory.mktemp("explore") / "log.txt"


@pytest.fixture(scope="module")
def server(tiny_name: str, log: Path) -> Iterator[str]:
    folder = log.parent
    pairs, lines = ToyPairs("explore", 24), ["image,caption"]
    for index, (caption,) in enumerate(pairs.captions):
        pairs.load_image(index).save(folder / f"{index}.png")
        lines.append(f'{index}.png,"{HARM}{caption}"')
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {"train": str(folder / "pairs.csv"), "val": str(folder / "pairs.csv")}
    config = RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "data": data,
            "train": {"batch_size": 12, "learning_rate": 1e-3, "precision": "fp32"},
            "out": folder / "run",
            "report": False,
        }
    )
    refine(config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "clip_refine", "explore", str(config.out), "--no-browser"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=file,
            stderr=file,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
            },
        )
        try:
            _wait(f"http://127.0.0.1:{port}/", process, log)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            assert process.wait(10) == 143


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def test_queries_by_text_and_image_with_and_without_captions(server: str, browser):
    page = browser.new_page()
    trouble: list[str] = []
    page.on("console", lambda said: said.type == "error" and trouble.append(said.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: trouble.append(f"dialog {dialog.message}"))
    own = (server, "data:", "blob:")
    page.on("request", lambda asked: asked.url.startswith(own) or trouble.append(asked.url))
    page.goto(server)
    query = page.get_by_label("Query", exact=True)
    query.fill("a red circle")
    query.press("Enter")
    page.wait_for_function(
        "document.querySelector('#changed').innerText.includes('of 12 the same')"
    )
    for side in ("#base", "#refined"):
        page.wait_for_selector(f"{side} .hit img")
        assert page.locator(f"{side} .hit").count() == 12
        assert page.locator(f"{side} .text").count() == 0
    page.get_by_label("Mixed index").check()
    page.wait_for_selector("#refined .text, #base .text")
    texts = page.locator("#base .text, #refined .text")
    assert all(text.startswith(HARM) for text in texts.all_inner_texts())
    page.get_by_label("Mixed index").uncheck()
    page.wait_for_function("!document.querySelector('#base .text, #refined .text')")
    example = page.locator("button", has_text=HARM).first
    example.click()
    page.wait_for_function(f"document.querySelector('textarea').value.startsWith({HARM!r})")
    image = {"name": "query.png", "mimeType": "image/png", "buffer": _png()}
    page.locator("input[type=file]").first.set_input_files(image)
    page.wait_for_function(
        "document.querySelector('#base .score')?.innerText.includes('cosine 1.0')"
    )
    assert trouble == []
    page.close()


def test_side_by_side_on_a_phone(server: str, browser):
    page = browser.new_page(viewport=PHONE)
    page.goto(server)
    query = page.get_by_label("Query", exact=True)
    query.fill("a red circle")
    query.press("Enter")
    page.wait_for_selector("#refined .hit img")
    base, refined = (page.locator(side).bounding_box() for side in ("#base", "#refined"))
    assert base["x"] + base["width"] <= refined["x"]
    assert abs(base["y"] - refined["y"]) < 2
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    edges = {page.locator(name).first.bounding_box()["x"] for name in ("h2", "#changed", ".hits")}
    assert max(edges) - min(edges) < 1
    page.get_by_label("Mixed index").check()
    page.wait_for_selector("#refined .text")
    for text in page.locator(".hit .text").all():  # whole, however long
        assert text.evaluate("text => text.scrollHeight <= text.clientHeight")
    page.set_viewport_size({"width": 1280, "height": 900})
    base, refined = (page.locator(side).bounding_box() for side in ("#base", "#refined"))
    assert refined["x"] - base["x"] - base["width"] >= 30  # else cards, 8 apart, are one long row
    page.close()


def test_nobody_is_advised_to_share_the_page(server: str, log: Path):
    said = log.read_text()
    assert f"{server} on this machine only" in said
    assert "share" not in said


def _png() -> bytes:
    import io

    file = io.BytesIO()
    ToyPairs("explore", 24).load_image(7).save(file, "PNG")
    return file.getvalue()
