"""bf16 autocast for each tower where a short measurement finds it faster."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clip_refine.models import DualEncoder

PrecisionName = Literal["fp32", "bf16", "bf16-image", "bf16-text"]
_SAMPLE = 16  # pairs a measurement encodes: enough to fill the cores, little enough to be short
_ROUNDS = 3


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


@dataclass(frozen=True)
class PrecisionMeasurement:
    """Seconds of one forward and backward pass, float32 over bf16, median of a few rounds.

    Attributes:
        image_speedup: How many times faster bf16 is for the image tower.
        text_speedup: The same for the text tower.
    """

    image_speedup: float
    text_speedup: float

    @property
    def choice(self) -> TowerPrecision:
        """bf16 where it is faster by more than the noise of the measurement."""
        return TowerPrecision(self.image_speedup > 1.1, self.text_speedup > 1.1)


def measure_precision(
    model: DualEncoder, pixels: Tensor, tokens: Tensor, device: torch.device
) -> PrecisionMeasurement:
    """Time both towers in float32 and under bf16 autocast.

    Leaves weights and gradients as they were.

    Args:
        model: On `device`, weights in float32.
        pixels: (B, 3, H, W) of a few images; 16 are used.
        tokens: (B, L) of their captions.
        device: Where to measure.
    """
    pixels, tokens = pixels[:_SAMPLE].to(device), tokens[:_SAMPLE].to(device)
    measurement = PrecisionMeasurement(
        _speedup(lambda: model.encode_image(pixels), device),
        _speedup(lambda: model.encode_text(tokens), device),
    )
    if isinstance(model, nn.Module):
        model.zero_grad(set_to_none=True)
    return measurement


def _speedup(encode: Callable[[], Tensor], device: torch.device) -> float:
    """float32 seconds over bf16 seconds, measured in turn so that drift hits both alike."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(_ROUNDS + 1):
        for bf16 in (False, True):
            seconds[bf16].append(_seconds(encode, bf16, device))
    # the first round warms up
    return statistics.median(seconds[False][1:]) / statistics.median(seconds[True][1:])


def _seconds(encode: Callable[[], Tensor], bf16: bool, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    with autocast(bf16, device):
        features = encode()
    if features.requires_grad:
        features.float().square().mean().backward()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
