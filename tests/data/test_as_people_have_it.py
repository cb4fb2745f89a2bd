"""Data as other programs leave it: read as it is meant, or refused with what is wrong."""

import gzip
import json
import struct
import tarfile
import unicodedata
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from clip_refine.config import DataConfig
from clip_refine.data import open_stream, recognise
from clip_refine.data.images import (
    FORMATS,
    MAX_RATIO,
    check_image,
    decode_image,
    image_files,
)
from clip_refine.data.rows import read_quoted, texts_of
from clip_refine.roads.check import scan_image
from clip_refine.support.errors import DataError
from tests.data.files import encoded
from tests.data.layouts import add_sample, drawn, opened, write_images

# --- tables ---------------------------------------------------------------------------------------


def table(folder: Path, text: str | bytes, name: str = "c.csv") -> str:
    write_images(folder, drawn())
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


@pytest.mark.parametrize("written", [json.dumps(["a dog", "it's"]), repr(["a dog", "it's"])])
def test_lists_of_captions_in_a_cell(tmp_path: Path, written: str):
    quoted = written.replace('"', '""')
    names = {
        "a.csv": f'filename,raw\n000.jpg,"{quoted}"\n',
        "a.tsv": f"filename\traw\n000.jpg\t{written}\n",
        "a.jsonl": json.dumps({"image": "000.jpg", "captions": written}) + "\n",
    }
    for name, text in names.items():
        assert opened(table(tmp_path, text, name)).captions == (("a dog", "it's"),), name


def test_columns_and_endings_in_capitals(tmp_path: Path):
    for header in ("Image,Caption", "FILE_NAME,TEXT", "img,txt"):
        source = opened(table(tmp_path, f"{header}\n000.jpg,a dog\n", "c.csv"))
        assert source.captions == (("a dog",),)
    # a name as it is known comes before one in other letters
    source = opened(table(tmp_path, "Image,path,caption\nno.jpg,000.jpg,a dog\n", "c.csv"))
    assert len(source) == 1
    with pytest.raises(DataError, match=r"no captions in it. Did you mean .*c.csv\?"):
        recognise(str(tmp_path))
    for ending in (".txt", ".TXT"):
        folder = tmp_path / ending
        folder.mkdir()
        (folder / "IMG_1.JPG").write_bytes((tmp_path / "000.jpg").read_bytes())
        (folder / f"IMG_1{ending}").write_text("a dog")
        assert opened(str(folder)).captions == (("a dog",),)


def test_what_only_looks_like_a_list():
    for text in ("[sic] a dog", "[]?", "[1, 2]", "[a, b]"):
        assert texts_of(text) == (text,)
    assert "without commas" in texts_of("['a dog' 'a cat']")
    assert "without commas" in texts_of("['a dog'\n 'a cat']")
    assert "cannot be read" in texts_of('["a dog", "a c')
    assert texts_of("[\"he said 'a' 'b'\"]") == ("he said 'a' 'b'",)
    assert "no caption" in texts_of("[]")


MISTAKES = {
    '001.png,"Stop" sign on a street': "text before or behind a field in double quotes",
    '001.png,"a dog runs': "never closed",
    "001.png," + "word " * 40_000: "more than 131,072 letters",
}


@pytest.mark.parametrize("mark", [",", ";"])
@pytest.mark.parametrize("line", MISTAKES)
@pytest.mark.parametrize("quoted", ["", '"'])
def test_a_mistake_costs_one_line(tmp_path: Path, line: str, mark: str, quoted: str):
    rows = [
        f"00{i % 3}.{'png' if i % 3 == 1 else 'jpg'},{quoted}text {i}{quoted}" for i in range(9)
    ]
    rows[1] = line
    text = "\n".join(["image,caption", *rows, ""]).replace(",", mark)
    source = opened(table(tmp_path, text), skip=True, limit=0.2)
    assert sum(map(len, source.captions)) == 8
    [bad] = source.skipped
    assert bad.where.endswith("line 3")
    assert MISTAKES[line] in bad.problem


def test_quoted_fields_over_several_lines():
    lines = ["image,text\n", 'a.png,"one,\n', 'two ""x""\n', 'three"\n', "b.png,four\n"]
    assert list(read_quoted(lines, ",")) == [
        (1, ["image", "text"]),
        (4, ["a.png", 'one,\ntwo "x"\nthree']),
        (5, ["b.png", "four"]),
    ]


def test_semicolons_between_columns(tmp_path: Path):
    text = 'image;caption\n000.jpg;a dog, brown\n001.png;"a cat; grey"\n'
    source = opened(table(tmp_path, text))
    assert source.captions == (("a dog, brown",), ("a cat; grey",))
    assert source.kind == "CSV table with semicolons"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16(tmp_path: Path, encoding: str):
    text = "image,caption\n000.jpg,ein Hörnchen\n"
    for name in ("c.csv", "c.txt"):
        source = opened(table(tmp_path, text.encode(encoding), name))
        assert source.captions == (("ein Hörnchen",),)
    with pytest.raises(DataError, match=r"c.jsonl: is UTF-16. Save it as UTF-8"):
        opened(table(tmp_path, '{"image": "000.jpg"}'.encode(encoding), "c.jsonl"))
    with pytest.raises(DataError, match=r"odd.csv: is damaged UTF-16"):
        opened(table(tmp_path, text.encode("utf-16")[:-1], "odd.csv"))


def test_back_slashes_and_accents_in_paths(tmp_path: Path):
    pairs = drawn()
    decomposed = unicodedata.normalize("NFD", "caf\u00e9")
    write_images(tmp_path / "im" / decomposed, pairs)
    rows = f"im\\caf\u00e9\\{pairs[0][0]},one\nim/caf\u00e9/{pairs[1][0]},two\n"
    (tmp_path / "c.csv").write_text(f"image,caption\n{rows}", encoding="utf-8")
    (tmp_path / "list.txt").write_text(f"caf\u00e9\\{pairs[1][0]}\n", encoding="utf-8")
    assert len(opened(str(tmp_path / "c.csv"))) == 2
    assert len(opened(str(tmp_path / "c.csv"), split_file=tmp_path / "list.txt")) == 1


@pytest.mark.parametrize("ids", [(str, int), (int, str), (float, str)])
def test_coco_ids_as_text_on_one_side(tmp_path: Path, ids: tuple[type, type]):
    here, there = ids
    write_images(tmp_path, drawn())
    images = [{"id": here(i), "file_name": name} for i, (name, _, _) in enumerate(drawn())]
    annotations = [{"image_id": there(i), "caption": f"photo {i}"} for i in range(4)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert opened(str(tmp_path / "c.json")).captions == tuple((f"photo {i}",) for i in range(4))


def test_conversations_as_llava_has_them(tmp_path: Path):
    def record(name: str) -> dict:
        said = {"human": "<image>\nDescribe it.", "gpt": f"It is {name}."}
        more = [{"from": "human", "value": "Red?"}, {"from": "gpt", "value": "No."}]
        turns = [{"from": who, "value": text} for who, text in said.items()]
        return {"id": name, "image": name, "conversations": turns + more}

    records = [record(name) for name, _, _ in drawn()]
    expected = tuple((f"It is {name}.",) for name, _, _ in drawn())
    lines = "\n".join(map(json.dumps, records))
    for name, text in {"llava.json": json.dumps(records, indent=1), "llava.jsonl": lines}.items():
        assert opened(table(tmp_path, text, name)).captions == expected
    asked = [{"role": "user", "content": "What?"}]
    assert "without an answer" in texts_of(asked)
    assert texts_of([*asked, {"role": "assistant", "content": "A dog."}]) == ("A dog.",)


def test_compressed_files_are_named_as_such(tmp_path: Path):
    for name in ("c.csv.gz", "s.tgz", "photos.zip"):
        with pytest.raises(DataError, match=f"{name}: is compressed. Unpack it"):
            recognise(str(tmp_path / name))


# --- images ---------------------------------------------------------------------------------------


def with_text(kind: str, size: int = 2_000_000, **how) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    getattr(info, kind)("Comment", "x" * size, **how)
    return info


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.effect_noise((64, 48), 50).convert("RGB")


def test_png_with_large_metadata(picture: Image.Image):
    large = {
        "profile": {"icc_profile": bytes(2_000_000)},
        "zTXt": {"pnginfo": with_text("add_text", zip=True)},
        "iTXt": {"pnginfo": with_text("add_itxt", zip=True)},
    }
    for name, how in large.items():
        data = encoded(picture, "PNG", **how)
        assert check_image(data) is None, name
        assert decode_image(data, name).tobytes() == picture.tobytes()
        assert scan_image(data, name).width == 64


@pytest.mark.parametrize("behind", [False, True])
def test_png_with_a_wrong_checksum_of_its_text(picture: Image.Image, behind: bool, tmp_path: Path):
    body = b"Comment\0some words"
    chunk = struct.pack(">I", len(body)) + b"tEXt" + body
    data = encoded(picture, "PNG")
    at = data.index(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    damaged = data[:at] + chunk + bytes(4) + data[at:]
    (tmp_path / "x.png").write_bytes(damaged)
    assert check_image(tmp_path / "x.png") is None
    assert decode_image(tmp_path / "x.png", "x").tobytes() == picture.tobytes()
    at = data.index(b"IDAT") + 8  # in the pixels it stays an error
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(data[:at] + b"\0\0" + data[at + 2 :], "x")


def test_xmp_still_turns_an_image_whose_profile_is_too_large():
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    image = Image.new("RGB", (30, 20))
    sizes = [
        decode_image(encoded(image, "PNG", pnginfo=info, **how), "x").size
        for how in ({}, {"icc_profile": bytes(2_000_000)})
    ]
    assert sizes == [(20, 30), (20, 30)]


@pytest.mark.parametrize("size", [(1, MAX_RATIO + 1), (2 * MAX_RATIO + 1, 2)])
def test_narrow_images_that_would_fill_the_memory_are_refused(size: tuple[int, int]):
    data = encoded(Image.new("RGB", size), "PNG")
    assert "times as long as it is narrow" in (check_image(data) or "")
    assert check_image(encoded(Image.new("RGB", (1, MAX_RATIO)), "PNG")) is None


def test_every_ending_of_every_format_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    endings = [ending for endings in FORMATS.values() for ending in endings]
    assert {".jfif", ".avif", ".jp2", ".ppm", ".jpeg"} <= set(endings)
    for ending in endings:
        (tmp_path / f"x{ending.upper()}").touch()
    for name in ("a.heic", "b.heic", "c.svg", "README", "d.txt"):
        (tmp_path / name).touch()
    for name in (".ipynb_checkpoints/x.png", "__MACOSX/x.png", "._x.jpg", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = image_files(tmp_path, expected=frozenset((".txt",)))
    assert {path.suffix.lower() for path in found} == set(endings)
    assert len(found) == len(endings)
    said = capsys.readouterr().err
    assert "4 files are no images by their endings (2 .heic, 1 " in said


# --- folders and shards ---------------------------------------------------------------------------


def test_a_text_file_beside_each_image(tmp_path: Path):
    """Also beside the Parquet file of addresses that img2dataset leaves there."""
    write_images(tmp_path / "00000", drawn())
    (tmp_path / "00000.parquet").touch()
    for name, _, texts in drawn()[1:]:
        path = (tmp_path / "00000" / name).with_suffix(".txt")
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        path.with_suffix(".json").write_text("{}")
    assert recognise(str(tmp_path)) == "sidecars"
    source = opened(str(tmp_path))
    assert source.captions == tuple(tuple(texts) for _, _, texts in drawn()[1:])
    assert [Path(name).name for name in source.uncaptioned] == ["000.jpg"]
    (tmp_path / "list.txt").write_text("00000/002.jpg\n")
    assert len(opened(str(tmp_path), split_file=tmp_path / "list.txt")) == 1
    (tmp_path / "00000" / "001.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"001.txt: is empty. Write a caption"):
        opened(str(tmp_path))


def test_captions_in_a_folder_of_their_own(tmp_path: Path):
    write_images(tmp_path / "images" / "a", drawn())
    (tmp_path / "captions" / "a").mkdir(parents=True)
    for name, _, texts in drawn():
        (tmp_path / "captions" / "a" / name).with_suffix(".txt").write_text(texts[0])
    assert opened(str(tmp_path)).captions == tuple((texts[0],) for _, _, texts in drawn())


def test_folders_with_other_texts_are_none_of_these(tmp_path: Path):
    write_images(tmp_path, drawn())
    (tmp_path / "README.txt").write_text("about them")
    with pytest.raises(DataError, match="there are no captions in it"):
        recognise(str(tmp_path))


def shard(path: Path, parts: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in parts.items():
            key, _, extension = name.partition(".")
            add_sample(tar, key, {extension: content})
    return str(path)


def in_stream(name: str, **settings) -> list[str]:
    stream = open_stream(name, DataConfig(skip_bad=True, max_bad=1.0, **settings))
    return [text for rows in stream.open_rows(None) for row in rows() for text in row.captions]


def test_parts_of_samples_apart(tmp_path: Path):
    jpeg, png = (content for _, content, _ in drawn(2))
    parts = {"0.jpg": jpeg, "1.png": png, "0.txt": b"a dog", "1.txt": b"a cat"}
    name = shard(tmp_path / "s.tar", parts)
    source = opened(name)
    assert source.captions == (("a dog",), ("a cat",))
    assert source.image_bytes(1) == png
    stream = open_stream(name, DataConfig())
    problems = [row.problem for rows in stream.open_rows(None) for row in rows() if row.problem]
    assert len(problems) == 2
    assert "side by side" in problems[0]


def test_keys_with_dots(tmp_path: Path):
    jpegs = [content for _, content, *_ in drawn(3)]  # each another, or they would be one image
    jpeg = jpegs[0]
    numbered = {
        f"img.{i:03}.{e}": c for i in range(3) for e, c in (("jpg", jpegs[i]), ("txt", b"%d" % i))
    }
    name = shard(tmp_path / "a.tar", numbered)
    assert opened(name).captions == (("0",), ("1",), ("2",))
    assert in_stream(name) == ["0", "1", "2"]
    named = {"0.input.jpg": jpeg, "0.outputs.txt": b"a dog"}
    name = shard(tmp_path / "b.tar", named)
    with pytest.raises(DataError, match=r"first dot.*--data.image-column input.jpg"):
        opened(name)
    columns = {"image_column": "input.jpg", "caption_column": "outputs.txt"}
    assert opened(name, **columns).captions == (("a dog",),)
    several = {"0.0.jpg": jpeg, "0.1.jpg": jpeg, "0.txt": b"two"}
    name = shard(tmp_path / "c.tar", several)
    assert opened(name, image_column="1.jpg").captions == (("two",),)


def test_shards_of_other_formats_and_with_clutter(tmp_path: Path):
    image = Image.new("RGB", (16, 12), "red")
    parts = {"0.avif": encoded(image, "AVIF"), "0.txt": b"a dog"}
    clutter = {"__MACOSX/0.avif": b"\0\5\x16\7", "._0.avif": b"\0\5\x16\7"}
    assert opened(shard(tmp_path / "s.tar", parts | clutter)).captions == (("a dog",),)


def test_parts_that_nobody_asks_for_may_be_large(tmp_path: Path):
    """Such as masks and vectors in a `.json` beside the caption."""
    large = json.dumps({"caption": "a cat", "masks": "x" * (1 << 20)}).encode()
    parts = {"a.png": drawn(1)[0][1], "a.txt": b"a dog", "a.json": large}
    name = shard(tmp_path / "s.tar", parts)
    assert opened(name).captions == (("a dog",),)
    [pair] = islice(open_stream(name).pairs(seed=0), 1)
    assert pair.caption == "a dog"
    with pytest.raises(DataError, match=r"its part .json has .* bytes, more than the 1,048,576"):
        opened(shard(tmp_path / "t.tar", {n: part for n, part in parts.items() if n != "a.txt"}))


def test_compressed_shards(tmp_path: Path):
    path = Path(shard(tmp_path / "s.tar", {"0.jpg": drawn(1)[0][1], "0.txt": b"a dog"}))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=r"s.tar: is compressed with gzip.*Unpack it"):
        opened(str(path))


def test_hidden_shards_are_left_out(tmp_path: Path):
    parts = {"0.jpg": drawn(1)[0][1], "0.txt": b"a dog"}
    shard(tmp_path / "s.tar", parts)
    (tmp_path / "._s.tar").write_bytes(b"\0\5\x16\7" + bytes(100))
    assert len(opened(str(tmp_path))) == 1
