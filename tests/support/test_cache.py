"""Rows by fingerprint: only added, found by every later run, whole or not there."""

import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from clip_refine.cli import main
from clip_refine.support.cache import KeptRows, RowCache
from clip_refine.support.errors import OutputError
from clip_refine.support.folder import locked

NAMES = [f"{number:032x}" for number in range(5)]
ROWS = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)


def opened(folder: Path) -> RowCache:
    return RowCache(folder, flag="--cache")


def test_rows_come_back_in_any_order(tmp_path: Path):
    rows = opened(tmp_path)
    assert rows.missing([*NAMES, NAMES[4]]) == [0, 1, 2, 3, 4]
    rows.add(NAMES[:2], ROWS[:2])
    assert rows.missing([*NAMES, NAMES[4]]) == [2, 3, 4]
    opened(tmp_path).add(NAMES[2:], ROWS[2:])  # another run
    assert rows.missing(NAMES) == []
    for again in (rows, opened(tmp_path), pickle.loads(pickle.dumps(rows))):
        found = again.read([NAMES[4], NAMES[0], NAMES[4]])
        assert found.dtype == np.float32
        assert np.array_equal(found, ROWS[[4, 0, 4]])
    found = rows.sound(0)
    assert found is not None
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1


def test_nothing_is_written_twice(tmp_path: Path):
    rows = opened(tmp_path)
    rows.add(NAMES[:3], ROWS[:3])
    rows.add([NAMES[1], NAMES[3], NAMES[3]], ROWS[[0, 3, 4]])
    assert rows.known() == {name: row for row, name in enumerate(NAMES[:4])}
    assert np.array_equal(rows.read(NAMES[:4]), ROWS[:4])
    assert (tmp_path / "rows").stat().st_size == 4 * ROWS[0].nbytes


def test_rows_that_were_not_listed_are_written_again(tmp_path: Path):
    rows = opened(tmp_path)
    rows.add(NAMES[:2], ROWS[:2])
    with (tmp_path / "rows").open("ab") as file:
        file.write(b"killed meanwhile " * 3)  # more than a row, which nothing lists
    with (tmp_path / "fingerprints").open("ab") as file:
        file.write(b"cut")
    assert rows.known() == {NAMES[0]: 0, NAMES[1]: 1}
    rows.add(NAMES[2:], ROWS[2:])
    assert np.array_equal(opened(tmp_path).read(NAMES), ROWS)


def test_a_file_that_was_cut_off_is_filled_again(tmp_path: Path):
    rows = opened(tmp_path)
    rows.add(NAMES, ROWS)
    rows.read(NAMES)
    with (tmp_path / "rows").open("r+b") as file:
        file.truncate(3 * ROWS[0].nbytes - 1)
    assert rows.missing(NAMES) == [2, 3, 4]
    with pytest.raises(OutputError, match="3 rows .* not there. Is --cache a folder that all"):
        rows.read(NAMES)
    rows.add(NAMES[2:], ROWS[2:])
    assert np.array_equal(rows.read(NAMES), ROWS)


def garble(layout: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "layout.json").write_text(layout)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        garble("{"),
        garble("[]"),
        garble('{"type": "<f4"}'),
        garble('{"type": "many", "shape": [2]}'),
        garble('{"type": "<f4", "shape": [0]}'),
        remove("layout.json"),
        remove("rows"),
        remove("sums"),
        remove("fingerprints"),
    ],
)
def test_what_cannot_be_understood_is_made_again(damage: Callable[[Path], None], tmp_path: Path):
    opened(tmp_path).add(NAMES, ROWS)
    damage(tmp_path)
    rows = opened(tmp_path)
    assert rows.missing(NAMES) == [0, 1, 2, 3, 4]
    rows.add(NAMES[:2], ROWS[:2])
    assert np.array_equal(opened(tmp_path).read(NAMES[:2]), ROWS[:2])
    assert json.loads((tmp_path / "layout.json").read_text()) == {"type": "<f4", "shape": [2, 3]}


def test_files_of_an_older_version_are_left_alone(tmp_path: Path):
    older = {"pixels": b"abc", "keys": b"d" * 16, "x.safetensors": b"e"}
    for name, content in older.items():
        (tmp_path / name).write_bytes(content)
    rows = opened(tmp_path)
    assert rows.known() == {}
    rows.add(NAMES, ROWS)
    assert np.array_equal(rows.read(NAMES), ROWS)
    assert {name: (tmp_path / name).read_bytes() for name in older} == older


def test_rows_of_another_shape_are_refused(tmp_path: Path):
    rows = opened(tmp_path)
    rows.add(NAMES[:2], ROWS[:2])
    with pytest.raises(ValueError, match="rows of"):
        rows.add(NAMES[2:], ROWS[2:, :1])
    assert np.array_equal(rows.read(NAMES[:2]), ROWS[:2])


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written .* Choose another --cache"):
        opened(tmp_path / "file" / "inside").add(NAMES, ROWS)


def write_rows(folder: Path, start: int, *, alone: bool) -> None:
    """Add 30 rows, slowly, as one of two processes that begin together."""
    rows = opened(folder)
    wanted = [f"{number:032x}" for number in range(start, start + 30)]
    with rows.writing() if alone else nullcontext():
        for position in rows.missing(wanted):
            time.sleep(0.005)
            name = wanted[position]
            rows.add([name], np.full((1, 4, 4), int(name, 16), np.uint8))


@pytest.mark.parametrize("alone", [True, False])
def test_two_writers_at_once(alone: bool, tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=write_rows, args=(tmp_path, start), kwargs={"alone": alone})
        for start in (0, 15)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    rows = opened(tmp_path)
    known = rows.known()
    assert sorted(int(name, 16) for name in known) == list(range(45))
    assert (tmp_path / "rows").stat().st_size == 45 * 16
    assert all((rows.sound(row) == int(name, 16)).all() for name, row in known.items())


def test_a_flipped_bit_is_found_and_the_row_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    opened(tmp_path).add(NAMES, ROWS)
    with (tmp_path / "rows").open("r+b") as file:
        file.seek(3 * ROWS[0].nbytes + 5)
        [byte] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    rows = opened(tmp_path)
    assert rows.sound(3) is None
    assert rows.sound(2) is not None
    rows.check(NAMES)
    assert "row 3 has rotted" in capsys.readouterr().err
    assert rows.missing(NAMES) == [3]
    rows.add(NAMES, ROWS)
    assert np.array_equal(rows.read(NAMES), ROWS)
    assert rows.known()[NAMES[3]] == 5
    again = opened(tmp_path)
    again.check(NAMES)
    assert again.missing(NAMES) == []


def test_what_is_kept_is_shown_and_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "pixels" / "of a model"
    opened(folder).add(NAMES, ROWS)
    [kept] = KeptRows.all_in(tmp_path)
    assert (kept.folder, kept.rows) == (folder, 5)
    assert kept.size > ROWS.nbytes
    main(["cache", "--folder", str(tmp_path)])
    assert "5 rows  unused for 0.0 days  pixels/of a model" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["cache", "prune", "--folder", str(tmp_path)])
    assert "say what may go" in capsys.readouterr().err
    main(["cache", "prune", "--folder", str(tmp_path), "--unused-days", "1"])
    assert folder.is_dir()
    with opened(folder).writing():
        main(["cache", "prune", "--folder", str(tmp_path), "--unused-days", "0"])
    assert "in use" in capsys.readouterr().out
    assert folder.is_dir()
    main(["cache", "prune", "--folder", str(tmp_path), "--unused-days", "0"])
    assert not folder.exists()


def test_looking_at_a_cache_is_no_use_of_it_but_reading_is(tmp_path: Path):
    folder = tmp_path / "pixels" / "of a model"
    opened(folder).add(NAMES, ROWS)
    month_ago = time.time() - 30 * 86400
    for file in folder.iterdir():
        os.utime(file, (month_ago, month_ago))
    assert [round(KeptRows.all_in(tmp_path)[0].unused_days) for _ in range(2)] == [30, 30]
    opened(folder).sound(0)
    assert (folder / "rows").stat().st_mtime > month_ago + 86400, "where a disk notes no reading"
    assert round(KeptRows.all_in(tmp_path)[0].unused_days) == 0


def test_rows_are_read_that_came_while_another_run_was_writing_them(tmp_path: Path):
    opened(tmp_path / "whole").add(NAMES, ROWS)
    opened(tmp_path).add(NAMES[:1], ROWS[:1])
    rows, ends = opened(tmp_path), {"sums": 4, "fingerprints": 16}
    for name in ("rows", "sums", "fingerprints"):  # as `add` writes them
        (tmp_path / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        if name == "rows":
            assert rows.sound(rows.known()[NAMES[0]]) is not None
            assert {name: (tmp_path / name).stat().st_size for name in ends} == ends
    assert np.array_equal(rows.read(NAMES), ROWS)
    found = [rows.sound(rows.known()[name]) for name in NAMES]
    assert all(row is not None for row in found)
    assert np.array_equal(np.stack(found), ROWS)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_a_writer_that_waited_while_the_cache_was_pruned_begins_anew(tmp_path: Path):
    folder = tmp_path / "pixels" / "of a model"
    opened(folder).add(NAMES, ROWS)
    waiting = Thread(target=lambda: opened(folder).add(NAMES, ROWS))
    with locked(folder / "lock"):
        waiting.start()
        time.sleep(0.3)
        shutil.rmtree(folder)
    waiting.join()
    assert opened(folder).missing(NAMES) == []
