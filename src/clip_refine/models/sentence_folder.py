"""sentence-transformers folders: a Transformers model in a sub-folder, listed in modules.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_refine.errors import ModelError

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
    """What a sentence-transformers folder holds besides the Transformers model.

    Attributes:
        module: The model's sub-folder, "" for the folder itself.
        files: The other files by name, to be written again as they were.
    """

    module: str
    files: dict[str, bytes]

    @classmethod
    def beside_transformers(cls, *, pad_to_context: bool) -> "SentenceFolder":
        """What to put into a Transformers folder so that both libraries load it.

        Args:
            pad_to_context: Whether texts are always padded to the context length (SigLIP); where
                not, the layout is the one that sentence-transformers before 5.4 knows, too.
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
        """What is there under a folder's or Hub model's name; None for a plain Transformers model.

        Raises:
            ModelError: The model has further modules that change its features.
        """
        listing = _read(name, _LISTING)
        if listing is None:
            return None
        modules: list[dict[str, Any]] = json.loads(listing)
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        if not kinds or kinds[0] not in _MODELS or set(kinds[1:]) - set(_HARMLESS):
            raise ModelError(
                f"{name}: {_LISTING} lists {', '.join(kinds)}. Only CLIP-type models can be "
                "refined: one CLIPModel or Transformer, and at most a Normalize behind it."
            )
        paths = [Path(str(module["path"])) for module in modules]
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
    if Path(name).is_dir():
        path = Path(name) / file
        return path.read_bytes() if path.is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found).read_bytes() if found else None
