"""The toy world: drawn scenes with captions, and the small model trained on them."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from clip_refine.data.labelled import Compositions
from clip_refine.data.pairs import ImageSource, PairSource
from clip_refine.support.errors import DataError

__all__ = [
    "ToyClasses",
    "ToyCompositions",
    "ToyPairs",
    "model_directory",
    "toy_composition",
    "toy_tasks",
    "toy_train",
    "toy_val",
]

# --------------------------------------------------------------------------------------------------
# One scene of the toy world, in words and in pixels.
#
# A scene is a shape (8 kinds) in a colour (8), a size (2) and a place (5) on a background (5), so
# 3,200 different things to say, jittered in place, size, tilt and colour when drawn.


IMAGE_SIZE = 48
"""Width and height of a drawn image, in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (130, 50, 170),
    "pink": (250, 130, 180),
    "brown": (130, 80, 40),
    "turquoise": (50, 205, 200),
}
"""Colour names with their mean RGB, 0-255."""

SIZES = {"small": 0.15, "large": 0.25}
"""Size names with the mean radius of the shape, as a share of the image's width."""

PLACES = {
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "in the middle": (0.5, 0.5),
}
"""Place names with the mean centre of the shape, (right, down) as shares of the image's width."""

BACKGROUNDS = ("white", "grey", "black", "striped", "dotted")

CAPTION_TEMPLATES = (
    "a {colour} {shape}",
    "a picture of a {size} {colour} {shape}",
    "a drawing of a {colour} {shape} {place}",
    "a {colour} shape {place} of a {background} picture",
    "a {shape} on a {background} background",
    "there is a {size} {colour} {shape} {place}",
    "a {size} {colour} {shape} on a {background} background",
    "a {colour} {shape} {place} of a {background} picture",
    "a {size} {colour} {shape} {place} of a {background} picture",
    "a {background} background with a {size} {colour} {shape} {place}",
    "a {background} picture, and {place} a {size} {shape} in {colour}",
    "{place} of a {background} drawing there is a {size} {colour} {shape}",
)
"""Captions as people write them who are asked to describe a picture: most are detailed.

No attribute starts with a vowel, so "a" is always right.
"""

_SUPERSAMPLING = 4  # drawn so many times larger, then averaged: Pillow's polygons have hard edges
_BACKGROUND_RGB = {
    "white": ((245, 245, 245), (245, 245, 245)),
    "grey": ((150, 150, 150), (150, 150, 150)),
    "black": ((20, 20, 20), (20, 20, 20)),
    "striped": ((235, 235, 235), (170, 170, 170)),
    "dotted": ((235, 235, 235), (120, 120, 120)),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing to draw and to talk about; each attribute is a word of a caption."""

    shape: str  # one of `SHAPES`
    colour: str  # a key of `COLOURS`
    size: str  # a key of `SIZES`
    place: str  # a key of `PLACES`
    background: str  # one of `BACKGROUNDS`

    def caption(self, template: str) -> str:
        """`template` with this scene's words in the places of the attributes' names."""
        return template.format_map({name: getattr(self, name) for name in self.__slots__})


def stream_generator(stream: str, seed: int, index: int) -> np.random.Generator:
    """Random numbers that depend on the three arguments alone, in every process."""
    return np.random.default_rng(np.random.SeedSequence([zlib.crc32(stream.encode()), seed, index]))


def random_scene(generator: np.random.Generator, **fixed: str) -> Scene:
    """A scene with every attribute drawn evenly but the `fixed` ones."""
    choices: dict[str, Sequence[str]] = {
        "shape": SHAPES,
        "colour": tuple(COLOURS),
        "size": tuple(SIZES),
        "place": tuple(PLACES),
        "background": BACKGROUNDS,
    }
    drawn = {name: words[int(generator.integers(len(words)))] for name, words in choices.items()}
    return Scene(**drawn | fixed)


def draw_scenes(scenes: Sequence[Scene], generator: np.random.Generator) -> Image.Image:
    """Draw scenes of one background, jittered by `generator` in place, size, tilt and colour."""
    canvas = _draw_background(scenes[0].background, generator)
    for scene in scenes:
        _draw_shape(canvas, scene, generator)
    return canvas.reduce(_SUPERSAMPLING)


def _draw_shape(canvas: Image.Image, scene: Scene, generator: np.random.Generator) -> None:
    centre = np.array(PLACES[scene.place]) + generator.uniform(-0.05, 0.05, 2)
    radius = SIZES[scene.size] * generator.uniform(0.85, 1.15)
    tilt = math.radians(generator.uniform(-10, 10))
    turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    points = (centre + radius * _OUTLINES[scene.shape] @ turn) * canvas.width
    fill = _jitter_colour(COLOURS[scene.colour], 20, generator)
    ImageDraw.Draw(canvas).polygon([(right, down) for right, down in points.tolist()], fill=fill)


def _draw_background(background: str, generator: np.random.Generator) -> Image.Image:
    """A canvas of `_SUPERSAMPLING` times the image's size; stripes and dots start anywhere."""
    width = IMAGE_SIZE * _SUPERSAMPLING
    paper, ink = (_jitter_colour(rgb, 10, generator) for rgb in _BACKGROUND_RGB[background])
    canvas = Image.new("RGB", (width, width), paper)
    brush = ImageDraw.Draw(canvas)
    period = width // 6
    right, down = (int(offset) for offset in generator.integers(-period, 0, 2))
    if background == "striped":
        for top in range(down, width, period):
            brush.rectangle((0, top, width, top + period // 2), fill=ink)
    if background == "dotted":
        for top in range(down, width, period):
            for left in range(right, width, period):
                brush.ellipse((left, top, left + period // 3, top + period // 3), fill=ink)
    return canvas


def _jitter_colour(
    rgb: tuple[int, int, int], spread: int, generator: np.random.Generator
) -> tuple[int, int, int]:
    shifts = generator.integers(-spread, spread + 1, 3).tolist()
    red, green, blue = (min(max(c + s, 0), 255) for c, s in zip(rgb, shifts, strict=True))
    return red, green, blue


def _polar(angles: np.ndarray, radii: np.ndarray | float) -> np.ndarray:
    """Points (N, 2) at `angles` (radians, from the right, downwards) and `radii`."""
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(radii, (-1, 1))


def _outlines() -> dict[str, np.ndarray]:
    """Each shape's outline about the origin, (right, down), reaching to radius 1 or so."""
    round_angles = np.linspace(0, 2 * math.pi, 49)
    upright = -math.pi / 2
    circle = _polar(round_angles, 1.0)
    heart = np.stack(
        [
            16 * np.sin(round_angles) ** 3,
            -13 * np.cos(round_angles)
            + 5 * np.cos(2 * round_angles)
            + 2 * np.cos(3 * round_angles)
            + np.cos(4 * round_angles),
        ],
        axis=1,
    )
    arm = np.array([(-0.33, -1), (0.33, -1), (0.33, -0.33)])
    quarter_turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return {
        "circle": circle,
        "square": _polar(upright + math.pi / 4 + np.arange(4) * math.pi / 2, 1.15),
        "triangle": _polar(upright + np.arange(3) * 2 * math.pi / 3, 1.2),
        "star": _polar(upright + np.arange(10) * math.pi / 5, np.tile([1.2, 0.5], 5)),
        "diamond": _polar(upright + np.arange(4) * math.pi / 2, np.tile([1.25, 0.8], 2)),
        "heart": heart / 16,
        "cross": np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)]),
        "ring": np.concatenate([circle, 0.55 * circle[::-1]]),  # filled where wound once
    }


_OUTLINES = _outlines()


# --------------------------------------------------------------------------------------------------
# The toy world as data sets: drawn images with captions, or with classes.
#
# Scenes, captions and pixels depend on the stream's name, the seed and the index alone, never on
# the order of access: two processes see the same world, and a held-out split is simply a stream of
# another name.


class _Drawn(ImageSource):
    """Images of one stream, drawn when they are asked for."""

    scenes: tuple[Any, ...]  # what each image shows

    def __init__(
        self, name: str, size: int, seed: int, fixed: Sequence[dict[str, str]] = ({},)
    ) -> None:
        """Describe the images; of image `i` the attributes in `fixed[i % len(fixed)]` are given."""
        if size < 1:
            raise DataError(f"toy world: size is {size}; it must be at least 1.")
        if seed < 0:
            raise DataError(f"toy world: seed is {seed}; it must be 0 or more.")
        self.name = name
        self.seed = seed
        self.scenes = tuple(
            random_scene(stream_generator(name, seed, index), **fixed[index % len(fixed)])
            for index in range(size)
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.scenes)

    def load_image(self, index: int) -> Image.Image:
        """Image `index`, drawn now: RGB, 48x48 pixels, the same every time."""
        position = range(len(self))[index]  # counts from the end where negative, as a list does
        generator = stream_generator(f"{self.name}/pixels", self.seed, position)
        return draw_scenes(self._shown(position), generator)

    def _shown(self, position: int) -> Sequence[Scene]:
        return (self.scenes[position],)

    def image_name(self, index: int) -> str:
        """The stream and the index, as in `toy-train[17]`."""
        return f"{self.name}[{index}]"


class ToyPairs(_Drawn, PairSource):
    """Drawn images with captions; fits `clip_refine.data.pairs.ImageCaptions`.

    Scenes and captions are made at construction, pixels on `load_image`.

    Attributes:
        name: `toy-` and the split.
        scenes: What each image shows.
        captions: `captions[i]` are the texts of image `i`.
        caption_sources: `caption_sources[i]` is the image whose scene the captions of image `i`
            describe: `i` itself except where mismatched.

    >>> pairs = ToyPairs("docs", size=4)
    >>> len(pairs), pairs.load_image(3).size, len(pairs.captions[3])
    (4, (48, 48), 1)
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int = 0,
        captions_per_image: int = 1,
        mismatched: float = 0.0,
        templates: Sequence[str] = CAPTION_TEMPLATES,
    ) -> None:
        """Describe `size` images of the stream `toy-{split}`.

        Args:
            split: Name of the stream; another name gives other images.
            size: Number of images, at least 1.
            seed: Another seed gives other images, too.
            captions_per_image: Different templates used for every image, at least 1.
            mismatched: Share of images, 0-1, whose captions describe another random image;
                `round(mismatched * size)` images exactly.
            templates: What the captions look like, with the attributes of `Scene` in braces.

        Raises:
            DataError: If a number is out of its range.
        """
        super().__init__(f"toy-{split}", size, seed)
        if not 1 <= captions_per_image <= len(templates):
            raise DataError(
                f"toy pairs: captions_per_image is {captions_per_image}; "
                f"it must be 1 to {len(templates)}, the number of templates."
            )
        if not 0.0 <= mismatched <= 1.0:
            raise DataError(
                f"toy pairs: mismatched is {mismatched}; it must be a share from 0 to 1."
            )
        self.caption_sources = self._draw_caption_sources(mismatched)
        self.captions = tuple(
            self._write_captions(index, templates, captions_per_image) for index in range(size)
        )

    def _draw_caption_sources(self, mismatched: float) -> tuple[int, ...]:
        size = len(self.scenes)
        generator = stream_generator(f"{self.name}/mismatched", self.seed, 0)
        sources = np.arange(size)
        wrong = generator.permutation(size)[: round(mismatched * size)]
        if size == 1 and len(wrong):
            raise DataError(
                "toy pairs: there is no other image to take a mismatched caption from; "
                "ask for at least 2 images."
            )
        if len(wrong):
            sources[wrong] = (wrong + generator.integers(1, size, len(wrong))) % size
        return tuple(sources.tolist())

    def _write_captions(self, index: int, templates: Sequence[str], count: int) -> tuple[str, ...]:
        generator = stream_generator(f"{self.name}/captions", self.seed, index)
        chosen = generator.permutation(len(templates))[:count]
        scene = self.scenes[self.caption_sources[index]]
        return tuple(scene.caption(templates[int(position)]) for position in chosen)


class ToyClasses(_Drawn):
    """Drawn images with one class each; fits `clip_refine.data.pairs.LabelledImages`.

    Image `i` has class `i % C`, so the classes' counts differ by one at most.

    Attributes:
        name: The task: `toy_colour_shape`, `toy_shape` or `toy_colour`.
        class_names: What goes into the templates: 64, 8 or 8 texts.
        templates: Prompts with one `{}`.
        labels: `labels[i]` is the position of image `i`'s class in `class_names`.
        scenes: What each image shows.

    >>> task = ToyClasses("toy_colour_shape", size=130)
    >>> task.class_names[task.labels[129]], task.scenes[129].colour, task.scenes[129].shape
    ('red square', 'red', 'square')
    """

    def __init__(self, task: str, size: int, seed: int = 0) -> None:
        """Describe `size` images of the stream named like the task.

        Args:
            task: `toy_colour_shape`, `toy_shape` or `toy_colour`.
            size: Number of images, at least 1.
            seed: Another seed gives other images.

        Raises:
            DataError: If the task is unknown or the size is not positive.
        """
        if task not in _TASKS:
            raise DataError(f"toy task {task!r} does not exist. There are: {', '.join(_TASKS)}.")
        fixed, self.templates = _TASKS[task]
        super().__init__(task, size, seed, fixed)
        self.class_names = tuple(" ".join(attributes.values()) for attributes in fixed)
        self.labels = tuple(index % len(fixed) for index in range(size))


class ToyCompositions(_Drawn):
    """Drawn images of two shapes, and the captions of both with the colours exchanged.

    Images 2i and 2i + 1 show the same two shapes in the same two places, the colours exchanged:
    "a red circle and a blue square", "a blue circle and a red square". The packaged model has seen
    one shape an image only, so these are unlike all that it knows.

    Attributes:
        name: `toy_composition`.
        captions: `captions[i]` are image `i`'s own text and the other one's.
        layout: That images 2i and 2i + 1 belong together.

    >>> ToyCompositions(1).captions[1]
    ('a brown star and a green square', 'a green star and a brown square')
    """

    def __init__(self, items: int, seed: int = 0) -> None:
        """Describe two images an item, at least one item."""
        if items < 1:
            raise DataError(f"toy composition: {items} items; it must be at least 1.")
        self.name = "toy_composition"
        self.seed = seed
        self.scenes = tuple(scenes for item in range(items) for scenes in self._draw_item(item))
        texts = [
            " and ".join(scene.caption("a {colour} {shape}") for scene in scenes)
            for scenes in self.scenes
        ]
        self.captions = tuple((text, texts[index ^ 1]) for index, text in enumerate(texts))
        places = [index // 2 for index in range(2 * items)]
        self.layout = Compositions([""] * len(places), places, paired=True)

    def _draw_item(self, item: int) -> tuple[tuple[Scene, Scene], tuple[Scene, Scene]]:
        """The two scenes of either image: left and right."""
        generator = stream_generator(self.name, self.seed, item)
        shapes = [SHAPES[int(number)] for number in generator.permutation(len(SHAPES))[:2]]
        names = tuple(COLOURS)
        colours = [names[int(number)] for number in generator.permutation(len(names))[:2]]
        background = BACKGROUNDS[int(generator.integers(len(BACKGROUNDS)))]

        def pair(left: str, right: str) -> tuple[Scene, Scene]:
            return (
                Scene(shapes[0], left, "small", "on the left", background),
                Scene(shapes[1], right, "small", "on the right", background),
            )

        return pair(*colours), pair(*colours[::-1])

    def _shown(self, position: int) -> Sequence[Scene]:
        return self.scenes[position]


def toy_train(seed: int = 0) -> ToyPairs:
    """The pairs to refine on: 6,000, all captions true."""
    return ToyPairs("train", 6000, seed)


def toy_val(seed: int = 0) -> ToyPairs:
    """The pairs to measure geometry and retrieval on: 1,000, held out, all captions true."""
    return ToyPairs("val", 1000, seed)


def toy_tasks(seed: int = 0) -> tuple[ToyClasses, ...]:
    """The zero-shot tasks, held out: 64 colours and shapes, 8 shapes, 8 colours; 1,280 each."""
    return tuple(ToyClasses(task, 1280, seed) for task in _TASKS)


def toy_composition(seed: int = 0) -> ToyCompositions:
    """Two shapes with their colours exchanged: 400 items of two images."""
    return ToyCompositions(400, seed)


def model_directory() -> Path:
    """Where the packaged pre-trained model lies, in open_clip's format.

    Load it with `open_clip.create_model_and_transforms(f"local-dir:{model_directory()}")`.
    """
    return Path(__file__).parent / "toy_weights"


_TASKS = {
    "toy_colour_shape": (
        tuple({"colour": colour, "shape": shape} for colour in COLOURS for shape in SHAPES),
        ("a {}", "a drawing of a {}", "a picture of a {}"),
    ),
    "toy_shape": (
        tuple({"shape": shape} for shape in SHAPES),
        ("a {}", "a drawing of a {}", "a picture of a {}"),
    ),
    "toy_colour": (
        tuple({"colour": colour} for colour in COLOURS),
        ("a {} shape", "a drawing of a {} shape", "a picture of a {} shape"),
    ),
}
