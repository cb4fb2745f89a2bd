"""What a run ran on, for `environment.json`."""

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "clip-refine",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "accelerate",
    "numpy",
)


def describe_environment(device: str) -> dict[str, Any]:
    """Versions, machine, device, command and the git commit of the working folder if any."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "device": device,
        "command": sys.argv,
        "git_commit": _git_commit(),
    }


def write_environment(path: Path, device: str) -> None:
    """Write `environment.json`."""
    text = json.dumps(describe_environment(device), indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def package_version(package: str) -> str | None:
    """As it is installed; None where it is not, as when this program runs from its sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
