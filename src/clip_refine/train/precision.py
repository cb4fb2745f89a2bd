"""The student's towers, each at its own precision."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from clip_refine.losses import PairFeatures
from clip_refine.models import DualEncoder, Teacher
from clip_refine.models.weights import Heads, used_parameters
from clip_refine.train.part import tower_blocks

PrecisionName = Literal["fp32", "bf16", "bf16-image", "bf16-text"]
# one thread with AMX: towers of 2^16 and 2^14 (toy) take twice as long in bf16, those of 2^19 and
# more (ViT-S/32, RN50) 1.3 to 2 times less
_WORTH_BF16 = 2**18


@dataclass(frozen=True)
class TowerPrecision:
    """Which towers run under bf16 autocast; weights, loss and optimiser stay in float32.

    Attributes:
        image_bf16: Whether the image tower does.
        text_bf16: Whether the text tower does.
    """

    image_bf16: bool
    text_bf16: bool

    @classmethod
    def from_name(cls, name: PrecisionName) -> "TowerPrecision":
        """The setting `name` of the configuration."""
        return cls(name in ("bf16", "bf16-image"), name in ("bf16", "bf16-text"))

    @property
    def name(self) -> PrecisionName:
        """What to write into a configuration to get this again."""
        if self.image_bf16:
            return "bf16" if self.text_bf16 else "bf16-image"
        return "bf16-text" if self.text_bf16 else "fp32"


def autocast(enabled: bool, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast on `device`, or none."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def faster_precision(
    model: DualEncoder, pixels: Tensor, tokens: Tensor, device: torch.device
) -> TowerPrecision:
    """The precision that suits the device and each tower: the same whenever it is asked.

    bf16 where the device has matrix units for it and the tower's largest matrix is large enough to
    win more there than autocast costs. On a CPU not for a tower with grouped convolutions that
    mostly convolves, as EfficientNets do: forward and backward take 1.9 times as long in bf16.

    Args:
        model: On `device`.
        pixels: (B, 3, H, W) of a few images.
        tokens: (B, L) of a few captions.
        device: Where training runs.
    """
    pixels, tokens = pixels.to(device), tokens.to(device)
    module: Any = model
    encoders = (lambda: model.encode_image(pixels)), (lambda: model.encode_text(tokens))
    looked_up = {
        id(table)
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        for table in part.parameters()
    }
    grouped = {
        id(part.weight)
        for part in module.modules()
        if isinstance(part, nn.Conv2d) and part.groups > 1 and device.type == "cpu"
    }

    def wins(weights: list[nn.Parameter]) -> bool:
        matrices = [w for w in weights if w.ndim >= 2 and id(w) not in looked_up]
        convolved = sum(w.numel() for w in matrices if w.ndim > 2)
        mostly = 2 * convolved > sum(w.numel() for w in matrices)
        slow = mostly and any(id(w) in grouped for w in matrices)
        return not slow and any(w.numel() >= _WORTH_BF16 for w in matrices)

    return TowerPrecision(
        *(multiplies_bf16(device) and wins(used_parameters(module, encode)) for encode in encoders)
    )


def multiplies_bf16(device: torch.device) -> bool:
    """Whether it has matrix units for bf16, as GPUs since Ampere and CPUs with AMX have."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


# --------------------------------------------------------------------------------------------------
# The student as a trainable module: which parts learn, which stay as the teacher has them.


_BATCH_NORMS = (nn.modules.batchnorm._NormBase,)


class TowerOutput(NamedTuple):
    """What a forward pass gives the objective; all of it may carry gradient."""

    features: PairFeatures  # raw, in float32, (B, d) each
    logit_scale: Tensor  # 0-d factor on cosines
    logit_bias: Tensor | None  # 0-d offset of SigLIP-type models, None for others


Known = tuple[Tensor | None, Tensor | None]
"""Raw features of images and of texts where a frozen tower, or the trunk below a head, need not
compute them."""


class StudentTowers(nn.Module):
    """Both towers in one `forward`, which is what data-parallel wrappers need.

    Attributes:
        encoder: The dual encoder.
        precision: Which tower runs under bf16 autocast.
        heads: The encoder's, where what is known are features before these.
    """

    def __init__(
        self, encoder: nn.Module, precision: TowerPrecision, heads: Heads | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.precision = precision
        self.heads = heads

    def forward(self, pixels: Tensor, tokens: Tensor, known: Known = (None, None)) -> TowerOutput:
        """Features, logit scale and bias of a batch; `known` features are not computed again."""
        encoder: DualEncoder = self.encoder  # pyright: ignore[reportAssignmentType]
        image, text = encode_pairs(encoder, pixels, tokens, self.precision, known, self.heads)
        scale, bias = encoder.logit_scale, getattr(encoder, "logit_bias", None)
        # clones, since what has shared weights must not return views
        features = PairFeatures(image.clone(), text.clone())
        return TowerOutput(features, scale.clone(), None if bias is None else bias.clone())


def rows_of(known: Known, rows: Tensor) -> Known:
    """What is known of some pairs."""
    image, text = (None if side is None else side[rows] for side in known)
    return image, text


def encode_pairs(
    encoder: DualEncoder | Teacher,
    pixels: Tensor,
    tokens: Tensor,
    precision: TowerPrecision,
    known: Known = (None, None),
    heads: Heads | None = None,
) -> PairFeatures:
    """Raw features, each tower in its own precision; tokens (B, K, L) give texts (B, K, d)."""
    image_features, text_features = known
    with autocast(precision.image_bf16, pixels.device):
        if image_features is None:
            image_features = encoder.encode_image(pixels)
        elif heads:
            image_features = heads[0](image_features)
    with autocast(precision.text_bf16, tokens.device):
        if text_features is None:
            texts = tokens.flatten(0, -2)
            text_features = encoder.encode_text(texts).unflatten(0, tokens.shape[:-1])
        elif heads:
            text_features = heads[1](text_features)
    sides = (image_features, text_features)
    return PairFeatures(
        *(side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides)
    )


def prepare_student(model: nn.Module, *, logit_scale: bool, logit_bias: bool) -> None:
    """Make weights float32 and set whether logit scale and bias are trained, in place.

    Parameters that are frozen already stay so; `trained_part` freezes others.

    The student stays in evaluation mode: dropout would make it differ from its teacher at random,
    and running statistics of small batches ruin BatchNorm towers.

    Args:
        model: The dual encoder; weights become float32.
        logit_scale: Whether the parameter called `logit_scale` is trained.
        logit_bias: Whether the parameter called `logit_bias` is.
    """
    model.float().eval()
    trained = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last in trained:
            parameter.requires_grad_(trained[last])


@contextmanager
def training_mode(model: nn.Module, *, statistics: bool, dropout: bool) -> Iterator[None]:
    """Some layers in train mode within the block; all are in evaluation mode after it."""
    for module in model.modules():
        module.training = statistics if isinstance(module, _BATCH_NORMS) else dropout
    try:
        yield
    finally:
        model.eval()


# --------------------------------------------------------------------------------------------------
# Weights shared out among processes (FSDP2): each holds a part of every one, with its gradient and
# moments; a block is whole while it runs.


def share_out(towers: StudentTowers, device: torch.device) -> StudentTowers:
    """A copy of the towers so shared; what is one number only is whole in every process."""
    copied = copy.deepcopy(towers)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    numbers = {parameter for parameter in copied.parameters() if parameter.ndim == 0}
    for module in (*tower_blocks(copied), copied):
        fully_shard(module, mesh=mesh, ignored_params=numbers)
    return copied


def whole(tensor: Tensor) -> Tensor:
    """All of what may be shared out; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_as(pattern: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `pattern` is shared out."""
    if not isinstance(pattern, DTensor) or tensor.shape != pattern.shape:
        return tensor
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)


@torch.no_grad()
def batch_statistics(features: PairFeatures) -> dict[str, float]:
    """What the log says about a batch: mean raw norms and the distance of the unit centroids."""
    sides = features.image_features, features.text_features
    norms = [side.norm(dim=-1, keepdim=True).clamp_min(1e-12) for side in sides]
    centres = [(side / norm).mean(dim=0) for side, norm in zip(sides, norms, strict=True)]
    distance = (centres[0] - centres[1]).norm()
    # one transfer from the GPU for all three
    values = torch.stack([norms[0].mean(), norms[1].mean(), distance]).tolist()
    return dict(zip(("image_norm", "text_norm", "centroid_distance"), values, strict=True))
