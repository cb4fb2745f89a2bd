"""Files and folders of weights, and factories: what is in them, and the model made of it."""

import argparse
import pickle
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any, Literal, NoReturn, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.jit import _pickle as script_lists

from clip_refine.models.encoder import check_weights, save_weights
from clip_refine.support.console import remark
from clip_refine.support.errors import ModelError, foreign
from clip_refine.support.folder import check_sums
from clip_refine.support.limits import is_regular, parse_json, read_text, shown

# --------------------------------------------------------------------------------------------------
# The weights of a TorchScript archive, read without its code.
#
# OpenAI published CLIP as such archives: a zip of weights, of a pickle that says which module each
# belongs to, and of code. Here the code is left out, and the pickle goes through PyTorch's own
# restricted reader (`weights_only`), for which a script class is no more than a bag of attributes.


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
    """Whether a file is a TorchScript archive; refuses a damaged one, or one unpacking larger."""
    with foreign(ModelError, f"{path}: {_DAMAGED}"):
        if not zipfile.is_zipfile(path):
            return False
    with foreign(ModelError, f"{path}: {_DAMAGED}"), zipfile.ZipFile(path) as archive:
        size = path.stat().st_size
        # PyTorch packs the code of scripts, of some 100 kB, and no weights
        if sum(entry.file_size for entry in archive.infolist()) > size + (1 << 24):
            raise ModelError(
                f"{path}: unpacks to far more than its {size:,} bytes. Save it unpacked."
            )
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name, as `torch.jit.load(path).state_dict()` gives them."""
    before = f"{path}: a TorchScript archive whose weights cannot be read"
    after = " Download it again, or save the model's state_dict() as .safetensors."
    with (
        foreign(ModelError, before, after),
        zipfile.ZipFile(path) as archive,
        TemporaryFile() as plain,
    ):
        root = archive.namelist()[0].partition("/")[0]
        _copy_without_code(archive, root, plain)
        # the script's own classes that the pickle names; nothing is executed
        operations = pickletools.genops(archive.read(f"{root}/data.pkl"))
        named = {str(argument) for code, argument, _ in operations if code.name == "GLOBAL"}
        allowed: list[Any] = [
            (ScriptModule, name.replace(" ", "."))
            for name in named
            if name.startswith(("__torch__.", "__torch__ "))
        ]
        allowed += [getattr(script_lists, name) for name in _LISTS]
        with torch.serialization.safe_globals(allowed):
            module = torch.load(plain, map_location="cpu", weights_only=True)
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


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, ScriptModule):
            yield from _tensors(value, f"{prefix}{name}.")


# --------------------------------------------------------------------------------------------------
# Files of weights of open_clip's trainer, OpenAI and others, read without running anything.


# kept beside OpenAI's weights, and by nobody else
_OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
# where trainers put weights among other things: open_clip's, the usual snippet, timm's
_NESTED = ("state_dict", "model_state_dict", "model")
# of data-parallel, compiled and Lightning's models, and of nested states that were flattened
_PREFIXES = ("module.", "_orig_mod.", "model.", *(f"{name}." for name in _NESTED[:2]))


@dataclass(frozen=True)
class CheckpointFile:
    """A file of weights."""

    path: Path  # as it was given
    readable: Path  # where open_clip reads the same weights: the file itself, or a copy in its form
    # names and shapes of the weights; empty for big_vision's .npz
    shapes: Mapping[str, tuple[int, ...]]
    is_openai: bool = False  # whether OpenAI made it, whose models have QuickGELU
    run_name: str = ""  # what open_clip's trainer called its run, "" elsewhere


@contextmanager
def open_checkpoint(path: Path) -> Iterator[CheckpointFile]:
    """A file of weights, ready for open_clip within the block; what was changed is said."""
    if path.exists() and not is_regular(path):
        raise ModelError(f"{path}: is no file but a pipe or a device. Give a file of weights.")
    if path.suffix in (".npz", ".npy"):
        yield CheckpointFile(path, path, {})
        return
    if path.suffix == ".safetensors":
        shapes = _safetensors_shapes(path)
        if shapes.keys() == _cleaned(path, shapes)[0].keys():
            yield CheckpointFile(path, path, shapes)  # not read here, since it may be large
            return
    with torch.serialization.safe_globals(_plain_settings()):
        weights, run_name, done = _read(path)
        cleaned, left_out = _cleaned(path, weights)
        done += [f"{name!r} left out of their names" for name in left_out]
        if done:
            remark(f"{path}: weights {', '.join(done)}.")
        shapes = {name: tuple(weight.shape) for name, weight in cleaned.items()}
        is_openai = is_torchscript(path) or any(name in weights for name in _OPENAI_NUMBERS)
        if path.suffix != ".safetensors" and not done and len(cleaned) == len(weights):
            yield CheckpointFile(path, path, shapes, is_openai, run_name)
            return
        with TemporaryDirectory() as folder:
            copy = Path(folder) / "weights.safetensors"
            save_weights(cleaned, copy, {})
            yield CheckpointFile(path, copy, shapes, is_openai, run_name)


def weights_in(folder: Path) -> Path | None:
    """The file of weights that open_clip would load from a folder, or the list of its parts."""
    names = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
    patterns = [f"{name}.{kind}" for name in names for kind in ("safetensors", "bin", "pth")]
    patterns += ["*.index.json", "*.safetensors", "*.bin", "*.pth"]
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)))
    return next(found, None)


def _read(path: Path) -> tuple[dict[str, Tensor], str, list[str]]:
    """The weights in a file by their names there, the run's name, and what was done for them."""
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    if path.suffix == ".safetensors":
        _safetensors_shapes(path)  # which says what is wrong with it
        return load_file(path), "", []
    if is_torchscript(path):
        return read_torchscript(path), "", []
    stored = _read_pickle(path)
    inside = {"": stored, **(stored if isinstance(stored, dict) else {})}
    holders = {
        str(key): held
        for key, held in inside.items()
        if isinstance(held, dict) and any(isinstance(value, Tensor) for value in held.values())
    }
    key = next((key for key in (*_NESTED, "") if key in holders), None)
    others = [repr(other) for other in holders if other]
    if key is None or (key == "" and others):
        raise ModelError(
            f"{path}: holds no weights "
            + (f"but those under {' and '.join(others)}. " if others else "of its own. ")
            + "Give a state dict, or a training checkpoint of open_clip with one under "
            "'state_dict' ('model_state_dict' and 'model' will do)."
        )
    weights = {str(name): w for name, w in holders[key].items() if isinstance(w, Tensor)}
    run_name = str(stored.get("name", "")) if key else ""
    return weights, run_name, [f"taken from {key!r}"] if key in _NESTED[1:] else []


def _read_parts(path: Path) -> tuple[dict[str, Tensor], str, list[str]]:
    """The weights of all files that an index lists."""
    listed = read_json(path).get("weight_map")
    parts = sorted({str(part) for part in listed.values()}) if isinstance(listed, dict) else []
    weights: dict[str, Tensor] = {}
    for part in parts:
        file = path.parent / part
        if Path(part).name != part or len(part) > 250 or not file.is_file():
            raise ModelError(f"{path}: its part {part:.80} is not beside it. Copy that file, too.")
        weights |= _read(file)[0]
    if not weights:
        raise ModelError(f"{path}: lists no files of weights under 'weight_map'.")
    return weights, "", [f"read from {len(parts)} parts"]


_Held = TypeVar("_Held")


def _cleaned(path: Path, weights: Mapping[str, _Held]) -> tuple[dict[str, _Held], list[str]]:
    """Without prefixes of wrappers and without what is no weight; and which prefixes there were."""
    cleaned, left_out = {}, dict[str, None]()
    for given, weight in weights.items():
        name = given
        while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), ""):
            name = name.removeprefix(prefix)
            left_out[prefix] = None
        if name in cleaned:
            raise ModelError(
                f"{path}: holds two weights called {name}, one of them as {given}. Save the one "
                "model that is meant."
            )
        if name not in _OPENAI_NUMBERS and not name.endswith("attn_mask"):
            cleaned[name] = weight
    return cleaned, list(left_out)


_DAMAGED = "is damaged or no file of weights"


def _read_pickle(path: Path) -> Any:
    with foreign(ModelError, f"{path}: {_DAMAGED}"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except MemoryError as error:
            raise ModelError(f"{path}: {_DAMAGED}, or too large for the memory.") from error
        except pickle.UnpicklingError as error:
            if not re.search("Unsupported (global|class)|unrecognized function", str(error)):
                raise ModelError(f"{path}: {_DAMAGED}.") from error
            raise ModelError(
                f"{path}: could not be loaded: it holds more than weights, and other objects are "
                "not unpickled because they can run code. Save it as .safetensors, or save its "
                "state_dict only."
            ) from error


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with (
        foreign(ModelError, f"{path}: is damaged or no .safetensors file"),
        safe_open(path, "pt") as file,
    ):
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _plain_settings() -> list[Any]:
    """What trainers put beside weights and what cannot run code: settings and numbers."""
    scalar = np.float64(0).__reduce__()[0]  # numpy's own rebuilding of one number
    kinds = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")}
    return [
        argparse.Namespace,
        np.dtype,
        *kinds,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (_encode, "_codecs.encode"),  # how older pickles hold bytes
    ]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in encoding {encoding!r}")
    return text.encode(encoding)


# --------------------------------------------------------------------------------------------------
# What a folder holds: an open_clip, Transformers or sentence-transformers model, or a run.


Kind = Literal["open_clip", "transformers", "sentence-transformers"]
OPEN_CLIP_CONFIG = "open_clip_config.json"
PROVENANCE = "provenance.json"  # what models saved by this package have beside their weights
_TRANSFORMERS_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class ModelFolder:
    """A folder that a model can be loaded from."""

    kind: Kind  # in whose format
    path: Path  # the folder itself, for a run its model's
    remark: str  # what was recognised, as a part of a sentence


def recognise_folder(folder: Path) -> ModelFolder:
    """Tell the kind of a model's or a run's folder by the files in it."""
    if is_run(folder):
        model = folder / "model"
        if not model.is_dir():
            raise ModelError(f"{folder}: a run without its model/. Give a model's folder.")
        found = recognise_folder(model)
        return ModelFolder(found.kind, found.path, f"a run, whose model is {found.remark}")
    # a run that saved open_clip's files, too, trained and measured the other ones
    comes_with_both = (folder / PROVENANCE).is_file() and any(
        (folder / name).is_file() for name in ("modules.json", "config.json")
    )
    if (folder / OPEN_CLIP_CONFIG).is_file() and not comes_with_both:
        return ModelFolder("open_clip", folder, "an open_clip model")
    if (folder / "modules.json").is_file():
        return ModelFolder("sentence-transformers", folder, "a sentence-transformers model")
    if (folder / "config.json").is_file():
        if not any((folder / name).is_file() for name in _TRANSFORMERS_WEIGHTS):
            raise ModelError(
                f"{folder}: config.json without weights beside it. Transformers keeps them in "
                "model.safetensors (or pytorch_model.bin)."
            )
        kind = read_json(folder / "config.json").get("model_type", "of no named type")
        return ModelFolder("transformers", folder, f"a Transformers model ({kind})")
    if (folder / "model.safetensors").is_file():
        raise ModelError(f"{folder}: {made_by(_factory_of(folder), str(folder))}")
    raise ModelError(
        f"{folder}: holds no model. Allowed: an open_clip folder ({OPEN_CLIP_CONFIG}), a "
        "Transformers folder (config.json and model.safetensors), a sentence-transformers folder "
        "(modules.json), or a folder that `clip-refine refine` wrote."
    )


def made_by(factory: str | None, weights: str | None) -> str:
    """What to do about a model of the user's own class: the rest of an error."""
    named = factory or "MODULE:FUNCTION"
    behind, flag = (f"@{weights}", f" --model.pretrained {weights}") if weights else ("", "")
    return (
        f"its model was made by {factory or 'Python code'}, which is imported only where the "
        f"command line names it. If you trust it: --model.factory {named}{flag}; in one word, as "
        f"for export and --models, factory:{named}{behind}; explore --factory {named}."
    )


def _factory_of(folder: Path) -> str | None:
    """Which function made the model that a saved one came from, as far as its provenance says."""
    if not (folder / PROVENANCE).is_file():
        return None
    base = read_json(folder / PROVENANCE).get("base")
    name = base.get("name") if isinstance(base, dict) else None
    return maker_of(name if isinstance(name, str) else "")


MADE_BY = "a model made by "  # a function, by name, as provenance has it


def maker_of(name: str) -> str | None:
    """The function that made a base model of this name, `MODULE:FUNCTION`; None where none did."""
    found = re.fullmatch(rf"{MADE_BY}([\w.]+:\w+)", name)
    return found and found[1]


def load_own_weights(model: nn.Module, place: Path) -> None:
    """Give a model that a factory made the weights of a run, of a model's folder, or of a file.

    Raises:
        ModelError: There is no `model.safetensors`, it is damaged, or of another model.
        DataError: It is not what was written there, by the checksums beside it.
    """
    folder = place / "model" if is_run(place) else place
    path = folder / "model.safetensors" if folder.is_dir() else folder
    if path.suffix != ".safetensors" or not path.is_file():
        raise ModelError(
            f"{place}: holds no weights for a model that a factory makes. Give a run, its model/ "
            "or a .safetensors file; what the model's own save wrote its function has to load."
        )
    check_sums(folder)
    check_weights(path)
    found = _safetensors_shapes(path)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if other := sorted({*own.items()} ^ {*found.items()}):
        raise ModelError(
            f"{path}: is of another model than the factory makes: {other[0][0]} and what else "
            "differs in name or shape. Name the function that the run was made with."
        )
    model.load_state_dict(load_file(path))


def how_to_load(folder: Path) -> str:
    """Which library loads a saved model, and how: the end of a sentence, or nothing.

    >>> how_to_load(Path("nowhere"))
    ''
    """
    try:
        found = recognise_folder(folder)
    except ModelError:
        made = _factory_of(folder)
        return f", for --model.factory {made} --model.pretrained {folder}" if made else ""
    match found.kind:
        case "open_clip":
            return f", which open_clip loads as local-dir:{folder}"
        case "transformers":
            return ", which transformers loads with AutoModel.from_pretrained"
        case "sentence-transformers":
            return ", which sentence-transformers loads with SentenceTransformer"


@contextmanager
def no_code_of_models() -> Iterator[None]:
    """Within the block Transformers runs no Python file of a model and asks nobody whether it may.

    Other libraries call it with what a model's settings say, so `trust_remote_code=False` in our
    own calls is not enough. Every file of code goes through the two functions that refuse here.
    """
    try:
        from transformers import dynamic_module_utils as code
    except ImportError:  # then there is nobody to run it
        yield
        return

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ValueError(_CODE_NEEDED)

    with (
        patch.object(code, "TIME_OUT_REMOTE_CODE", 0),  # seconds to wait for an answer: do not ask
        patch.object(code, "get_cached_module_file", refuse),
        patch.object(code, "get_class_in_module", refuse),
    ):
        yield


_CODE_NEEDED = "it is built by code of its own (trust_remote_code)"


def needs_code(error: BaseException) -> bool:
    """Whether a model was refused because Python files of its own would have to run."""
    return "trust_remote_code" in str(error) or "custom code" in str(error)


def is_run(folder: Path) -> bool:
    """Whether `clip-refine refine` wrote this folder."""
    return (folder / "scores.json").is_file() and (folder / "config.yaml").is_file()


WEIGHTS_LIST = 1 << 26
"""Bytes of a JSON file of a model's folder: a list of a large model's weights may have some MB."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's folder."""
    try:
        found = parse_json(read_text(path, WEIGHTS_LIST))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: is not readable JSON ({error}). Copy the model again."
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected names and values, got {shown(found)}.")
    return found
