"""Every reader of files that others write: sound files to begin with, and how they are read."""

import io
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

# --------------------------------------------------------------------------------------------------
# A sound file → one that is not: bytes changed, or values of JSON replaced.


_WORDS = [
    *(
        b"",
        b"\0",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\x1b[2J",
        b"-1",
        b"1e999",
        b"NaN",
        b"null",
        b"[]",
    ),
    *(b"{}", b"[" * 2000, b'"', b"'", b"\t", b"\n", b"../", b"/dev/zero", b"9" * 30, b"!!float x"),
    *(b"&a [*a]", b": ", b"- ", b"{0..9}", b"\xff" * 8, b"\x7f\xff\xff\xff", b"a" * 5000),
]
_VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 0.5, 1e308, float("nan"), "", "x", "\x1b]0;x\x07", "../..", 10**30),
    *([], {}, [1], [[]], {"a": 1}, [[1, 2]] * 50, "x" * 5000, ["x"] * 3, -0.0, 2**31, "\udc80"),
]


@st.composite
def edited(draw: DrawFn, sound: bytes) -> bytes:
    """Bytes replaced, put in, taken out or repeated, at one to four places."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 40))
        word = draw(st.sampled_from(_WORDS) | st.binary(max_size=8))
        match draw(st.sampled_from(["replace", "insert", "delete", "repeat", "cut"])):
            case "replace":
                content[at : at + len(word)] = word
            case "insert":
                content[at:at] = word
            case "delete":
                del content[at : at + length]
            case "repeat":
                content[at:at] = content[at : at + length] * 5
            case _:
                del content[at:]
    return bytes(content)


@st.composite
def other_values(draw: DrawFn, sound: bytes) -> bytes:
    """JSON with one or two values replaced, left out or renamed."""
    content = json.loads(sound)
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(content))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "replace", "remove", "double"])):
            case "replace":
                holder[key] = deepcopy(draw(st.sampled_from(_VALUES)))
            case "remove":
                del holder[key]
            case _ if isinstance(holder, dict):
                name = draw(st.sampled_from(["x", "", "\x1b[2J", "auto_map"]))
                holder[name] = deepcopy(holder[key])
            case _:
                holder.append(deepcopy(holder[key]))
    return json.dumps(content).encode()


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every value, by what holds it; of long lists the first."""
    if isinstance(content, dict | list):
        keys = list(content) if isinstance(content, dict) else range(min(3, len(content)))
        for key in keys:
            yield content, key
            yield from _places(content[key])


# --------------------------------------------------------------------------------------------------
# What is read.


@dataclass
class Target:
    """One reader."""

    write: Callable[[Path], list[str]]  # sound files into a folder; those that are changed
    read: Callable[[Path, str], object]  # the folder, the name of the changed file
    slow: bool = False  # some tenths of a second a file

    def prepare(self, folder: Path) -> dict[str, bytes]:
        """Write the sound files and return those that are changed."""
        folder.mkdir(parents=True, exist_ok=True)
        return {name: (folder / name).read_bytes() for name in self.write(folder)}


def changed(files: dict[str, bytes]) -> SearchStrategy[tuple[str, bytes]]:
    """One of the files, changed."""

    def one(name: str) -> SearchStrategy[tuple[str, bytes]]:
        ways = edited(files[name])
        if name.endswith(".json"):
            ways = ways | other_values(files[name])
        return st.tuples(st.just(name), ways)

    return st.sampled_from(sorted(files)).flatmap(one)


def _tables(folder: Path) -> list[str]:
    from tests.data import layouts

    pairs = layouts.drawn(2)
    writers = [
        *(layouts.write_table, layouts.write_tsv, layouts.write_kaggle, layouts.write_token),
        *(layouts.write_coco, layouts.write_karpathy, layouts.write_jsonl),
        *(layouts.write_json_list, layouts.write_jsonl_with_content),
    ]
    written = []
    for writer in writers:
        path = Path(writer(folder / writer.__name__, pairs).partition("#")[0])
        written.append(str(path.relative_to(folder)))
    return written


def _read_pairs(folder: Path, name: str) -> None:
    from clip_refine.data import open_pairs

    open_pairs(str(folder / name))


def _shards(folder: Path) -> list[str]:
    from tests.data import layouts

    layouts.write_shards(folder, layouts.drawn(2), shards=1)
    return [str(path.relative_to(folder)) for path in folder.rglob("*.tar")]


def _read_shards(folder: Path, name: str) -> None:
    from clip_refine.config import DataConfig
    from clip_refine.data.sources import open_stream
    from clip_refine.support.errors import DataError

    with suppress(DataError):
        next(iter(open_stream(str(folder / name), DataConfig(streaming=True)).pairs(seed=0)))
    _read_pairs(folder, name)


def _images(folder: Path) -> list[str]:
    from PIL import Image

    picture = Image.effect_mandelbrot((20, 16), (-3, -2.5, 2, 2.5), 9).convert("RGB")
    for ending in ("png", "jpg", "gif", "webp", "tif", "bmp", "ppm", "jp2", "avif"):
        picture.save(folder / f"a.{ending}")
    picture.convert("P").save(folder / "b.png", transparency=0)
    return [path.name for path in folder.iterdir()]


def _read_image(folder: Path, name: str) -> None:
    from clip_refine.data.images import open_image

    open_image(folder / name)


def _configs(folder: Path) -> list[str]:
    from clip_refine.config import EvaluateConfig, RefineConfig, dump_config
    from clip_refine.config.runs import CompareConfig
    from clip_refine.config.suites import shipped

    for kind in (RefineConfig, EvaluateConfig, CompareConfig):
        (folder / f"{kind.__name__}.yaml").write_text(dump_config(kind()))
        as_json = kind().model_dump_json()
        (folder / f"{kind.__name__}.json").write_text(as_json)
    (folder / "suite.yaml").write_text(shipped("toy.yaml"))
    (folder / "names.yaml").write_text("{a: cat, b: dog}")
    (folder / "names.json").write_text('["cat", "dog"]')
    return [path.name for path in folder.iterdir()]


def _read_config(folder: Path, name: str) -> None:
    from clip_refine.config import EvaluateConfig, RefineConfig, load_config, load_suite
    from clip_refine.config.runs import CompareConfig
    from clip_refine.data.labelled import read_texts

    kinds = {kind.__name__: kind for kind in (RefineConfig, EvaluateConfig, CompareConfig)}
    path = folder / name
    if path.stem in kinds:
        load_config(kinds[path.stem], path)
    elif path.stem == "suite":
        load_suite(str(path))
    else:
        read_texts(path)


def _weights(folder: Path) -> list[str]:
    import torch
    from safetensors.torch import save_file

    weights = {"visual.proj": torch.randn(4, 3), "logit_scale": torch.tensor(1.0)}
    save_file(weights, folder / "a.safetensors")
    torch.save({"state_dict": weights, "name": "x", "epoch": 3}, folder / "a.pt")
    torch.save(weights, folder / "old.pt", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but what OpenAI published
        script: Any = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    script.save(str(folder / "script.pt"))
    listed = {"weight_map": {"visual.proj": "a.safetensors"}}
    (folder / "a.safetensors.index.json").write_text(json.dumps(listed))
    return [path.name for path in folder.iterdir() if path.is_file()]


def _read_weights(folder: Path, name: str) -> None:
    from clip_refine.models.checkpoints import open_checkpoint

    with open_checkpoint(folder / name):
        pass


def _open_clip(folder: Path) -> list[str]:
    from tests.conftest import TINY, write_model

    small = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "layers": 1}}
    write_model(folder / "model", small)
    return ["model/open_clip_config.json"]


def _read_open_clip(folder: Path, name: str) -> None:
    from clip_refine.models import load_open_clip

    load_open_clip(f"local-dir:{folder / 'model'}")


def _transformers(folder: Path) -> list[str]:
    from tests.models.tiny_transformers import write_clip

    write_clip(folder / "model")
    names = ("config.json", "tokenizer_config.json", "processor_config.json")
    return [f"model/{name}" for name in names if (folder / "model" / name).is_file()]


def _read_transformers(folder: Path, name: str) -> None:
    from clip_refine.models import load_transformers

    load_transformers(str(folder / "model"))


def _runs(folder: Path) -> list[str]:
    from tests.report.test_comparison_page import write_comparison
    from tests.report.test_page import evidence, write_run

    (folder / "run").mkdir()
    (folder / "compared").mkdir()
    write_run(folder / "run", evidence(12, 3))
    write_comparison(folder / "compared")
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path.relative_to(folder)) for path in found]


def _read_run(folder: Path, name: str) -> None:
    from clip_refine.config import RefineConfig, load_config
    from clip_refine.report.comparison_page import write_comparison_report
    from clip_refine.report.run_page import write_run_report

    if name.startswith("run"):
        write_run_report(folder / "run")
        load_config(RefineConfig, folder / "run" / "config.yaml")
    else:
        write_comparison_report(folder / "compared")


def _vectors(folder: Path) -> list[str]:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    generator = np.random.default_rng(0)
    sides = {f"{side}_features": generator.normal(size=(4, 3)) for side in ("image", "text")}
    np.savez(folder / "a.npz", **sides)  # type: ignore[arg-type]
    save_file(
        {name: torch.from_numpy(rows) for name, rows in sides.items()}, folder / "a.safetensors"
    )
    np.save(folder / "image.npy", sides["image_features"])
    np.save(folder / "text.npy", sides["text_features"])
    peer(folder)
    names = ("a.npz", "a.safetensors", "image.npy", "text.npy")
    return [*names, "peer/peer.json", "peer/peer.safetensors"]


def peer(folder: Path) -> None:
    """A fitted transform."""
    from clip_refine.config import PosthocConfig
    from clip_refine.roads.vectors import fit_file

    fit_file("mean-centring+nnn", folder / "a.npz", folder / "peer", PosthocConfig(neighbours=2))


def _read_vectors(folder: Path, name: str) -> None:
    from clip_refine.vectors.files import load_peer
    from clip_refine.vectors.stored import read_pairs

    if name.startswith("peer"):
        load_peer(folder / "peer")
    elif name.endswith(".npy"):
        read_pairs(f"{folder / 'image.npy'},{folder / 'text.npy'}")
    else:
        read_pairs(str(folder / name))


_STORED = ("npz", "safetensors", "folder", "clip-retrieval", "parquet", "dataset")


def _stored(folder: Path) -> list[str]:
    from tests.vectors.test_stored import SHARED, write

    for kind in _STORED:
        (folder / kind).mkdir()
        write(kind, folder / kind, SHARED)
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return [name for name in found if "_1." not in name]


def _read_stored(folder: Path, name: str) -> None:
    from clip_refine.support.errors import ClipRefineError
    from clip_refine.vectors.stored import apply_stored, read_pairs
    from clip_refine.vectors.transforms import Fold
    from tests.vectors.cases import drawn

    [source] = (folder / name.split("/")[0]).iterdir()
    owner = {"clip-retrieval": "image_path", "parquet": "owner", "dataset": "owner"}
    with suppress(ClipRefineError):
        read_pairs(str(source), owner=owner.get(name.split("/")[0]))
    out = folder.parent / f"out{source.suffix}"
    apply_stored(Fold.fit(*drawn(2, 20, 20)), source, out, side="image", overwrite=True)


def _sums(folder: Path) -> list[str]:
    from clip_refine.support.folder import SUMS, seal, sum_beside

    for name in ("a.npy", "b.npy"):
        (folder / name).write_bytes(b"numbers")
    seal(folder)
    beside = sum_beside(folder / "a.npy")
    beside.write_text((folder / SUMS).read_text().splitlines()[0] + "\n")
    return [SUMS, beside.name]


def _read_sums(folder: Path, name: str) -> None:
    from clip_refine.support.folder import check_sums

    check_sums(folder)
    check_sums(folder / "a.npy")


_ABOUT = {"settings": {"seed": 1, "train.steps": None}, "model": "0f", "pairs": "f0"}


@cache
def _trainer() -> Any:
    """Of a small model, before its first step but with an optimiser that has moments."""
    import torch

    from clip_refine.config import RefineConfig
    from clip_refine.models import Teacher, load_open_clip
    from clip_refine.priors import StandardNormal
    from clip_refine.roads import build
    from clip_refine.train import TowerPrecision
    from tests.conftest import TINY, write_model

    with TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", TINY)
        model = load_open_clip(f"local-dir:{folder}/model")
    config = RefineConfig.model_validate({"train": {"device": "cpu"}})
    accelerator = build.build_accelerator("cpu")
    student = build.build_student(model, config, accelerator.device)
    prepared = (TowerPrecision.from_name("fp32"), StandardNormal(), accelerator)
    trainer = build.build_trainer(config, student, Teacher(student), *prepared, steps=4)
    for group in trainer.schedule.optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    trainer.schedule.optimizer.step()
    return trainer


def _states(folder: Path) -> list[str]:
    from clip_refine.support.folder import SUMS
    from clip_refine.train.state import States

    states = States(folder, "1", _ABOUT, decided={"precision": "fp32"})
    states._write(folder, 3, *_trainer().state())
    (folder / "state/step-000000003" / SUMS).unlink()  # who changes weights changes it, too
    return [f"state/step-000000003/state.{ending}" for ending in ("json", "safetensors")]


def _read_state(folder: Path, name: str) -> None:
    from clip_refine.config import RefineConfig
    from clip_refine.roads.refine import as_it_was
    from clip_refine.train.state import _plain_sum, check_same, fitting, newest_state

    with suppress(ValueError, AttributeError, TypeError, RecursionError):
        newest_state(folder)
        path = folder / "state/step-000000003/state.json"
        plain = json.loads(path.read_bytes())
        plain.pop("sum", None)
        path.write_text(json.dumps({**plain, "sum": _plain_sum(plain)}))
    if saved := newest_state(folder):
        as_it_was(RefineConfig(), saved)
        with fitting(saved):
            check_same(saved, _ABOUT)
            _trainer().restore(saved.tensors(), saved.plain)


def _benchmarks(folder: Path) -> list[str]:
    from tests.data.test_benchmarks import ROW, draw, mixbench, write_lines

    mixbench(folder / "mixbench")
    draw(folder / "winoground" / "images", "a.jpg", "b.jpg")
    item = {"image_0": "a.jpg", "image_1": "b.jpg", "caption_0": "x", "caption_1": "y"}
    write_lines(folder / "winoground" / "examples.jsonl", [item])
    (folder / "data").mkdir()
    (folder / "data" / "swap_obj.json").write_text(json.dumps({"0": ROW, "7": ROW}))
    names = ("queries.jsonl", "mixed_corpus.jsonl", "qrels/qrels.tsv")
    mixed = [f"mixbench/{name}" for name in names]
    return [*mixed, "winoground/examples.jsonl", "data/swap_obj.json"]


def _read_benchmark(folder: Path, name: str) -> None:
    from clip_refine.data.labelled import read_mixbench, read_sugarcrepe, read_winoground

    if name.startswith("mixbench"):
        read_mixbench(folder / "mixbench")
    elif name.startswith("winoground"):
        read_winoground(folder / "winoground")
    else:
        read_sugarcrepe(folder / "data", folder / "winoground" / "images")


def _command_line(folder: Path) -> list[str]:
    for name in ("report.tables", "report.comparison", "report.run_page", "report.comparison_page"):
        import_module(f"clip_refine.{name}")  # imports take longer than a file may
    for path in files("clip_refine.roads").iterdir():
        if path.name.endswith(".py"):
            import_module(f"clip_refine.roads.{path.name.removesuffix('.py')}")
    from clip_refine.cli import VERBS

    verbs = [verb for verb in VERBS if verb != "demo"]
    flags = ["--data.train", "--model.name", "--out", "--config", "--recipe", "--train.epochs"]
    flags += ["--models", "--suite", "--help", "--json", "--print-config", "--seed", "--debug="]
    values = [
        "x",
        "-1",
        "nan",
        "\x1b[2J",
        "a.csv#kind=x",
        "{0..9}.tar",
        "=",
        "",
        "hf:x",
        "factory:x",
    ]
    generator = random.Random(0)
    lines = []
    for verb in verbs:
        more = [generator.choice(flags + values) for _ in range(6)]
        lines.append("\t".join([verb, *more]))
    (folder / "commands.txt").write_text("\n".join(lines))
    return ["commands.txt"]


def no_models() -> Any:
    """Within it no model is loaded, so that no verb begins to work."""
    from clip_refine.roads import build
    from clip_refine.support.errors import ModelError

    stopped = ModelError("no model is loaded here")
    return patch.object(build, "build_model", side_effect=stopped)


def _read_command_line(folder: Path, name: str) -> None:
    from clip_refine.cli import main

    text = (folder / name).read_bytes().decode("utf-8", errors="surrogateescape")
    lines = [line for line in text.split("\n") if not line.startswith("demo")]
    words = lines[sum(text.encode(errors="ignore")) % len(lines)].split("\t")
    said, error = io.StringIO(), io.StringIO()
    try:
        # settings that are sound go as far as the model, and no further
        with no_models(), redirect_stdout(said), redirect_stderr(error):
            main([word for word in words if word != "--debug"])
    except SystemExit as stopped:
        if stopped.code not in (0, 1, 2):
            raise AssertionError(f"exit status {stopped.code!r}") from None
    shown = error.getvalue()
    if "This should not happen" in shown or "Traceback" in shown:
        raise AssertionError(shown)
    if len(shown) > 20_000 or re.search(r"\x1b\[2J", shown):
        raise AssertionError(f"{len(shown)} letters: {shown[:300]!r}")


TARGETS = {
    "tables": Target(_tables, _read_pairs),
    "shards": Target(_shards, _read_shards),
    "images": Target(_images, _read_image),
    "configs": Target(_configs, _read_config),
    "weights": Target(_weights, _read_weights),
    "open_clip": Target(_open_clip, _read_open_clip, slow=True),
    "transformers": Target(_transformers, _read_transformers, slow=True),
    "runs": Target(_runs, _read_run),
    "benchmarks": Target(_benchmarks, _read_benchmark),
    "vectors": Target(_vectors, _read_vectors),
    "stored": Target(_stored, _read_stored),
    "sums": Target(_sums, _read_sums),
    "states": Target(_states, _read_state, slow=True),
    "command_line": Target(_command_line, _read_command_line, slow=True),
}
