"""Which model it is: equal for equal models, another for others, whatever they are."""

import torch
from PIL import Image
from torch import Tensor

from clip_refine.models.encoder import identity


class Bare:
    """A dual encoder that is no module, as one that runs elsewhere."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.tensor(image.getpixel((3, 200)), dtype=torch.float32)

    def tokenizer(self, texts: list[str]) -> Tensor:
        return torch.tensor([[len(text)] for text in texts])

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels * self.factor

    def encode_text(self, tokens: Tensor) -> Tensor:
        return tokens.float()


def test_models_whose_weights_nobody_sees_are_told_apart():
    assert list(identity(Bare(1), "fp32")) == list(identity(Bare(1), "fp32"))
    assert list(identity(Bare(1), "fp32")) != list(identity(Bare(2), "fp32"))


def test_where_texts_are_cut_off_counts():
    """At 16 and at 24 tokens a long caption has other features (cosine .63 was seen)."""

    class Cut(Bare):
        def __init__(self, length: int) -> None:
            super().__init__(1)
            self.length = length

        def tokenizer(self, texts: list[str]) -> Tensor:
            return torch.tensor([[min(len(text.split()), self.length)] for text in texts])

    assert list(identity(Cut(16), "fp32")) != list(identity(Cut(24), "fp32"))
