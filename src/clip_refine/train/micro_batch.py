"""Large batches in small memory: the loss of the whole batch, its gradient a part at a time.

Features of the whole batch are computed without a graph; the loss is differentiated with respect to
them; then one part after the other is encoded again, with its graph, and takes its rows of that
gradient. The result is the gradient of the batch in one go.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(GradCache), RepL4NLP 2021, arXiv 2101.06983.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_refine.losses import PairFeatures
from clip_refine.models.text_length import cut_columns
from clip_refine.train.part import Frozen
from clip_refine.train.precision import Known, TowerOutput, autocast, rows_of

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
    _parts: "Parts"
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
