"""Features of a model that are computed once and kept: what is on disk is not computed again."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from clip_refine.console import Bar
from clip_refine.data.content import fingerprint, image_fingerprint
from clip_refine.data.loader import Images
from clip_refine.evaluation.embed import Embedder
from clip_refine.feature_rows import FeatureRows

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
    """A model's features of images and texts on disk, by what is in them.

    Attributes:
        folder: Of this model.
    """

    folder: Path

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
    """Encodes what a store lacks. Several processes share that, and all call it together.

    Attributes:
        store: On a disk that all processes see.
        embedder: The model and the way to feed it.
        accelerator: Which process this is.
    """

    store: FeatureStore
    embedder: Embedder
    accelerator: Accelerator

    def images(self, source: Images, fingerprints: Sequence[str], title: str) -> None:
        """Encode the images that are missing.

        Args:
            source: The images.
            fingerprints: Of each, from `image_fingerprints`.
            title: What the progress bar says.

        Raises:
            DataError: An image cannot be decoded.
            OutputError: The folder cannot be written.
        """
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
        """Encode the texts that are missing.

        Raises:
            OutputError: The folder cannot be written.
        """
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
    """What is in each image, in order.

    Raises:
        DataError: An image cannot be read.
    """
    bar = Bar(title, len(source), visible=visible, transient=True)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda index: image_fingerprint(source, index), range(len(source)))
        return list(bar.over(found))
