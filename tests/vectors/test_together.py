"""One index through a map in several processes: what comes out, and what is left when one ends."""

import io
import json
import os
import signal
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from torch.multiprocessing.spawn import ProcessExitedException

from clip_refine.cli import main
from clip_refine.support.errors import (
    ClipRefineError,
    ConfigError,
    EndedError,
    FailedError,
    OutputError,
)
from clip_refine.support.group import Group
from clip_refine.vectors import stored
from clip_refine.vectors.files import load_peer, save_peer
from clip_refine.vectors.stored import apply_stored
from clip_refine.vectors.transforms import Fold
from tests.several import in_processes
from tests.vectors.cases import drawn
from tests.vectors.test_stored import IMAGE, LANCE, TEXT, contents, write

BOTH = pytest.mark.parametrize("kind", ["clip-retrieval", "dataset"])


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    save_peer(Fold.fit(*drawn(2, 20, 20)), tmp_path / "maps")
    return tmp_path / "maps"


def five(kind: str, folder: Path, image: np.ndarray = IMAGE) -> Path:
    """Five files to map, of clip-retrieval's with others and an empty folder beside."""
    source = write(kind, folder, image)
    if kind == "dataset":
        table = load_from_disk(str(source))
        assert isinstance(table, Dataset)
        table.save_to_disk(folder / "five", num_shards=5)
        return folder / "five"
    for number in (2, 3, 4):
        for name, side in (("img_emb", IMAGE), ("text_emb", TEXT)):
            np.save(source / f"{name}/{name}_{number}.npy", np.tile(side, (number, 1)))
    (source / "empty").mkdir()
    (source / "a.txt").write_text("a note")
    return source


def apply_here(source: Path, out: Path, maps: Path, fault: str = "") -> None:
    """In each process; the second one is killed or finds the disk full at its second file."""
    rank, begun = Group().rank, list[Path]()
    usual = stored._Finished.once

    def once(self: stored._Finished, file: Path, source: Path, make) -> int:
        begun.append(file)
        if fault in ("disk", "killed") and rank == 1 and len(begun) == 2:
            file.write_bytes(b"half")
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        return usual(self, file, source, make)

    stored._Finished.once = once
    try:
        said = str(apply_stored(maps, source, out, side="image"))
    except ClipRefineError as error:
        said = f"{type(error).__name__}: {error}"
    made = [str(file.name) for file in begun]
    (out.parent / f"{out.name}-{rank}.json").write_text(json.dumps([said, made]))


def told(out: Path, count: int) -> list[tuple[str, list[str]]]:
    """What each process said and made."""
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(count)]


@BOTH
def test_they_make_what_one_makes(kind: str, maps: Path, tmp_path: Path):
    source = five(kind, tmp_path)
    rows = apply_stored(maps, source, tmp_path / "one", side="image")
    for count in (2, 3):
        out = tmp_path / f"{count}"
        in_processes(count, apply_here, source, out, maps)
        assert contents(out) == contents(tmp_path / "one")
        assert (out / "empty").is_dir() == (kind == "clip-retrieval")
        assert {said for said, _ in told(out, count)} == {str(rows)}
        shares = [made for _, made in told(out, count)]
        assert all(shares)
        files = [name for made in shares for name in made]
        assert sorted(files) == sorted(
            path.name
            for path in source.rglob("*")
            if path.is_file() and (kind != "dataset" or path.suffix == ".arrow")
        )
        if kind == "dataset":
            assert len(load_from_disk(str(out))) == rows
    assert not list(tmp_path.glob(".*"))


def by_command(source: Path, out: Path, maps: Path) -> None:
    given = ["vectors", "apply", str(maps), str(source), "--side", "image", "--out", str(out)]
    with redirect_stdout(io.StringIO()) as printed:
        main([*given, "--json"])
    out.with_name(f"printed-{Group().rank}").write_text(printed.getvalue())


def test_the_command_says_the_count_of_all_once(maps: Path, tmp_path: Path):
    in_processes(2, by_command, write("clip-retrieval", tmp_path), tmp_path / "new", maps)
    first, second = ((tmp_path / f"printed-{rank}").read_text() for rank in "01")
    assert json.loads(first)["vectors"] == 9
    assert second == ""


def twice(source: Path, out: Path, maps: Path) -> None:
    """As a script does it; more processes than the first one has files."""
    assert apply_stored(maps, source, out, side="image") == 9
    assert apply_stored(maps, out, out.with_name("both"), side="text") == 9


def test_there_may_be_more_of_them_than_files_and_more_than_one_call(maps: Path, tmp_path: Path):
    source = write("folder", tmp_path)
    in_processes(3, twice, source, tmp_path / "new", maps)
    twice(source, tmp_path / "one" / "new", maps)
    assert contents(tmp_path / "both") == contents(tmp_path / "one" / "both")


@BOTH
@pytest.mark.parametrize("fault", ["row", "disk"])
def test_what_is_wrong_in_one_ends_all(kind: str, fault: str, maps: Path, tmp_path: Path):
    image, out = IMAGE.copy(), tmp_path / "new"
    image[6] *= fault != "row"
    in_processes(2, apply_here, five(kind, tmp_path, image), out, maps, fault)
    said = [said for said, _ in told(out, 2)]
    [own] = [one for one in said if not one.startswith("EndedError: another process of this run ")]
    if fault == "row":
        assert "is zero. Remove such rows, with their ids, first." in own
    else:
        assert own.startswith(f"FailedError: {out}: cannot be written (No space left on device).")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


@BOTH
@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_them_goes_on_after_a_kill(
    kind: str, count: int, maps: Path, tmp_path: Path
):
    source, out, partial = five(kind, tmp_path), tmp_path / "new", tmp_path / ".new.partial"
    with pytest.raises(ProcessExitedException):
        in_processes(2, apply_here, source, out, maps, "killed")
    [_, run, line] = (partial / ".finished-1").read_text().splitlines()
    assert run == (partial / ".finished").read_text().splitlines()[1]
    kept = json.loads(line)[0]
    made = (partial / kept).stat().st_mtime_ns
    if count == 1:
        apply_stored(maps, source, out, side="image")
    else:
        in_processes(count, apply_here, source, out, maps)
    assert (out / kept).stat().st_mtime_ns == made
    apply_stored(maps, source, tmp_path / "one", side="image")
    assert contents(out) == contents(tmp_path / "one")
    assert not list(tmp_path.glob(".*"))


def apart(source: Path, out: Path, maps: Path) -> None:
    """As on two machines, each with a disk of its own under one name."""
    rank = Group().rank
    if rank:
        hidden = stored.hidden_work
        stored.hidden_work = lambda path: hidden(path).with_name("elsewhere")
    with pytest.raises(ClipRefineError) as error:
        apply_stored(maps, source, out, side="image")
    if rank:
        assert isinstance(error.value, OutputError)
        assert "does not find what the first one has begun" in str(error.value)


def unlike(source: Path, out: Path, maps: Path, fault: str) -> None:
    """The second process is given another map, or sees a file less."""
    rank = Group().rank
    if rank and fault == "map":
        save_peer(Fold.fit(*drawn(2, 30, 30)), out.with_name("others"))
        maps = out.with_name("others")
    if rank and fault == "file":
        usual = stored._Finished.share
        stored._Finished.share = lambda self, files, *more: usual(
            self, dict(list(files.items())[1:]), *more
        )
    with pytest.raises(ClipRefineError) as error:
        apply_stored(maps, source, out, side="image")
    out.with_name(f"said-{rank}").write_text(str(error.value))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("map", "process 1 has another map or side than the first one"),
        ("file", "process 1 sees other files than the first one, such as a.txt"),
    ],
)
def test_processes_that_would_not_make_one_index_are_refused(
    fault: str, message: str, maps: Path, tmp_path: Path
):
    in_processes(2, unlike, five("clip-retrieval", tmp_path), tmp_path / "new", maps, fault)
    assert message in (tmp_path / "said-1").read_text()
    assert "another process of this run has ended" in (tmp_path / "said-0").read_text()
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


def test_what_is_left_of_an_earlier_run_does_not_end_a_later_one(maps: Path, tmp_path: Path):
    """Its process notices the other number and leaves the list alone."""
    source, out = write("clip-retrieval", tmp_path), tmp_path / "new"
    move = stored._Move(load_peer(maps), "image")
    within = stored._Finished.within(out, move, source, Group(), overwrite=False)
    folder, _ = within.__enter__()
    (folder / ".finished").write_text("{}\nanother run\n")
    ended = EndedError()
    assert not within.__exit__(EndedError, ended, ended.__traceback__)
    assert (tmp_path / ".new.partial" / ".finished").read_text() == "{}\nanother run\n"


def wait_for_nobody(heard: Path) -> None:
    """The first process waits for the second, which waits until the first was told to stop."""
    group = Group()
    with suppress(KeyboardInterrupt), group.together():
        if group.first:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                group.meet()
            heard.touch()
        while not heard.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt


def test_who_waits_for_others_hears_a_signal(tmp_path: Path):
    in_processes(2, wait_for_nobody, tmp_path / "heard")
    assert (tmp_path / "heard").exists()


def test_a_launcher_that_names_no_meeting_place(
    maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(FailedError, match="the 2 processes of this run did not find each other"):
        apply_stored(maps, write("clip-retrieval", tmp_path), tmp_path / "new", side="image")
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_not_all_see_is_refused(maps: Path, tmp_path: Path):
    in_processes(2, apart, write("folder", tmp_path), tmp_path / "new", maps)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["npz", "safetensors", "parquet", "lance"])
def test_one_file_is_for_one_process(
    kind: str, maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if kind == "lance":
        pytest.importorskip("lancedb", reason=LANCE)
    source = write(kind, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="is written by one process, but 2 run. Start this with"):
        apply_stored(maps, source, tmp_path / f"new.{kind}", side="image")
