"""The folder of a comparison: what it takes for its own, and what it leaves alone."""

from pathlib import Path

import pytest

from clip_refine.roads.compare import FinishedRun, FinishedRuns
from clip_refine.support.errors import OutputError
from clip_refine.support.folder import recover

SETTINGS = {"seed": 1, "train": {"epochs": 2}}
FAILED = FinishedRun(depends_on="a", row=None, resampled={})


def test_a_row_comes_back_where_it_follows_from_the_same(tmp_path: Path):
    store = FinishedRuns.open(tmp_path / "out", SETTINGS, overwrite=False)
    store.write("hycd+x[loss.alpha=0.5]-1", FAILED)
    again = FinishedRuns.open(tmp_path / "out", SETTINGS, overwrite=False)
    assert again.read("hycd+x[loss.alpha=0.5]-1", "a") == FAILED
    assert again.read("hycd+x[loss.alpha=0.5]-1", "b") is None
    assert again.read("hycd+x(loss.alpha=0.5)-1", "a") is None  # alike but for the brackets


def test_a_row_that_was_cut_off_counts_as_missing(tmp_path: Path):
    store = FinishedRuns.open(tmp_path, SETTINGS, overwrite=False)
    store.write("x", FAILED)
    [file] = (tmp_path / "rows").iterdir()
    file.write_text(file.read_text()[:20])
    assert store.read("x", "a") is None


def test_other_settings_are_refused_once_a_run_is_finished(tmp_path: Path):
    other = {"seed": 1, "train": {"epochs": 3}}
    FinishedRuns.open(tmp_path, SETTINGS, overwrite=False)
    store = FinishedRuns.open(tmp_path, other, overwrite=False)
    store.write("x", FAILED)
    with pytest.raises(OutputError, match=r"other settings \(train.epochs was 3, is 2\)"):
        FinishedRuns.open(tmp_path, SETTINGS, overwrite=False)
    assert FinishedRuns.open(tmp_path, other, overwrite=False).read("x", "a") == FAILED
    assert FinishedRuns.open(tmp_path, SETTINGS, overwrite=True).read("x", "a") is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, overwrite: bool):
    (tmp_path / "config.yaml").write_text("seed: 1")
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(OutputError, match="holds no comparison. Choose another --out"):
        FinishedRuns.open(tmp_path, SETTINGS, overwrite=overwrite)
    with pytest.raises(OutputError, match="holds no comparison"):
        FinishedRuns.open(tmp_path / "precious.txt", SETTINGS, overwrite=overwrite)
    assert (tmp_path / "precious.txt").read_text() == "keep me"


def test_a_word_is_found_once(tmp_path: Path):
    store = FinishedRuns.open(tmp_path, SETTINGS, overwrite=False)
    assert store.once("precision", lambda: "fp32") == "fp32"
    store.write("x", FAILED)
    assert store.once("precision", lambda: "bf16") == "fp32"


def test_a_word_of_other_settings_is_found_again(tmp_path: Path):
    FinishedRuns.open(tmp_path, SETTINGS, overwrite=False).once("precision", lambda: "fp32")
    store = FinishedRuns.open(tmp_path, {"seed": 2}, overwrite=False)
    assert store.once("precision", lambda: "bf16") == "bf16"


def test_a_folder_that_was_only_begun_is_usable(tmp_path: Path):
    (tmp_path / "rows").mkdir()
    (tmp_path / ".state.json.x-1-1.partial").touch()  # killed while the first file was written
    FinishedRuns.open(tmp_path, SETTINGS, overwrite=False).write("x", FAILED)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["state.json", "config.yaml"])
def test_a_record_that_was_cut_off_costs_no_finished_run(
    name: str, overwrite: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    FinishedRuns.open(out, SETTINGS, overwrite=False).write("x", FAILED)
    whole = (out / name).read_text()
    (out / name).write_text(whole[:9])
    store = FinishedRuns.open(out, SETTINGS, overwrite=overwrite)
    assert (out / name).read_text() == whole
    assert store.read("x", "a") == (None if overwrite else FAILED)
    if name == "state.json" and not overwrite:
        assert "state.json cannot be read" in capsys.readouterr().err


def test_going_on_writes_nothing_again(tmp_path: Path):
    FinishedRuns.open(tmp_path, SETTINGS, overwrite=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    FinishedRuns.open(tmp_path, SETTINGS, overwrite=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_is_overwritten_stays_until_the_new_one_is_complete(tmp_path: Path):
    out, kept = tmp_path / "out", tmp_path / ".out.aside"
    FinishedRuns.open(out, SETTINGS, overwrite=False).write("x", FAILED)
    FinishedRuns.open(out, SETTINGS, overwrite=True)
    recover(out)  # `refine` begins so, and would find what it left itself
    assert FinishedRuns(kept).read("x", "a") == FAILED
    store = FinishedRuns.open(out, SETTINGS, overwrite=True)  # the second one stopped, too
    assert FinishedRuns(kept).read("x", "a") == FAILED
    store.complete()
    assert not kept.exists()
