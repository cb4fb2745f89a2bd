"""Images with their captions, and the views of them: subset, every caption, mixture."""

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from clip_refine.data.rows import (
    BadRow,
    BadRowPolicy,
    BadRows,
    ImagePlace,
    Row,
    image_problem,
    load_place,
    read_place,
    skipped_rows,
)
from clip_refine.errors import DataError
from clip_refine.support.console import Bar

# --------------------------------------------------------------------------------------------------
# What a source of images is to the rest of the package: small protocols.


class Images(Protocol):
    """What image batches need of a source.

    Where images are files or stored as files are, a source also has `image_bytes(index) -> bytes`,
    the content of image `index`, raising OSError where it is gone; see `content.image_bytes`.
    """

    def __len__(self) -> int: ...
    def load_image(self, index: int) -> Image.Image: ...  # noqa: D102
    def image_name(self, index: int) -> str: ...  # noqa: D102


class ImageCaptions(Protocol):
    """Images with their captions, by position; every kind of source becomes one of these.

    Attributes:
        name: What to call the source in logs and tables.
        captions: `captions[i]` are the texts of image `i`, at least one.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def captions(self) -> Sequence[Sequence[str]]: ...  # noqa: D102
    def __len__(self) -> int: ...
    def load_image(self, index: int) -> Image.Image:
        """Image `index`, decoded, in RGB."""
        ...

    def image_name(self, index: int) -> str:
        """What to call image `index` in a message, usually its path."""
        ...


class LabelledImages(Protocol):
    """Images with one class each and the prompts that name the classes.

    Attributes:
        name: The task's name in tables, for example `cifar10`.
        class_names: What goes into the templates, one text a class.
        templates: Prompts with one `{}` for the class name.
        labels: `labels[i]` is the position of image `i`'s class in `class_names`.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def class_names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def templates(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def labels(self) -> Sequence[int]: ...  # noqa: D102
    def __len__(self) -> int: ...
    def load_image(self, index: int) -> Image.Image:
        """Image `index`, decoded, in RGB."""
        ...

    def image_name(self, index: int) -> str:
        """What to call image `index` in a message, usually its path."""
        ...


# --------------------------------------------------------------------------------------------------
# What images and captions hold, as short fingerprints.


_DIGEST_BYTES = 16


def image_bytes(images: Images, index: int) -> bytes | None:
    """The content of the file that image `index` is decoded from, or None for a drawn one."""
    source: Any = images
    if not hasattr(source, "image_bytes"):
        return None
    try:
        return source.image_bytes(index)
    except OSError as error:
        raise DataError(
            f"{images.image_name(index)}: cannot be read ({error.strerror or error}). Check the "
            "path."
        ) from error


def image_fingerprint(images: Images, index: int) -> str:
    """Of the image file's content, wherever it is stored.

    Of the pixels and the name where there is no such content, because the image is drawn.
    """
    data = image_bytes(images, index)
    if data is not None:
        return fingerprint(data)
    image = images.load_image(index)
    name = images.image_name(index)
    return fingerprint(
        name.encode(), image.mode.encode(), repr(image.size).encode(), image.tobytes()
    )


def pairs_fingerprint(pairs: ImageCaptions) -> str:
    """Which images with which captions, whatever their order and the folder they lie in.

    Of every image's file name, file size and captions; no image is read, so that it costs a look
    at each file. Images that were changed without a change of size keep it: `image_fingerprint`
    tells those apart.
    """
    of_each = sorted(
        fingerprint(
            Path(name).name.encode(),
            str(_file_size(name)).encode(),
            *(caption.encode() for caption in captions),
        ).encode()
        for name, captions in (
            (pairs.image_name(index), pairs.captions[index]) for index in range(len(pairs))
        )
    )
    return fingerprint(*of_each)


def _file_size(name: str) -> int:
    """In bytes; 0 for what is no file of its own, such as a drawn image or one in an archive."""
    try:
        return Path(name).stat().st_size
    except (OSError, ValueError):
        return 0


def fingerprint(*parts: bytes) -> str:
    """32 hexadecimal digits, other ones for other parts.

    >>> fingerprint(b"ab", b"c") == fingerprint(b"a", b"bc")
    False
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Rows of any source → images with captions, every row checked.


@dataclass(frozen=True)
class CaptionedImages:
    """Images with one or more captions each, wherever they are stored.

    Attributes:
        name: The file, folder or dataset that they come from.
        kind: What it was recognised as.
        places: Where each image is.
        captions: `captions[i]` are the texts of image `i`.
        skipped: Rows that were left out.
        uncaptioned: Images of the source that have no caption, by name.
    """

    name: str
    kind: str
    places: Sequence[ImagePlace]
    captions: Sequence[tuple[str, ...]]
    skipped: Sequence[BadRow] = ()
    uncaptioned: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.places)

    def load_image(self, index: int) -> Image.Image:
        """Image `index` in RGB.

        Raises:
            DataError: The file is gone or cannot be decoded.
        """
        return load_place(self.places[index])

    def image_name(self, index: int) -> str:
        """The image's path, or what it is called in its table or archive."""
        return str(self.places[index])

    def image_bytes(self, index: int) -> bytes:
        """The content of the image file.

        Raises:
            OSError: The file is gone.
        """
        return read_place(self.places[index])


def collect(
    name: str, kind: str, rows: Iterable[Row], policy: BadRowPolicy | None = None
) -> CaptionedImages:
    """Check every row and put the captions of one image together.

    Images keep the order of their first row.
    """
    policy = policy or BadRowPolicy()
    bad = BadRows(name, policy)
    captions: dict[ImagePlace, list[str]] = {}
    problems: dict[ImagePlace, str | None] = {}
    for row in Bar(f"Checking {name}", transient=True).over(rows):
        bad.total += 1
        problem = row_problem(row)
        if problem is None and row.image is not None:
            if row.image not in problems:
                problems[row.image] = image_problem(row.image, decode=policy.skip)
            problem = problems[row.image]
        if problem is not None:
            bad.add(row.where, problem)
        elif row.image is not None:
            captions.setdefault(row.image, []).extend(text.strip() for text in row.captions)
    bad.settle()
    described = {place: tuple(texts) for place, texts in captions.items() if texts}
    if not described:
        raise DataError(f"{name}: {kind} without pairs. Add pairs of image and caption.")
    return CaptionedImages(
        name=name,
        kind=kind,
        places=tuple(described),
        captions=tuple(described.values()),
        skipped=tuple(bad.found),
        uncaptioned=tuple(str(place) for place, texts in captions.items() if not texts),
    )


def row_problem(row: Row) -> str | None:
    """What is wrong with a row apart from its image, or None."""
    if row.problem is not None:
        return row.problem
    if row.image is None:
        return "names no image. Name one or remove the row."
    for text in row.captions:
        if not text.strip():
            return f"image {_short(row.image)!r} has an empty caption. Add one or remove the row."
        if not _is_text(text):
            return (
                f"image {_short(row.image)!r} has a caption that is not UTF-8. Save it as UTF-8 "
                "or remove the row."
            )
    return None


def _short(place: ImagePlace) -> str:
    return getattr(place, "name", None) or str(place)


def _is_text(text: str) -> bool:
    """Whether a text read with `surrogateescape` was sound."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --------------------------------------------------------------------------------------------------
# Several sources as one, and which of their images an epoch uses how often.


class Mixture:
    """The images of several sources, one source behind the other.

    Without weights an epoch uses every image once. With weights it has as many pairs, of which each
    source gives its share: one that has too few images begins anew, so that some come twice or more
    often, and one that has too many gives another part of them each epoch.

    Attributes:
        sources: What is mixed.
        name: All their names.
        captions: The texts of each image.
        group_of: For each image the number of its source.
        weights: One a source, or none.
    """

    def __init__(self, sources: Sequence[ImageCaptions], weights: Sequence[float] = ()) -> None:
        """Mix.

        Args:
            sources: At least one.
            weights: As many positive numbers; only their ratios count.

        Raises:
            ValueError: There are weights, but not one for each source.
        """
        if weights and len(weights) != len(sources):
            raise ValueError(f"{len(weights)} weights for {len(sources)} sources")
        self.sources = tuple(sources)
        self.weights = tuple(weights)
        self.name = " + ".join(source.name for source in sources)
        self.captions = [texts for source in sources for texts in source.captions]
        self.group_of = [number for number, one in enumerate(sources) for _ in range(len(one))]
        sizes = [len(source) for source in sources]
        self._starts = [0, *itertools.accumulate(sizes[:-1])]

    def __len__(self) -> int:
        return len(self.captions)

    def load_image(self, index: int) -> Image.Image:
        """Image `index`, in RGB."""
        source, position = self._at(index)
        return source.load_image(position)

    def image_name(self, index: int) -> str:
        """Image `index` as its source calls it."""
        source, position = self._at(index)
        return source.image_name(position)

    def image_bytes(self, index: int) -> bytes | None:
        """The content of the image file, None where the source has none."""
        return image_bytes(*self._at(index))

    @property
    def skipped(self) -> list[BadRow]:
        """Rows that were left out of the sources."""
        return skipped_rows(self.sources)

    @property
    def mixing(self) -> "Mixing | None":
        """What an epoch takes from where; None where it takes every image once."""
        return (self.group_of, self.weights) if self.weights else None

    def _at(self, index: int) -> tuple[ImageCaptions, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return self.sources[number], index - self._starts[number]


Mixing = tuple[Sequence[int], Sequence[float]]
"""For each image the number of its group, and for each group its weight."""


def mixing_of(pairs: ImageCaptions) -> Mixing | None:
    """What an epoch of these pairs takes from where; None where it takes every image once."""
    return getattr(pairs, "mixing", None)


def mixed_order(mixing: Mixing, *, generator: torch.Generator) -> torch.Tensor:
    """As many positions as there are images, shuffled, each group with its share of them.

    Within a group every image comes equally often, or once more than others.

    >>> order = mixed_order(([0, 0, 1, 1, 1, 1], [2, 1]), generator=torch.Generator())
    >>> sorted((order < 2).tolist())
    [False, False, True, True, True, True]
    """
    groups = torch.tensor(mixing[0])
    chosen = []
    for number, share in enumerate(_shares(mixing)):
        members = (groups == number).nonzero().flatten()
        while share:
            drawn = members[torch.randperm(len(members), generator=generator)[:share]]
            chosen.append(drawn)
            share -= len(drawn)
    order = torch.cat(chosen)
    return order[torch.randperm(len(order), generator=generator)]


def _shares(mixing: Mixing) -> list[int]:
    """Pairs of each group in an epoch, by largest remainders; groups without images get none."""
    groups, weights = mixing
    sizes = [0] * len(weights)
    for group in groups:
        sizes[group] += 1
    usable = [weight if size else 0.0 for weight, size in zip(weights, sizes, strict=True)]
    exact = [len(groups) * weight / sum(usable) for weight in usable]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for number in by_remainder[: len(groups) - sum(shares)]:
        shares[number] += 1
    return shares


# --------------------------------------------------------------------------------------------------
# Every caption with its image as a pair of its own.


class EveryCaption:
    """A source in which each image stands once for each of its captions.

    Attributes:
        source: Where images and captions are.
        image_of: For each pair the position of its image in `source`.
        name: What to call it.
        captions: One text a pair.
    """

    def __init__(self, source: ImageCaptions) -> None:
        self.source = source
        counted = list(enumerate(source.captions))
        self.image_of = [image for image, texts in counted for _ in texts]
        self.captions = [(text,) for _, texts in counted for text in texts]
        self.name = source.name

    def __len__(self) -> int:
        return len(self.image_of)

    def load_image(self, index: int) -> Image.Image:
        """The image of pair `index`, in RGB."""
        return self.source.load_image(self.image_of[index])

    def image_name(self, index: int) -> str:
        """The image of pair `index`, as its source calls it."""
        return self.source.image_name(self.image_of[index])

    def image_bytes(self, index: int) -> bytes | None:
        """The content of the image file, None where the source has none."""
        return image_bytes(self.source, self.image_of[index])

    @property
    def skipped(self) -> Sequence[BadRow]:
        """Rows that were left out of the source."""
        return getattr(self.source, "skipped", ())

    @property
    def mixing(self) -> Mixing | None:
        """What an epoch takes from where."""
        mixing = mixing_of(self.source)
        return mixing and ([mixing[0][image] for image in self.image_of], mixing[1])


# --------------------------------------------------------------------------------------------------
# Every row of a source, good or bad, and every image that a row names.


@dataclass(frozen=True)
class AllRows:
    """What a source holds, before anything is left out."""

    kind: str  # what the source was recognised as
    images: ImageCaptions  # all that rows name, readable or not; some have no captions
    rows: int  # how many there are
    bad: Sequence[BadRow] = ()  # those with something wrong besides the image
    broken_off: str | None = None  # why reading stopped before the end, if it did


def read_all(name: str, kind: str, rows: Iterable[Row], *, visible: bool = True) -> AllRows:
    """Go through a source without opening its images or stopping at what is wrong."""
    captions: dict[ImagePlace, list[str]] = {}
    bad: list[BadRow] = []
    count, broken_off = 0, None
    try:
        for row in Bar(f"Reading {name}", visible=visible, transient=True).over(rows):
            count += 1
            problem = row_problem(row)
            if problem is not None:
                bad.append(BadRow(row.where, problem))
            if row.image is not None:
                texts = captions.setdefault(row.image, [])
                texts += [text.strip() for text in row.captions] if problem is None else []
    except DataError as error:
        if not count:
            raise
        broken_off = str(error)
    images = CaptionedImages(
        name=name,
        kind=kind,
        places=tuple(captions),
        captions=tuple(tuple(texts) for texts in captions.values()),
    )
    return AllRows(kind, images, count, bad, broken_off)


# --------------------------------------------------------------------------------------------------
# Part of a source, and a seeded split into training and held-out images.


MINIMUM_HELD_OUT = 100


class Subset:
    """Some images of a source with all their captions.

    Attributes:
        source: Where the images are.
        indices: Positions in `source`.
        name: What to call this part.
        captions: The texts of each image in this part.
    """

    def __init__(self, source: ImageCaptions, indices: Sequence[int], name: str) -> None:
        self.source = source
        self.indices = indices
        self.name = name
        captions = source.captions
        self.captions = [captions[index] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def load_image(self, index: int) -> Image.Image:
        """Image `index` of this part, in RGB."""
        return self.source.load_image(self.indices[index])

    def image_name(self, index: int) -> str:
        """Image `index` of this part, as its source calls it."""
        return self.source.image_name(self.indices[index])

    def image_bytes(self, index: int) -> bytes | None:
        """The content of the image file, None where the source has none."""
        return image_bytes(self.source, self.indices[index])

    @property
    def mixing(self) -> Mixing | None:
        """What an epoch takes from where."""
        mixing = mixing_of(self.source)
        return mixing and ([mixing[0][index] for index in self.indices], mixing[1])

    @property
    def skipped(self) -> Sequence[BadRow]:
        """Rows that were left out of the source."""
        return getattr(self.source, "skipped", ())


def hold_out(
    source: ImageCaptions, *, fraction: float, seed: int
) -> tuple[Subset | EveryCaption, Subset]:
    """Split by image, so that no held-out image has a caption in training.

    In a mixture images of one name are one image, of which only one copy is held out.

    Args:
        source: At least 200 images.
        fraction: Share of the images to hold out; never fewer than 100.
        seed: Same seed, same split.

    Returns:
        Training part and held-out part, each in the order of the source. Of `EveryCaption` the
        training part has every caption again, the held-out part the images with all captions.

    Raises:
        DataError: Less than half of the images would be left to train on.
    """
    if isinstance(source, EveryCaption):
        training, held_out = hold_out(source.source, fraction=fraction, seed=seed)
        return EveryCaption(training), held_out
    held_out = max(MINIMUM_HELD_OUT, round(fraction * len(source)))
    if held_out > len(source) // 2:
        raise DataError(
            f"{source.name}: {len(source)} images, too few to hold {held_out} of them out for the "
            "before/after numbers. Give evaluation pairs of their own with --data.val."
        )
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, others = order[:held_out], order[held_out:]
    if _is_mixed(source):
        chosen, others = _by_name(source, order, held_out)
    return (
        Subset(source, sorted(others), f"{source.name} (training part)"),
        Subset(source, sorted(chosen), f"{source.name} (held-out part)"),
    )


def _is_mixed(source: ImageCaptions) -> bool:
    while isinstance(source, Subset):
        source = source.source
    return isinstance(source, Mixture)


def _by_name(
    source: ImageCaptions, order: Sequence[int], count: int
) -> tuple[list[int], list[int]]:
    """Held-out and training positions, where several sources may have captions of one image."""
    names = {index: source.image_name(index) for index in order}
    held_out: dict[str, int] = {}
    for index, name in names.items():
        if len(held_out) == count:
            break
        held_out.setdefault(name, index)
    return list(held_out.values()), [i for i in order if names[i] not in held_out]
