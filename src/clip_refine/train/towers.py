"""A batch through the towers: each at its own precision, in parts where memory is small."""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from clip_refine.losses import PairFeatures
from clip_refine.models import DualEncoder, Teacher
from clip_refine.models.encoder import cut_columns
from clip_refine.models.weights import Heads, used_parameters
from clip_refine.train.part import Frozen, tower_blocks

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


# --------------------------------------------------------------------------------------------------
# Large batches in small memory: the loss of the whole batch, its gradient a part at a time.
#
# Features of the whole batch are computed without a graph; the loss is differentiated with respect
# to them; then one part after the other is encoded again, with its graph, and takes its rows of
# that gradient. The result is the gradient of the batch in one go.
#
# Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
# (GradCache), RepL4NLP 2021, arXiv 2101.06983.


Encode = Callable[..., TowerOutput]  # of pixels, tokens and what is known of them
Parts = Sequence[tuple[Tensor, Tensor]]
"""Of each part the rows of its pairs in the batch, and their tokens."""
USED = 0.5
"""Share of a device's memory that a step's activations may take; the rest is for what is counted
only roughly: the loss, buffers of kernels, other programs."""
COPIES = 5
"""How often the weights stand in memory: their own, the teacher's, gradients, two of AdamW's."""


def parts_by_length(tokens: Tensor, lengths: Tensor | None, size: int) -> Parts:
    """(B, L) or (B, K, L) tokens in parts of `size` pairs, texts of like length together.

    `lengths` are those of all texts, to which a part's tokens are cut; None where that would change
    features. A batch is as long as its longest text, most of which is then padding.
    """
    if lengths is None:
        return [(rows, tokens[rows]) for rows in torch.arange(len(tokens)).split(size)]
    longest = lengths.view(len(tokens), -1).amax(dim=1).cpu()
    order = longest.argsort(stable=True)
    return [
        (rows, cut_columns(tokens[rows], int(longest[rows].max()))) for rows in order.split(size)
    ]


def put_together(features: Sequence[PairFeatures], parts: Parts) -> PairFeatures:
    """The parts' features in the order of the batch."""
    back = torch.cat([rows for rows, _ in parts]).argsort()
    return PairFeatures(*(torch.cat(rows)[back] for rows in zip(*features, strict=True)))


@dataclass(frozen=True)
class EncodedParts:
    """A batch without a graph; `backward` hands the gradient of its `output` to the towers."""

    output: TowerOutput
    _pixels: Tensor
    _parts: Parts
    _known: Known
    _random: list["_RandomState"]
    _towers: Encode

    def backward(self) -> None:
        """Encode part after part anew, each with its rows of the gradient of `output`."""
        with weights_cast_once(self._pixels):
            self._backward()

    def _backward(self) -> None:
        given = self.output
        parts = zip(self._parts, self._random, strict=True)
        for number, ((rows, tokens), random) in enumerate(parts):
            with random.again():
                output = self._towers(self._pixels[rows], tokens, rows_of(self._known, rows))
            found = [
                (new, old.grad[rows])
                for new, old in zip(output.features, given.features, strict=True)
                if new.requires_grad and old.grad is not None
            ]
            if number == 0:  # what belongs to the batch, not to a pair
                for new, old in (
                    (output.logit_scale, given.logit_scale),
                    (output.logit_bias, given.logit_bias),
                ):
                    if new is not None and new.requires_grad and old is not None:
                        found += [] if old.grad is None else [(new, old.grad)]
            roots, gradients = zip(*found, strict=True)
            torch.autograd.backward(roots, gradients)


@torch.no_grad()
def encode_in_parts(
    towers: Encode, pixels: Tensor, parts: Parts, frozen: Frozen, known: Known
) -> EncodedParts:
    """Features of a batch, computed part after part without a graph; of `frozen` towers once."""
    random, outputs = [], []
    with weights_cast_once(pixels):
        for rows, tokens in parts:
            random.append(_RandomState(pixels.device))
            outputs.append(towers(pixels[rows], tokens, rows_of(known, rows)))
    sides = put_together([output.features for output in outputs], parts)
    scale, bias = outputs[0].logit_scale, outputs[0].logit_bias
    output = TowerOutput(
        PairFeatures(*(side.requires_grad_() for side in sides)),
        scale.detach().requires_grad_(),
        None if bias is None else bias.detach().requires_grad_(),
    )
    image, text = (
        side.detach() if stays and given is None else given
        for side, stays, given in zip(sides, frozen, known, strict=True)
    )
    return EncodedParts(output, pixels, parts, (image, text), random, towers)


@contextmanager
def weights_cast_once(given: Tensor, teacher: nn.Module | None = None) -> Iterator[None]:
    """Autocast keeps its casts of trained weights until the outermost one ends, so within this.

    A teacher's weights, from which nothing has a graph, count as trained for as long.
    """
    weights = [p for p in teacher.parameters() if p.is_floating_point()] if teacher else []
    with autocast(False, given.device):
        try:
            for weight in weights:
                weight.requires_grad_(True)
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(False)


class _RandomState:
    """What dropout draws next, on the CPU and on the towers' device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same once more, and go on afterwards as if nothing had been drawn."""
        with torch.random.fork_rng([self.device] if self.gpu is not None else []):
            torch.set_rng_state(self.cpu)
            if self.gpu is not None:
                torch.cuda.set_rng_state(self.gpu, self.device)
            yield


# --------------------------------------------------------------------------------------------------
# How many pairs fit.


def bytes_per_pair(towers: Encode, pixels: Tensor, tokens: Tensor) -> float:
    """What one pair's graph keeps for the gradient, in bytes; without what all pairs share.

    That is what twice as many pairs keep more: beside the weights, whose bf16 copies autocast adds
    to every graph, once a batch, there are masks and embeddings of positions.
    """
    # copies, since a slice would count as all that it is cut from
    once, twice = (
        _bytes_kept(towers, torch.cat([pixels] * times), torch.cat([tokens] * times))
        for times in (1, 2)
    )
    return (twice - once) / len(pixels)


def _bytes_kept(towers: Encode, pixels: Tensor, tokens: Tensor) -> int:
    """By the tensors that a forward pass saves, each memory once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that holds its own result, as ReLU's, is never freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = towers(pixels, tokens)
        del output
    return sum(kept.values())


def memory_of(device: torch.device, system: Path = Path("/")) -> int:
    """Bytes in all, of a CPU what system and container allow; so a machine always chooses alike."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_group_limits(system)])


def _group_limits(system: Path) -> Iterator[int]:
    """What the control groups of this process allow, of both versions; none where there are none.

    A group has no more than those that it lies in. A container may see its own as the outermost.
    """
    groups = system / "sys" / "fs" / "cgroup"
    with suppress(OSError):
        for line in (system / "proc" / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                root, name = groups, "memory.max"
            elif "memory" in controllers.split(","):
                root, name = groups / "memory", "memory.limit_in_bytes"
            else:
                continue
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                with suppress(OSError, ValueError):  # no such group; "max" is no limit
                    yield int((folder / name).read_text())


def fitting_size(model: nn.Module, per_pair: float, memory: int, copies: float = COPIES) -> int:
    """The largest power of two of pairs whose graph fits beside weights and optimiser, at least 1.

    >>> fitting_size(nn.Linear(10, 10, bias=False), per_pair=1e6, memory=2**27)
    64
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    fitting = max(1, int((USED * memory - copies * weights) / max(per_pair, 1)))
    return 2 ** (fitting.bit_length() - 1)
