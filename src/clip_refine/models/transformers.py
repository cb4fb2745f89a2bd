"""Models in Hugging Face Transformers' and sentence-transformers' formats."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from clip_refine.models.checkpoints import WEIGHTS_LIST, needs_code, no_code_of_models
from clip_refine.models.encoder import (
    PROBES,
    TRANSFORMERS,
    count_tokens,
    cut_columns,
    hold_any,
    same_features,
    save_weights,
)
from clip_refine.support.errors import ModelError, first_line, foreign
from clip_refine.support.limits import LAYERS, leads_out, read_all, too_many_layers

# --------------------------------------------------------------------------------------------------
# Text as a Transformers model takes it: length, padding and attention mask found by trying.


_UNLIMITED = 100_000  # tokenizers without a limit of their own say 1e30


@dataclass(frozen=True)
class Padding:
    """How to tell padding from text by the ids alone, so that one tensor is all a text needs."""

    token: int  # the padding id
    side: str  # where it stands
    ends_text: bool  # whether a text's own last id is the same one, as in CLIP

    def mask(self, tokens: Tensor) -> Tensor:
        """(B, L) ids → (B, L) int64, 1 at text and 0 at padding.

        >>> Padding(9, "right", ends_text=True).mask(torch.tensor([[1, 5, 9, 9, 9]])).tolist()
        [[1, 1, 1, 0, 0]]
        """
        ids = tokens.flip(1) if self.side == "right" else tokens
        run = (ids == self.token).long().cumprod(dim=1)  # the unbroken run at the padded end
        padded = run.sum(dim=1, keepdim=True) - int(self.ends_text)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if self.side == "right":
            return (positions < tokens.shape[1] - padded).long()
        return (positions >= padded).long()


@dataclass(frozen=True)
class TransformersTokenizer:
    """Texts → (B, L') ids, padded as the model was trained."""

    tokenizer: Any  # transformers' own
    context_length: int  # L
    padding: Padding | None  # how padding is told from text
    # whether L' is that of the longest text, rounded up to a multiple of 8, or always L
    cut: bool = False

    def __call__(self, texts: list[str]) -> Tensor:
        """B texts → (B, L') int64 ids, L' at most L."""
        tokens, mask = self.padded(texts)
        return cut_columns(tokens, int(mask.sum(dim=1).max())) if self.cut else tokens

    def lengths(self, tokens: Tensor) -> Tensor | None:
        """(B,) tokens of each text that features depend on; None where those are all."""
        return self.padding.mask(tokens).sum(dim=1) if self.cut and self.padding else None

    def padded(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(B, L) ids and attention mask."""
        encoded = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text with start and end, before it is cut."""
        return count_tokens(self.tokenizer, texts)

    def are_special(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text holds a special token."""
        return hold_any(texts, self.tokenizer.all_special_tokens)

    def save_pretrained(self, folder: str) -> None:
        """Write its files."""
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class TextInput:
    """What the text tower gets."""

    tokenizer: TransformersTokenizer  # texts → ids
    # whether it needs the attention mask: not where padding stands behind all it sees, nor where
    # the model was trained to look at padding (SigLIP)
    masked: bool

    def arguments(self, tokens: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of `get_text_features`."""
        if not self.masked or self.tokenizer.padding is None:
            return {"input_ids": tokens}
        return {"input_ids": tokens, "attention_mask": self.tokenizer.padding.mask(tokens)}


@torch.no_grad()
def detect_text_input(model: Any, tokenizer: Any, features: Any) -> TextInput:
    """Find length, mask and cut that give the features which the full input gives.

    The full input is what Transformers' users pass: texts padded to the context length, with the
    attention mask where the tokenizer counts it among the model's inputs. `features` are
    keyword arguments of `get_text_features` → (B, d) raw features.
    """
    text_config = getattr(model.config, "text_config", model.config)
    # the shorter of what the tokenizer and what the tower's positions allow
    lengths = [
        getattr(text_config, "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    allowed = [length for length in lengths if length and length < _UNLIMITED]
    if not allowed:
        raise ModelError(
            f"{type(model).__name__}: neither its config nor its tokenizer says how long a text "
            "may be. Set model_max_length in tokenizer_config.json."
        )
    full = TransformersTokenizer(tokenizer, min(allowed), None)
    tokens, mask = (part.to(model.device) for part in full.padded(PROBES))
    # whether tokenizer and tower belong together: an empty one is made where files are missing
    expected, known = getattr(text_config, "vocab_size", None), len(tokenizer)
    if expected and (int(tokens.max()) >= expected or known < expected // 2):
        raise ModelError(
            f"{type(model).__name__}: its tokenizer knows {known} tokens, its text tower "
            f"{expected}. Are the tokenizer's files, such as tokenizer.json, beside config.json?"
        )
    if "attention_mask" not in tokenizer.model_input_names:
        return _cut_where_exact(TextInput(full, masked=False), tokens, features)
    masked = features(input_ids=tokens, attention_mask=mask)
    needs_mask = not same_features(features(input_ids=tokens), masked)
    ways = (
        Padding(tokenizer.pad_token_id, tokenizer.padding_side, ends_text)
        for ends_text in (False, True)
    )
    padding = next((way for way in ways if torch.equal(way.mask(tokens), mask)), None)
    if needs_mask and padding is None:
        raise ModelError(
            f"{type(tokenizer).__name__}: padding cannot be told from text by its ids, and the "
            "text tower needs to know. Wrap the model in a DualEncoder of your own."
        )
    found = TextInput(replace(full, padding=padding), masked=needs_mask)
    return _cut_where_exact(found, tokens, features)


def _cut_where_exact(text_input: TextInput, tokens: Tensor, features: Any) -> TextInput:
    whole = text_input.tokenizer
    if whole.tokenizer.padding_side != "right":
        return text_input
    cutting = replace(whole, cut=True)
    expected = features(**text_input.arguments(tokens))
    for rows in (slice(None), slice(0, 1)):  # together and the shortest alone, cut the most
        short = cutting(PROBES[rows]).to(tokens.device)
        if not same_features(features(**text_input.arguments(short)), expected[rows]):
            return text_input
    return TextInput(cutting, text_input.masked)


# --------------------------------------------------------------------------------------------------
# sentence-transformers folders: a Transformers model in a sub-folder, listed in modules.json.


_LISTING = "modules.json"
_MODELS = ("CLIPModel", "Transformer")
_HARMLESS = ("Normalize",)  # does not change unit features
_SMALL_FILES = (
    "config_sentence_transformers.json",
    "{module}/sentence_bert_config.json",
    "{module}/sentence_clip_config.json",
)


@dataclass(frozen=True)
class SentenceFolder:
    """What a sentence-transformers folder holds besides the Transformers model."""

    module: str  # the model's sub-folder, "" for the folder itself
    files: dict[str, bytes]  # the other files by name, to be written again as they were

    @classmethod
    def beside_transformers(cls, *, pad_to_context: bool) -> "SentenceFolder":
        """What to put into a Transformers folder so that both libraries load it.

        Where texts are not always padded to the context length, as SigLIP's are, the layout is the
        one that sentence-transformers before 5.4 knows, too.
        """
        module = "sentence_transformers.models.CLIPModel"
        files: dict[str, Any] = {
            "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        }
        if pad_to_context:
            module = "sentence_transformers.base.modules.transformer.Transformer"
            files["sentence_bert_config.json"] = {
                "transformer_task": "feature-extraction",
                "modality_config": {
                    modality: {
                        "method": f"get_{modality}_features",
                        "method_output_name": "pooler_output",
                    }
                    for modality in ("text", "image")
                },
                "module_output_name": "sentence_embedding",
                "processing_kwargs": {"text": {"padding": "max_length"}},
            }
        files[_LISTING] = [{"idx": 0, "name": "0", "path": "", "type": module}]
        written = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
        return cls("", {name: text.encode() for name, text in written.items()})

    @classmethod
    def find(cls, name: str) -> "SentenceFolder | None":
        """What is there under a folder's or Hub model's name; None for plain ones."""
        listing = _read(name, _LISTING)
        if listing is None:
            return None
        try:
            modules = [(str(module["type"]), str(module["path"])) for module in json.loads(listing)]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ModelError(f"{name}: {_LISTING} is no list of modules with type and path.") from (
                error
            )
        kinds = [kind.rpartition(".")[2] for kind, _ in modules]
        foreign = [kind for kind, _ in modules if not kind.startswith("sentence_transformers.")]
        if foreign:
            raise ModelError(
                f"{name}: {_LISTING} names {foreign[0]}, and code of elsewhere is never imported "
                "for a model. Allowed: sentence_transformers.models.CLIPModel and its likes."
            )
        if not kinds or kinds[0] not in _MODELS or set(kinds[1:]) - set(_HARMLESS):
            raise ModelError(
                f"{name}: {_LISTING} lists {', '.join(kinds)}. Only CLIP-type models can be "
                "refined: one CLIPModel or Transformer, and at most a Normalize behind it."
            )
        paths = [Path(path) for _, path in modules]
        if any(path.is_absolute() or ".." in path.parts for path in paths):
            raise ModelError(f"{name}: {_LISTING} names a path outside the folder. It is refused.")
        module = paths[0].as_posix() if paths[0].parts else ""
        names = [pattern.format(module=module).lstrip("/") for pattern in _SMALL_FILES]
        names += [f"{path.as_posix()}/config.json" for path in paths[1:]]
        found = {name_of: _read(name, name_of) for name_of in names}
        files = {name_of: content for name_of, content in found.items() if content is not None}
        return cls(module, {_LISTING: listing, **files})

    def write(self, folder: Path) -> None:
        """Put the other files beside a saved model."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _read(name: str, file: str) -> bytes | None:
    """A small file of a folder or of a Hub model."""
    folder = Path(name)
    if folder.is_dir():
        path, blobs = folder / file, folder.parent.parent / "blobs"  # of the Hub's own cache
        if not path.is_file():
            return None
        # it would be written again beside the refined model
        if leads_out(path, folder) and (blobs.is_symlink() or leads_out(path, blobs)):
            raise ModelError(f"{path}: is a link out of the model's folder. Put the file there.")
        with foreign(ModelError, f"{path}: cannot be read"), path.open("rb") as opened:
            return read_all(opened, WEIGHTS_LIST)
    from transformers.utils.hub import cached_file

    found = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found).read_bytes() if found else None


# --------------------------------------------------------------------------------------------------
# Hugging Face Transformers dual encoders: CLIP, SigLIP and whatever encodes images and texts.


@dataclass(frozen=True)
class TransformersPreprocess:
    """One image as the model's own image processor makes it."""

    processor: Any  # transformers' image processor

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image → (3, H, W)."""
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


class TransformersEncoder(nn.Module):
    """A Transformers model with image and text features behind the `DualEncoder` protocol.

    Attributes:
        model: The Transformers model itself.
        processor: Its processor, which holds image processor and tokenizer.
        preprocess: Its image processor for one image.
        tokenizer: Its tokenizer; rows end with the longest text where that is exact.
        sentence_folder: What makes its folder one of sentence-transformers, None for a plain one.
        format: Which library loads what `save` writes.
    """

    format = TRANSFORMERS
    padding_is_free = False

    def __init__(
        self, model: nn.Module, processor: Any, *, sentence_folder: SentenceFolder | None = None
    ) -> None:
        """Wrap a model.

        Args:
            model: With `get_image_features`, `get_text_features` and `logit_scale`.
            processor: With `image_processor` and `tokenizer`.
            sentence_folder: Given where the model is to be saved for sentence-transformers.

        Raises:
            ModelError: The model is no dual encoder, or its images are not of one size.
        """
        super().__init__()
        self.model: Any = model
        self.processor = processor
        self.preprocess = TransformersPreprocess(processor.image_processor)
        self.sentence_folder = sentence_folder
        self.eval()
        kind = type(model).__name__
        if not (hasattr(model, "logit_scale") or hasattr(model, "temperature")):
            raise ModelError(f"{kind}: has no logit_scale, which a dual encoder needs.")
        pixels = self.preprocess(Image.new("RGB", (40, 30)))
        if pixels.ndim != 3:
            raise ModelError(
                f"{kind}: its image processor makes {tuple(pixels.shape)} of one image, where "
                "(3, H, W) is needed."
            )
        self._text_input = detect_text_input(model, processor.tokenizer, self._text_features)
        self.tokenizer = self._text_input.tokenizer
        device = self.model.device
        with torch.no_grad():
            image_features = self.encode_image(pixels[None].to(device))
            text_features = self.encode_text(self.tokenizer(["a"]).to(device))
        dims = tuple(image_features.shape[1:]), tuple(text_features.shape[1:])
        if dims[0] != dims[1]:
            raise ModelError(
                f"{kind}: image features have shape {dims[0]} and text features {dims[1]}, so they "
                "cannot be compared. It is no dual encoder."
            )

    @property
    def logit_scale(self) -> Tensor:
        """0-d factor on cosines."""
        if hasattr(self.model, "logit_scale"):
            limit = getattr(self.model, "max_log_logit_scale", None)  # AIMv2's
            stored = self.model.logit_scale
            return (stored if limit is None else stored.clamp(0.0, limit)).exp().squeeze()
        return (1 / self.model.temperature).squeeze()  # ALIGN's

    @property
    def logit_bias(self) -> Tensor | None:
        """0-d offset of SigLIP-type models, None for others."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.squeeze()

    @property
    def full_length_tokenizer(self) -> TransformersTokenizer:
        """Its tokenizer without the cut."""
        return replace(self.tokenizer, cut=False)

    def preprocessing(self) -> dict[str, Any]:
        """What `preprocess` does, as Transformers writes it down."""
        return {"transformers": json.loads(self.processor.image_processor.to_json_string())}

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, d) raw image features."""
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, d) raw text features; L is the context length, or less where cut."""
        return self._text_features(**self._text_input.arguments(tokens))

    def _text_features(self, **arguments: Tensor) -> Tensor:
        return _pooled(self.model.get_text_features(**arguments))

    def save(self, folder: Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write a folder that Transformers' `from_pretrained` loads, in the model's own dtype.

        A model from a sentence-transformers folder is written as one.

        Args:
            folder: Created where missing.
            metadata: Texts for the safetensors header.
        """
        target = folder / self.sentence_folder.module if self.sentence_folder else folder
        target.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            self.model.save_pretrained(target)
            self.processor.save_pretrained(target)
            # where Transformers 4 looks for it
            self.processor.image_processor.save_pretrained(target)
        for path in target.glob("*.safetensors"):
            save_weights(load_file(path), path, {"format": "pt", **(metadata or {})})
        if self.sentence_folder:
            self.sentence_folder.write(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without a model's own code, and Transformers' bars and remarks: we say what matters."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with no_code_of_models():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _pooled(features: Any) -> Tensor:
    """The features themselves: Transformers 5 wraps them, Transformers 4 does not."""
    return features if isinstance(features, Tensor) else features.pooler_output


# --------------------------------------------------------------------------------------------------
# Transformers and sentence-transformers models by folder or Hub name.


INSTALL = "pip install 'clip-refine[hf]'"


@dataclass(frozen=True)
class ProcessorParts:
    """Stands in for the processor of a model that has none of its own."""

    image_processor: Any  # transformers' image processor
    tokenizer: Any  # transformers' tokenizer

    def save_pretrained(self, folder: Path) -> None:
        """Write the files of both."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_transformers(name: str) -> TransformersEncoder:
    """Load a dual encoder of Transformers or sentence-transformers with float32 weights.

    Args:
        name: A folder, or a name on the Hugging Face Hub.

    Raises:
        ModelError: It cannot be found, is no dual encoder, lacks weights, would need code from its
            folder, or the extra `[hf]` is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"{name}: needs Transformers. Install it with {INSTALL}.") from error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers that decode are forks
    try:
        with quiet_transformers():
            sentence_folder = SentenceFolder.find(name)
            where: dict[str, Any] = {"trust_remote_code": False}
            if sentence_folder and sentence_folder.module:
                where["subfolder"] = sentence_folder.module
            settings, _ = transformers.PretrainedConfig.get_config_dict(name, **where)
            if deep := too_many_layers(settings):
                raise ModelError(
                    f"{name}: {deep} of its config.json asks for more than {LAYERS} layers."
                )
            _check_kind(name, transformers.AutoConfig.from_pretrained(name, **where))
            loaded = transformers.AutoModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, **where
            )
            processor = transformers.AutoProcessor.from_pretrained(name, **where)
            if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
                processor = ProcessorParts(  # the model has no joint one
                    transformers.AutoImageProcessor.from_pretrained(name, **where),
                    transformers.AutoTokenizer.from_pretrained(name, **where),
                )
    except ImportError as error:
        raise ModelError(
            f"{name}: needs a package that is not installed ({first_line(error)}). Install it with "
            "pip."
        ) from error
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # settings and weights can make anything of it fail
        raise ModelError(_why_not_loaded(name, error)) from error
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} weights of {type(model).__name__} are missing or do not fit, "
            f"the first is {missing[0]}. Do config and weights belong together?"
        )
    for parameter in model.parameters():
        # out of the mapped file, where weights lie as they fall and kernels round accordingly
        parameter.data = parameter.data.clone()
    with foreign(ModelError, f"{name}: could not be used"):
        return TransformersEncoder(model, processor, sentence_folder=sentence_folder)


def _check_kind(name: str, config: Any) -> None:
    """Refuse before the weights are read what cannot work with them."""
    from transformers import MODEL_MAPPING

    if config.model_type == "siglip2":
        raise ModelError(
            f"{name}: a NaFlex SigLIP 2, whose images differ in shape, so that they cannot be "
            "stacked. Use a fixed-resolution one, such as google/siglip2-base-patch16-224."
        )
    attention = str(getattr(config, "_attn_implementation", None))
    if getattr(config, "quantization_config", None) or "/" in attention:
        raise ModelError(
            f"{name}: its config.json asks for code of elsewhere (quantization_config, or a kernel "
            "as attn_implementation). Take that out, and give weights that are not quantised."
        )
    kind = MODEL_MAPPING.get(type(config), None)
    lacking = [
        method
        for method in ("get_image_features", "get_text_features")
        if not hasattr(kind, method)
    ]
    if lacking:
        raise ModelError(
            f"{name}: a {config.model_type} model is no dual encoder: it has no "
            f"{' and no '.join(lacking)}. Give a CLIP- or SigLIP-type model."
        )


def _why_not_loaded(name: str, error: Exception) -> str:
    if needs_code(error):
        return (
            f"{name}: is built by code in its own folder, which is never run here. Wrap it in a "
            "DualEncoder of your own and pass --model.factory."
        )
    failed = f"{name}: could not be loaded: {first_line(error)}"
    if Path(name).exists():
        return failed
    return (
        f"{failed} If there is no network here, download the model elsewhere and give its folder."
    )
