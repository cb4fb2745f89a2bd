"""The one-file form of a tokenizer, which libraries outside Python read."""

from pathlib import Path


def add_tokenizer_json(folder: Path) -> None:
    """Write tokenizer.json from a CLIP tokenizer's other files, where Transformers is installed."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
