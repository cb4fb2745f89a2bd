"""The weights of a TorchScript archive, read without its code.

OpenAI published CLIP as such archives: a zip of weights, of a pickle that says which module each
belongs to, and of code. Here the code is left out, and the pickle goes through PyTorch's own
restricted reader (`weights_only`), for which a script class is no more than a bag of attributes.
"""

import io
import pickletools
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor
from torch.jit import _pickle as script_lists

from clip_refine.errors import ModelError

_CODE = ("code/", "constants", "extra/")
_LISTS = (  # each returns its first argument
    "build_intlist",
    "build_doublelist",
    "build_boollist",
    "build_tensorlist",
    "restore_type_tag",
)


class ScriptModule:
    """Stands in for any class of a script: it holds what was saved and does nothing."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name, as `torch.jit.load(path).state_dict()` gives them.

    Raises:
        ModelError: The archive is damaged, or holds more than modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive, TemporaryFile() as plain:
            root = archive.namelist()[0].partition("/")[0]
            _copy_without_code(archive, root, plain)
            classes = _script_classes(archive.read(f"{root}/data.pkl"))
            allowed: list[Any] = [(ScriptModule, name) for name in classes]
            allowed += [getattr(script_lists, name) for name in _LISTS]
            with torch.serialization.safe_globals(allowed):
                module = torch.load(plain, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path}: a TorchScript archive whose weights cannot be read ({reason}). Download it "
            "again, or save the model's state_dict() as .safetensors."
        ) from error
    return dict(_tensors(module, ""))


def _copy_without_code(archive: zipfile.ZipFile, root: str, plain: IO[bytes]) -> None:
    """The archive as `torch.save` would have written it, on disk because it may be large."""
    with zipfile.ZipFile(plain, "w") as copy:
        for entry in archive.infolist():
            if not entry.filename.removeprefix(f"{root}/").startswith(_CODE):
                target = zipfile.ZipInfo(entry.filename)
                with archive.open(entry) as source, copy.open(target, "w") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    plain.seek(0)


def _script_classes(pickled: bytes) -> set[str]:
    """The script's own classes that a pickle names; nothing is executed."""
    operations = pickletools.genops(io.BytesIO(pickled))
    named = (str(argument) for opcode, argument, _ in operations if opcode.name == "GLOBAL")
    return {
        name.replace(" ", ".") for name in named if name.startswith(("__torch__.", "__torch__ "))
    }


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, ScriptModule):
            yield from _tensors(value, f"{prefix}{name}.")
