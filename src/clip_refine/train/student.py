"""The student as a trainable module: which parts learn, which stay as the teacher has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from clip_refine.losses import PairFeatures
from clip_refine.models import DualEncoder, Teacher
from clip_refine.train.precision import TowerPrecision, autocast

_BATCH_NORMS = (nn.modules.batchnorm._NormBase,)


class TowerOutput(NamedTuple):
    """What a forward pass gives the objective; all of it may carry gradient.

    Attributes:
        features: Raw, in float32, (B, d) each.
        logit_scale: 0-d factor on cosines.
        logit_bias: 0-d offset of SigLIP-type models, None for others.
    """

    features: PairFeatures
    logit_scale: Tensor
    logit_bias: Tensor | None


class StudentTowers(nn.Module):
    """Both towers in one `forward`, which is what data-parallel wrappers need.

    Attributes:
        encoder: The dual encoder.
        precision: Which tower runs under bf16 autocast.
    """

    def __init__(self, encoder: nn.Module, precision: TowerPrecision) -> None:
        super().__init__()
        self.encoder = encoder
        self.precision = precision

    def forward(self, pixels: Tensor, tokens: Tensor) -> TowerOutput:
        """Features, logit scale and bias of a batch."""
        encoder: DualEncoder = self.encoder  # pyright: ignore[reportAssignmentType]
        features = encode_pairs(encoder, pixels, tokens, self.precision)
        return TowerOutput(features, encoder.logit_scale, getattr(encoder, "logit_bias", None))


def encode_pairs(
    encoder: DualEncoder | Teacher, pixels: Tensor, tokens: Tensor, precision: TowerPrecision
) -> PairFeatures:
    """Raw float32 features of a batch, each tower in its own precision."""
    with autocast(precision.image_bf16, pixels.device):
        image_features = encoder.encode_image(pixels)
    with autocast(precision.text_bf16, tokens.device):
        text_features = encoder.encode_text(tokens)
    return PairFeatures(image_features.float(), text_features.float())


def prepare_student(
    model: nn.Module,
    *,
    logit_scale: Literal["frozen", "trained"],
) -> None:
    """Make weights float32 and set whether the logit scale is trained, in place.

    Parameters that are frozen already stay so; `trained_part` freezes others.

    The student stays in evaluation mode: dropout would make it differ from its teacher at random,
    and running statistics of small batches ruin BatchNorm towers.

    Args:
        model: The dual encoder; weights become float32.
        logit_scale: Whether the parameters called `logit_scale` and `logit_bias` are trained.
    """
    model.float().eval()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("logit_scale", "logit_bias"):
            parameter.requires_grad_(logit_scale == "trained")


@contextmanager
def training_mode(model: nn.Module, *, statistics: bool, dropout: bool) -> Iterator[None]:
    """Some layers in train mode within the block; all are in evaluation mode after it.

    Args:
        model: Both towers.
        statistics: Whether BatchNorm layers follow the batches.
        dropout: Whether everything else is in train mode: dropout, stochastic depth, patch dropout.
    """
    for module in model.modules():
        module.training = statistics if isinstance(module, _BATCH_NORMS) else dropout
    try:
        yield
    finally:
        model.eval()


@torch.no_grad()
def batch_statistics(features: PairFeatures) -> dict[str, float]:
    """What the log says about a batch: mean raw norms and the distance of the unit centroids."""
    image_norms = features.image_features.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    text_norms = features.text_features.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    image_center = (features.image_features / image_norms).mean(dim=0)
    text_center = (features.text_features / text_norms).mean(dim=0)
    values = torch.stack(
        [image_norms.mean(), text_norms.mean(), (image_center - text_center).norm()]
    ).tolist()
    return dict(zip(("image_norm", "text_norm", "centroid_distance"), values, strict=True))
