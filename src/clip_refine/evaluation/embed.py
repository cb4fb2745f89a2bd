"""The one loop that encodes, and the features that are kept."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from clip_refine.data import ImageCaptions, PixelReader, image_batches
from clip_refine.data.pairs import Images, fingerprint, image_fingerprint
from clip_refine.errors import ModelError
from clip_refine.models import DualEncoder
from clip_refine.support.cache import FeatureRows
from clip_refine.support.console import Bar

# --------------------------------------------------------------------------------------------------
# Images and texts → frozen features, in float32.


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
    """

    model: DualEncoder
    device: torch.device
    batch_size: int
    workers: int = 0
    visible: bool = True
    reader: PixelReader | None = None

    def images(self, images: Images, title: str) -> Tensor:
        """Raw features of all images in order, (N, d), float32 on the CPU."""
        return torch.cat(list(self.image_blocks(images, title)))

    @torch.no_grad()
    def image_blocks(self, images: Images, title: str) -> Iterator[Tensor]:
        """The same, a batch at a time, as it is ready."""
        batches = image_batches(
            images,
            batch_size=self.batch_size,
            preprocess=self.reader or self.model.preprocess,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        done = 0
        for pixels in self._bar(title, len(images)).over(batches):
            pixels = pixels.to(self.device, non_blocking=True)
            features = self.model.encode_image(pixels).float().cpu()
            yield _finite(features, lambda index, start=done: images.image_name(start + index))
            done += len(features)

    @torch.no_grad()
    def texts(self, texts: list[str], title: str) -> Tensor:
        """Raw features of all texts in order, (N, d), float32 on the CPU.

        Texts are encoded in order of length, so that short ones need not wait for long ones.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        starts = range(0, len(texts), self.batch_size)
        features = []
        for start in self._bar(title, len(texts)).over(starts):
            chosen = [texts[i] for i in order[start : start + self.batch_size]]
            tokens = self.model.tokenizer(chosen).to(self.device)
            features.append(self.model.encode_text(tokens).float().cpu())
        by_length = torch.cat(features)
        in_order = torch.empty_like(by_length)
        in_order[torch.tensor(order)] = by_length
        return _finite(in_order, lambda index: repr(texts[index]))

    def _bar(self, title: str, count: int) -> Bar:
        batches = -(-count // self.batch_size)
        return Bar(title, batches, visible=self.visible, transient=True)


def _finite(features: Tensor, name: Callable[[int], str]) -> Tensor:
    """The features, refused where one is NaN or infinite: every number after it would be, too."""
    bad = (~features.isfinite().all(dim=-1)).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f"the model's features of {name(bad[0])} are not finite ({len(bad)} of {len(features)} "
            "such). Look for NaN in its weights, or load them again."
        )
    return features


@dataclass(frozen=True)
class EmbeddedPairs:
    """Features of images and of all their captions."""

    image_features: Tensor  # (N, d) raw
    text_features: Tensor  # (M, d) raw, M >= N
    text_to_image: Tensor  # (M,) the image of each caption, in rising order

    @property
    def first_caption_features(self) -> Tensor:
        """(N, d) raw features of each image's first caption: one row a pair."""
        first = torch.searchsorted(self.text_to_image, torch.arange(len(self.image_features)))
        return self.text_features[first]


def embed_pairs(embedder: Embedder, pairs: ImageCaptions) -> EmbeddedPairs:
    """Encode every image and every caption once."""
    texts = [text for captions in pairs.captions for text in captions]
    counts = torch.tensor([len(captions) for captions in pairs.captions])
    return EmbeddedPairs(
        embedder.images(pairs, "Encoding images"),
        embedder.texts(texts, "Encoding captions"),
        torch.repeat_interleave(torch.arange(len(pairs)), counts),
    )


def embed_prompts(embedder: Embedder, class_names: Any, templates: Any) -> Tensor:
    """(C, T, d) raw features of every class name in every template."""
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = embedder.texts(prompts, "Encoding prompts")
    return features.view(len(class_names), len(templates), -1)


# --------------------------------------------------------------------------------------------------
# Features of a model that are computed once and kept: what is on disk is not computed again.


ROWS_A_FILE = 1024
"""Features that are written together: what an interruption may cost each process."""


@dataclass(frozen=True)
class _Chosen:
    """Some images of a source."""

    source: Images
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def load_image(self, index: int) -> Image.Image:
        return self.source.load_image(self.indices[index])

    def image_name(self, index: int) -> str:
        return self.source.image_name(self.indices[index])


@dataclass(frozen=True)
class FeatureStore:
    """A model's features of images and texts on disk, by what is in them."""

    folder: Path  # of this model

    def images(self, fingerprints: Sequence[str]) -> Tensor:
        """(N, d) raw features of encoded images in order, float32."""
        return self.rows("images").read(fingerprints)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(M, d) raw features of encoded texts in order, float32."""
        return self.rows("texts").read([fingerprint(text.encode()) for text in texts])

    def rows(self, kind: str) -> FeatureRows:
        """Those of `images` or of `texts`."""
        return FeatureRows(self.folder / kind)


@dataclass(frozen=True)
class Filler:
    """Encodes what a store lacks. Several processes share that, and all call it together."""

    store: FeatureStore  # on a disk that all processes see
    embedder: Embedder  # the model and the way to feed it
    accelerator: Accelerator  # which process this is

    def images(self, source: Images, fingerprints: Sequence[str], title: str) -> None:
        """Encode the images that are missing."""
        rows = self.store.rows("images")
        mine = self._share(rows.missing(fingerprints))
        if mine:
            done, ready = 0, []
            for block in self.embedder.image_blocks(_Chosen(source, mine), title):
                ready.append(block)
                count = sum(map(len, ready))
                if count >= ROWS_A_FILE or done + count == len(mine):
                    names = [fingerprints[index] for index in mine[done : done + count]]
                    rows.add(names, torch.cat(ready))
                    done, ready = done + count, []
        self.accelerator.wait_for_everyone()

    def texts(self, texts: Sequence[str], title: str) -> None:
        """Encode the texts that are missing."""
        rows = self.store.rows("texts")
        names = [fingerprint(text.encode()) for text in texts]
        # in order of length, so that those of one batch are alike
        missing = sorted(rows.missing(names), key=lambda index: len(texts[index]))
        mine = self._share(missing)
        for start in range(0, len(mine), ROWS_A_FILE):
            part = mine[start : start + ROWS_A_FILE]
            features = self.embedder.texts([texts[index] for index in part], title)
            rows.add([names[index] for index in part], features)
        self.accelerator.wait_for_everyone()

    def _share(self, missing: list[int]) -> list[int]:
        """This process's part; nobody writes before everybody has seen what is missing."""
        self.accelerator.wait_for_everyone()
        return missing[self.accelerator.process_index :: self.accelerator.num_processes]


def image_fingerprints(source: Images, title: str, *, visible: bool = True) -> list[str]:
    """What is in each image, in order."""
    bar = Bar(title, len(source), visible=visible, transient=True)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda index: image_fingerprint(source, index), range(len(source)))
        return list(bar.over(found))
