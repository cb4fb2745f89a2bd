"""What every model here can do, how one is made, saved, frozen, and told from another."""

import copy
import hashlib
import importlib
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from clip_refine.models.weights import Heads
from clip_refine.support.console import remark
from clip_refine.support.errors import ModelError
from clip_refine.support.folder import readable

# --------------------------------------------------------------------------------------------------
# What a model must offer to be refined.


LOW_LOGIT_SCALE = 10.0
"""CLIP starts at 1/0.07 = 14.3 and ends at 100, whose logarithms are 2.7 and 4.6."""


@runtime_checkable
class DualEncoder(Protocol):
    """A `torch.nn.Module` with an image tower and a text tower that end in one space.

    Attributes:
        preprocess: PIL image → (3, H, W), the model's own inference preprocessing.
        tokenizer: B texts → (B, L) token ids.
        logit_scale: 0-d tensor, the factor on cosines in the model's softmax (about 100 for
            CLIP): the exponential of the parameter that CLIP models store.
    """

    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]

    @property
    def logit_scale(self) -> Tensor: ...  # noqa: D102

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, d) raw features, not normalised."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, d) raw features, not normalised."""
        ...


def check_dual_encoder(model: Any) -> Any:
    """Return `model` if it can be refined.

    Raises:
        ModelError: It is no module, or lacks something of the protocol; what, is said. A
            `logit_scale` below 10, which may be a logarithm, is only remarked on.
    """
    members = ("encode_image", "encode_text", "preprocess", "tokenizer", "logit_scale")
    lacking = [name for name in members if not hasattr(model, name)]
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{kind} cannot be refined: it is no torch.nn.Module. It must be one, with "
            f"{', '.join(members[:-1])} and {members[-1]}."
        )
    if lacking:
        raise ModelError(
            f"{kind} cannot be refined: it has no {', no '.join(lacking)}. A dual encoder has "
            f"{', '.join(members[:-1])} and {members[-1]}."
        )
    for name in members[:-1]:
        if not callable(getattr(model, name)):
            raise ModelError(f"{kind} cannot be refined: its {name} cannot be called.")
    if not isinstance(model.logit_scale, Tensor) or model.logit_scale.ndim:
        raise ModelError(
            f"{kind} cannot be refined: its logit_scale must be a 0-d tensor, the factor on "
            "cosines (the exponential of what CLIP stores)."
        )
    scale = float(model.logit_scale.detach())
    if scale < LOW_LOGIT_SCALE:
        remark(
            f"{kind}: its logit_scale is {scale:.3g}, where trained models have 10 to 100. If that "
            "is the parameter that CLIP stores, it is a logarithm: return its .exp()."
        )
    return model


# --------------------------------------------------------------------------------------------------
# How long texts are: their tokens counted, and cut to a batch's longest where that is exact.


# texts of several lengths that ways of encoding are compared on
PROBES = ["a", "a photo of a dog on a beach.", "two words"]
_MULTIPLE = 8  # matrix kernels are fastest at such lengths
_SAME = 1e-5  # of the largest feature: kernels round differently at other lengths


@runtime_checkable
class CountingTokenizer(Protocol):
    """A tokenizer that also tells how many tokens a text has before it is cut."""

    @property
    def context_length(self) -> int | None:
        """Tokens that the model reads; None where that is not known."""
        ...

    def lengths(self, tokens: Tensor) -> Tensor | None:
        """(B,) tokens of each text that features depend on; None where those are all."""
        ...

    def token_counts(self, texts: Sequence[str]) -> list[int] | None:
        """Tokens of each text with start and end; None where they cannot be counted."""
        ...

    def are_special(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text holds one of the tokenizer's own marks, such as `<|endoftext|>`."""
        ...


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text with start and end, by a tokenizer of Transformers."""
    encoded = tokenizer(list(texts), truncation=False, padding=False, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]]


def hold_any(texts: Sequence[str], marks: Sequence[str]) -> list[bool]:
    """Whether each text holds one of the marks.

    >>> hold_any(["a dog", "a dog<|endoftext|> on a beach"], ["<|endoftext|>"])
    [False, True]
    """
    return [any(mark in text for mark in marks) for text in texts]


def cut_columns(tokens: Tensor, longest: int) -> Tensor:
    """(..., L) → (..., L'), L' the longest text rounded up to a multiple of 8."""
    return tokens[..., : -(-longest // _MULTIPLE) * _MULTIPLE]


def same_features(some: Tensor, others: Tensor) -> bool:
    """Whether two (B, d) features differ by no more than kernels' rounding."""
    return bool((some - others).abs().max() <= _SAME * others.abs().max())


# --------------------------------------------------------------------------------------------------
# A model of the user's own, from a function that makes it.


def call_factory(name: str) -> DualEncoder:
    """Import a function and return the dual encoder that it makes.

    Args:
        name: `package.module:function`; the module may lie in the current folder.

    Raises:
        ModelError: There is no such module or function, it fails, or what it returns lacks
            something of a dual encoder.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ModelError(
            f"model.factory {name!r}: expected a module and a function in it, as in "
            "my_package.models:build."
        )
    module = _import(name, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if _is_own(value, module_name)]
        raise ModelError(
            f"model.factory {name!r}: {module.__file__} has no function {function_name}."
            + (f" It has {', '.join(known)}." if known else "")
        )
    try:
        model: Any = function()
    except Exception as error:
        raise ModelError(f"model.factory {name!r}: {_where(error)}") from error
    try:
        check_dual_encoder(model)
    except ModelError as error:
        raise ModelError(f"model.factory {name!r}: {error}") from error
    if model in _MADE:  # it would have the weights that were loaded or trained meanwhile
        raise ModelError(
            f"model.factory {name!r}: gave the same object as before. Let it make a new model each "
            "time."
        )
    _MADE.add(model)
    return model


_MADE: WeakSet[Any] = WeakSet()
"""What factories gave."""


def _import(name: str, module_name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # the command's own folder is there, the current one is not
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(
                f"model.factory {name!r}: there is no module {error.name}, neither in {here} nor "
                "among the installed packages."
            ) from error
        raise ModelError(f"model.factory {name!r}: {_where(error)}") from error
    except Exception as error:
        raise ModelError(f"model.factory {name!r}: {_where(error)}") from error


def _is_own(value: Any, module_name: str) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module_name


def _where(error: Exception) -> str:
    """An error of the user's code with the line that it comes from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {last.filename}, line {last.lineno}: {error}"


# --------------------------------------------------------------------------------------------------
# What a model says about its files, so that nobody else needs to know its class.


OPEN_CLIP, TRANSFORMERS, OWN = "open_clip", "transformers", "pytorch"
"""Formats that models save themselves in, by their libraries' names on the Hub."""


@runtime_checkable
class Savable(Protocol):
    """A model with files of its own: `OpenClipEncoder`, `TransformersEncoder`, `OwnFiles`."""

    format: str  # which library loads what `save` writes

    @property
    def full_length_tokenizer(self) -> Any:
        """Texts → (B, L) ids of the context length, whatever the texts."""
        ...

    @property
    def padding_is_free(self) -> bool:
        """Whether any ids may stand behind a text's end."""
        ...

    def preprocessing(self) -> dict[str, Any]:
        """What `preprocess` does, under the name of the library that did it."""
        ...

    def save(self, folder: Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write weights and settings, `metadata` in the weights' header."""
        ...


@dataclass(frozen=True)
class OwnFiles:
    """The files of a model of the user's own class, which need not have more than weights."""

    model: Any
    format = OWN
    padding_is_free = False

    @property
    def full_length_tokenizer(self) -> Any:
        """Its tokenizer: whether that cuts texts is not known."""
        return self.model.tokenizer

    def preprocessing(self) -> dict[str, Any]:
        """What Python says about it."""
        return {"python": repr(self.model.preprocess)}

    def save(self, folder: Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """By the model's own `save` where it has one, else as `model.safetensors`."""
        if hasattr(self.model, "save"):
            self.model.save(folder, metadata=metadata)
            return
        save_weights(self.model.state_dict(), folder / "model.safetensors", metadata or {})


def files_of(model: Any) -> Savable:
    """What writes a model's files: itself, if it is a library's."""
    return model if isinstance(model, Savable) else OwnFiles(model)


def save_weights(weights: Mapping[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    """Write a .safetensors file that whoever may read the folder may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {  # safetensors refuses tensors that share memory
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()
    }
    with readable(path):
        save_file(plain, path, metadata={**header, "clip_refine_sha256": "0" * 64})
        _sort_header(path)
        if noted := _noted_sum(path):
            with path.open("r+b") as file:
                file.seek(noted[0])
                file.write(noted[2])


def check_weights(path: Path) -> None:
    """Compare a file of `save_weights`, wherever it got to, with the checksum in its header."""
    noted = _noted_sum(path) if path.suffix == ".safetensors" else None
    if noted and noted[1] != noted[2]:
        raise ModelError(
            f"{path}: is not what was written there, by the checksum in its header. Copy or make "
            "it again."
        )


_SUM = re.compile(rb'"clip_refine_sha256":"([0-9a-f]{64})"')


def _noted_sum(path: Path) -> tuple[int, bytes, bytes] | None:
    """Where a sound header notes its file's checksum, which one, and that of the file as it is.

    That is of the header with zeros in that place, and of the tensors. Files of others have none.
    """
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        if (noted := _SUM.search(header)) is None:
            return None
        found = hashlib.sha256(_SUM.sub(b"0" * 64, header))
        while block := file.read(1 << 20):
            found.update(block)
    return 8 + noted.start(1), noted[1], found.hexdigest().encode()


def _sort_header(path: Path) -> None:
    """Give what is written beside the tensors an order; safetensors shuffles it each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # else it is written in another way, which is no worse
            file.seek(8)
            file.write(text.ljust(length))


# --------------------------------------------------------------------------------------------------
# The frozen copy that the student is held to.


class Teacher:
    """A deep copy of a dual encoder that never changes.

    No module on purpose: a parent's `train()`, `requires_grad_()` or `parameters()` does not reach
    it, so it cannot be switched to training and no optimiser finds it.

    Attributes:
        encoder: The copy.
        runs: Whether it encodes what it is given, so that a batch may come in parts.
        heads: What makes features of that which `encode_image` and `encode_text` give, where these
            stop before the layers that the model's towers end in; None where they do not.
    """

    runs = True

    def __init__(self, model: nn.Module, heads: Heads | None = None) -> None:
        # many small parts, none of which ever changes
        names = ("tokenizer", "full_length_tokenizer")
        shared = [getattr(model, name, None) for name in names]
        memo: dict[int, Any] = {id(tokenizer): tokenizer for tokenizer in shared}
        copied = copy.deepcopy(model, memo)
        self.heads = heads and (heads[0].copied(), heads[1].copied())
        for head in heads or ():
            for own, neutral in zip(head.layer, head.nothing(), strict=True):
                memo[id(own)].data = neutral
        self.encoder: Any = copied.requires_grad_(False).eval()
        quick_on_cpu(copied)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, d) raw features without a graph."""
        return self.encoder.encode_image(pixels)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, d) raw features without a graph."""
        return self.encoder.encode_text(tokens)

    def follow(self, batches: Iterable[Any], plan: Any) -> Iterable[Any]:
        """The batches of an epoch, as they are: this teacher sees what the student sees."""
        del plan
        return batches

    def state_dict(self) -> dict[str, Tensor]:
        """The frozen weights, to compare with."""
        return self.encoder.state_dict()


# --------------------------------------------------------------------------------------------------
# The same functions on a CPU where PyTorch's own way is slow (docs/log.md has by how much).


_SHORT = 128  # tokens; PyTorch's fused attention is faster above, and keeps less


def quick_on_cpu(model: nn.Module) -> Callable[[], None]:
    """Take faster ways through a model on a CPU; beside a GPU it stays what it was.

    Under bf16 autocast those are ways of attention and patches. Convolutional towers get their
    pixels channels last, in any precision. Returns what undoes it.
    """
    changed: list[Any] = []
    for module in model.modules():
        match module:
            case nn.MultiheadAttention(batch_first=True, bias_k=None, add_zero_attn=False):
                quick = _attention
            case nn.Conv2d(padding=(0, 0), dilation=(1, 1), groups=1) if (
                module.stride == module.kernel_size != (1, 1)
            ):
                quick = _patches
            case nn.Conv2d(in_channels=3):
                quick = _stem
            case _:
                continue
        if "forward" not in vars(module):
            module.forward = MethodType(quick, module)
            changed.append(module)

    def undo() -> None:
        for module in changed:
            del module.forward  # what stood there before is the class's own

    return undo


def _is_slow(given: Tensor) -> bool:
    enabled = given.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return enabled and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention with scores and softmax in float32, as the fused kernel has them.

    That kernel's gradient takes 4 to 9 times as long, and without a graph PyTorch's projection
    copies its weight once for each token.
    """
    plain = query is key is value and key_padding_mask is None and not need_weights
    dropped = self.training and self.dropout
    masked = attn_mask is not None and (attn_mask.ndim != 2 or attn_mask.dtype == torch.bool)
    if not plain or dropped or masked or query.ndim != 3 or not _is_slow(query):
        return nn.MultiheadAttention.forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, **others
        )
    projected = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
    heads = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = heads.unbind(0)  # (B, heads, L, d) each
    if query.shape[1] > _SHORT:
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask)
    else:
        with torch.autocast("cpu", enabled=False):
            queries, keys = (queries * self.head_dim**-0.5).contiguous(), keys.contiguous()
            scores = queries.float() @ keys.float().transpose(-1, -2)
            scores = scores if attn_mask is None else scores + attn_mask
            mixed = scores.softmax(dim=-1).to(values.dtype) @ values
    return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def _stem(self: Any, pixels: Tensor) -> Tensor:
    """Channels last, which everything behind it keeps: twice as fast, with other rounding."""
    if pixels.device.type == "cpu":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    return nn.Conv2d.forward(self, pixels)


def _patches(self: Any, pixels: Tensor) -> Tensor:
    """Patches side by side in one matrix product: the convolution's gradient takes 30 times."""
    (height, width), size = self.kernel_size, pixels.shape[-2:]
    if size[0] % height or size[1] % width or not _is_slow(pixels):
        return nn.Conv2d.forward(self, pixels)
    tiles = pixels.bfloat16().unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, rows, columns, 3 x height x width)
    return functional.linear(tiles, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------------
# Which model it is: its weights, architecture and tokenizer as bytes.


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# the last is longer than any text tower reads, so that where texts are cut off shows, too
_PROBE_TEXTS = ["a photo of a cat.", "Two people, one umbrella: rain at 5 o'clock!", "red " * 300]


def identity(model: Any, precision: str, device: torch.device | str = "cpu") -> Iterator[bytes]:
    """Everything that features follow from besides the pixels; equal for equal models.

    What a tokenizer is called is not enough, since two functions may have one name: what it makes
    of a sample counts, too. The same goes for the features of a model that is no module, whose
    weights nobody sees.
    """
    yield precision.encode()
    yield _ADDRESS.sub("", repr(model)).encode()
    tokens = model.tokenizer(_PROBE_TEXTS)
    yield _bytes(tokens)
    if isinstance(model, nn.Module):
        yield from _weights(model)
    else:
        yield from _probe_features(model, tokens, device)


def _weights(model: nn.Module) -> Iterator[bytes]:
    for name, tensor in sorted(model.state_dict().items()):  # adapters leave another order behind
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield _bytes(tensor)


@torch.no_grad()
def _probe_features(model: Any, tokens: Tensor, device: torch.device | str) -> Iterator[bytes]:
    image = Image.linear_gradient("L").convert("RGB")
    yield _bytes(model.encode_image(model.preprocess(image)[None].to(device)))
    yield _bytes(model.encode_text(tokens.to(device)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
