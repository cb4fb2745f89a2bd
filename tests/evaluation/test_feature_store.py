"""Features are computed once, also by several processes, also after an interruption."""

import os
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import multiprocessing

from clip_refine import build
from clip_refine.data.pairs import fingerprint
from clip_refine.data.toy import ToyPairs
from clip_refine.errors import OutputError
from clip_refine.evaluation import Embedder
from clip_refine.evaluation import embed as feature_store
from clip_refine.evaluation.embed import FeatureStore, Filler, image_fingerprints
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.support.cache import FeatureRows

NAMES = [fingerprint(bytes([number])) for number in range(5)]


def filler(model: OpenClipEncoder, folder: Path) -> Filler:
    embedder = Embedder(model, torch.device("cpu"), 5, visible=False)
    return Filler(FeatureStore(folder), embedder, build.build_accelerator("cpu"))


def test_rows_come_back_in_any_order(tmp_path: Path):
    rows = FeatureRows(tmp_path)
    features = torch.randn(5, 3)
    rows.add(NAMES[:2], features[:2])
    assert rows.missing([*NAMES, NAMES[4]]) == [2, 3, 4]
    rows.add(NAMES[2:], features[2:])
    assert rows.missing(NAMES) == []
    assert torch.equal(rows.read([NAMES[4], NAMES[0], NAMES[4]]), features[[4, 0, 4]])


def test_a_damaged_file_is_computed_again(tmp_path: Path):
    rows = FeatureRows(tmp_path)
    rows.add(NAMES[:2], torch.randn(2, 3))
    rows.add(NAMES[2:], torch.randn(3, 3))
    damaged = next(iter(tmp_path.glob("*.safetensors")))
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert len(rows.missing(NAMES)) in (2, 3)
    with pytest.raises(OutputError, match="a folder that all processes share"):
        rows.read(NAMES)


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Choose another --cache"):
        FeatureRows(tmp_path / "file" / "inside").add(NAMES, torch.randn(5, 3))


def test_features_are_the_models_and_are_computed_once(
    tiny: OpenClipEncoder, tmp_path: Path, pairs: ToyPairs, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feature_store, "ROWS_A_FILE", 7)
    fill = filler(tiny, tmp_path)
    contents = image_fingerprints(pairs, "", visible=False)
    texts = [text for captions in pairs.captions for text in captions]
    fill.images(pairs, contents, "")
    fill.texts(texts, "")
    plain = fill.embedder.images(pairs, "")
    torch.testing.assert_close(fill.store.images(contents), plain)
    torch.testing.assert_close(fill.store.texts(texts), fill.embedder.texts(texts, ""))

    monkeypatch.setattr(tiny, "encode_image", None)
    monkeypatch.setattr(tiny, "encode_text", None)
    fill.images(pairs, contents, "")
    fill.texts(texts, "")


def test_an_interruption_costs_little(
    tiny: OpenClipEncoder, tmp_path: Path, pairs: ToyPairs, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feature_store, "ROWS_A_FILE", 10)
    contents = image_fingerprints(pairs, "", visible=False)

    class Interrupted(ToyPairs):
        def load_image(self, index: int) -> Image.Image:
            if index == 40:
                raise KeyboardInterrupt
            return super().load_image(index)

    fill = filler(tiny, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fill.images(Interrupted("tests", size=64, captions_per_image=3), contents, "")
    left = fill.store.rows("images").missing(contents)
    assert 24 <= len(left) <= 34
    fill.images(pairs, contents, "")
    torch.testing.assert_close(fill.store.images(contents), fill.embedder.images(pairs, ""))


def encode(name: str, folder: Path) -> None:
    pairs = ToyPairs("shared-work", size=21)
    fill = filler(load_open_clip(name), folder)
    fill.images(pairs, image_fingerprints(pairs, "", visible=False), "")
    fill.texts([captions[0] for captions in pairs.captions], "")
    mine = f"{fill.accelerator.process_index} of {fill.accelerator.num_processes}"
    (folder / f"{mine}.txt").write_text("done")


def one_of_two(rank: int, port: int, name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    encode(name, folder)
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_share_the_work(tiny_name: str, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    encode(tiny_name, tmp_path / "one")
    multiprocessing.spawn(one_of_two, (port, tiny_name, tmp_path / "two"), nprocs=2)
    done = {path.name for path in (tmp_path / "two").glob("*.txt")}
    assert done == {"0 of 2.txt", "1 of 2.txt"}
    assert len(list((tmp_path / "two" / "images").glob("*.safetensors"))) == 2
    pairs = ToyPairs("shared-work", size=21)
    contents = image_fingerprints(pairs, "", visible=False)
    alone, together = (FeatureStore(tmp_path / folder) for folder in ("one", "two"))
    torch.testing.assert_close(alone.images(contents), together.images(contents))
    texts = [captions[0] for captions in pairs.captions]
    torch.testing.assert_close(alone.texts(texts), together.texts(texts))
