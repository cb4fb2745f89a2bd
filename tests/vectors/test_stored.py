"""Stored vectors of every layout: read as pairs, and mapped without changing anything else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.numpy import load_file, save_file
from torch import Tensor

from clip_refine.support.errors import ConfigError, DataError, OutputError
from clip_refine.vectors import stored
from clip_refine.vectors.files import (
    FeatureSet,
    load_peer,
    read_features,
    save_peer,
    write_features,
)
from clip_refine.vectors.stored import apply_stored, open_npy, read_pairs
from clip_refine.vectors.transforms import (
    Fold,
    LinearMaps,
    NearestNeighbourNormalisation,
    Peer,
    Procrustes,
)
from tests.vectors.cases import drawn

IMAGE, TEXT = (side.numpy().astype(np.float16) for side in drawn(5, 9, 9))
OWNERS = [0, 0, 1, 2, 2, 2, 3, 4, 5]  # rows 0 and 1 are captions of one image, and so on
SHARED = IMAGE[[OWNERS.index(owner) for owner in OWNERS]]  # an image's vector in each of its rows
IDS = [f"item-{row}" for row in range(9)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stored, "_ROWS", 4)


@pytest.fixture
def fold() -> Peer:
    return Fold.fit(*drawn(2, 20, 20))


LANCE = "lancedb is not installed: pip install 'clip-refine[lance]'"
OF_SIX = ("fixed.parquet", "lance")  # whose lists have six numbers, here


def write(kind: str, folder: Path, image: np.ndarray = IMAGE, text: np.ndarray = TEXT) -> Path:
    arrays = {"image_features": image, "text_features": text}
    match kind:
        case "npz":
            np.savez(folder / "v.npz", **arrays, text_to_image=np.arange(9))
        case "compressed.npz":
            np.savez_compressed(folder / "v.npz", **arrays)
            return folder / "v.npz"
        case "safetensors":
            save_file(
                arrays | {"text_to_image": np.arange(9)}, folder / "v.safetensors", {"a": "b"}
            )
        case "folder":
            (folder / "v.folder").mkdir()
            np.save(folder / "v.folder/image.npy", image)
            np.save(folder / "v.folder/text.npy", text)
        case "clip-retrieval":
            for name, side in (("img_emb", image), ("text_emb", text)):
                (folder / f"v.clip-retrieval/{name}").mkdir(parents=True)
                for number, rows in enumerate((slice(0, 5), slice(5, 9))):
                    np.save(folder / f"v.clip-retrieval/{name}/{name}_{number}.npy", side[rows])
            (folder / "v.clip-retrieval/metadata").mkdir()
            for number, rows in enumerate((slice(0, 5), slice(5, 9))):
                table = pa.table({"image_path": OWNERS[rows], "id": IDS[rows]})
                path = folder / f"v.clip-retrieval/metadata/metadata_{number}.parquet"
                pq.write_table(table, path)
        case "parquet" | "fixed.parquet" | "dataset" | "lance" | "hub":
            kinds = pa.list_(pa.float16(), 6 if kind in OF_SIX else -1)
            columns = {"id": pa.array(IDS), "owner": pa.array(OWNERS)}
            sides = {
                "image_embedding": pa.array(list(image), kinds),
                "text_embedding": pa.array(list(text), kinds),
            }
            table = pa.table(columns | sides)
            if kind == "dataset":
                Dataset(table).save_to_disk(folder / "v", num_shards=2)
                return folder / "v"
            if kind == "hub":
                pq.write_table(table, folder / "train.parquet")
                return folder
            if kind == "lance":
                lancedb = pytest.importorskip("lancedb", reason=LANCE)
                lancedb.connect(str(folder)).create_table("v", data=table)
                return folder / "v.lance"
            pq.write_table(table, folder / "v.parquet")
            return folder / "v.parquet"
    return folder / f"v.{kind}"


KINDS = (
    *("npz", "compressed.npz", "safetensors", "folder", "clip-retrieval", "parquet"),
    *("fixed.parquet", "dataset", "lance"),
)


def found_in(path: Path) -> tuple[Tensor, Tensor]:
    pairs = read_pairs(str(path))
    return pairs.image_features, pairs.text_features


KILLED = """
import os, signal, sys
from pathlib import Path
from clip_refine.vectors import stored
from clip_refine.vectors.files import load_peer

maps, source, out = map(Path, sys.argv[1:])
once, count = stored._Finished.once, 0

def die_in_the_second(self, file, read, make):
    def begin(target):
        global count
        count += "img_emb" in str(file) or file.suffix == ".arrow"
        if count == 2:
            target.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return make(target)
    return once(self, file, read, begin)

stored._Finished.once = die_in_the_second
stored.apply_stored(load_peer(maps), source, out, side="image")
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the one with a random number in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "state.json"
    }


class TestPairs:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_layout_gives_the_same(self, kind: str, tmp_path: Path):
        image, text = found_in(write(kind, tmp_path))
        assert np.array_equal(image.numpy(), IMAGE)
        assert np.array_equal(text.numpy(), TEXT)

    def test_a_dataset_on_the_hub(self, tmp_path: Path):
        name = f"hf:{write('hub', tmp_path, SHARED)}"
        found = read_pairs(name, owner="owner")
        assert np.array_equal(found.text_features.numpy(), TEXT)
        assert len(read_pairs(f"{name}#split=train").image_features) == len(TEXT)
        with pytest.raises(DataError, match="has no split 'test', only train"):
            read_pairs(f"{name}#split=test")
        with pytest.raises(DataError, match="hf:nobody/nothing: cannot be read"):
            read_pairs("hf:nobody/nothing")

    def test_two_files(self, tmp_path: Path):
        folder = write("folder", tmp_path)
        found = read_pairs(f"{folder}/image.npy,{folder}/text.npy")
        assert np.array_equal(found.text_features.numpy(), TEXT)

    @pytest.mark.parametrize(
        ("kind", "owner"),
        [
            *(("parquet", "owner"), ("clip-retrieval", "image_path")),
            *(("dataset", "owner"), ("lance", "owner")),
        ],
    )
    def test_several_captions_an_image(self, kind: str, owner: str, tmp_path: Path):
        found = read_pairs(str(write(kind, tmp_path, SHARED)), owner=owner)
        assert found.text_to_image is not None
        assert found.text_to_image.tolist() == OWNERS
        assert np.array_equal(found.image_features.numpy(), SHARED[[0, 2, 3, 6, 7, 8]])
        assert len(found.text_features) == 9

    def test_ten_shards_are_in_order_of_their_numbers(self, tmp_path: Path):
        for name in ("img_emb", "text_emb"):
            (tmp_path / name).mkdir()
            for number in range(12):
                np.save(tmp_path / f"{name}/{name}_{number}.npy", np.full((1, 2), number + 1.0))
        assert found_in(tmp_path)[0][:, 0].tolist() == list(range(1, 13))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image": IMAGE[:, :5]}, "must have one dimension, got 5 and 6"),
            ({"image": IMAGE[:8]}, "8 image vectors and 9 text vectors, and no text_to_image"),
            ({"image": IMAGE * np.inf}, "image_features: row 0 is not finite"),
            ({"text": TEXT * 0}, "text_features: row 0 is zero"),
            ({"text": TEXT[0]}, r"expected rows of float16.* got \(6,\)"),
            ({"text": TEXT.astype(int)}, "got .* of int64"),
        ],
        ids=["dimension", "length", "infinite", "zero", "vector", "whole"],
    )
    def test_what_are_no_pairs(self, change: dict, message: str, tmp_path: Path):
        folder = write("folder", tmp_path)
        for name, array in change.items():
            np.save(folder / f"{name}.npy", array)
        with pytest.raises(DataError, match=message):
            read_pairs(str(folder))

    def test_orders_that_do_not_match(self, tmp_path: Path):
        parquet = write("parquet", tmp_path)  # rows 0 and 1 are of one image, yet unlike
        with pytest.raises(DataError, match="rows 0 and 1 are both of image 0, but"):
            read_pairs(str(parquet), owner="owner")
        folder = write("clip-retrieval", tmp_path)
        np.save(folder / "text_emb/text_emb_0.npy", TEXT[:4])
        with pytest.raises(DataError, match=r"img_emb has \[5, 4\] rows a file, text_emb has \[4"):
            read_pairs(str(folder))
        (folder / "text_emb/text_emb_0.npy").unlink()
        with pytest.raises(DataError, match=r"there is no text_emb_0\.npy among 1 files"):
            read_pairs(str(folder))

    def test_owners_that_are_not_there(self, tmp_path: Path):
        with pytest.raises(DataError, match="no column 'who'. There are id, owner, image_emb"):
            read_pairs(str(write("parquet", tmp_path)), owner="who")
        with pytest.raises(DataError, match="owner 'who' is a column, which only"):
            read_pairs(str(write("npz", tmp_path)), owner="who")
        with pytest.raises(DataError, match="v.parquet: unhashable type: 'list'"):
            read_pairs(str(tmp_path / "v.parquet"), owner="image_embedding")

    @pytest.mark.parametrize("kind", ["folder", "clip-retrieval"])
    def test_files_that_are_cut_off(self, kind: str, tmp_path: Path):
        folder = write(kind, tmp_path)
        path = next(folder.rglob("*im*.npy"))
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(DataError, match="was not written to the end. Write it again"):
            read_pairs(str(folder))

    @pytest.mark.parametrize("name", ["no.npz", "no.parquet", "no", "a.npy,b.npy"])
    def test_nothing_there(self, name: str, tmp_path: Path):
        with pytest.raises(DataError, match="no"):
            read_pairs(str(tmp_path / name))


class TestApply:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("side", ["image", "text"])
    def test_one_side_moves_and_the_rest_stays(self, kind: str, side, fold: Peer, tmp_path: Path):
        source = write(kind, tmp_path)
        out = tmp_path / f"new{source.suffix}"
        assert apply_stored(fold, source, out, side=side) == 9
        image, text = found_in(out)
        moved, expected = (image, fold.transform_image(torch.from_numpy(IMAGE)))
        other, kept = text, TEXT
        if side == "text":
            moved, expected = text, fold.transform_text(torch.from_numpy(TEXT))
            other, kept = image, IMAGE
        assert moved.dtype == torch.float16
        assert torch.equal(moved, expected.half())
        assert np.array_equal(other.numpy(), kept)
        apply_stored(fold, source, out, side="text", overwrite=True)
        assert np.array_equal(found_in(out)[0].numpy(), IMAGE)

    def test_ids_and_schema_stay(self, fold: Peer, tmp_path: Path):
        source, out = write("parquet", tmp_path), tmp_path / "new.parquet"
        apply_stored(fold, source, out, side="image")
        assert pq.read_schema(out) == pq.read_schema(source)
        assert pq.read_table(out)["id"].to_pylist() == IDS
        source, out = write("clip-retrieval", tmp_path), tmp_path / "new"
        apply_stored(fold, source, out, side="image")
        names = [path.relative_to(source) for path in source.rglob("*.*")]
        assert {path.relative_to(out) for path in out.rglob("*.*")} == {*names, Path(stored.NOTE)}
        for number in range(2):
            file = f"metadata/metadata_{number}.parquet"
            assert (out / file).read_bytes() == (source / file).read_bytes()
        apply_stored(fold, source, out, side="text", overwrite=True)
        assert json.loads((out / stored.NOTE).read_text())["side"] == "text"

    def test_a_saved_dataset_stays_one(self, fold: Peer, tmp_path: Path):
        source, out = write("dataset", tmp_path), tmp_path / "new"
        apply_stored(fold, source, out, side="image")
        before, after = load_from_disk(str(source)), load_from_disk(str(out))
        assert after.features == before.features
        assert after["id"][:] == IDS
        # what `datasets` cached of the one is not taken for the other's
        assert after._fingerprint != before._fingerprint

    def test_a_table_without_its_package(self, fold: Peer, tmp_path: Path, monkeypatch):
        monkeypatch.setitem(sys.modules, "lancedb", None)
        with pytest.raises(DataError, match=r"v.lance: LanceDB tables need the extra \[lance\]"):
            read_pairs(str(tmp_path / "v.lance"))

    def test_metadata_of_safetensors_stays(self, fold: Peer, tmp_path: Path):
        source, out = write("safetensors", tmp_path), tmp_path / "new.safetensors"
        apply_stored(fold, source, out, side="text")
        assert load_file(out)["text_to_image"].tolist() == list(range(9))
        assert out.stat().st_size == source.stat().st_size
        assert b'"a":"b"' in out.read_bytes()

    def test_what_evaluate_saved_can_be_read_again(self, fold: Peer, tmp_path: Path):
        source, out = tmp_path / "v.safetensors", tmp_path / "new.safetensors"
        write_features(source, FeatureSet(*map(torch.from_numpy, (IMAGE, TEXT))), note={"a": "b"})
        apply_stored(fold, source, out, side="image")
        moved = fold.transform_image(torch.from_numpy(IMAGE)).half()
        assert torch.equal(read_features(out).image_features, moved)
        assert out.stat().st_size == source.stat().st_size

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_a_single_file_of_any_precision(self, dtype, fold: Peer, tmp_path: Path):
        np.save(tmp_path / "a.npy", IMAGE.astype(dtype))
        apply_stored(fold, tmp_path / "a.npy", tmp_path / "b.npy", side="image")
        found = np.load(tmp_path / "b.npy")
        assert found.dtype == dtype
        assert open_npy(tmp_path / "b.npy").rows == 9
        expected = fold.transform_image(torch.from_numpy(IMAGE.astype(dtype)))
        assert np.array_equal(found, expected.numpy().astype(dtype))

    @pytest.mark.parametrize("kind", ["clip-retrieval", "dataset"])
    def test_it_goes_on_after_a_kill(self, kind: str, fold: Peer, tmp_path: Path, capsys):
        """Killed while the second file of images is written; the first one is kept."""
        source, out = write(kind, tmp_path), tmp_path / "new"
        whole = tmp_path / "whole"
        apply_stored(fold, source, whole, side="image")
        save_peer(fold, tmp_path / "maps")
        told = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "maps", source, out])
        assert told.returncode == -signal.SIGKILL
        partial = tmp_path / ".new.partial"
        [first, _] = sorted([*partial.glob("img_emb/*.npy"), *partial.glob("*.arrow")])
        written = first.stat().st_mtime_ns
        capsys.readouterr()
        assert apply_stored(fold, source, out, side="image") == 9
        assert "Going on: " in capsys.readouterr().err
        name = first.relative_to(partial)
        assert (out / name).stat().st_mtime_ns == written
        assert contents(out) == contents(whole)

    @pytest.mark.parametrize("change", ["another map", "another source", "a flipped bit"])
    def test_it_keeps_nothing_that_is_of_something_else(
        self, change: str, fold: Peer, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        """After Ctrl-C in the second file of images."""

        def stop(move: object, matrix: stored.Matrix, target: Path) -> int:
            if matrix.path.name == "img_emb_1.npy":
                raise KeyboardInterrupt
            return apply(move, matrix, target)

        source, out, apply = write("clip-retrieval", tmp_path), tmp_path / "new", stored._apply_npy
        monkeypatch.setattr(stored, "_apply_npy", stop)
        with pytest.raises(KeyboardInterrupt):
            apply_stored(fold, source, out, side="image")
        monkeypatch.setattr(stored, "_apply_npy", apply)
        assert "; the same command goes on." in capsys.readouterr().err
        if change == "another map":
            fold = Fold.fit(*drawn(3, 20, 20))
        elif change == "another source":
            file = source / "img_emb/img_emb_0.npy"
            np.save(file, np.load(file)[:, ::-1].copy())
        else:
            file = tmp_path / ".new.partial/img_emb/img_emb_0.npy"
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        apply_stored(fold, source, out, side="image")
        assert ("Cleared " in capsys.readouterr().err) == (change == "another map")
        apply_stored(fold, source, tmp_path / "whole", side="image")
        assert contents(out) == contents(tmp_path / "whole")

    @pytest.mark.parametrize("gone", ["a.txt", "img_emb/img_emb_1.npy"])
    def test_it_keeps_nothing_of_what_has_gone(
        self, gone: str, fold: Peer, tmp_path: Path, monkeypatch
    ):
        """The first was finished, the second begun when it was stopped."""
        source, out = write("clip-retrieval", tmp_path), tmp_path / "new"
        (source / "a.txt").write_text("a note")

        def stop(move, matrix, target: Path) -> int:
            target.write_bytes(b"half")
            if target.name == "img_emb_1.npy":
                raise KeyboardInterrupt
            return matrix.rows

        with monkeypatch.context() as patched:
            patched.setattr(stored, "_apply_npy", stop)
            with pytest.raises(KeyboardInterrupt):
                apply_stored(fold, source, out, side="image")
        assert (tmp_path / ".new.partial" / gone).is_file()
        (source / gone).unlink()
        np.save(source / "img_emb/img_emb_0.npy", IMAGE[:5])  # later than what was made of it
        apply_stored(fold, source, out, side="image")
        apply_stored(fold, source, tmp_path / "whole", side="image")
        assert contents(out) == contents(tmp_path / "whole")

    def test_another_dimension_comes_out(self, tmp_path: Path):
        new = drawn(0, 30, 1)[0]
        maps = Procrustes.align(new[:, :4], new)
        apply_stored(maps, write("clip-retrieval", tmp_path), tmp_path / "new", side="image")
        assert np.load(tmp_path / "new/img_emb/img_emb_1.npy").shape == (4, 4)
        for kind in ("npz", "safetensors", "parquet"):
            source = write(kind, tmp_path)
            with pytest.raises(DataError, match="procrustes makes 4 dimensions of 6"):
                apply_stored(maps, source, tmp_path / f"b{source.suffix}", side="image")
            assert not (tmp_path / f"b{source.suffix}").exists()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("value", "fault"), [(0, "zero"), (np.nan, "not finite")])
    def test_bad_rows_leave_nothing(self, kind: str, value, fault: str, fold: Peer, tmp_path: Path):
        image = IMAGE.copy()
        image[6] = value
        source = write(kind, tmp_path, image)
        before = sorted(tmp_path.rglob("*"))
        row = 1 if kind in ("clip-retrieval", "dataset") else 6  # of its file
        with pytest.raises(DataError, match=f"row {row} is {fault}"):
            apply_stored(fold, source, tmp_path / f"new{source.suffix}", side="image")
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OF_SIX])
    def test_vectors_of_another_model(self, kind: str, fold: Peer, tmp_path: Path):
        eye = np.eye(9, 5, dtype=np.float16) + 1
        source = write(kind, tmp_path, eye, eye)
        with pytest.raises(DataError, match="dimension 5, but fold was fitted on 6"):
            apply_stored(fold, source, tmp_path / f"new{source.suffix}", side="image")
        assert not (tmp_path / f"new{source.suffix}").exists()

    @pytest.mark.parametrize("kind", [*(kind for kind in KINDS if kind != "lance"), "npy"])
    def test_a_bit_that_flips_afterwards_is_told(self, kind: str, fold: Peer, tmp_path: Path):
        """Wherever it is read again; without its checksum a file is read as any other."""
        np.save(tmp_path / "v.npy", IMAGE)
        source = tmp_path / "v.npy" if kind == "npy" else write(kind, tmp_path)
        one, two = (tmp_path / f"{name}{source.suffix}" for name in ("one", "two"))
        apply_stored(fold, source, one, side="image")
        apply_stored(fold, one, two, side="image")
        within = sorted([*one.rglob("*.npy"), *one.rglob("*.arrow")])
        harmed = within[0] if one.is_dir() else one
        content = bytearray(harmed.read_bytes())
        content[-1 if harmed.suffix == ".npy" else len(content) // 2] ^= 1
        harmed.write_bytes(content)
        pairs = f"{one},{one}" if kind == "npy" else str(one)
        again = tmp_path / f"again{source.suffix}"
        for read in (
            lambda: read_pairs(pairs),
            lambda: apply_stored(fold, one, again, side="image"),
            lambda: apply_stored(fold, one, again, side="text"),
        ):
            with pytest.raises(DataError, match=f"{harmed.name}: is not what was written there"):
                read()
        for sums in (stored.sum_beside(harmed), harmed.parent / stored.SUMS):
            sums.unlink(missing_ok=True)
        if harmed.suffix == ".npy":
            assert read_pairs(pairs)
        # what is mapped once more has sums of its own, and none of what it was before
        apply_stored(fold, two, one, side="image", overwrite=True)
        read_pairs(pairs)

    @pytest.mark.parametrize(
        "kind", ["npz", "parquet", "folder", "clip-retrieval", "dataset", "lance"]
    )
    def test_too_little_room_is_said_at_the_start(
        self, kind: str, fold: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        source = write(kind, tmp_path)
        size = sum(path.stat().st_size for path in (source, *source.rglob("*")) if path.is_file())
        out, usage = tmp_path / f"new{source.suffix}", shutil.disk_usage(tmp_path)
        for free, enough in ((size - 1, False), (size, True)):
            left = usage._replace(free=2**28 + free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, left=left: left)
            if enough:
                apply_stored(fold, source, out, side="image")
            else:
                with pytest.raises(OutputError, match=r"new.*: the mapped vectors take .* kB, but"):
                    apply_stored(fold, source, out, side="image")
                assert not out.exists()

    def test_room_is_of_the_dimension_that_comes_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        new = drawn(0, 1000, 1)[0]
        np.save(tmp_path / "a.npy", new)
        usage = shutil.disk_usage(tmp_path)._replace(free=2**28 + 1000 * 4 * 8 + 200)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        fewer = Procrustes.align(new[:, :4], new)
        apply_stored(fewer, tmp_path / "a.npy", tmp_path / "b.npy", side="image")
        with pytest.raises(OutputError, match="take 48 kB, but only 268 MB are free"):
            apply_stored(Fold.fit(new, new), tmp_path / "a.npy", tmp_path / "c.npy", side="image")

    def test_nothing_of_elsewhere_is_copied(self, fold: Peer, tmp_path: Path):
        """A folder that was sent may hold links to what only its reader may read."""
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret/key").write_text("a password")
        source = write("clip-retrieval", tmp_path)
        for target in (tmp_path / "secret/key", tmp_path / "secret", Path("/dev/zero"), Path("no")):
            (source / "note").symlink_to(target)
            with pytest.raises(
                DataError, match=r"note: a link to a folder or out of .*, or no file"
            ):
                apply_stored(fold, source, tmp_path / "new", side="image")
            (source / "note").unlink()
        (source / "note").symlink_to(source / "metadata/metadata_0.parquet")
        apply_stored(fold, source, tmp_path / "new", side="image")
        assert not (tmp_path / "new/note").is_symlink()
        source = write("dataset", tmp_path)
        (source / "dataset_info.json").unlink()
        (source / "dataset_info.json").symlink_to(tmp_path / "secret/key")
        with pytest.raises(DataError, match=r"dataset_info.json: a link"):
            apply_stored(fold, source, tmp_path / "newer", side="image")

    def test_files_that_are_cut_off(self, fold: Peer, tmp_path: Path):
        np.save(tmp_path / "v.npy", IMAGE)
        for source in (tmp_path / "v.npy", write("safetensors", tmp_path), write("npz", tmp_path)):
            source.write_bytes(source.read_bytes()[:-5])
            with pytest.raises(DataError, match="not written to the end|read|damaged"):
                apply_stored(fold, source, tmp_path / f"new{source.suffix}", side="image")

    def test_refusals(self, fold: Peer, tmp_path: Path):
        source = write("npz", tmp_path)
        with pytest.raises(ConfigError, match="side 'images': must be image or text"):
            apply_stored(fold, source, tmp_path / "b.npz", side="images")  # pyright: ignore
        with pytest.raises(OutputError, match="exists already"):
            apply_stored(fold, source, source, side="image")
        nnn = NearestNeighbourNormalisation.fit(*drawn(2, 8, 8))
        with pytest.raises(DataError, match="nnn: appends 2 columns of scores"):
            apply_stored(nnn, source, tmp_path / "b.npz", side="image")
        with pytest.raises(DataError, match="no text vectors called words. It has image_feat"):
            apply_stored(fold, source, tmp_path / "b.npz", side="text", column="words")
        with pytest.raises(DataError, match="not a kind of stored vectors"):
            apply_stored(fold, tmp_path / "v.faiss", tmp_path / "b.faiss", side="image")
        with pytest.raises(OutputError, match="plain: the layout stays, .* ends in .lance"):
            apply_stored(fold, tmp_path / "v.lance", tmp_path / "plain", side="image")
        with pytest.raises(OutputError, match="b.npy: the layout stays, .* ends in .npz"):
            apply_stored(fold, source, tmp_path / "b.npy", side="image")
        folder = write("clip-retrieval", tmp_path)
        with pytest.raises(OutputError, match=r"new: lies in .*, which is read\. Choose an --out"):
            apply_stored(fold, folder, folder / "new", side="image")
        assert not (folder / "new").exists()
        np.save(tmp_path / "a.npy", IMAGE)
        for unnamed in (tmp_path / "a.npy", write("folder", tmp_path)):
            with pytest.raises(DataError, match="has no column 'words'"):
                apply_stored(fold, unnamed, tmp_path / "b.npy", side="image", column="words")
        apply_stored(fold, source, source, side="image", overwrite=True)
        assert not np.array_equal(found_in(source)[0].numpy(), IMAGE)

    def test_maps_apply_as_any_transform_does(self, fold: Fold, tmp_path: Path):
        np.save(tmp_path / "a.npy", IMAGE)
        for name, peer in (("fold", fold), ("maps", LinearMaps.of(fold))):
            apply_stored(peer, tmp_path / "a.npy", tmp_path / f"{name}.npy", side="image")
        one, other = (np.load(tmp_path / f"{name}.npy") for name in ("fold", "maps"))
        assert np.abs(one - other).max() < 1e-3


@pytest.mark.parametrize("state", ["[]", "{}", '{"_data_files": [{"filename": "../a.arrow"}]}'])
def test_a_dataset_names_its_own_files(state: str, fold: Peer, tmp_path: Path):
    source = write("dataset", tmp_path)
    shutil.copy(next(source.glob("*.arrow")), tmp_path / "a.arrow")
    (source / "state.json").write_text(state)
    for read in (
        lambda: read_pairs(str(source)),
        lambda: apply_stored(fold, source, tmp_path / "b", side="text"),
    ):
        with pytest.raises(DataError, match=r"state.json: cannot be read"):
            read()


def test_lists_that_reach_beyond_their_values_are_refused(fold: Peer, tmp_path: Path):
    """Arrow files say themselves where in memory a list begins and ends."""
    source = write("dataset", tmp_path)
    for file, rows in zip(sorted(source.glob("*.arrow")), (5, 4), strict=True):
        sound = np.arange(0, 6 * rows + 1, 6, "<i4")
        far = np.append(0, sound[1:] + 2**20).astype("<i4")
        content = file.read_bytes()
        assert sound.tobytes() in content
        file.write_bytes(content.replace(sound.tobytes(), far.tobytes()))
    for read in (
        lambda: read_pairs(str(source)),
        lambda: apply_stored(fold, source, tmp_path / "b", side="image"),
    ):
        with pytest.raises(DataError, match="cannot be read"):
            read()


def test_texts_of_any_encoding_are_copied(fold: Peer, tmp_path: Path):
    texts = pa.array([b"caf\xe9", b"plain"]).view(pa.string())
    vectors = pa.array(np.eye(2, 6, dtype="f4").tolist(), pa.list_(pa.float32()))
    source, target = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.table({"image": vectors, "caption": texts}), source)
    apply_stored(fold, source, target, side="image")
    assert pq.read_table(target)["caption"].chunk(0).view(pa.binary()).to_pylist() == [
        b"caf\xe9",
        b"plain",
    ]


def test_pipes_are_not_waited_for(fold: Peer, tmp_path: Path):
    folder = write("folder", tmp_path)
    (folder / "image.npy").unlink()
    os.mkfifo(folder / "image.npy")
    names = ("a.npz", "a.safetensors", "a.parquet")
    for name in names:
        os.mkfifo(tmp_path / name)
    for source in (folder, *(tmp_path / name for name in names)):
        with pytest.raises(
            DataError, match="a pipe, a device or a folder|there is no image.npy|no image"
        ):
            read_pairs(str(source))
        with pytest.raises(DataError, match="a pipe, a device or a folder|no image"):
            apply_stored(fold, source, tmp_path / f"b{source.suffix}", side="image")
    save_peer(fold, tmp_path / "maps")
    (tmp_path / "maps/peer.json").unlink()
    os.mkfifo(tmp_path / "maps/peer.json")
    with pytest.raises(DataError, match="peer.json: cannot be read .a pipe"):
        load_peer(tmp_path / "maps")


def test_a_header_that_says_gigabytes_takes_none(tmp_path: Path):
    header = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"{'descr': '<f4'}"
    (tmp_path / "image.npy").write_bytes(header)
    np.save(tmp_path / "text.npy", np.ones((2, 3)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"image.npy: cannot be read \(EOF"):
        read_pairs(str(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    np.save(tmp_path / "image.npy", np.ones((2, 3)))
    (tmp_path / "text_to_image.npy").write_bytes(header)
    with pytest.raises(DataError, match=r"text_to_image.npy: cannot be read \(EOF"):
        read_pairs(str(tmp_path))
