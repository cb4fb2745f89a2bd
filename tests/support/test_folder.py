"""A folder of results: whole or not at all, and one writer at a time."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clip_refine.support import folder
from clip_refine.support.errors import DataError, FailedError, OutputError
from clip_refine.support.folder import (
    SUMS,
    check_sums,
    complete_file,
    complete_folder,
    file_sum,
    locked,
    recover,
    seal,
    sum_beside,
    write_file,
)
from clip_refine.support.process import is_alive, process_tag


def test_a_second_run_does_not_clear_what_the_first_writes(tmp_path: Path):
    out = tmp_path / "new" / "out"
    with complete_folder(out, overwrite=False) as folder:
        (folder / "scores.json").write_text("hours of work")
        for overwrite in (False, True):
            with (
                pytest.raises(OutputError, match="another run is writing it"),
                complete_folder(out, overwrite=overwrite),
            ):
                pass
    assert (out / "scores.json").read_text() == "hours of work"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with complete_folder(out, overwrite=True):
        pass
    assert not list(out.iterdir())


def hold_again_and_again(lock: Path, held: Path, seconds: float, result: Any) -> None:
    """Take the lock, and be the only one that may make a file."""
    end, taken, double = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        with locked(lock) as mine:
            if not mine:
                continue
            taken += 1
            try:
                os.close(os.open(held, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                double += 1
                continue
            held.unlink()
    result.put((taken, double))


def test_four_processes_never_hold_one_lock_twice(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    given = (tmp_path / "lock", tmp_path / "held", 2.0, result)
    hammers = [context.Process(target=hold_again_and_again, args=given) for _ in range(4)]
    for hammer in hammers:
        hammer.start()
    counted = [result.get() for _ in hammers]
    for hammer in hammers:
        hammer.join()
    assert sum(taken for taken, _ in counted) > 1000
    assert sum(double for _, double in counted) == 0


def write_run(out: Path, text: str) -> None:
    with complete_folder(out, overwrite=True) as folder:
        (folder / "scores.json").write_text(text)


@pytest.mark.parametrize("overwriting", [False, True])
def test_a_kill_between_any_two_renames_loses_nothing(
    overwriting: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for killed_at in range(1, 4):
        out = tmp_path / str(killed_at) / "out"
        if overwriting:
            write_run(out, "old")
        calls, usual = [], Path.rename

        def rename(self: Path, target: Path, calls=calls, usual=usual, at=killed_at) -> Path:
            calls.append(target)
            if len(calls) == at:
                raise KeyboardInterrupt  # before it, as a kill would
            return usual(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill cleans nothing up
            with suppress(KeyboardInterrupt):
                write_run(out, "new")
        complete = len(calls) > 1
        recover(out)
        if complete:
            assert (out / "scores.json").read_text() == "new"
        elif overwriting:
            assert (out / "scores.json").read_text() == "old"
        write_run(out, "newest")
        assert (out / "scores.json").read_text() == "newest"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (".out.previous, which a run that was killed" in capsys.readouterr().err) == overwriting


def test_what_a_dead_process_left_is_cleared_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    dead = subprocess.run([sys.executable, "-c", ""], check=True) and process_tag(2**22 - 1)
    living = process_tag(os.getppid())
    assert is_alive(living)
    assert not is_alive(dead)
    assert not is_alive(process_tag().rpartition("-")[0] + "-1")  # this number, started earlier
    assert is_alive("another_machine-1-1")
    for tag in (dead, living):
        (tmp_path / f".x.json.{tag}.partial").touch()
    (tmp_path / ".out.partial").mkdir()
    write_file(tmp_path / "x.json", "{}")
    with complete_folder(tmp_path / "out", overwrite=False):
        pass
    said = capsys.readouterr().err.replace("\n", " ")
    assert "Cleared" in said
    assert ".out.partial, which a run that was killed had left" in said
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".x.json.{living}.partial", "out", "x.json"]


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [damage, Path.unlink])
def test_checksums_tell_what_is_not_what_was_written(harm: Callable[[Path], Any], tmp_path: Path):
    (tmp_path / "inner").mkdir()
    weights = tmp_path / "inner" / "weights.safetensors"
    weights.write_bytes(b"many numbers")
    (tmp_path / "inner" / "README.md").write_text("no tensors")
    seal(tmp_path)
    assert not (tmp_path / SUMS).exists()
    listed = subprocess.run(["sha256sum", "--check", SUMS], cwd=tmp_path / "inner", check=False)
    assert listed.returncode == 0
    check_sums(tmp_path)
    check_sums(tmp_path / "inner")
    harm(weights)
    with pytest.raises(DataError, match=r"weights.safetensors: (is not what|cannot be read)"):
        check_sums(tmp_path / "inner")


@pytest.mark.parametrize("harm", [damage, Path.unlink])
def test_the_checksum_of_one_file_lies_beside_it(harm: Callable[[Path], Any], tmp_path: Path):
    file = tmp_path / "a.npy"
    file.write_bytes(b"many numbers")
    check_sums(file)
    sum_beside(file).write_text(f"{file_sum(file)}  a.npy\n")
    check_sums(file)
    sum_beside(file).rename(tmp_path / "b.npy.sha256")
    moved = file.rename(tmp_path / "b.npy")
    check_sums(moved)
    harm(moved)
    with pytest.raises(
        DataError, match=r"b.npy: (is not what .* in b.npy.sha256.* remove .*sha256|cannot be read)"
    ):
        check_sums(moved)


def test_a_users_own_sums_of_another_form_are_let_be(tmp_path: Path):
    file = tmp_path / "a.npy"
    file.write_bytes(b"many numbers")
    for line in (f"{file_sum(file)} *a.npy", f"SHA256 (a.npy) = {'0' * 64}", "not a sum"):
        sum_beside(file).write_text(f"{line}\n")
        check_sums(file)


def test_a_list_of_checksums_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file is read once however often it is listed, and none outside the folder."""
    read = []
    monkeypatch.setattr(folder, "file_sum", lambda file: read.append(file.name) or "f" * 64)
    (tmp_path / "a").write_text("large")
    lines = [f"{'f' * 64}  {name}\n" for name in ("a", "a", "../b", "/etc/passwd", "a")]
    (tmp_path / SUMS).write_text("".join(lines))
    check_sums(tmp_path)
    assert read == ["a"]
    (tmp_path / SUMS).write_text(f"{'f' * 64}  \0\n")
    with pytest.raises(DataError, match="cannot be read .*embedded null"):
        check_sums(tmp_path)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    file = tmp_path / "a"
    write_file(file, "old")
    with suppress(KeyboardInterrupt), complete_file(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_who_may_read_the_folder_may_read_its_features(tmp_path: Path):
    """safetensors lets only the owner read what it writes, whatever the umask is."""
    usual = os.umask(0o027)
    try:
        with complete_file(tmp_path / "x.safetensors") as partial:
            save_file({"x": torch.zeros(1)}, partial)
    finally:
        os.umask(usual)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_made_is_one_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.json", tmp_path / ("n" * 250)):
        with pytest.raises(OutputError, match=f"{path.name}: cannot be written"):
            write_file(path, "{}")


def test_checksums_of_pipes_are_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / SUMS).write_text(f"{'0' * 64}  pipe\n")
    with pytest.raises(DataError, match="pipe: is not what was written"):
        check_sums(tmp_path)
    (tmp_path / SUMS).write_bytes(b"\xff")
    with pytest.raises(DataError, match=f"{SUMS}: cannot be read"):
        check_sums(tmp_path)
    (tmp_path / SUMS).unlink()
    os.mkfifo(tmp_path / SUMS)
    check_sums(tmp_path)


def test_what_could_not_begin_is_a_wrong_place_and_what_had_begun_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    place = tmp_path / "out"
    with (
        pytest.raises(FailedError, match="out: cannot be written .No such file") as gone,
        complete_folder(place, overwrite=False) as folder,
    ):
        shutil.rmtree(folder)
    with (
        pytest.raises(FailedError, match="left on device.. Make room, or choose another"),
        complete_file(place),
    ):
        full()
    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(FailedError, match="No space left"):
        write_file(place, "{}")
    assert gone.value.status == 1
    assert OutputError("").status == 2
