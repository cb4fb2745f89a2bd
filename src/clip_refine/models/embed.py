"""Images and texts → features: the one loop that encodes, and the features that are kept."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from clip_refine.data import ImageCaptions, PixelReader, image_batches
from clip_refine.data.pairs import ChosenImages, Images, fingerprint, image_fingerprint
from clip_refine.models.encoder import DualEncoder
from clip_refine.support.cache import RowCache
from clip_refine.support.console import Bar
from clip_refine.support.errors import ModelError

Block = tuple[Sequence[int], Tensor]  # positions of some images or texts, their (B, d) features


@dataclass(frozen=True)
class Embedder:
    """A model with the way to feed it.

    Attributes:
        model: A dual encoder in evaluation mode on `device`.
        device: Where it is.
        batch_size: Images or texts at a time.
        workers: Processes that decode images.
        visible: Whether progress is shown.
        reader: How images become pixels, where not by the model's preprocessing alone.
        group: Accelerate's, of processes that share the work: all call together, and `images` and
            `texts` give each of them everything. None where this one works alone.
    """

    model: DualEncoder
    device: torch.device
    batch_size: int
    workers: int = 0
    visible: bool = True
    reader: PixelReader | None = None
    group: Accelerator | None = None

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) of one batch → (B, d) raw features, float32 on the CPU."""
        pixels = pixels.to(self.device, non_blocking=True)
        return self.model.encode_image(pixels).float().cpu()

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """B texts of one batch → (B, d) raw features, float32 on the CPU."""
        tokens = self.model.tokenizer(texts).to(self.device)
        return self.model.encode_text(tokens).float().cpu()

    def images(self, images: Images, title: str) -> Tensor:
        """Raw features of all images in order, (N, d), float32 on the CPU."""
        return self._all(
            range(len(images)),
            lambda own: self.image_blocks(ChosenImages(images, own), title),
        )

    def texts(self, texts: Sequence[str], title: str) -> Tensor:
        """Raw features of all texts in order, (N, d), float32 on the CPU."""
        return self._all(
            _by_length(texts),
            lambda own: self.text_blocks([texts[index] for index in own], title),
        )

    def _all(
        self, order: Sequence[int], encode: Callable[[Sequence[int]], Iterator[Block]]
    ) -> Tensor:
        """The features of all; processes take turns with the batches, which stay the same.

        One that fails leaves the others waiting until the launcher ends them.
        """
        rank, count = (self.group.process_index, self.group.num_processes) if self.group else (0, 1)
        size = self.batch_size
        starts = range(rank * size, len(order), count * size)
        # one that has none of the batches has to know the dimension, too
        own = [index for start in starts for index in order[start : start + size]] or order[:1]
        found = torch.empty(0)
        for rows, features in encode(own):
            if not len(found):
                found = features.new_zeros(len(order), features.shape[1])
            found[[own[row] for row in rows]] = features if starts else 0.0
        if self.group is None or count == 1:
            return found
        added: Any = self.group.reduce(found.to(self.device))
        return added.cpu()

    def image_blocks(self, images: Images, title: str) -> Iterator[Block]:
        """The features of all images in order, a batch at a time, as it is ready."""
        size = self.batch_size
        batches = image_batches(
            images,
            batch_size=size,
            preprocess=self.reader or self.model.preprocess,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        done = 0
        for pixels in self._bar(title, len(images), size).over(batches):
            indices = range(done, done + len(pixels))
            features = self.encode_pixels(pixels)
            _check_finite(features, lambda row, of=indices: images.image_name(of[row]))
            yield indices, features
            done += len(pixels)

    def text_blocks(self, texts: Sequence[str], title: str) -> Iterator[Block]:
        """The features of all texts, a batch at a time.

        In order of length, so that short ones need not wait for long ones.
        """
        order = _by_length(texts)
        size = self.batch_size
        for start in self._bar(title, len(texts), size).over(range(0, len(texts), size)):
            indices = order[start : start + size]
            features = self.encode_texts([texts[index] for index in indices])
            _check_finite(features, lambda row, of=indices: repr(texts[of[row]]))
            yield indices, features

    def _bar(self, title: str, count: int, size: int) -> Bar:
        return Bar(title, -(-count // size), visible=self.visible, transient=True)


def _by_length(texts: Sequence[str]) -> list[int]:
    return sorted(range(len(texts)), key=lambda index: len(texts[index]))


def _check_finite(features: Tensor, name: Callable[[int], str]) -> None:
    """Refuse features that nothing can be told from: with NaN or infinity, or all of them 0."""
    bad = (~features.isfinite().all(dim=-1)).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f"the model's features of {name(bad[0])} are not finite ({len(bad)} of {len(features)} "
            "such). Look for NaN in its weights, or load them again."
        )
    if not features.any():
        raise ModelError(
            f"the model's features are all 0, those of {name(0)} too. Its weights may be 0, as in "
            "a placeholder or a file that was cut off; load them again."
        )


# --------------------------------------------------------------------------------------------------
# Features that are computed once and kept: what is on disk is not computed again.


@dataclass(frozen=True)
class FeatureStore:
    """A model's features of images and texts on disk, by what is in them.

    The processes of an embedder's group share the work of adding to it; the folder is on a disk
    that all of them see.
    """

    folder: Path  # of this model

    def images(self, fingerprints: Sequence[str]) -> Tensor:
        """(N, d) raw features of images in order, float32."""
        return torch.from_numpy(self._rows("images").read(fingerprints))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(M, d) raw features of texts in order, float32."""
        return torch.from_numpy(self._rows("texts").read(_text_fingerprints(texts)))

    def add_images(
        self,
        embedder: Embedder,
        source: Images,
        fingerprints: Sequence[str],
        title: str,
    ) -> None:
        """Encode the images that are missing."""
        self._add(
            self._rows("images"),
            fingerprints,
            lambda missing: embedder.image_blocks(ChosenImages(source, missing), title),
            embedder.group,
        )

    def add_texts(self, embedder: Embedder, texts: Sequence[str], title: str) -> None:
        """Encode the texts that are missing."""
        self._add(
            self._rows("texts"),
            _text_fingerprints(texts),
            lambda missing: embedder.text_blocks([texts[index] for index in missing], title),
            embedder.group,
        )

    def _rows(self, kind: str) -> RowCache:
        return RowCache(self.folder / kind, flag="--cache")

    def _add(
        self,
        rows: RowCache,
        names: Sequence[str],
        encode: Callable[[list[int]], Iterator[Block]],
        group: Accelerator | None,
    ) -> None:
        rows.check(names)
        missing = rows.missing(names)
        if group is not None:
            # nobody adds before everybody has seen what is missing
            group.wait_for_everyone()
            missing = missing[group.process_index :: group.num_processes]
        # each batch at once, so that an interruption costs no more than one
        for indices, features in encode(missing) if missing else ():
            rows.add([names[missing[index]] for index in indices], features.numpy())
        if group is not None:
            group.wait_for_everyone()


def _text_fingerprints(texts: Sequence[str]) -> list[str]:
    return [fingerprint(text.encode()) for text in texts]


def image_fingerprints(source: Images, title: str, *, visible: bool = True) -> list[str]:
    """What is in each image, in order."""
    bar = Bar(title, len(source), visible=visible, transient=True)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda index: image_fingerprint(source, index), range(len(source)))
        return list(bar.over(found))


# --------------------------------------------------------------------------------------------------
# Pairs and class names → features.


@dataclass(frozen=True)
class EmbeddedPairs:
    """Features of images and of all their captions."""

    image_features: Tensor  # (N, d) raw
    text_features: Tensor  # (M, d) raw, M >= N
    text_to_image: Tensor  # (M,) the image of each caption, in rising order

    @property
    def first_caption(self) -> Tensor:
        """(N,) the row of each image's first caption; its others follow."""
        return torch.searchsorted(self.text_to_image, torch.arange(len(self.image_features)))

    @property
    def first_caption_features(self) -> Tensor:
        """(N, d) raw features of each image's first caption: one row a pair."""
        return self.text_features[self.first_caption]

    def part(self, indices: Sequence[int]) -> "EmbeddedPairs":
        """Those of some images with their captions, as a `Subset` with these indices has them."""
        chosen = torch.tensor(list(indices))
        counts = torch.bincount(self.text_to_image, minlength=len(self.image_features))[chosen]
        owners = torch.repeat_interleave(torch.arange(len(chosen)), counts)
        # a caption's place among those of its image, behind that image's first one
        place = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
        texts = self.first_caption[chosen][owners] + place
        return EmbeddedPairs(self.image_features[chosen], self.text_features[texts], owners)


def embed_pairs(
    embedder: Embedder, pairs: ImageCaptions, store: FeatureStore | None = None
) -> EmbeddedPairs:
    """Encode every image and every caption once; with a store, only what it lacks."""
    texts = [text for captions in pairs.captions for text in captions]
    counts = torch.tensor([len(captions) for captions in pairs.captions])
    owners = torch.repeat_interleave(torch.arange(len(pairs)), counts)
    titles = "Encoding images", "Encoding captions"
    if store is None:
        images = embedder.images(pairs, titles[0])
        return EmbeddedPairs(images, embedder.texts(texts, titles[1]), owners)
    names = image_fingerprints(pairs, "Looking images up", visible=embedder.visible)
    store.add_images(embedder, pairs, names, titles[0])
    store.add_texts(embedder, texts, titles[1])
    return EmbeddedPairs(store.images(names), store.texts(texts), owners)


def embed_prompts(embedder: Embedder, class_names: Any, templates: Any) -> Tensor:
    """(C, T, d) raw features of every class name in every template."""
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = embedder.texts(prompts, "Encoding prompts")
    return features.view(len(class_names), len(templates), -1)
