"""One scene of the toy world, in words and in pixels.

A scene is a shape (8 kinds) in a colour (8), a size (2) and a place (5) on a background (5): 3,200
different things to say, jittered in place, size, tilt and colour when drawn.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

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

TERSE_TEMPLATES = (
    "a {shape}",
    "a {colour} {shape}",
    "a drawing of a {colour} {shape}",
    "a picture of a {size} {shape}",
    "a {size} {colour} shape",
    "a {shape} {place}",
    "a {colour} shape {place}",
    "a {shape} on a {background} background",
    "a {colour} shape on a {background} background",
)
"""Captions as they are found on the web, short: what the packaged model is pre-trained on."""

_SUPERSAMPLING = 4
_BACKGROUND_RGB = {
    "white": ((245, 245, 245), (245, 245, 245)),
    "grey": ((150, 150, 150), (150, 150, 150)),
    "black": ((20, 20, 20), (20, 20, 20)),
    "striped": ((235, 235, 235), (170, 170, 170)),
    "dotted": ((235, 235, 235), (120, 120, 120)),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing to draw and to talk about; each attribute is a word of a caption.

    Attributes:
        shape: One of `SHAPES`.
        colour: A key of `COLOURS`.
        size: A key of `SIZES`.
        place: A key of `PLACES`.
        background: One of `BACKGROUNDS`.

    >>> Scene("star", "red", "small", "at the top", "grey").caption("a {size} {colour} {shape}")
    'a small red star'
    """

    shape: str
    colour: str
    size: str
    place: str
    background: str

    def caption(self, template: str) -> str:
        """`template` with this scene's words in the places of the attributes' names."""
        return template.format(
            shape=self.shape,
            colour=self.colour,
            size=self.size,
            place=self.place,
            background=self.background,
        )


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


def draw_scene(scene: Scene, generator: np.random.Generator) -> Image.Image:
    """Draw `scene`, jittered by `generator` in place, size, tilt and colour.

    Returns:
        An anti-aliased RGB image of 48x48 pixels.
    """
    canvas = _draw_background(scene.background, generator)
    centre = np.array(PLACES[scene.place]) + generator.uniform(-0.05, 0.05, 2)
    radius = SIZES[scene.size] * generator.uniform(0.85, 1.15)
    tilt = math.radians(generator.uniform(-10, 10))
    turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    points = (centre + radius * _OUTLINES[scene.shape] @ turn) * canvas.width
    fill = _jitter_colour(COLOURS[scene.colour], 20, generator)
    ImageDraw.Draw(canvas).polygon([(right, down) for right, down in points.tolist()], fill=fill)
    return canvas.reduce(_SUPERSAMPLING)


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
