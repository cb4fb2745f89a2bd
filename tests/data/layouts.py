"""One set of pairs written in every layout that the package reads."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from clip_refine.config import DataConfig
from clip_refine.data import CaptionedImages, open_pairs

Pairs = Sequence[tuple[str, bytes, Sequence[str]]]
"""(file name, content, captions) of every image."""


def drawn(count: int = 4) -> Pairs:
    """Up to 32 images of one colour each, JPEG and PNG in turn, with three captions each."""
    made = []
    for index in range(count):
        kind = ("JPEG", "PNG")[index % 2]
        content = io.BytesIO()
        Image.new("RGB", (16, 12), (40 * index % 256, 100, 200)).save(content, kind)
        name = f"{index:03}.{'jpg' if kind == 'JPEG' else 'png'}"
        made.append((name, content.getvalue(), [f"picture {index}, text {k}" for k in range(3)]))
    return made


def write_images(folder: Path, pairs: Pairs) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content, _ in pairs:
        (folder / name).write_bytes(content)


def write_table(folder: Path, pairs: Pairs, *, name: str = "captions.csv") -> str:
    write_images(folder, pairs)
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        rows = [(image, text) for image, _, texts in pairs for text in texts]
        csv.writer(file).writerows([("file_name", "caption"), *rows])
    return str(folder / name)


def write_tsv(folder: Path, pairs: Pairs) -> str:
    write_images(folder, pairs)
    rows = "".join(f"{image}\t{text}\n" for image, _, texts in pairs for text in texts)
    (folder / "captions.tsv").write_text(f"filepath\ttitle\n{rows}", encoding="utf-8")
    return str(folder / "captions.tsv")


def write_kaggle(folder: Path, pairs: Pairs) -> str:
    write_images(folder / "flickr30k_images", pairs)
    rows = "".join(
        f"{image}| {number}| {text}\n"
        for image, _, texts in pairs
        for number, text in enumerate(texts)
    )
    (folder / "results.csv").write_text(f"image_name| comment_number| comment\n{rows}")
    return str(folder / "results.csv")


def write_kaggle_8k(folder: Path, pairs: Pairs) -> str:
    write_images(folder / "Images", pairs)
    rows = "".join(f'{image},"{text}"\n' for image, _, texts in pairs for text in texts)
    (folder / "captions.txt").write_text(f"image,caption\n{rows}", encoding="utf-8")
    return str(folder / "captions.txt")


def write_token(folder: Path, pairs: Pairs) -> str:
    write_images(folder / "Flicker8k_Dataset", pairs)
    rows = "".join(
        f"{image}#{number}\t{text}\n"
        for image, _, texts in pairs
        for number, text in enumerate(texts)
    )
    (folder / "Flickr8k.token.txt").write_text(rows, encoding="utf-8")
    return str(folder / "Flickr8k.token.txt")


def write_coco(folder: Path, pairs: Pairs) -> str:
    write_images(folder / "val2017", pairs)
    (folder / "annotations").mkdir(exist_ok=True)
    images = [{"id": 10 + i, "file_name": name} for i, (name, _, _) in enumerate(pairs)]
    annotations = [
        {"id": 100 * i + k, "image_id": 10 + i, "caption": text}
        for i, (_, _, texts) in enumerate(pairs)
        for k, text in enumerate(texts)
    ]
    path = folder / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return str(path)


def write_karpathy(folder: Path, pairs: Pairs) -> str:
    write_images(folder / "val2014", pairs)
    images = [
        {
            "filepath": "val2014",
            "filename": name,
            "split": "train" if i % 2 == 0 else "restval",
            "sentences": [{"raw": text, "tokens": text.split()} for text in texts],
        }
        for i, (name, _, texts) in enumerate(pairs)
    ]
    images.append({"filename": "x.jpg", "split": "test", "sentences": [{"raw": "not read"}]})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return str(folder / "dataset_coco.json")


def write_jsonl(folder: Path, pairs: Pairs) -> str:
    write_images(folder, pairs)
    rows = [json.dumps({"image": name, "captions": texts}) for name, _, texts in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder / "pairs.jsonl")


def write_json_list(folder: Path, pairs: Pairs) -> str:
    write_images(folder, pairs)
    rows = [{"image": name, "captions": texts} for name, _, texts in pairs]
    (folder / "pairs.json").write_text(json.dumps(rows, indent=1))
    return str(folder / "pairs.json")


def write_sidecars(folder: Path, pairs: Pairs) -> str:
    write_images(folder, pairs)
    for name, _, texts in pairs:
        (folder / name).with_suffix(".txt").write_text("\n".join(texts), encoding="utf-8")
    return str(folder)


def write_jsonl_with_content(folder: Path, pairs: Pairs) -> str:
    import base64

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        json.dumps({"image": {"bytes": base64.b64encode(content).decode()}, "caption": texts})
        for _, content, texts in pairs
    ]
    (folder / "content.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder / "content.jsonl")


def _dataset(pairs: Pairs):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))}
    )
    images = [{"bytes": content, "path": name} for name, content, _ in pairs]
    rows = {"image": images, "caption": [list(texts) for _, _, texts in pairs]}
    return datasets.Dataset.from_dict(rows, features=features)


def write_parquet(folder: Path, pairs: Pairs) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    _dataset(pairs).to_parquet(str(folder / "pairs.parquet"))
    return str(folder / "pairs.parquet")


def write_parquet_with_paths(folder: Path, pairs: Pairs) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    write_images(folder, pairs)
    rows = [(name, text) for name, _, texts in pairs for text in texts]
    table = pa.table({"image_path": [row[0] for row in rows], "text": [row[1] for row in rows]})
    parquet.write_table(table, folder / "paths.parquet")
    return str(folder / "paths.parquet")


def write_saved(folder: Path, pairs: Pairs) -> str:
    _dataset(pairs).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def write_hub(folder: Path, pairs: Pairs) -> str:
    """A folder laid out as a repository on the Hub, which `datasets` opens by its path."""
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = pairs if split == "train" else pairs[:1]
        _dataset(rows).to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return f"hf:{folder}"


def write_image_folder(folder: Path, pairs: Pairs) -> str:
    write_images(folder / "train", pairs)
    rows = [
        json.dumps({"file_name": name, "text": text}) for name, _, texts in pairs for text in texts
    ]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(rows))
    return str(folder)


def write_image_folder_csv(folder: Path, pairs: Pairs) -> str:
    write_table(folder, pairs, name="metadata.csv")
    return str(folder)


def write_shards(folder: Path, pairs: Pairs, *, shards: int = 2) -> str:
    """As img2dataset writes them, but with several captions as a list in the .json."""
    folder.mkdir(parents=True, exist_ok=True)
    share = -(-len(pairs) // shards)
    for number in range(shards):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for name, content, texts in pairs[number * share : (number + 1) * share]:
                stem, _, extension = name.rpartition(".")
                parts = {extension: content, "json": json.dumps({"captions": texts}).encode()}
                add_sample(tar, stem, parts)
    return str(folder / f"{{00000..{shards - 1:05}}}.tar")


def add_sample(tar: tarfile.TarFile, key: str, parts: dict[str, bytes]) -> None:
    for extension, content in parts.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


LAYOUTS: dict[str, Callable[[Path, Pairs], str]] = {
    "CSV table": write_table,
    "TSV table": write_tsv,
    "table with | between the columns": write_kaggle,
    "CSV table (captions.txt)": write_kaggle_8k,
    "token file": write_token,
    "COCO captions": write_coco,
    "Karpathy split file": write_karpathy,
    "JSON lines": write_jsonl,
    "JSON lines (content)": write_jsonl_with_content,
    "JSON list": write_json_list,
    "images with a text file each": write_sidecars,
    "Parquet": write_parquet,
    "Parquet (paths)": write_parquet_with_paths,
    "dataset saved to disk": write_saved,
    "dataset on the Hub": write_hub,
    "image folder with metadata": write_image_folder,
    "image folder with metadata (CSV)": write_image_folder_csv,
    "WebDataset": write_shards,
}
"""What each is recognised as, and how to write it; the value gives the name to open."""


def opened(
    name: str, *, skip: bool = False, limit: float = 0.05, training: bool = True, **settings
) -> CaptionedImages:
    """A source opened as its kind is recognised."""
    data = DataConfig(skip_bad=skip, max_bad=limit, **settings)
    pairs = open_pairs(name, data, training=training)
    assert isinstance(pairs, CaptionedImages)
    return pairs
