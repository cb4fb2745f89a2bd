"""`explore`: a page on this machine that searches images and captions with two models."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clip_refine.config import ModelConfig, RefineConfig, load_config, override
from clip_refine.data import CaptionedImages, ImageCaptions, Subset, open_pairs
from clip_refine.data.images import SUFFIXES, image_files
from clip_refine.data.pairs import Images
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.evidence import thumbnail
from clip_refine.evaluation.similarity import unit_rows
from clip_refine.roads import build
from clip_refine.support.errors import ConfigError, DataError, ModelError

# --------------------------------------------------------------------------------------------------
# One model's features of images and captions, searched by text or image.


@dataclass(frozen=True)
class Hit:
    """Something that was found."""

    rank: int  # 1 is first
    image: int | None  # position of the image, None for a caption
    caption: str | None  # the text, None for an image
    cosine: float  # with the query


class SearchIndex:
    """Unit features of one model.

    Attributes:
        embedder: The model and how to feed it.
        image_unit: (N, d).
        text_unit: (M, d), M may be 0.
        captions: The M texts.
    """

    def __init__(self, embedder: Embedder, images: Images, captions: list[str], name: str) -> None:
        """Encode everything once."""
        self.embedder = embedder
        self.captions = captions
        self.image_unit = unit_rows("images", embedder.images(images, f"{name}: images"))
        self.text_unit = self.image_unit[:0]
        if captions:
            self.text_unit = unit_rows("captions", embedder.texts(captions, f"{name}: captions"))

    @torch.no_grad()
    def by_text(self, query: str, *, mixed: bool, count: int) -> list[Hit]:
        """The nearest to a text, first the nearest; where `mixed`, captions but `query`, too."""
        features = self.embedder.encode_texts([query])
        return self._nearest(features, mixed=mixed, count=count, but=query)

    @torch.no_grad()
    def by_image(self, query: Image.Image, *, mixed: bool, count: int) -> list[Hit]:
        """The nearest to an image; arguments as in `by_text`."""
        pixels = self.embedder.model.preprocess(query.convert("RGB"))[None]
        return self._nearest(self.embedder.encode_pixels(pixels), mixed=mixed, count=count)

    def _nearest(
        self, query: Tensor, *, mixed: bool, count: int, but: str | None = None
    ) -> list[Hit]:
        unit = unit_rows("query", query.float().cpu())[0]
        cosines = self.image_unit @ unit
        if mixed:
            same = torch.tensor([text == but for text in self.captions], dtype=torch.bool)
            of_captions = (self.text_unit @ unit).masked_fill(same, -torch.inf)
            cosines = torch.cat([cosines, of_captions])
        best = cosines.topk(min(count, len(cosines)))
        hits = []
        for position, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            rank, caption = len(hits) + 1, position - len(self.image_unit)
            if caption < 0:
                hits.append(Hit(rank, position, None, cosine))
            elif self.captions[caption] != but:  # those come last
                hits.append(Hit(rank, None, self.captions[caption], cosine))
        return hits


# --------------------------------------------------------------------------------------------------
# The folder of a run → two searchable models.


@dataclass(frozen=True)
class Explorer:
    """Two models on the same images."""

    images: Images  # what is searched
    captions: list[str]  # of the images; empty where they have none
    base: SearchIndex  # the model as it came
    refined: SearchIndex  # the refined model


def open_explorer(
    run: Path,
    images: str | None = None,
    *,
    factory: str | None = None,
    limit: int = 2000,
    device: str = "auto",
) -> Explorer:
    """Load both models of a run and encode what is to be searched.

    `factory` makes the base model where a function did; the run's own word for it is not taken.
    """
    if not (run / "config.yaml").is_file():
        raise DataError(f"{run}: holds no run (no config.yaml). Give a folder that refine wrote.")
    config = load_config(RefineConfig, run / "config.yaml")
    if config.model.name.startswith("python:"):
        raise ModelError(
            f"{run}: its base model was passed from Python ({config.model.name}), so it cannot be "
            "loaded by name. Refine with --model.name or --model.factory to explore."
        )
    base = ModelConfig(factory=factory) if factory else config.model
    pairs = _find_images(config, images)
    pairs = Subset(pairs, range(min(limit, len(pairs))), pairs.name)
    captions = [text for texts in pairs.captions for text in texts]
    accelerator = build.build_accelerator(device)
    indices = []
    for name, model in (("base", base), ("refined", ModelConfig(name=str(run / "model")))):
        encoder = build.build_model(model)
        if isinstance(encoder, nn.Module):
            encoder.float().eval().to(accelerator.device)
        workers = build.count_workers(None, accelerator.device)
        embedder = Embedder(encoder, accelerator.device, config.evaluation.batch_size, workers)
        indices.append(SearchIndex(embedder, pairs, captions, name))
    return Explorer(pairs, captions, *indices)


def _find_images(config: RefineConfig, images: str | None) -> ImageCaptions:
    """A folder of images without captions, or a source of pairs, or the run's held-out pairs."""
    if images is None:
        return build.build_data(config.data, seed=config.seed)[1]
    folder = Path(images)
    if not folder.is_dir():
        # the split, the list and the columns are those of the run's own pairs
        others = ("split", "split_file", "image_column", "caption_column")
        return open_pairs(images, override(config.data, **dict.fromkeys(others)), training=False)
    paths = image_files(folder, links=config.data.allow_outside)
    if not paths:
        raise DataError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))}).")
    return CaptionedImages(images, "folder", paths, [()] * len(paths))


# --------------------------------------------------------------------------------------------------
# The page of `clip-refine explore`, by Gradio.


COUNT = 12  # hits that are shown for each model
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
    """Serve the page on this machine only."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        gradio: Any = import_module("gradio")
    except ModuleNotFoundError as error:
        raise ConfigError("explore needs Gradio. Run `pip install 'clip-refine[app]'`.") from error
    app = _page(gradio, explorer)
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    try:
        app.launch(
            server_name="127.0.0.1",
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=not wait,
            quiet=not wait,
            share=False,
            footer_links=[],
            theme=gradio.themes.Default(**fonts),
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
    search = renderer(explorer)
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


def renderer(explorer: Explorer) -> Callable[[str, Image.Image | None, bool], tuple[str, str]]:
    """What turns a query into the hits of both models, as HTML with all text escaped."""

    @lru_cache(maxsize=1024)
    def shown_image(index: int) -> str:
        return thumbnail(explorer.images.load_image(index), side=200, quality=80)

    def grid(found: list[Hit], other: list[Hit]) -> str:
        others = {(hit.image, hit.caption) for hit in other}
        cards = ""
        for hit in found:
            if hit.image is not None:
                name = escape(explorer.images.image_name(hit.image))
                source = f"data:image/jpeg;base64,{shown_image(hit.image)}"
                shown = f'<img src="{source}" alt="{name}" title="{name}">'
            else:
                shown = f'<div class="text">{escape(hit.caption or "")}</div>'
            only = "" if (hit.image, hit.caption) in others else " only"
            score = f'<div class="score">{hit.rank} · cosine {hit.cosine:.3f}</div>'
            cards += f'<div class="hit{only}">{shown}{score}</div>'
        return f'<div class="hits">{cards}</div>'

    def render(text: str, image: Image.Image | None, mixed: bool) -> tuple[str, str]:
        text = (text or "").strip()
        models = explorer.base, explorer.refined
        if image is not None:
            found = [model.by_image(image, mixed=mixed, count=COUNT) for model in models]
        elif text:
            found = [model.by_text(text, mixed=mixed, count=COUNT) for model in models]
        else:
            return "", ""
        return grid(*found), grid(*found[::-1])

    return render
