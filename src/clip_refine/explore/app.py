"""The page of `clip-refine explore`, by Gradio."""

import base64
import io
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape
from importlib import import_module
from typing import Any

from PIL import Image

from clip_refine.errors import ConfigError
from clip_refine.explore.index import Hit, SearchIndex
from clip_refine.explore.open import Explorer

COUNT = 12
"""Hits that are shown for each model."""

THUMBNAIL = 200
_FONTS = ("system-ui", "sans-serif")
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self'; frame-ancestors 'self'"
)
_CSS = """
.hits { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(116px, 1fr)); }
.hits .hit { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 6px;
  background: var(--background-fill-primary); min-width: 0; }
.hits .hit.only { border-color: var(--color-accent); }
.hits img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; margin: 0; }
.hits .text { aspect-ratio: 1; display: flex; align-items: center; justify-content: center;
  text-align: center; font-size: .8rem; line-height: 1.3; overflow: hidden;
  overflow-wrap: anywhere; padding: 4px; border-radius: 6px;
  background: var(--background-fill-secondary); }
.hits .score { font-size: .75rem; opacity: .75; margin-top: 4px; }
"""


def launch(explorer: Explorer, *, port: int | None, browser: bool, wait: bool = True) -> Any:
    """Serve the page on this machine only.

    Args:
        explorer: What to search.
        port: Of localhost; None for the first free one from 7860 on.
        browser: Whether to open one.
        wait: Whether to stay until the server is stopped.

    Returns:
        Gradio's app, which has `local_url` and `close()`.

    Raises:
        ConfigError: Gradio is not installed, or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        gradio: Any = import_module("gradio")
    except ModuleNotFoundError as error:
        raise ConfigError("explore needs Gradio. Run `pip install 'clip-refine[app]'`.") from error
    app = _page(gradio, explorer)
    theme = gradio.themes.Default(font=_FONTS, font_mono=("ui-monospace", "monospace"))
    try:
        app.launch(
            server_name="127.0.0.1",
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=not wait,
            quiet=not wait,
            share=False,
            footer_links=[],
            theme=theme,
            css=_CSS,
            app_kwargs={"middleware": [_no_network()]},
        )
    except OSError as error:
        raise ConfigError(f"port {port}: {error}. Choose another --port.") from error
    return app


def _no_network() -> Any:
    """A header that keeps the page's browser from asking any other machine."""
    from starlette.middleware import Middleware

    class Policy:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def with_header(message: Any) -> None:
                if message["type"] == "http.response.start":
                    header = (b"content-security-policy", _POLICY.encode())
                    message["headers"] = [*message.get("headers", []), header]
                await send(message)

            await self.app(scope, receive, with_header)

    return Middleware(Policy)


def _page(gradio: Any, explorer: Explorer) -> Any:
    render = renderer(explorer)

    def search(text: str, image: Image.Image | None, mixed: bool) -> tuple[str, str]:
        return render(text, image, mixed)

    with gradio.Blocks(title="clip-refine explore", analytics_enabled=False) as app:
        gradio.Markdown("## Before and after, on your images")
        gradio.Markdown(
            f"{len(explorer.images):,} images, {len(explorer.captions):,} captions. Type a query, "
            "or drop an image, which then is the query. Frames mark what only one of the two finds."
        )
        with gradio.Row():
            with gradio.Column(scale=3):
                text = gradio.Textbox(label="Query", placeholder="a red circle")
                mixed = gradio.Checkbox(
                    label="Mixed index: search captions, too",
                    interactive=bool(explorer.captions),
                )
                go = gradio.Button("Search", variant="primary")
            with gradio.Column(scale=2):
                image = gradio.Image(
                    label="Image query", type="pil", sources=["upload", "clipboard"], height=180
                )
        with gradio.Row():
            columns = []
            for name in ("Base", "Refined"):
                with gradio.Column():
                    gradio.Markdown(f"### {name}")
                    columns.append(gradio.HTML(elem_id=name.lower()))
        inputs = [text, image, mixed]
        for event in (text.submit, go.click, image.change, mixed.change):
            event(search, inputs, columns, show_progress="hidden", api_visibility="private")
    return app


def renderer(
    explorer: Explorer,
) -> Callable[[str, Image.Image | None, bool], tuple[str, str]]:
    """What turns a query into the hits of both models, as HTML with all text escaped."""

    @lru_cache(maxsize=1024)
    def thumbnail(index: int) -> str:
        small = explorer.images.load_image(index).convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=80)
        return base64.b64encode(file.getvalue()).decode("ascii")

    def hits(index: SearchIndex, text: str, image: Image.Image | None, mixed: bool) -> list[Hit]:
        if image is not None:
            return index.by_image(image, mixed=mixed, count=COUNT)
        return index.by_text(text, mixed=mixed, count=COUNT)

    def card(hit: Hit, others: set[object]) -> str:
        if hit.image is not None:
            name = escape(explorer.images.image_name(hit.image))
            source = f"data:image/jpeg;base64,{thumbnail(hit.image)}"
            shown = f'<img src="{source}" alt="{name}" title="{name}">'
        else:
            shown = f'<div class="text">{escape(hit.caption or "")}</div>'
        only = "" if _identity(hit) in others else " only"
        score = f'<div class="score">{hit.rank} · cosine {hit.cosine:.3f}</div>'
        return f'<div class="hit{only}">{shown}{score}</div>'

    def grid(found: Sequence[Hit], other: Sequence[Hit]) -> str:
        others = {_identity(hit) for hit in other}
        return f'<div class="hits">{"".join(card(hit, others) for hit in found)}</div>'

    def render(text: str, image: Image.Image | None, mixed: bool) -> tuple[str, str]:
        text = (text or "").strip()
        if not text and image is None:
            return "", ""
        found = [hits(index, text, image, mixed) for index in (explorer.base, explorer.refined)]
        return grid(*found), grid(*found[::-1])

    return render


def _identity(hit: Hit) -> object:
    return hit.caption if hit.image is None else hit.image
