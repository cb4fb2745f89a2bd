"""The most memory that a part of a run held at one time."""

import sys
from pathlib import Path

import torch

_GB = 1e9


class PeakMemory:
    """Watches from its making on: of the GPU where the model is on one, else of the process.

    On Linux a process's mark is reset, so that each part is seen alone; elsewhere it is the most
    that the process ever held.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset the high-water mark
        except OSError:
            return  # no Linux, or not allowed

    @property
    def gigabytes(self) -> float:
        """The peak so far in 10⁹ bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _GB
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / _GB
        except OSError:
            pass
        return _process_peak_bytes() / _GB


def _process_peak_bytes() -> int:
    """Since the process began; 0 on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
