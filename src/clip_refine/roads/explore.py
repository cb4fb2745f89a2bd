"""`explore`: a page on this machine that searches images and captions with two models."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from html import escape
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clip_refine.config import DataConfig, ModelConfig, RefineConfig, load_config, override
from clip_refine.data import CaptionedImages, ImageCaptions, Subset, open_pairs
from clip_refine.data.images import SUFFIXES, image_files
from clip_refine.data.pairs import Images
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.evidence import thumbnail
from clip_refine.evaluation.similarity import unit_rows
from clip_refine.report.page import read_mapping
from clip_refine.report.tables import short_path
from clip_refine.roads import build
from clip_refine.roads.vectors import unit_pairs
from clip_refine.support.console import say
from clip_refine.support.errors import ConfigError, DataError, ModelError
from clip_refine.vectors.files import load_peer
from clip_refine.vectors.stored import read_pairs

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
    """Unit features of one model, (N, d) of images and (M, d) of M captions; M may be 0."""

    def __init__(self, embedder: Embedder, images: Images, captions: list[str], name: str) -> None:
        """Encode everything once."""
        self.name, self.embedder, self.captions = name, embedder, captions
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
            of_captions = of_captions.masked_fill(self._again, -torch.inf)
            cosines = torch.cat([cosines, of_captions])
        best = cosines.topk(min(count, len(cosines)))
        hits = []
        for position, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            rank, caption = len(hits) + 1, position - len(self.image_unit)
            if caption < 0:
                hits.append(Hit(rank, position, None, cosine))
            elif cosine > -torch.inf:  # those come last
                hits.append(Hit(rank, None, self.captions[caption], cosine))
        return hits

    @cached_property
    def _again(self) -> Tensor:
        """Which captions stand before already, of another image: words are found once."""
        first = {text: row for row, text in reversed([*enumerate(self.captions)])}
        again = [first[text] != row for row, text in enumerate(self.captions)]
        return torch.tensor(again, dtype=torch.bool)


class StoredIndex(SearchIndex):
    """The same of vectors that are stored: there is no model, so each query is one of them."""

    def __init__(self, images: Tensor, texts: Tensor, captions: list[str], name: str) -> None:
        """Unit rows, a text a caption."""
        self.name, self.captions = name, captions
        self.image_unit, self.text_unit = unit_rows("images", images), unit_rows("captions", texts)

    def by_text(self, query: str, *, mixed: bool, count: int) -> list[Hit]:
        """The nearest to `image 3`, to `caption 5`, or to the first caption with these words."""
        query = query.lower()  # keyboards of phones begin with a capital
        named = re.fullmatch(r"(image|caption)?\s*(\d{1,12})", query)
        rows = self.image_unit if named and named[1] == "image" else self.text_unit
        words = (row for row, text in enumerate(self.captions) if query in text.lower())
        row = int(named[2]) if named else next(words, None)
        if row is None or row >= len(rows):
            raise DataError(
                f"no stored vector is called {query!r}. Without a model a query is image 0 to "
                f"{len(self.image_unit) - 1}, caption 0 to {len(self.captions) - 1}, or words of a "
                "caption."
            )
        own = self.captions[row] if rows is self.text_unit else None
        return self._nearest(rows[row : row + 1], mixed=mixed, count=count, but=own)


# --------------------------------------------------------------------------------------------------
# The folder of a run → two searchable models.


@dataclass(frozen=True)
class Explorer:
    """Two models on the same images."""

    images: Images | None  # what is searched; None where vectors are all there is
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
    """Load both models of a run and encode what is to be searched; a file names no `factory`."""
    if not (run / "config.yaml").is_file():
        raise DataError(f"{run}: holds no run (no config.yaml). Give a folder that refine wrote.")
    if (run / "comparison.json").is_file():
        raise DataError(
            f"{run}: holds a comparison. Give one run: the command under its decision makes one, "
            "and `compare --save-models` keeps all."
        )
    if (run / "peer.json").is_file():
        return _open_stored(run, images, limit)
    config = load_config(RefineConfig, run / "config.yaml")
    if config.model.name.startswith("python:") and not factory:
        raise ModelError(
            f"{run}: its base model was passed from Python ({config.model.name}), so it cannot be "
            "loaded by name. Name a function that makes it: --factory MODULE:FUNCTION."
        )
    base, refined = config.model, ModelConfig(name=str(run / "model"))
    if factory:
        weights = base.pretrained if base.name.startswith("factory:") else None
        base = ModelConfig(factory=factory, pretrained=weights)
        refined = ModelConfig(factory=factory, pretrained=str(run))
    pairs = _find_images(config, images)
    pairs = Subset(pairs, range(min(limit, len(pairs))), pairs.name)
    captions = [text for texts in pairs.captions for text in texts]
    accelerator = build.build_accelerator(device)
    indices = []
    tag = f" ({short_path(base.pretrained)})" if base.pretrained else ""
    names = {
        f"{short_path(base.factory or base.name)}{tag}": base,
        f"{config.recipe}, run {run.resolve().name}": refined,
    }
    for name, model in names.items():
        encoder = build.build_model(model)
        embedder = build.build_embedder(encoder, accelerator, config.evaluation, None)
        indices.append(SearchIndex(embedder, pairs, captions, name))
    return Explorer(pairs, captions, *indices)


def _open_stored(run: Path, images: str | None, limit: int) -> Explorer:
    """The vectors that maps were learnt on, as they were and mapped; `images` are to be shown."""
    settings = read_mapping(run / "config.yaml")
    data = settings.get("data")
    source = data.get("train") if isinstance(data, dict) else None
    if not isinstance(source, str) or source == "python":
        raise DataError(f"{run}: its vectors were given in Python, so they cannot be read again.")
    try:
        found = unit_pairs(read_pairs(source, owner=settings.get("owner")))
    except DataError as error:
        raise DataError(
            f"{error} {run} was learnt on it. If that is a path from another folder, run this in "
            "the one where `vectors refine` ran."
        ) from error
    owners, shown = found.text_to_image.tolist(), None
    captions = [f"caption {row} of image {owner}" for row, owner in enumerate(owners)]
    if images is not None:
        shown = open_pairs(images, DataConfig(), training=False)
        captions = [text for texts in shown.captions for text in texts]
        if [len(texts) for texts in shown.captions] != found.text_to_image.bincount().tolist():
            raise DataError(
                f"{images}: {len(shown):,} images with {len(captions):,} captions are not those of "
                f"{source} ({len(found.image_features):,} and {len(owners):,}). Give the pairs "
                "that the vectors were made of, in their order, or leave --images out."
            )
    count = sum(owner < limit for owner in owners)
    rows, texts = found.image_features[:limit], found.text_features[:count]
    captions = captions[:count]
    maps = load_peer(run)
    mapped = maps.transform_image(rows), maps.transform_text(texts)
    return Explorer(
        shown,
        captions,
        StoredIndex(rows, texts, captions, f"stored vectors {short_path(source)}"),
        StoredIndex(*mapped, captions, f"{settings.get('recipe')}, maps {run.resolve().name}"),
    )


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
_LONGEST = 300  # letters of a caption
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self'; frame-ancestors 'self'"
)
_CSS = """
.html-container { padding: 0 !important; }  /* in line with all else */
@media (min-width: 700px) { .sides { column-gap: 32px !important; } }  /* two rows, not one */
.hits { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); }
.hits .hit { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 6px;
  background: var(--background-fill-primary); min-width: 0; }
.hits .hit.only { border-color: var(--color-accent); }
.hits img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; margin: 0; }
.hits .text { aspect-ratio: 1; display: flex; align-items: center; justify-content: center;
  text-align: center; font-size: .8rem; line-height: 1.3;
  overflow-wrap: anywhere; padding: 4px; border-radius: 6px;
  background: var(--background-fill-secondary); }
.hits .score { font-size: .75rem; opacity: .75; margin-top: 4px; }
.model { font-weight: 600; overflow-wrap: anywhere; margin: 8px 0 0; }
"""


def launch(explorer: Explorer, *, port: int | None, browser: bool) -> None:
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
            prevent_thread_lock=True,
            quiet=True,  # else it advises to share the page with everybody
            share=False,
            footer_links=[],
            theme=gradio.themes.Default(**fonts),
            css=_CSS,
            app_kwargs={"middleware": [_no_network()]},
        )
    except OSError as error:
        raise ConfigError(f"port {port}: {error}. Choose another --port.") from error
    say(f"{app.local_url} on this machine only; Ctrl-C stops it.")
    try:
        Event().wait()  # Gradio's own waiting keeps the signal for itself
    except KeyboardInterrupt as asked:
        say("stopped.")
        sys.stdout.flush()
        os._exit(getattr(asked, "status", 130))  # the server's threads wait for pages that are open


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


EXAMPLES = 4  # queries to begin with
ANYTHING = ("a person", "an animal", "a building", "a red thing")  # where there are no captions


def _page(gradio: Any, explorer: Explorer) -> Any:
    search, base, refined = renderer(explorer), explorer.base, explorer.refined
    stored = isinstance(base, StoredIndex)
    count = f"{len(base.image_unit):,} images, {len(explorer.captions):,} captions"
    how = (
        "A query is image 3, caption 5, or words of a stored caption."
        if stored
        else "Type a query, or drop an image, which then is the query."
    )
    with gradio.Blocks(title="clip-refine explore", analytics_enabled=False) as app:
        gradio.HTML(f"<h2>{escape(base.name)} beside {escape(refined.name)}</h2>")
        gradio.Markdown(f"{count}. {how} Frames mark what only one of the two finds.")
        with gradio.Row():
            with gradio.Column(scale=3):
                text = gradio.Textbox(label="Query", placeholder="image 3" if stored else "a dog")
                mixed = gradio.Checkbox(
                    label="Mixed index: search captions, too", visible=bool(explorer.captions)
                )
                go = gradio.Button("Search", variant="primary")
            with gradio.Column(scale=2, visible=not stored):
                image = gradio.Image(
                    label="Image query", type="pil", sources=["upload", "clipboard"], height=180
                )
        with gradio.Row(equal_height=True):
            examples = [
                gradio.Button(query, size="sm", min_width=100) for query in _examples(explorer)
            ]
        changed = gradio.HTML("Nothing is searched yet.", elem_id="changed")
        shown = [changed]
        half = {"min_width": 100}  # side by side on a phone, too
        with gradio.Row(elem_classes="sides"):
            for index in (base, refined):
                with gradio.Column(**half):
                    gradio.HTML(f'<p class="model">{escape(index.name)}</p>')
        with gradio.Row(elem_classes="sides"):
            for name in ("base", "refined"):
                with gradio.Column(**half):
                    shown.append(gradio.HTML(elem_id=name))
        inputs = [text, image, mixed]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        for event in (text.submit, go.click, image.change, mixed.change):
            event(search, inputs, shown, **quiet)
        for example in examples:
            picked = example.click(lambda query: (query, None), [example], [text, image], **quiet)
            picked.then(search, inputs, shown, **quiet)
    return app


def _examples(explorer: Explorer) -> list[str]:
    """Queries to begin with: some captions, far apart."""
    captions = list(dict.fromkeys(explorer.captions)) or ANYTHING
    return [*captions[:: max(len(captions) // EXAMPLES, 1)][:EXAMPLES]]


def what_changed(base: list[Hit], refined: list[Hit]) -> str:
    """Of one query's hits, in a line.

    >>> was = [Hit(1, 7, None, 0.9), Hit(2, 8, None, 0.8)]
    >>> what_changed(was, [Hit(1, 8, None, 0.9), Hit(2, 9, None, 0.8)])
    '1 of 2 the same, 1 of them at another rank, by 1 at most; another stands first.'
    """
    before = {(hit.image, hit.caption): hit.rank for hit in base}
    same = [hit for hit in refined if (hit.image, hit.caption) in before]
    moves = [abs(hit.rank - before[hit.image, hit.caption]) for hit in same]
    said = f"{len(same)} of {len(refined)} the same"
    if not any(moves):
        return f"{said}, in the same order." if len(same) == len(refined) else f"{said}."
    moved = sum(move > 0 for move in moves)
    first = refined[0].rank == before.get((refined[0].image, refined[0].caption))
    return (
        f"{said}, {moved} of them at another rank, by {max(moves)} at most; "
        f"{'the same' if first else 'another'} stands first."
    )


def renderer(explorer: Explorer) -> Callable[[str, Image.Image | None, bool], tuple[str, str, str]]:
    """What turns a query into a line and the hits of both models, as HTML with text escaped."""

    @lru_cache(maxsize=1024)
    def shown_image(images: Images, index: int) -> str:
        return thumbnail(images.load_image(index), side=200, quality=80)

    def grid(found: list[Hit], other: list[Hit], was: str) -> str:
        others = {(hit.image, hit.caption): hit.rank for hit in other}
        cards = ""
        for hit in found:
            if hit.image is not None and explorer.images is not None:
                name = escape(explorer.images.image_name(hit.image))
                source = f"data:image/jpeg;base64,{shown_image(explorer.images, hit.image)}"
                shown = f'<img src="{source}" alt="{name}" title="{name}">'
            else:
                called = f"image {hit.image}" if hit.caption is None else hit.caption
                cut = called if len(called) <= _LONGEST else f"{called[:_LONGEST]} ..."
                shown = f'<div class="text">{escape(cut)}</div>'
            rank = others.get((hit.image, hit.caption))
            only = " only" if rank is None else ""
            moved = f" ({was} {rank})" if rank not in (None, hit.rank) else ""
            score = f'<div class="score">{hit.rank}{moved}<br>cosine {hit.cosine:.3f}</div>'
            cards += f'<div class="hit{only}">{shown}{score}</div>'
        return f'<div class="hits">{cards}</div>'

    def render(text: str, image: Image.Image | None, mixed: bool) -> tuple[str, str, str]:
        text = (text or "").strip()
        models = explorer.base, explorer.refined
        try:
            if image is not None:
                found = [model.by_image(image, mixed=mixed, count=COUNT) for model in models]
            elif text:
                found = [model.by_text(text, mixed=mixed, count=COUNT) for model in models]
            else:
                return "", "", ""
            base, refined = found
            grids = grid(base, refined, "then"), grid(refined, base, "was")
            return what_changed(base, refined), *grids
        except DataError as error:  # of a query, or of an image beside stored vectors
            return escape(str(error)), "", ""

    return render
