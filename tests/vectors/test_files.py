"""A saved peer comes back the same, and what does not fit together is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clip_refine import __version__
from clip_refine.config import PosthocConfig
from clip_refine.config.runs import PEER_NAMES
from clip_refine.support.errors import ConfigError, DataError, OutputError
from clip_refine.support.folder import SUMS
from clip_refine.vectors.files import (
    FeatureSet,
    load_peer,
    read_features,
    save_peer,
    write_features,
)
from clip_refine.vectors.transforms import PEERS, Chain, MeanCentring, fit_peer
from tests.vectors.cases import FITS, drawn

SHOWN = drawn(3, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FITS)
def test_round_trip(name: str, dtype: torch.dtype, tmp_path: Path):
    peer = FITS[name](*drawn(2, 8, 9, dtype))
    save_peer(peer, tmp_path / "peer")
    again = load_peer(tmp_path / "peer")
    assert type(again) is type(peer)
    assert (again.name, again.dim, again.fitted_on) == (name, peer.dim, (8, 9))
    assert torch.equal(again.similarity(*SHOWN), peer.similarity(*SHOWN))


def test_a_chain_of_chains_comes_back_flat(tmp_path: Path):
    inner = Chain.fit(*drawn(2, 8, 9), steps=[MeanCentring.fit])
    peer = Chain((inner, FITS["nnn"](*drawn(2, 8, 9))))
    save_peer(peer, tmp_path / "peer")
    again = load_peer(tmp_path / "peer")
    assert again.name == peer.name == "mean-centring+nnn"
    assert torch.equal(again.similarity(*SHOWN), peer.similarity(*SHOWN))


def test_what_the_file_says(tmp_path: Path):
    save_peer(FITS["mean-centring+nnn"](*drawn(2, 8, 9)), tmp_path / "peer")
    fitted = {"dim": 6, "fitted_on_images": 8, "fitted_on_texts": 9}
    assert json.loads((tmp_path / "peer/peer.json").read_text()) == {
        "format": 1,
        "clip_refine_version": __version__,
        "steps": [
            {"kind": "mean-centring", **fitted, "settings": {}},
            {"kind": "nnn", **fitted, "settings": {"neighbours": 3, "alpha": 0.6}},
        ],
    }


def test_saving_twice_gives_the_same_bytes(tmp_path: Path):
    for folder in ("one", "two"):
        save_peer(FITS["mean-centring+nnn"](*drawn(2, 8, 9)), tmp_path / folder)
    for file in ("peer.json", "peer.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_who_may_read_one_file_may_read_the_other(tmp_path: Path):
    save_peer(FITS["fold"](*drawn(2, 8, 9)), tmp_path / "peer")
    modes = [
        (tmp_path / "peer" / name).stat().st_mode for name in ("peer.json", "peer.safetensors")
    ]
    assert modes[0] == modes[1]


def test_a_folder_that_exists_is_kept(tmp_path: Path):
    with pytest.raises(OutputError, match="exists already"):
        save_peer(FITS["nnn"](*drawn(2, 8, 9)), tmp_path)
    save_peer(FITS["nnn"](*drawn(2, 8, 9)), tmp_path / "peer")
    save_peer(FITS["modality-shift"](*drawn(2, 8, 9)), tmp_path / "peer", overwrite=True)
    assert load_peer(tmp_path / "peer").name == "modality-shift"


def set_in(*path: Any, value: Any) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (set_in("steps", 0, "kind", value="mean"), "there is no peer 'mean'"),
        (set_in("steps", 0, "kind", value="mean-centring"), "nnn|is made from"),
        (set_in("steps", 0, "dim", value=7), "dim 7, fitted on"),
        (set_in("steps", 0, "fitted_on_images", value=80), r"fitted on \(80, 9\), but"),
        (set_in("steps", 0, "settings", value={}), "is made from"),
        (set_in("steps", 0, "settings", "more", value=1), "is made from"),
        (set_in("steps", 0, "settings", "alpha", value=-1), "alpha must be at least 0"),
        (set_in("steps", 0, "settings", "alpha", value="much"), "settings.alpha"),
        (set_in("steps", 0, "settings", "neighbours", value=2.5), "neighbours must be a whole"),
        (set_in("steps", 0, "settings", "image_references", value=1), "not make a peer"),
        (set_in("steps", value=[]), "not expected"),
        (set_in("format", value=2), "format: Input should be 1"),
        (set_in("author", value="me"), "author: Extra inputs"),
    ],
)
def test_a_changed_record_is_refused(tamper: Callable[[dict], None], message: str, tmp_path: Path):
    save_peer(FITS["nnn"](*drawn(2, 8, 9)), tmp_path / "peer")
    record = json.loads((tmp_path / "peer/peer.json").read_text())
    tamper(record)
    (tmp_path / "peer/peer.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=message):
        load_peer(tmp_path / "peer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.image_references": torch.ones(8, 6)}, "must be rows of norm 1"),
        ({"0.image_references": torch.eye(6)[:4]}, r"fitted on \(8, 9\), but"),
        ({"0.image_references": torch.eye(5)}, "must have dimension 5, got 6"),
        ({"0.image_references": torch.tensor(1.0)}, r"must be \(rows, dim\)"),
        ({"0.image_references": torch.eye(6).half()}, "must be float32 or float64"),
        ({"0.image_references": torch.full((8, 6), torch.nan)}, "row 0 is not finite"),
        ({"0.more": torch.eye(2)}, "0.more not expected"),
        ({"0.image_references": None}, "is made from"),
    ],
    ids=str,
)
def test_changed_tensors_are_refused(changes: dict, message: str, tmp_path: Path):
    save_peer(FITS["nnn"](*drawn(2, 8, 9)), tmp_path / "peer")
    path = tmp_path / "peer/peer.safetensors"
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    (tmp_path / "peer" / SUMS).unlink()
    with pytest.raises(DataError, match=message):
        load_peer(tmp_path / "peer")


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (torch.full((6,), 0.9), "must be a mean of unit features"),
        (torch.full((6,), torch.nan), "must be a mean of unit features"),
        (torch.zeros(2, 3), r"must both be \(dim,\)"),
    ],
    ids=str,
)
def test_means_that_are_none_are_refused(mean: torch.Tensor, message: str, tmp_path: Path):
    save_peer(FITS["mean-centring"](*drawn(2, 8, 9)), tmp_path / "peer")
    path = tmp_path / "peer/peer.safetensors"
    save_file(load_file(path) | {"0.image_mean": mean}, path)
    (tmp_path / "peer" / SUMS).unlink()
    with pytest.raises(DataError, match=message):
        load_peer(tmp_path / "peer")


def test_missing_and_damaged_files(tmp_path: Path):
    with pytest.raises(DataError, match=r"peer.json: cannot be read .* `clip-refine posthoc fit`"):
        load_peer(tmp_path)
    save_peer(FITS["nnn"](*drawn(2, 8, 9)), tmp_path / "peer")
    (tmp_path / "peer/peer.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="peer.safetensors: is not what was written"):
        load_peer(tmp_path / "peer")
    (tmp_path / "peer/peer.safetensors").unlink()
    with pytest.raises(DataError, match="peer.safetensors: cannot be read"):
        load_peer(tmp_path / "peer")
    (tmp_path / "peer/peer.json").write_text("{")
    with pytest.raises(DataError, match="is no description of a fitted peer"):
        load_peer(tmp_path / "peer")


class TestByName:
    @pytest.mark.parametrize("name", FITS)
    def test_the_same_as_by_class(self, name: str):
        settings = PosthocConfig(neighbours=3, alpha=0.6, strength=0.7, share=0.8)
        peer = fit_peer(name, *drawn(2, 8, 9), settings)
        expected = FITS[name](*drawn(2, 8, 9))
        assert type(peer) is type(expected)
        assert torch.equal(peer.similarity(*SHOWN), expected.similarity(*SHOWN))

    def test_every_kind_has_a_name(self):
        assert tuple(PEERS) == PEER_NAMES  # those of the command line's help
        assert set(PEERS) == set(FITS) - {"mean-centring+nnn"}
        for kind, peer in PEERS.items():
            assert type(fit_peer(kind, *drawn(2, 8, 9))) is peer

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("mean-centering", "no such peer. Did you mean mean-centring?"),
            ("mean-centring+", "'': there is no such peer. There are"),
            ("nnn+mean-centring", "can only be the last of a chain"),
        ],
    )
    def test_no_such_name(self, name: str, message: str):
        with pytest.raises(ConfigError, match=message):
            fit_peer(name, *drawn(2, 8, 9))


def test_features_and_maps_that_rotted_are_refused(tmp_path: Path):
    features = FeatureSet(torch.randn(4, 3), torch.randn(4, 3))
    write_features(tmp_path / "f.safetensors", features, note={})
    read_features(tmp_path / "f.safetensors")
    save_peer(MeanCentring.fit(*features_of(features)), tmp_path / "peer")
    for file in (tmp_path / "f.safetensors", tmp_path / "peer" / "peer.safetensors"):
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
    with pytest.raises(DataError, match="not what was written there"):
        read_features(tmp_path / "f.safetensors")
    with pytest.raises(DataError, match="is not what was written there"):
        load_peer(tmp_path / "peer")


def features_of(features: FeatureSet) -> tuple[torch.Tensor, torch.Tensor]:
    return features.image_features, features.text_features
