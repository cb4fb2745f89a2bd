"""Settings → device, processes and generators."""

import os
import zlib

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from clip_refine.errors import ConfigError


def build_accelerator(device: str) -> Accelerator:
    """Accelerate's view of devices and processes.

    Raises:
        ConfigError: There is no such device here, or several processes are to share one.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device != "auto":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"device {device!r}: not usable here ({str(error).splitlines()[0]}). "
                "Use auto or cpu."
            ) from error
    if several and ":" in device:
        raise ConfigError(f"device {device!r}: several processes need one each. Use auto.")
    if not several:
        # Accelerate keeps the first device of a process for good; a later run may ask for another
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        if device != "auto":
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
    # every step has one graph; saying so lets models have parts that no feature depends on (CoCa)
    handler = DistributedDataParallelKwargs(static_graph=True)
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="no",  # each tower has its own autocast
        gradient_accumulation_steps=1,
        kwargs_handlers=[handler],
    )


def count_workers(workers: int | None, device: torch.device) -> int:
    """Decoding processes: as asked for, else none on a CPU, which is busy training anyway."""
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def count_free_workers(workers: int | None) -> int:
    """Decoding processes while nothing is trained: as asked for, else one a core, up to 8."""
    return min(8, os.cpu_count() or 1) if workers is None else workers


def device_name(device: torch.device) -> str:
    """What the device calls itself, for the record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that none depends on another's draws."""
    return torch.Generator().manual_seed((seed + zlib.crc32(purpose.encode())) % 2**63)
