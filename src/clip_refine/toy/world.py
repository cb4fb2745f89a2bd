"""The toy world as data sets: drawn images with captions, or with classes.

Scenes, captions and pixels depend on the stream's name, the seed and the index alone, never on the
order of access: two processes see the same world, and a held-out split is simply a stream of
another name.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clip_refine.errors import DataError
from clip_refine.toy.scene import (
    CAPTION_TEMPLATES,
    COLOURS,
    SHAPES,
    draw_scene,
    random_scene,
    stream_generator,
)


class ToyPairs:
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
        _check_size_and_seed(size, seed)
        if not 1 <= captions_per_image <= len(templates):
            raise DataError(
                f"toy pairs: captions_per_image is {captions_per_image}; "
                f"it must be 1 to {len(templates)}, the number of templates."
            )
        if not 0.0 <= mismatched <= 1.0:
            raise DataError(
                f"toy pairs: mismatched is {mismatched}; it must be a share from 0 to 1."
            )
        self.name = f"toy-{split}"
        self.seed = seed
        self.scenes = tuple(random_scene(stream_generator(self.name, seed, i)) for i in range(size))
        self.caption_sources = self._draw_caption_sources(mismatched)
        self.captions = tuple(
            self._write_captions(index, templates, captions_per_image) for index in range(size)
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.scenes)

    def load_image(self, index: int) -> Image.Image:
        """Image `index`, drawn now: RGB, 48x48 pixels, the same every time."""
        position = range(len(self))[index]
        generator = stream_generator(f"{self.name}/pixels", self.seed, position)
        return draw_scene(self.scenes[position], generator)

    def image_name(self, index: int) -> str:
        """The stream and the index, as in `toy-train[17]`."""
        return f"{self.name}[{index}]"

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


class ToyClasses:
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
        _check_size_and_seed(size, seed)
        fixed, self.templates = _TASKS[task]
        self.name = task
        self.seed = seed
        self.class_names = tuple(" ".join(attributes.values()) for attributes in fixed)
        self.labels = tuple(index % len(fixed) for index in range(size))
        self.scenes = tuple(
            random_scene(stream_generator(task, seed, index), **fixed[label])
            for index, label in enumerate(self.labels)
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.scenes)

    def load_image(self, index: int) -> Image.Image:
        """Image `index`, drawn now: RGB, 48x48 pixels, the same every time."""
        position = range(len(self))[index]
        generator = stream_generator(f"{self.name}/pixels", self.seed, position)
        return draw_scene(self.scenes[position], generator)

    def image_name(self, index: int) -> str:
        """The task and the index, as in `toy_shape[17]`."""
        return f"{self.name}[{index}]"


def toy_train(seed: int = 0) -> ToyPairs:
    """The pairs to refine on: 6,000, all captions true."""
    return ToyPairs("train", 6000, seed)


def toy_val(seed: int = 0) -> ToyPairs:
    """The pairs to measure geometry and retrieval on: 1,000, held out, all captions true."""
    return ToyPairs("val", 1000, seed)


def toy_tasks(seed: int = 0) -> tuple[ToyClasses, ToyClasses, ToyClasses]:
    """The zero-shot tasks, held out: 64 colours and shapes, 8 shapes, 8 colours; 1,280 each."""
    return (
        ToyClasses("toy_colour_shape", 1280, seed),
        ToyClasses("toy_shape", 1280, seed),
        ToyClasses("toy_colour", 1280, seed),
    )


def model_directory() -> Path:
    """Where the packaged pre-trained model lies, in open_clip's format.

    Load it with `open_clip.create_model_and_transforms(f"local-dir:{model_directory()}")`.
    """
    return Path(__file__).parent / "weights"


def _check_size_and_seed(size: int, seed: int) -> None:
    if size < 1:
        raise DataError(f"toy world: size is {size}; it must be at least 1.")
    if seed < 0:
        raise DataError(f"toy world: seed is {seed}; it must be 0 or more.")


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
