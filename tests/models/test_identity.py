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
