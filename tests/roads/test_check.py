"""What `clip-refine data check` says of a source with one of every fault."""

import json
import multiprocessing
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip_refine.cli import main
from clip_refine.config import DataConfig, ModelConfig
from clip_refine.data import open_pairs
from clip_refine.models import load_open_clip
from clip_refine.results import Findings, NumberSpread
from clip_refine.roads import build
from clip_refine.roads.check import check_data, findings_table, findings_verdict
from clip_refine.support.console import PeakMemory
from clip_refine.support.errors import ConfigError, DataError, OutputError
from clip_refine.toy import ToyPairs
from tests.data.files import drawn_files
from tests.data.layouts import drawn, write_shards


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight sound rows and one of every fault."""
    folder = tmp_path_factory.mktemp("faulty")
    files = drawn_files(folder, 8, size=(320, 240))
    shutil.copy(files.paths[0], folder / "copy.jpg")
    files.load_image(1).resize((200, 150)).save(folder / "near.jpg", quality=60)
    (folder / "cut.jpg").write_bytes(files.paths[2].read_bytes()[:2000])
    (folder / "empty.jpg").touch()
    exif = Image.Exif()
    exif[0x0112] = 6
    files.load_image(3).save(folder / "turned.jpg", exif=exif)
    glass = files.load_image(4).convert("RGBA")
    glass.putpixel((0, 0), (0, 0, 0, 0))
    glass.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "glass.png")
    rows = ["file_name,caption", *(f"{index:03}.jpg,picture {index}" for index in range(8))]
    rows += ["copy.jpg,[bold]twin[/bold]", "near.jpg,[bold]twin[/bold]", "cut.jpg,cut"]
    rows += ["empty.jpg,nothing", f"turned.jpg,{'word ' * 120}", "glass.png,glass", "gone.jpg,gone"]
    rows += ["000.jpg,", "/etc/passwd,outside", "one,too,many"]
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def findings(faulty: Path) -> Findings:
    return check_data(str(faulty / "captions.csv"), DataConfig())


def names(groups: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    return [[Path(name).name for name in group] for group in groups]


def test_every_row_is_counted_and_every_bad_one_listed(findings: Findings):
    assert findings.kind == "CSV table"
    assert findings.rows == 18
    assert [row.where.rpartition(" ")[2] for row in findings.bad_rows] == ["17", "18", "19"]
    problems = " ".join(row.problem for row in findings.bad_rows)
    for problem in ("empty caption", "absolute path", "3 fields"):
        assert problem in problems
    assert findings.broken_off is None
    assert not findings.sound
    for most, said in ((0.05, "skip-bad leaves out up to 5%"), (0.5, "skip-bad leaves them out")):
        assert said in findings_verdict(findings, DataConfig(max_bad=most))


def test_the_verdict_on_the_terminal_keeps_to_max_bad(faulty: Path, capsys):
    main(["data", "check", str(faulty / "captions.csv"), "--data.max-bad", "0.5"])
    assert "--data.skip-bad leaves them out" in " ".join(capsys.readouterr().out.split())


def test_images(findings: Findings):
    images = findings.images
    assert images.count == 15
    assert images.kinds == {"JPEG": 11, "PNG": 1}
    assert images.odd == {"turned by EXIF": 1, "transparent": 1}
    unreadable = {Path(found.where).name: found.problem for found in images.unreadable}
    assert list(unreadable) == ["cut.jpg", "empty.jpg", "gone.jpg"]
    assert "truncated" in unreadable["cut.jpg"]
    assert "0 bytes" in unreadable["empty.jpg"]
    assert names(images.duplicates) == [["000.jpg", "copy.jpg"]]
    assert names(images.near_duplicates) == [["001.jpg", "near.jpg"]]
    assert images.short_side == NumberSpread(
        smallest=150, median=240, mean=232.5, high=240, largest=240
    )


def test_captions(findings: Findings):
    captions = findings.captions
    assert captions.count == 15
    assert captions.context_length == 77
    assert captions.too_long == 1
    assert captions.too_long_examples[0].startswith("word word")
    assert captions.tokens
    assert captions.tokens.largest == 122
    assert captions.words
    assert captions.words.largest == 120
    assert captions.shared == {"[bold]twin[/bold]": 2}


def test_workers_find_the_same(faulty: Path, findings: Findings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clip_refine.data.loader.FEW", 1)
    assert check_data(findings.source, DataConfig(), workers=2) == findings


def test_the_models_own_context_counts(faulty: Path, tiny_name: str):
    short = check_data(
        str(faulty / "captions.csv"), DataConfig(), model=ModelConfig(name=tiny_name)
    )
    assert short.captions.context_length == 32
    assert short.captions.too_long == 1


def test_json_and_sheet(faulty: Path, findings: Findings, tmp_path: Path):
    out, sheet = tmp_path / "new" / "found.json", tmp_path / "pairs.png"
    source = str(faulty / "captions.csv")
    check_data(source, DataConfig(), out=out, sheet=sheet, seed=3)
    assert Findings.model_validate_json(out.read_text()) == findings
    with Image.open(sheet) as drawn:
        assert drawn.width == 5 * 264
        first = drawn.tobytes()
    with pytest.raises(OutputError, match="exists already"):
        check_data(source, DataConfig(), sheet=sheet)
    for seed, same in ((3, True), (4, False)):
        check_data(source, DataConfig(), sheet=sheet, seed=seed, overwrite=True)
        with Image.open(sheet) as drawn:
            assert (drawn.tobytes() == first) is same
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "pairs.png"]


def test_a_sound_source_and_images_without_captions(tmp_path: Path):
    files = drawn_files(tmp_path, 3)
    annotations = {
        "images": [{"id": i, "file_name": path.name} for i, path in enumerate(files.paths)],
        "annotations": [{"id": i, "image_id": i, "caption": f"one {i}"} for i in range(2)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(annotations))
    found = check_data(str(tmp_path / "coco.json"), DataConfig())
    assert [Path(name).name for name in found.images.without_captions] == ["002.jpg"]
    assert found.sound
    assert "of 3 different images it cannot hold out 100" in findings_verdict(found)


def test_a_source_that_breaks_off(tmp_path: Path):
    name = write_shards(tmp_path, drawn(), shards=1).replace("{00000..00000}", "00000")
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole[: len(whole) // 2])
    found = check_data(name, DataConfig())
    assert found.captions.count == 6
    assert "is cut off" in (found.broken_off or "")
    assert "broke off" in findings_verdict(found)


def test_nothing_to_read(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere.csv: cannot be read"):
        check_data(str(tmp_path / "nowhere.csv"), DataConfig())
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match="is empty"):
        check_data(str(tmp_path / "empty.csv"), DataConfig())
    with pytest.raises(ConfigError, match="from 0 to 16"):
        check_data("toy", DataConfig(), near=20)
    with pytest.raises(ConfigError, match="Leave --data.train"):
        check_data("toy", DataConfig(train="toy"))


def test_only_unreadable_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.csv").write_text("image,caption\ngone.jpg,one\n")
    found = check_data(str(tmp_path / "c.csv"), DataConfig(), sheet=tmp_path / "sheet.png")
    assert found.images.short_side is None
    assert not (tmp_path / "sheet.png").exists()
    assert "No sheet" in capsys.readouterr().err


def test_drawn_images(monkeypatch: pytest.MonkeyPatch):
    drawn = ToyPairs("check", size=20)
    monkeypatch.setattr("clip_refine.toy.toy_train", lambda: drawn)
    found = check_data("toy", DataConfig())
    assert (found.images.count, found.images.kinds) == (20, {"drawn": 20})


def test_from_the_command_line(faulty: Path, capsys: pytest.CaptureFixture[str]):
    main(["data", "check", str(faulty / "captions.csv"), "--data.caption-column", "caption"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("bad rows │ 3", "unreadable │ 3", "too long │ 1", "2 times: [bold]twin[/bold]"):
        assert text in shown
    assert "A run stops before training" in shown
    with pytest.raises(SystemExit):
        main(["data"])
    assert "clip-refine data check" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["data", "look"])
    assert stop.value.code == 2
    assert "there is no such action" in capsys.readouterr().err


def test_bad_rows_in_the_exit_status_and_findings_as_json(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    drawn_files(tmp_path, 1)
    (tmp_path / "good.csv").write_text("image,caption\n000.jpg,one\n")
    main(["data", "check", str(tmp_path / "good.csv"), "--strict"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(faulty / "captions.csv"), "--strict"])
    assert stop.value.code == 1
    (tmp_path / "empty.csv").write_text("image,caption\n")
    with pytest.raises(SystemExit, match="1"):
        main(["data", "check", str(tmp_path / "empty.csv"), "--strict"])
    assert "A run stops, since there are no pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["data", "check", str(faulty / "captions.csv"), "--strict", "--json"])
    found = Findings.model_validate_json(capsys.readouterr().out)
    assert len(found.bad_rows) == 3


def test_special_tokens_in_captions(
    tmp_path: Path, tiny_name: str, capsys: pytest.CaptureFixture[str]
):
    drawn_files(tmp_path, 3)
    marked = ("a dog <End_of_text> on a beach", "a dog &lt;end_of_text&gt; by a river")
    rows = [f"00{i}.jpg,{text}" for i, text in enumerate((*marked, "a dog"))]
    (tmp_path / "c.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    main(["data", "check", str(tmp_path / "c.csv"), "--model.name", tiny_name])
    assert "with special tokens │ 2" in " ".join(capsys.readouterr().out.split())
    found = check_data(str(tmp_path / "c.csv"), model=ModelConfig(name=tiny_name))
    assert found.captions.special == marked
    # and a run, in which they are cut off there, says so
    model = load_open_clip(tiny_name)
    cut, whole = model.encode_text(model.tokenizer([marked[1], "a dog"]))
    assert torch.allclose(cut, whole, atol=1e-6)
    build.warn_of_marks(model, open_pairs(str(tmp_path / "c.csv")))
    said = " ".join(capsys.readouterr().err.split())
    assert "c.csv: 2 captions hold a mark of the tokenizer" in said
    assert "'a dog <End_of_text> on a beach'" in said


def test_the_table_shows_no_markup_of_the_data(findings: Findings):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as captured:
        console.print(findings_table(findings.model_copy(update={"source": "[red]x[/red]"})))
    assert "[red]x[/red]" in captured.get()


def check_in_little_memory(folder: Path, result: Any) -> None:
    """Rows, and the most memory that checking them took beside what was there, in MB."""
    torch.set_num_threads(1)  # which a fork of a process with several can do
    device, least = torch.device("cpu"), PeakMemory(torch.device("cpu")).gigabytes
    limit = 2 * 10**8 + next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData:")
    )
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    took = []
    for count in (1_000, 10_000):
        rows = (f"{row % 8:03}.jpg,row {row}" for row in range(count))
        (folder / "rows.csv").write_text("\n".join(["file_name,caption", *rows]))
        peak = PeakMemory(device)
        found = check_data(str(folder / "rows.csv"), DataConfig(), workers=0)
        took.append((found.rows, 1000 * (peak.gigabytes - least)))
    result.put(took)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_memory_grows_no_faster_than_rows(tmp_path: Path):
    """A matrix of all rows with all would take 400 MB; docs/log.md has 100,000 rows."""
    drawn_files(tmp_path, 8)
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    child = context.Process(target=check_in_little_memory, args=(tmp_path, result))
    child.start()
    child.join()
    assert child.exitcode == 0
    (few, little), (many, more) = result.get()
    assert (few, many) == (1_000, 10_000)
    assert more < 10 * max(little, 10)
