"""What is wrong with rows of every kind: found before training, listed, or skipped and recorded."""

import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from clip_refine.data import BadRow, BadRowPolicy, read_table
from clip_refine.data.images import image_problem
from clip_refine.data.pairs import BadRows, skipped_rows, write_skipped
from clip_refine.data.rows import read_json
from clip_refine.support.errors import DataError
from clip_refine.support.limits import WHOLE, read_text
from tests.data.layouts import (
    add_sample,
    drawn,
    opened,
    write_coco,
    write_image_folder,
    write_images,
    write_parquet,
    write_shards,
    write_table,
    write_token,
)


def rewrite(path: str, change: Callable[[dict], None]) -> str:
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))
    return path


def noise(kind: str, mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.effect_noise((90, 70), 60).convert(mode).save(content, kind)
    return content.getvalue()


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_cut_off_images_are_found_by_their_end(tmp_path: Path, kind: str):
    path, whole = tmp_path / f"x.{kind.lower()}", noise(kind)
    path.write_bytes(whole)
    assert image_problem(path) is None
    path.write_bytes(whole + b"\0" * 300)
    assert image_problem(path) is None, "sound images with something behind their end"
    for share in (0.5, 0.9, 0.98):
        path.write_bytes(whole[: int(share * len(whole))])
        problem = image_problem(path)
        assert problem, share
        assert str(path) in problem


def test_damage_in_the_middle_is_found_by_decoding(tmp_path: Path):
    whole = noise("PNG")
    middle = len(whole) // 2
    (tmp_path / "x.png").write_bytes(whole[:middle] + b"\0" * 40 + whole[middle + 40 :])
    assert image_problem(tmp_path / "x.png") is None
    assert "cannot be decoded" in str(image_problem(tmp_path / "x.png", decode=True))


def broken(tmp_path: Path, content: bytes | None) -> str:
    name = write_table(tmp_path, drawn())
    (tmp_path / "001.png").unlink()
    if content is not None:
        (tmp_path / "001.png").write_bytes(content)
    return name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "001.png not found"),
        (b"", r"001.png is empty \(0 bytes\)"),
        (b"<html>404</html>", "001.png is not a readable image"),
        (noise("PNG")[:2000], "001.png: cannot be decoded"),
    ],
)
def test_bad_images_stop_the_run(tmp_path: Path, content: bytes | None, message: str):
    with pytest.raises(DataError, match=message) as caught:
        opened(broken(tmp_path, content))
    listed = str(caught.value).splitlines()
    assert len(listed) == 2
    assert "captions.csv, line 5, 6, 7: " in listed[0]
    assert listed[-1].endswith(
        "captions.csv: 3 of 12 rows are bad (25.0%). Mend them: --data.skip-bad goes on without "
        "bad rows only up to 5.0% of all (--data.max-bad)."
    )


def test_the_advice_is_one_that_helps(tmp_path: Path):
    with pytest.raises(DataError, match=r"Mend them, or pass --data.skip-bad to go on without"):
        opened(broken(tmp_path, b""), limit=0.5)
    for image in tmp_path.rglob("*.*g"):
        image.unlink()
    with pytest.raises(DataError, match=r"100.0%.* name their folder with --data.image-folder"):
        opened(str(tmp_path / "captions.csv"))


def test_what_rows_have_in_common_is_said_once(tmp_path: Path):
    path = tmp_path / "captions.csv"
    rows = ["/a.png,text", "no.png,text", "/b.png,text", ",text", "no.png,text", ",text"]
    path.write_text("image,caption\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError) as caught:
        opened(str(path))
    said = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert said[:-1] == [
        "captions.csv, line 2: '/a.png' is an absolute path.",
        "captions.csv, line 4: '/b.png' is an absolute path.",
        "Name the images' folder with --data.image-folder, where its end must lie, or pass "
        "--data.allow-outside.",
        "captions.csv, line 3, 6: image file no.png not found. Check the path.",
        "captions.csv, line 5, 7: names no image. Name one or remove the row.",
    ]


# --- the policy -----------------------------------------------------------------------------------


def test_bad_rows_are_skipped_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = opened(broken(tmp_path, b""), skip=True, limit=0.5)
    assert [Path(source.image_name(i)).name for i in range(3)] == ["000.jpg", "002.jpg", "003.png"]
    assert "captions.csv: 3 of 12 rows are bad (25.0%) and skipped" in capsys.readouterr().err
    write_skipped(skipped_rows([source, source]), tmp_path / "skipped.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [Path(line["where"]).name for line in lines] == [
        f"captions.csv, line {i}" for i in (5, 6, 7)
    ]
    assert "is empty (0 bytes)" in lines[0]["problem"]


def test_too_many_bad_rows_stop_all_the_same(tmp_path: Path):
    with pytest.raises(DataError, match=r"3 of 12 rows are bad \(25.0%\), more than the 5.0% that"):
        opened(broken(tmp_path, b""), skip=True)
    assert len(opened(broken(tmp_path, b""), skip=True, limit=0.25)) == 3


def test_nothing_is_written_where_nothing_was_skipped(tmp_path: Path):
    write_skipped([], tmp_path / "skipped.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_stream_stops_at_once_or_after_enough_rows():
    strict = BadRows("stream", BadRowPolicy())
    strict.settle_so_far()
    strict.total = 1
    strict.add("row 0", "is bad")
    with pytest.raises(DataError, match="row 0: is bad\nstream: a bad row in a stream"):
        strict.settle_so_far()
    lenient = BadRows("stream", BadRowPolicy(skip=True, limit=0.1))
    for number in range(1, 200):
        lenient.total = number
        lenient.add(f"row {number}", "is bad")
        lenient.settle_so_far()
    lenient.total = 200
    with pytest.raises(DataError, match="199 of 200 rows are bad"):
        lenient.settle_so_far()


# --- annotation files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written", ["/etc/passwd.png", "../secret.png", "a/../../b.png", "C:\\x.png"]
)
def test_paths_that_lead_elsewhere_are_refused(tmp_path: Path, written: str):
    write_images(tmp_path, drawn())
    path = tmp_path / "captions.csv"
    path.write_text(f"image,caption\n{written},text\n")
    with pytest.raises(DataError, match=r"line 2: .*--data.allow-outside"):
        opened(str(path))


def test_paths_that_lead_elsewhere_can_be_allowed(tmp_path: Path):
    (name, content, _), *_ = drawn(1)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "below").mkdir()
    path = tmp_path / "below" / "captions.csv"
    path.write_text(f"image,caption\n{tmp_path / name},one\n../{name},two\n")
    assert opened(str(path), allow_outside=True).captions == (("one", "two"),)


@pytest.mark.parametrize("place", ["/home/me/data/", "D:\\data\\"])
def test_the_end_of_an_absolute_path_is_looked_for_in_the_folder_of_images(
    tmp_path: Path, place: str
):
    """As a table has them that was written on another machine."""
    name, content, _ = drawn(1)[0]
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / name).write_bytes(content)
    path = tmp_path / "captions.csv"
    path.write_text(f"image,caption\n{place}photos{place[-1]}a{place[-1]}{name},text\n")
    with pytest.raises(DataError, match="Name the images' folder with --data.image-folder"):
        opened(str(path))
    for folder in (tmp_path, tmp_path / "photos", tmp_path / "photos" / "a"):
        for outside in (False, True):
            source = opened(str(path), image_folder=folder, allow_outside=outside)
            assert source.image_bytes(0) == content
    # on this machine, too, and as long as no name is
    here, long = tmp_path / "photos" / "a" / name, "/" + "a" * 300
    path.write_text(f"image,caption\n{here},text\n{long},text\n")
    with pytest.raises(DataError, match="line 3: '/aaa.* is an absolute path") as caught:
        opened(str(path), image_folder=tmp_path / "photos")
    assert "line 2" not in str(caught.value)
    path.write_text(f"image,caption\n/home/../photos/a/{name},text\n")
    with pytest.raises(DataError, match="absolute path"):
        opened(str(path), image_folder=tmp_path)


@pytest.mark.parametrize("written", ["https://example.org/a.png", "s3://bucket/a.png"])
def test_addresses_are_no_paths(tmp_path: Path, written: str):
    (tmp_path / "captions.csv").write_text(f"image,caption\n{written},text\n")
    with pytest.raises(DataError, match="is an address, not a path"):
        opened(str(tmp_path / "captions.csv"), allow_outside=True)


def test_captions_that_are_no_utf_8(tmp_path: Path):
    (name, content, _), *_ = drawn(1)
    (tmp_path / name).write_bytes(content)
    rows = {
        "a.csv": f"image,caption\n{name},caf".encode() + b"\xe9\n",
        "a.tsv": f"image\tcaption\n{name}\tcaf".encode() + b"\xe9\n",
        "a.jsonl": f'{{"image": "{name}", "caption": "caf'.encode() + b'\xe9"}\n',
        "token.txt": f"{name}#0\tcaf".encode() + b"\xe9\n",
    }
    for file, row in rows.items():
        (tmp_path / file).write_bytes(row)
        with pytest.raises(DataError, match=f"{name}' has a caption that is not UTF-8"):
            opened(str(tmp_path / file))


def test_quotes_at_the_beginning_of_captions(tmp_path: Path):
    write_images(tmp_path, drawn())
    (tmp_path / "a.tsv").write_text(
        'image\tcaption\n000.jpg\t"Stop" it says\n001.png\t"unclosed\n'
        '002.jpg\t"quoted ""words"""\n003.png\t"first\nsecond"\n000.jpg\tlast\n'
    )
    assert opened(str(tmp_path / "a.tsv")).captions == (
        ('"Stop" it says', "last"),
        ('"unclosed',),
        ('quoted "words"',),
        ("first\nsecond",),
    )


def test_rows_with_too_few_fields(tmp_path: Path):
    """Flickr30k's file on Kaggle has one such row."""
    write_images(tmp_path, drawn())
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n000.jpg| 0| one\n001.png| 4   two\n"
    )
    with pytest.raises(DataError, match="line 3: 2 fields, but the header has 3"):
        opened(str(tmp_path / "results.csv"))
    assert len(opened(str(tmp_path / "results.csv"), skip=True, limit=0.5)) == 1


def test_token_lines_of_another_form(tmp_path: Path):
    name = write_token(tmp_path, drawn())
    with Path(name).open("a") as file:
        file.write("000.jpg without a number\n")
    with pytest.raises(DataError, match="line 13: expected 'image.jpg#0', a tab and a caption"):
        opened(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].append(c["images"][0]), r"images\[4\]: id 10 stands at an earlier"),
        (
            lambda c: c["annotations"][2].update(image_id=77),
            r"annotations\[2\]: image id 77 is not",
        ),
        (lambda c: c["annotations"][1].update(caption=" "), r"annotations\[1\]: .*empty caption"),
        (
            lambda c: c["annotations"][1].update(caption=3),
            r"annotations\[1\]: has no caption but 3",
        ),
        (lambda c: c["images"][1].pop("file_name"), r"images\[1\]: has no id or no file_name"),
        (
            lambda c: c["images"][1].update(file_name="../x"),
            r"annotations\[3, 4, 5\]: '../x' leads out",
        ),
        (
            lambda c: c["images"][1].update(file_name="no.jpg"),
            r"annotations\[3, 4, 5\]: .*no.jpg not found",
        ),
    ],
)
def test_mistakes_in_coco_files(tmp_path: Path, change: Callable[[dict], None], message: str):
    with pytest.raises(DataError, match=message):
        opened(rewrite(write_coco(tmp_path, drawn()), change))


def test_images_without_annotations_are_reported(tmp_path: Path):
    def forget(content: dict) -> None:
        content["annotations"] = content["annotations"][3:]

    source = opened(rewrite(write_coco(tmp_path, drawn()), forget))
    assert (len(source), len(source.uncaptioned)) == (3, 1)
    assert source.uncaptioned[0].endswith("000.jpg")


def test_images_that_no_metadata_mentions_are_reported(tmp_path: Path):
    name = write_image_folder(tmp_path, drawn())
    (tmp_path / "train" / "more.jpg").write_bytes(drawn(5)[4][1])
    assert opened(name).uncaptioned == (str(tmp_path / "train" / "more.jpg"),)


def test_mistakes_in_json_lines(tmp_path: Path):
    write_images(tmp_path, drawn())
    path = tmp_path / "x.jsonl"
    rows = [
        '{"image": "000.jpg", "caption": "fine\\nin two lines"}',
        "",
        '{"image": "000.jpg", "caption": ',
        "[3]",
        '{"image": "000.jpg", "caption": null}',
        '{"image": "000.jpg", "caption": ["a", ""]}',
        '{"image": {"bytes": "%%%"}, "caption": "a"}',
        '{"image": null, "caption": "a"}',
        '{"image": 3, "caption": "a"}',
    ]
    path.write_text("\n".join(rows))
    source = opened(str(path), skip=True, limit=1.0)
    assert source.captions == (("fine\nin two lines",),)
    problems = [row.problem for row in source.skipped]
    found = [
        "no JSON (",
        "no JSON object",
        "no caption",
        "empty caption",
        "base64",
        "names no image",
    ]
    assert all(text in problem for text, problem in zip(found, problems, strict=False)), problems
    assert "neither path nor bytes but 3" in problems[6]
    assert source.skipped[0].where.endswith("line 3")


# --- tables and shards ----------------------------------------------------------------------------


def test_mistakes_in_parquet(tmp_path: Path):
    good = [*drawn(2)]
    name, content, _ = good[0]
    bad = [*good, (name, b"no image", ["a"]), (name, content, [""]), (name, content[:200], ["b"])]
    source = opened(write_parquet(tmp_path, bad), skip=True, limit=1.0)
    assert len(source) == 2
    assert [row.where[-5:] for row in source.skipped] == ["row 2", "row 3", "row 4"]


def test_parquet_with_captions_that_are_no_utf_8(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    images = [content for _, content, _ in drawn(2)]
    text = pa.array([b"fine", b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)
    parquet.write_table(pa.table({"image": images, "caption": text}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 1: has a text that is not UTF-8"):
        opened(str(tmp_path / "x.parquet"))


def test_parquet_that_is_none(tmp_path: Path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"x.parquet: cannot be read \("):
        opened(str(tmp_path / "x.parquet"))


def test_mistakes_in_shards(tmp_path: Path):
    jpeg, png, other, *_ = (content for _, content, _ in drawn(3))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add_sample(tar, "0", {"jpg": jpeg, "txt": b"fine"})
        add_sample(tar, "1", {"txt": b"no image"})
        add_sample(tar, "2", {"jpg": other})  # reported, not fatal
        add_sample(tar, "3", {"jpg": jpeg, "txt": b" "})
        add_sample(tar, "4", {"png": png, "txt": b"caf\xe9"})
        add_sample(tar, "5", {"jpg": b"", "txt": b"empty file"})
        add_sample(tar, "0", {"jpg": jpeg, "txt": b"again"})
        add_sample(tar, "6", {"jpg": jpeg, "json": b"{"})
    source = opened(str(tmp_path / "x.tar"), skip=True, limit=1.0)
    assert source.captions == (("fine",),)
    assert source.uncaptioned == (f"{tmp_path}/x.tar: 2.jpg",)
    problems = {row.where.rpartition(" ")[2]: row.problem for row in source.skipped}
    found = {"1": "has no image but txt", "3": "empty caption", "4": "not UTF-8", "5": "is empty"}
    found |= {"0": "stands earlier in the shard", "6": "its .json is no JSON"}
    assert problems.keys() == found.keys()
    assert all(text in problems[key] for key, text in found.items()), problems


@pytest.mark.parametrize("cut", [0, 100, 700, 1300, 2048, -10_240])
def test_a_shard_that_is_cut_off_is_named(tmp_path: Path, cut: int):
    name = write_shards(tmp_path, drawn())
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(DataError, match=f"^{shard}: is cut off or no tar file"):
        opened(name)


def test_every_row_is_bad(tmp_path: Path):
    (tmp_path / "a.csv").write_text("image,caption\nno.png,text\n")
    with pytest.raises(DataError, match="a.csv: CSV table without pairs"):
        opened(str(tmp_path / "a.csv"), skip=True, limit=1.0)


def test_bad_rows_as_text():
    assert str(BadRow("a.csv, line 3", "is bad.")) == "a.csv, line 3: is bad."
    with pytest.raises(DataError, match="cannot be read"):
        read_table(Path("nowhere.csv"))


def test_a_short_file_takes_little_memory_whatever_the_most(tmp_path: Path):
    """UTF-16, half of whose bytes are letters, once asked for twice the limit of 1 GiB."""
    (tmp_path / "a.json").write_bytes('["a"]'.encode("utf-16"))
    (tmp_path / "b.json").write_text('["a"]')
    tracemalloc.start()
    assert read_json(tmp_path / "a.json") == json.loads(read_text(tmp_path / "b.json", WHOLE))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20_000_000
