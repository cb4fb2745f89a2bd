"""CLIP's byte-pair vocabulary, as open_clip ships it, in the files that Transformers reads."""

import gzip
import json
from pathlib import Path

from open_clip.tokenizer import bytes_to_unicode, default_bpe

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_VOCABULARY_SIZE = 49_408
_MERGES = CLIP_VOCABULARY_SIZE - 2 * 256 - 2  # bytes alone and at a word's end, start and end


def clip_merges() -> list[str]:
    """The merges in their order, two symbols a line; the file holds more than CLIP uses."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return lines[1 : _MERGES + 1]


def clip_vocabulary() -> dict[str, int]:
    """Symbol → id: bytes, bytes at a word's end, merged symbols, start and end of text.

    >>> vocabulary = clip_vocabulary()
    >>> vocabulary[START], vocabulary[END], len(vocabulary)
    (49406, 49407, 49408)
    """
    symbols = list(bytes_to_unicode().values())
    symbols += [f"{symbol}</w>" for symbol in symbols]
    symbols += [merge.replace(" ", "") for merge in clip_merges()]
    return {symbol: number for number, symbol in enumerate([*symbols, START, END])}


def write_clip_tokenizer(folder: Path, *, context_length: int) -> None:
    """Write what `CLIPTokenizer.from_pretrained(folder)` reads.

    Padding is end-of-text, as in OpenAI's folders; the features do not depend on it, because
    nothing behind the first end-of-text is looked at.
    """
    vocabulary = json.dumps(clip_vocabulary(), ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *clip_merges()])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "model_max_length": context_length,
        "do_lower_case": True,
        **special,
    }
    for name, content in (("tokenizer_config", settings), ("special_tokens_map", special)):
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
