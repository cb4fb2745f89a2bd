"""What this machine and environment are good for, looked at before a run trips over it.

Nothing heavy is imported before it is tried: a broken torch is what somebody may be looking for.
"""

import os
import platform
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from threading import Thread

from clip_refine import __version__
from clip_refine.support.errors import first_line
from clip_refine.support.folder import SPARE, default_cache, package_version, size_text

_HUB_SECONDS = 3.0
_BROKEN = "See to what it names; a library is best installed anew, torch and torchvision together."


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` is empty where no run would trip over it."""

    about: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Environment, libraries, devices, precision, memory, disk and hub; nothing is written."""
    found = [
        Finding("clip-refine", f"{__version__} in {Path(__file__).parents[1]}"),
        Finding("python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    parts = {"libraries": _libraries, "devices": _devices, "disks": _disks, "hub": _hub}
    for about, part in parts.items():
        try:
            for one in part():
                found.append(one)
        except Exception as error:  # a library that is not there, or does not fit another, say
            found.append(Finding(about, f"fails: {first_line(error)}", _BROKEN))
    return found


def _libraries() -> Iterator[Finding]:
    """Each that is asked for, beside the bounds that are tested (CONTRIBUTING.md)."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in requires("clip-refine") or ()]
    except PackageNotFoundError:
        yield Finding("libraries", "not known, since clip-refine runs from its sources")
        return
    asked = [one for one in asked if one.name != "clip-refine"]
    extras = [str(one.marker).split('"')[1] if one.marker else "" for one in asked]
    versions = [package_version(one.name) for one in asked]
    # an extra may ask for a newer version of what is there without it
    missing = {extra for extra, found in zip(extras, versions, strict=True) if extra and not found}
    base = {one.name for one, extra in zip(asked, extras, strict=True) if not extra}
    for one, extra, found in zip(asked, extras, versions, strict=True):
        if extra == "dev":
            continue
        wanted = str(one.specifier)
        what = f"{found or 'not installed'} ({wanted}{f', extra [{extra}]' * bool(extra)})"
        fits = one.specifier.contains(found, prereleases=True) if found else bool(extra)
        fits = fits or (extra in missing and one.name in base)
        yield Finding(one.name, what, "" if fits else f"pip install '{one.name}{wanted}'")


def _devices() -> Iterator[Finding]:
    """What torch can compute on, tried by a product of two matrices, with its memory."""
    import open_clip  # noqa: F401 - with torchvision, which goes with one torch only
    import torch

    from clip_refine.train.towers import memory_of, multiplies_bf16

    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    names += ["mps"] * torch.backends.mps.is_available()
    for device in map(torch.device, ["cpu", *names]):
        try:
            torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).cpu()
        except RuntimeError as error:
            yield Finding(str(device), f"fails: {first_line(error)}", "See to its driver.")
            continue
        precision = "fp32"
        if multiplies_bf16(device):
            precision = "bf16, but fp32 for very small towers"
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            what = torch.cuda.get_device_name(device)
        else:
            free = _available()
            threads = torch.get_num_threads()
            what = f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}"
        memory = f"{size_text(free)} free of {size_text(memory_of(device))}"
        yield Finding(str(device), f"{what}; {memory}; --train.precision auto is {precision}")


def _available() -> int:
    """Bytes that programs can still have, as the system says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(ln.split()[1]) for ln in lines if ln.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _disks() -> Iterator[Finding]:
    """Free room where results, caches and temporary files go."""
    for what, folder in {
        "results": Path.cwd(),
        "cache": default_cache(),
        "temporary files": Path(tempfile.gettempdir()),
    }.items():
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        free, advice = shutil.disk_usage(there).free, ""
        if not os.access(there, os.W_OK):
            advice = "It cannot be written to: choose another folder."
        elif free < SPARE:
            advice = "Free some space, or choose another folder."
        yield Finding(what, f"{size_text(free)} free in {folder}", advice)


def _hub() -> Iterator[Finding]:
    """Whether models and data can be fetched; who has both at hand needs no hub."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", f"offline by HF_HUB_OFFLINE; kept: {constants.HF_HUB_CACHE}")
        return
    said = [f"no answer within {_HUB_SECONDS:g} s"]

    def ask() -> None:
        patience = 2 * _HUB_SECONDS  # longer than anybody waits for it below
        try:
            with urllib.request.urlopen(constants.ENDPOINT, timeout=patience):  # noqa: S310
                said.append("can be reached")
        except Exception as error:
            why = first_line(getattr(error, "reason", error))  # of urllib's wrapper what is inside
            said.append(f"cannot be reached ({why}); runs on what is kept need no hub")

    asked = Thread(target=ask, daemon=True)  # looking up a name knows no time-out
    asked.start()
    asked.join(_HUB_SECONDS)
    yield Finding("hub", f"{constants.ENDPOINT} {said[-1]}; kept: {constants.HF_HUB_CACHE}")
