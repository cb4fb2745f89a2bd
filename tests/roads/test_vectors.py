"""Files of features, and the command line from a model to transformed features."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clip_refine.cli import main
from clip_refine.config import PosthocConfig
from clip_refine.roads.vectors import align_vectors, apply_file, evaluate_vectors, fit_file
from clip_refine.support.errors import ConfigError, DataError, OutputError
from clip_refine.vectors.files import FeatureSet, load_peer, read_features, write_features
from clip_refine.vectors.stored import apply_stored
from tests.vectors.cases import drawn

IMAGE, TEXT = drawn(2, 8, 9, torch.float32)
SETTINGS = PosthocConfig(neighbours=3, alpha=0.6)
OWNERS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 7])


@pytest.fixture
def features(tmp_path: Path) -> Path:
    path = tmp_path / "features.safetensors"
    write_features(path, FeatureSet(IMAGE, TEXT, OWNERS), note={"model": "drawn"})
    return path


class TestFeatureFiles:
    def test_round_trip(self, features: Path):
        found = read_features(features)
        assert torch.equal(found.image_features, IMAGE)
        assert torch.equal(found.text_features, TEXT)
        assert found.text_to_image is not None
        assert torch.equal(found.text_to_image, OWNERS)
        with safe_open(features, "pt") as file:
            note = json.loads(file.metadata()["clip_refine"])
        assert note.pop("sha256")
        assert note == {"model": "drawn"}

    @pytest.mark.parametrize("names", [("image", "text"), ("image_features", "text_features")])
    def test_arrays_of_numpy(self, names: tuple[str, str], tmp_path: Path):
        arrays = {names[0]: IMAGE.numpy(), names[1]: TEXT.numpy()}
        np.savez(tmp_path / "f.npz", **arrays)
        found = read_features(tmp_path / "f.npz")
        assert torch.equal(found.image_features, IMAGE)
        assert torch.equal(found.text_features, TEXT)
        assert found.text_to_image is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"text_features": None}, "expected image_features, text_features and perhaps"),
            ({"more": IMAGE}, "got image_features, more, text_features, text_to_image"),
            ({"image": IMAGE}, "Rename or remove"),
            ({"image_features": IMAGE[0]}, r"image_features must be \(rows, dim\)"),
            ({"image_features": IMAGE.long()}, "got .* of torch.int64"),
            ({"image_features": IMAGE / 0}, "image_features: row 0 is not finite"),
            ({"text_features": TEXT[:, :5]}, "must have one dimension, got 6 and 5"),
            ({"text_to_image": OWNERS[1:]}, r"text_to_image must be \(9,\) whole numbers"),
            ({"text_to_image": OWNERS.float()}, "got .* of torch.float32"),
            ({"text_to_image": OWNERS + 1}, "must be from 0 to 7, got 1 to 8"),
        ],
        ids=lambda value: "" if isinstance(value, str) else ",".join(value),
    )
    def test_what_is_no_set_of_features(self, changes: dict, message: str, features: Path):
        tensors = load_file(features) | changes
        save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, features)
        with pytest.raises(DataError, match=message):
            read_features(features)

    def test_what_cannot_be_read(self, tmp_path: Path):
        with pytest.raises(DataError, match="cannot be read"):
            read_features(tmp_path / "none.safetensors")
        for name in ("bad.safetensors", "bad.npz"):
            (tmp_path / name).write_bytes(b"no features")
            with pytest.raises(DataError, match="cannot be read"):
                read_features(tmp_path / name)
        with pytest.raises(DataError, match="there is no such file or folder"):
            read_features(tmp_path / "features.csv")
        (tmp_path / "features.csv").touch()
        with pytest.raises(DataError, match="not a kind of feature file"):
            read_features(tmp_path / "features.csv")

    def test_pickled_objects_are_not_loaded(self, tmp_path: Path):
        objects = np.array([{"a": 1}], dtype=object)
        np.savez(tmp_path / "f.npz", image=objects, text=objects)
        with pytest.raises(DataError, match="allow_pickle"):
            read_features(tmp_path / "f.npz")

    def test_what_cannot_be_written(self, features: Path, tmp_path: Path):
        found = read_features(features)
        with pytest.raises(OutputError, match="exists already"):
            write_features(features, found, note={})
        with pytest.raises(OutputError, match=r"written as \.safetensors"):
            write_features(tmp_path / "f.npz", found, note={})
        (tmp_path / "folder.safetensors").mkdir()
        with pytest.raises(OutputError, match="is a folder"):
            write_features(tmp_path / "folder.safetensors", found, note={}, overwrite=True)
        assert not list(tmp_path.glob(".*"))


class TestFromFilesToFiles:
    def test_fit_and_apply(self, features: Path, tmp_path: Path):
        peer = fit_file("mean-centring+nnn", features, tmp_path / "peer", SETTINGS)
        apply_file(tmp_path / "peer", features, tmp_path / "moved.safetensors")
        moved = read_features(tmp_path / "moved.safetensors")
        assert torch.equal(moved.image_features, peer.transform_image(IMAGE))
        assert torch.equal(moved.text_features, peer.transform_text(TEXT))
        assert moved.text_to_image is not None
        assert torch.equal(moved.text_to_image, OWNERS)
        with safe_open(tmp_path / "moved.safetensors", "pt") as file:
            note = json.loads(file.metadata()["clip_refine"])
        assert (note["peer"], note["score_columns"]) == ("mean-centring+nnn", 2)
        # whose appended columns are no directions
        with pytest.raises(DataError, match=r"moved.safetensors: was made by mean-centring\+nnn"):
            evaluate_vectors(tmp_path / "moved.safetensors")

    def test_more_neighbours_than_references_are_said(self, features: Path, tmp_path: Path, capsys):
        fit_file("nnn", features, tmp_path / "all")
        assert (
            "neighbours 128: all references are taken where there are fewer, which are 8 im"
            in capsys.readouterr().err
        )
        fit_file("nnn", features, tmp_path / "some", SETTINGS)
        assert "neighbours" not in capsys.readouterr().err

    def test_python_may_name_folders_and_one_map(self, tmp_path: Path):
        features = tmp_path / "features.safetensors"
        write_features(features, FeatureSet(*drawn(2, 24, 24)), note={})
        peer = fit_file("mean-centring", features, tmp_path / "peer")
        given = [str(tmp_path / "peer"), tmp_path / "peer", peer, [peer]]
        rows = [evaluate_vectors(features, maps, resamples=10).measured for maps in given]
        assert all(found[1].scores == rows[0][1].scores for found in rows)
        applied = [
            apply_stored(maps, features, tmp_path / f"{n}.safetensors", side="image")
            for n, maps in enumerate(given[:3])
        ]
        assert len(set(applied)) == 1
        with pytest.raises(DataError, match="a FeatureSet of both sides, got tuple"):
            evaluate_vectors((IMAGE, TEXT))  # pyright: ignore

    def test_applied_twice_gives_the_same_bytes(self, features: Path, tmp_path: Path):
        fit_file("nnn", features, tmp_path / "peer")
        for name in ("one", "two"):
            apply_file(tmp_path / "peer", features, tmp_path / f"{name}.safetensors")
        one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "two"))
        assert one == two

    def test_features_that_do_not_fit(self, features: Path, tmp_path: Path):
        fit_file("mean-centring", features, tmp_path / "peer")
        other = tmp_path / "other.safetensors"
        write_features(other, FeatureSet(torch.eye(3), torch.eye(3)), note={})
        with pytest.raises(DataError, match="mean-centring cannot be applied. .* dimension 6"):
            apply_file(tmp_path / "peer", other, tmp_path / "moved.safetensors")
        zero = tmp_path / "zero.safetensors"
        write_features(zero, FeatureSet(torch.zeros(3, 3), torch.eye(3)), note={})
        with pytest.raises(DataError, match="nnn cannot be fitted. image features: row 0 is zero"):
            fit_file("nnn", zero, tmp_path / "zeros")
        assert not (tmp_path / "zeros").exists()
        assert not (tmp_path / "moved.safetensors").exists()

    def test_a_setting_that_a_peer_does_not_look_at(self, features: Path, tmp_path: Path):
        out = tmp_path / "peer"
        with pytest.raises(ConfigError, match="neighbours: mean-centring takes no such setting"):
            fit_file("mean-centring", features, out, SETTINGS)
        fit_file("mean-centring+nnn", features, out, SETTINGS)

    def test_nothing_is_overwritten_unasked(self, features: Path, tmp_path: Path):
        fit_file("nnn", features, tmp_path / "peer")
        with pytest.raises(OutputError, match="exists already"):
            fit_file("mean-centring", features, tmp_path / "peer")
        with pytest.raises(OutputError, match="exists already"):
            apply_file(tmp_path / "peer", features, features)
        fit_file("mean-centring", features, tmp_path / "peer", overwrite=True)
        apply_file(tmp_path / "peer", features, features, overwrite=True)
        assert not torch.equal(read_features(features).image_features, IMAGE)


class TestCommandLine:
    def test_from_a_model_to_transformed_features(
        self, table: Path, tiny_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        raw, peer, moved = (tmp_path / name for name in ("raw.safetensors", "p", "m.safetensors"))
        source = ("--model.name", tiny_name, "--data.val", str(table))
        main(["evaluate", *source, "--save-features", str(raw)])
        found = read_features(raw)
        assert found.image_features.shape == (64, 16)
        assert found.text_features.shape == (192, 16)
        assert found.text_to_image is not None
        assert found.text_to_image.tolist() == [image for image in range(64) for _ in range(3)]
        main(["posthoc", "fit", "modality-shift", str(raw), "--out", str(peer), "--strength", ".5"])
        main(["posthoc", "apply", str(peer), str(raw), "--out", str(moved)])
        shown = capsys.readouterr().out
        assert "modality-shift, fitted on 64 images and 192 texts" in shown
        assert "modality-shift, applied to" in shown
        expected = load_peer(peer).transform_image(found.image_features)
        assert torch.equal(read_features(moved).image_features, expected)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("nn", "f.safetensors"), "'nn': there is no such peer. Did you mean nnn?"),
            (("nnn", "f.safetensors", "--alpha", "-1"), "alpha: Input should be greater"),
            (("nnn", "gone.safetensors"), "gone.safetensors: cannot be read"),
        ],
        ids=lambda value: value[0],
    )
    def test_mistakes(
        self,
        arguments: tuple[str, ...],
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "f.safetensors").touch()  # what is not there is said before anything else
        with pytest.raises(SystemExit) as stop:
            main(["posthoc", "fit", *arguments, "--out", str(tmp_path / "peer")])
        assert stop.value.code == 2
        assert f"clip-refine posthoc: {message}" in capsys.readouterr().err

    def test_features_are_not_encoded_for_a_path_that_is_taken(
        self, table: Path, tiny_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        (tmp_path / "f.safetensors").touch()
        source = ("--model.name", tiny_name, "--data.val", str(table))
        with pytest.raises(SystemExit):
            main(["evaluate", *source, "--save-features", str(tmp_path / "f.safetensors")])
        assert "exists already" in capsys.readouterr().err

    def test_the_defaults_are_those_of_the_peers(self, features: Path, tmp_path: Path):
        defaults = PosthocConfig()
        for kind in ("nnn", "modality-shift"):
            main(["posthoc", "fit", kind, str(features), "--out", str(tmp_path / kind)])
            fit_file(kind, features, tmp_path / f"again-{kind}", defaults)
            written = (tmp_path / kind / "peer.json").read_bytes()
            assert written == (tmp_path / f"again-{kind}" / "peer.json").read_bytes()
            fit_file(kind, features, tmp_path / f"plain-{kind}")
            assert written == (tmp_path / f"plain-{kind}" / "peer.json").read_bytes()


def test_an_alignment_is_measured_on_items_it_has_not_seen(tmp_path: Path, capsys):
    """Of as many dimensions as items a rotation fits noise, which says nothing of other items."""
    generator = torch.Generator().manual_seed(0)
    for name in ("old", "new"):
        np.save(tmp_path / f"{name}.npy", torch.randn(200, 180, generator=generator).numpy())
    align_vectors(tmp_path / "old.npy", tmp_path / "new.npy", tmp_path / "map")
    said = " ".join(capsys.readouterr().err.split())
    assert "on 20 items that a map of the other 180 has not seen" in said
    found = float(re.search(r"mapped: (-?[.\d]+),", said)[1])
    assert abs(found) < 0.15
    few = [np.random.default_rng(seed).normal(size=(9, 4)) for seed in (0, 1)]
    for name, rows in zip(("a", "b"), few, strict=True):
        np.save(tmp_path / f"{name}.npy", rows.astype("float32"))
    align_vectors(tmp_path / "a.npy", tmp_path / "b.npy", tmp_path / "few")
    assert "on 9 items of the fit, too few" in " ".join(capsys.readouterr().err.split())
