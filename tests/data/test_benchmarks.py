"""Published benchmarks as they come, from local files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from clip_refine.data.labelled import (
    Compositions,
    Documents,
    read_mixbench,
    read_sugarcrepe,
    read_winoground,
)
from clip_refine.support.errors import DataError


def draw(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name) % 256, 0, 0)).save(path)
    return folder


def write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


ROW = {"filename": "a.jpg", "caption": "a dog on a cat", "negative_caption": "a cat on a dog"}


def test_sugarcrepe_has_a_file_a_category(tmp_path: Path):
    images, data = draw(tmp_path / "val2017", "a.jpg", "b.jpg"), tmp_path / "data"
    data.mkdir()
    # keys need not be contiguous
    (data / "swap_obj.json").write_text(json.dumps({"0": ROW, "7": {**ROW, "filename": "b.jpg"}}))
    (data / "add_att.json").write_text(json.dumps({"3": ROW}))
    found = read_sugarcrepe(data, images)
    assert isinstance(found.layout, Compositions)
    assert found.layout.categories == ["add_att", "swap_obj", "swap_obj"]
    assert found.layout.places == [0, 0, 1]
    assert found.captions[0] == ("a dog on a cat", "a cat on a dog")
    assert [path.name for path in found.places] == ["a.jpg", "a.jpg", "b.jpg"]
    assert found.load_image(1).size == (8, 8)


def test_sugarcrepe_plus_plus_is_a_list_with_a_second_caption(tmp_path: Path):
    images, data = draw(tmp_path / "val2017", "a.jpg"), tmp_path / "data"
    data.mkdir()
    row = {"id": 5, **ROW, "caption2": "on a cat sits a dog"}
    (data / "swap_obj.json").write_text(json.dumps([row]))
    found = read_sugarcrepe(data, images)
    assert found.captions == [("a dog on a cat", "on a cat sits a dog", "a cat on a dog")]
    (data / "add_att.json").write_text(json.dumps([ROW]))
    with pytest.raises(DataError, match="some entries have a caption2, others none"):
        read_sugarcrepe(data, images)


def test_winogrounds_items_are_two_images_each(tmp_path: Path):
    draw(tmp_path / "images", "ex_0_img_0.png", "ex_0_img_1.png")
    row = {
        "id": 0,
        "image_0": "ex_0_img_0",
        "image_1": "ex_0_img_1",
        "collapsed_tag": "Object",
        "caption_0": "an old person kisses a young one",
        "caption_1": "a young one kisses",
    }
    write_lines(tmp_path / "examples.jsonl", [row])
    found = read_winoground(tmp_path)
    assert isinstance(found.layout, Compositions)
    assert found.layout == Compositions(["Object", "Object"], [0, 0], paired=True)
    assert found.captions[1] == (row["caption_1"], row["caption_0"])
    assert [path.name for path in found.places] == ["ex_0_img_0.png", "ex_0_img_1.png"]


def mixbench(folder: Path) -> Path:
    """A text, an image and a query of both; documents of all three kinds; absent sides vary."""
    draw(folder, "images/q.jpg", "images/d.jpg", "images/e.jpg")
    write_lines(
        folder / "queries.jsonl",
        [
            {"query_id": "q0", "text": "a cat", "image": ""},
            {"query_id": "q1", "text": None, "image": "images/q.jpg"},
            {"query_id": "q2", "text": "which bird?", "image": "images/q.jpg"},
        ],
    )
    write_lines(
        folder / "mixed_corpus.jsonl",
        [
            {"corpus_id": "d0", "text": "", "image": "images/d.jpg"},
            {"corpus_id": "d1", "text": "a cat sleeps"},
            # from the folder above, as paths of the whole repository are
            {"corpus_id": "d2", "text": "a robin", "image": f"{folder.name}/images/e.jpg"},
        ],
    )
    qrels = "query_id\tcorpus_id\tscore\nq0\td1\t1\nq0\td0\t1\nq1\td0\t1\nq2\td2\t1\nq2\td1\t0\n"
    (folder / "qrels").mkdir()
    (folder / "qrels" / "qrels.tsv").write_text(qrels)
    return folder


def test_mixbench_rows_may_have_one_side(tmp_path: Path):
    found = read_mixbench(mixbench(tmp_path / "MSCOCO"))
    assert isinstance(found.layout, Documents)
    assert found.layout.queries == [(-1, 0), (0, -1), (1, 1)]
    assert found.layout.documents == [(2, -1), (-1, 2), (3, 3)]
    # a judgement of 0 is none
    assert found.layout.relevant == [[1, 0], [0], [2]]
    assert found.captions[0] == ("a cat", "which bird?", "a cat sleeps", "a robin")
    assert sum(len(texts) for texts in found.captions[1:]) == 0
    assert [path.name for path in found.places] == ["q.jpg", "q.jpg", "d.jpg", "e.jpg"]


def test_what_is_wrong_is_named_with_file_and_row(tmp_path: Path):
    folder = mixbench(tmp_path / "OVEN")
    queries, qrels = folder / "queries.jsonl", folder / "qrels" / "qrels.tsv"
    good, judged = queries.read_text(), qrels.read_text()
    for text, message in (
        ('{"query_id": "q0"}\n', r"queries.jsonl, row 1: has neither `text` nor `image`"),
        ('{"text": "a cat"}\n', r"queries.jsonl, row 1: has no `query_id`"),
        (good + "{oops\n", r"queries.jsonl, row 4: is not valid JSON"),
        (
            good.replace("images/q", "gone"),
            r"row 2: its image is not there, neither as .*OVEN/gone",
        ),
        (
            good + '{"query_id": "q3", "text": "x"}\n',
            r"nothing is relevant for query 'q3' \(1 such\)",
        ),
    ):
        queries.write_text(text)
        with pytest.raises(DataError, match=message):
            read_mixbench(folder)
    queries.write_text(good)
    qrels.write_text(judged + "q9\td0\t1\n")
    with pytest.raises(DataError, match="row 7: expected a query_id and a corpus_id"):
        read_mixbench(folder)
    qrels.unlink()
    with pytest.raises(DataError, match=r"qrels.tsv: cannot be read \(No such file"):
        read_mixbench(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no .json file"):
        read_sugarcrepe(tmp_path / "empty", tmp_path)
    bad = tmp_path / "data"
    bad.mkdir()
    (bad / "swap_att.json").write_text(json.dumps({"0": {"filename": "a.jpg", "caption": "x"}}))
    with pytest.raises(DataError, match=r"swap_att.json, row 1: has no `negative_caption`"):
        read_sugarcrepe(bad, tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a\0.png", "link.png"])
def test_images_elsewhere_are_refused(name: str, tmp_path: Path):
    folder = mixbench(draw(tmp_path / "up", "../secret.png") / "MSCOCO")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    write_lines(folder / "queries.jsonl", [{"query_id": "q0", "image": name}])
    with pytest.raises(DataError, match="row 1: .*(leads out|is no file name|is a link out)"):
        read_mixbench(folder)
    data = tmp_path / "data"
    data.mkdir()
    (data / "swap_obj.json").write_text(json.dumps([{**ROW, "filename": name}]))
    with pytest.raises(DataError, match="row 1: .*(leads out|is no file name|is a link out)"):
        read_sugarcrepe(data, folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is nested too deeply"),  # Python 3.13 reads 3,000 and more
        (b"3", "expected a list of entries"),
        (b"\xff\xff", "is not valid JSON"),
        (json.dumps([{**ROW, "caption": [1]}]).encode(), r"`caption` is \[1\], no text"),
        (json.dumps([{**ROW, "caption2": None}]).encode(), "has no `caption2`"),
    ],
)
def test_content_that_is_none_is_one_clear_error(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "swap_obj.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_sugarcrepe(tmp_path, draw(tmp_path / "images", "a.jpg"))


def test_lines_and_judgements_are_within_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = mixbench(tmp_path / "OVEN")
    judged = folder / "qrels" / "qrels.tsv"
    judged.write_text(judged.read_text().replace("q1\td0\t1", "q1\td0\tmuch"))
    with pytest.raises(DataError, match=r"qrels.tsv: cannot be read \(could not convert"):
        read_mixbench(folder)
    monkeypatch.setattr("clip_refine.data.labelled.LINE", 30)
    with pytest.raises(DataError, match="queries.jsonl: .*line 1 has more than the 30 letters"):
        read_mixbench(folder)
    (folder / "queries.jsonl").unlink()
    os.mkfifo(folder / "queries.jsonl")
    with pytest.raises(DataError, match="is no file but a folder, a pipe"):
        read_mixbench(folder)
