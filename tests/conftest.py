"""What many tests share: a tiny random CLIP, drawn pairs, and the folder of real data."""

import faulthandler
import json
import os
from collections.abc import Sequence
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# no test reaches the Hub; without this each that asks for it asks five times, a minute in all
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# more threads than cores fight over them; where tests run side by side, each has one core, whatever
# the process that starts them has set for itself
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clip_refine import toy
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.toy import ToyPairs

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
SHARED = Path(__file__).parents[2] / "shared"
needs_onnx = pytest.mark.skipif(
    find_spec("onnxscript") is None, reason="ONNX: pip install 'clip-refine[onnx]'"
)


def needs(package: str, extra: str) -> Any:
    """A package, or a test that is skipped and says how to have it."""
    how = f"{package} is not installed: pip install 'clip-refine[{extra}]'"
    return pytest.importorskip(package, reason=how)


# --------------------------------------------------------------------------------------------------
# What takes a third of a small run, and is the same each time: made once by every worker.


def share_vocabularies() -> None:
    """open_clip reads its 49,408 words anew for every tokenizer."""
    make, made = open_clip.SimpleTokenizer.__init__, {}

    @wraps(make)
    def as_before(self: open_clip.SimpleTokenizer, *given, **named) -> None:
        key = repr((given, sorted(named.items())))
        if key not in made:
            make(self, *given, **named)
            made[key] = dict(vars(self))
        vars(self).update(made[key])

    open_clip.SimpleTokenizer.__init__ = as_before


def keep_drawings() -> None:
    """An image of the toy world follows from its scenes and the state of its generator."""
    draw, made = toy.draw_scenes, {}

    @wraps(draw)
    def as_before(scenes: Sequence[toy.Scene], generator: np.random.Generator) -> Image.Image:
        key = (*scenes, repr(generator.bit_generator.state))
        if key not in made:
            if len(made) > 5000:  # 7 kB each
                made.clear()
            made[key] = draw(scenes, generator)
        return made[key].copy()

    toy.draw_scenes = as_before


share_vocabularies()
keep_drawings()


def write_model(folder: Path, model_config: dict, *, seed: int = 0) -> str:
    """Save a random model with this architecture as an open_clip folder; its `local-dir:` name."""
    torch.manual_seed(seed)
    settings = dict(model_config)
    custom_text = settings.pop("custom_text", False)
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    clip = kind(**settings)
    open_clip.set_model_preprocess_cfg(clip, {"size": 48, **PREPROCESS})
    context_length = model_config["text_cfg"]["context_length"]
    tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
    OpenClipEncoder(clip, None, tokenizer, model_config).save(folder)
    assert json.loads((folder / "open_clip_config.json").read_text())["model_cfg"] == model_config
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def tiny_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture
def tiny(tiny_name: str) -> OpenClipEncoder:
    return load_open_clip(tiny_name)


@pytest.fixture(scope="session")
def pairs() -> ToyPairs:
    return ToyPairs("tests", size=64, captions_per_image=3)


@pytest.fixture(scope="session")
def held_out() -> ToyPairs:
    return ToyPairs("tests-held-out", size=24)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("../shared is not on this machine: data of this project that is not published")
    return SHARED


@pytest.fixture
def table(tmp_path: Path, pairs: ToyPairs) -> Path:
    """A CSV of 64 drawn images with three captions each, image files beside it."""
    (tmp_path / "images").mkdir()
    lines = ["file_name,caption"]
    for index in range(len(pairs)):
        name = f"images/{index:03}.png"
        pairs.load_image(index).save(tmp_path / name)
        lines += [f'{name},"{caption}"' for caption in pairs.captions[index]]
    path = tmp_path / "captions.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pytest_unconfigure() -> None:
    """A suite that has passed and does not end is a fault, too: say where it hangs."""
    if "PYTEST_XDIST_WORKER" not in os.environ:  # one that has no more to do waits for the others
        faulthandler.dump_traceback_later(60, exit=True)
