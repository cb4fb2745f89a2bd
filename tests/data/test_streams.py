"""Pairs that come one after another: all of them, shuffled, the same for any number of helpers."""

import io
import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread

import pytest
import torch

from clip_refine.config import DataConfig, TrainConfig, override
from clip_refine.config.runs import RefineConfig
from clip_refine.data import (
    PairBatch,
    PairStream,
    StreamMixture,
    open_stream,
    stream_batches,
)
from clip_refine.data.images import read_place
from clip_refine.data.loader import swap_words
from clip_refine.models import OpenClipEncoder
from clip_refine.roads import build
from clip_refine.roads.refine import refine
from clip_refine.support.errors import ConfigError, DataError
from clip_refine.toy import ToyPairs
from tests.data.layouts import (
    LAYOUTS,
    Pairs,
    drawn,
    opened,
    write_hub,
    write_image_folder,
    write_images,
    write_jsonl,
    write_parquet,
    write_shards,
    write_table,
)

STREAMED = ["WebDataset", "Parquet", "JSON lines", "JSON lines (content)", "dataset on the Hub"]


def stream(name: str, *, skip: bool = False, **settings) -> PairStream:
    settings = {"shuffle_buffer": 3, **settings}
    return open_stream(name, DataConfig(skip_bad=skip, max_bad=0.3, **settings))


def some(source: PairStream | StreamMixture, count: int, seed: int = 0) -> list[tuple[bytes, str]]:
    pairs = islice(source.pairs(seed=seed), count)
    return [(read_place(pair.place), pair.caption) for pair in pairs]


@pytest.mark.parametrize("layout", STREAMED)
def test_a_pass_has_every_image_once_with_one_of_its_captions(layout: str, tmp_path: Path):
    pairs = drawn(8)
    source = stream(LAYOUTS[layout](tmp_path / "data", pairs))
    captions = {content: texts for _, content, texts in pairs}
    first, second = some(source, 16)[:8], some(source, 16)[8:]
    for one_pass in (first, second):
        assert sorted(content for content, _ in one_pass) == sorted(captions)
        assert all(text in captions[content] for content, text in one_pass)
    assert first != second
    assert some(source, 8) == first
    assert some(source, 8, seed=1) != first
    prefix = source.prefix(3)
    assert [prefix.image_bytes(i) for i in range(3)] == [content for _, content, _ in pairs[:3]]
    assert prefix.captions == [tuple(texts) for _, _, texts in pairs[:3]]


def test_all_captions_of_a_stream(tmp_path: Path):
    pairs = drawn(4)
    source = stream(write_shards(tmp_path, pairs), captions="all", shuffle_buffer=5)
    found = some(source, 12)
    assert sorted(found) == sorted((content, t) for _, content, texts in pairs for t in texts)


@pytest.mark.parametrize("captions", ["one", "all"])
def test_a_buffer_holds_no_more_bytes_than_it_may(
    captions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Room for two images, however many captions; three do not fit, nor two behind a start."""
    pairs = drawn(8)
    sizes = sorted(len(content) for _, content, _ in pairs)
    name = write_parquet(tmp_path, pairs)
    monkeypatch.setattr("clip_refine.data.streams.HELD", sum(sizes[-2:]) + 8)
    per_image = len(pairs[0][2]) if captions == "all" else 1
    settings = {"captions": captions, "shuffle_buffer": per_image}
    expected = some(stream(name, **settings), 40)
    rest = stream(name, **settings).pairs(seed=0, skip=9)
    assert [(read_place(p.place), p.caption) for p in islice(rest, 31)] == expected[9:]
    with pytest.raises(DataError, match=r"wait to be drawn take more .* --data.shuffle-buffer"):
        some(stream(name, captions=captions, shuffle_buffer=3 * per_image), 1)


def test_shards_come_in_another_order_each_pass(tmp_path: Path):
    pairs = drawn(6)
    source = stream(write_shards(tmp_path, pairs, shards=6), shuffle_buffer=1)
    orders = {tuple(content for content, _ in some(source, 6, seed=s)) for s in range(5)}
    assert len(orders) > 2


def test_lengths_where_the_source_tells(tmp_path: Path):
    name = write_shards(tmp_path / "tar", drawn(5))
    assert stream(name).length is None
    for number, count in ((0, 3), (1, 2)):
        stats = tmp_path / "tar" / f"{number:05}_stats.json"
        stats.write_text(json.dumps({"count": 9, "successes": count}))
    assert stream(name).length == 5
    assert stream(write_parquet(tmp_path, drawn(5))).length == 5
    assert stream(write_jsonl(tmp_path, drawn(5))).length is None
    assert stream(write_parquet(tmp_path, drawn(5)), captions="all").length is None


def batches_of(source, model: OpenClipEncoder, **settings) -> list[PairBatch]:
    settings = {"seed": 3, "steps": 5, "batch_size": 4, **settings}
    return list(
        stream_batches(source, preprocess=model.preprocess, tokenizer=model.tokenizer, **settings)
    )


@pytest.mark.parametrize("write", [write_shards, write_jsonl])
def test_workers_and_processes_change_nothing(write, tmp_path: Path, tiny: OpenClipEncoder):
    source = stream(write(tmp_path, drawn(10)))
    alone = batches_of(source, tiny)
    assert [batch.indices for batch in alone] == [list(range(4 * i, 4 * i + 4)) for i in range(5)]
    helped = batches_of(source, tiny, workers=2, swap_seed=1)
    own = [
        [pair.caption for pair in islice(source.pairs(seed=3), 20)][4 * i :][:4] for i in range(5)
    ]
    for batch, texts in zip(helped, own, strict=True):
        wrong = tiny.tokenizer([swap_words(text, 1) or text for text in texts])
        assert batch.wrong_tokens is not None
        assert torch.equal(batch.wrong_tokens, wrong[:, : batch.wrong_tokens.shape[1]])
    halves = [batches_of(source, tiny, rank=rank, processes=2) for rank in (0, 1)]
    for one, other, first, second in zip(alone, helped, *halves, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.pixels, torch.cat([first.pixels, second.pixels]))
        assert torch.equal(one.tokens, torch.cat([first.tokens, second.tokens]))


def test_processes_that_read_files_of_their_own(tmp_path: Path, tiny: OpenClipEncoder):
    """A pass has every pair once, in one of them, each with a number of its own."""
    pairs = drawn(12)
    source = stream(write_shards(tmp_path, pairs, shards=4))
    parts = [source.pairs(seed=3, share=(rank, 2)) for rank in (0, 1)]
    shared = [read_place(pair.place) for part in parts for pair in islice(part, 6)]
    assert sorted(shared) == sorted(content for _, content, _ in pairs)
    settings = {"processes": 2, "own_files": True, "steps": 3}
    halves = [batches_of(source, tiny, rank=rank, **settings) for rank in (0, 1)]
    numbers = [number for half in halves for batch in half for number in batch.indices]
    assert numbers == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    on = batches_of(source, tiny, rank=1, done=2, **settings)
    assert torch.equal(on[0].pixels, halves[1][2].pixels)
    alone = batches_of(source, tiny, own_files=True)
    assert torch.equal(alone[4].pixels, batches_of(source, tiny)[4].pixels)
    with pytest.raises(DataError, match="4 files, too few for 5 processes to have one each"):
        batches_of(source, tiny, rank=4, batch_size=5, processes=5, own_files=True)
    with pytest.raises(DataError, match="6 pairs, fewer than a batch of 7"):
        batches_of(source, tiny, batch_size=14, **settings)


def test_streams_are_mixed_in_their_shares(tmp_path: Path):
    few, many = drawn(3), drawn(6)[3:]
    mixture = StreamMixture(
        [stream(write_shards(tmp_path / "a", few)), stream(write_parquet(tmp_path / "b", many))],
        (3, 1),
    )
    found = some(mixture, 400)
    from_few = sum(text in {t for _, _, texts in few for t in texts} for _, text in found)
    assert 260 < from_few < 340
    assert some(mixture, 400) == found
    assert len(mixture.prefix(4)) == 4


# --- what is wrong --------------------------------------------------------------------------------


def with_bad_rows(folder: Path, share: float) -> str:
    good: Pairs = drawn(6)
    name, content, _ = good[0]
    bad = [(name, content, [" "])] * round(share * 300)
    return write_parquet(folder, [*good * 50, *bad])


def test_a_bad_row_stops_a_stream(tmp_path: Path):
    with pytest.raises(DataError, match="empty caption.*\n.*a bad row in a stream"):
        some(stream(with_bad_rows(tmp_path, 0.1)), 400)


def test_bad_rows_of_a_stream_are_skipped_and_recorded(tmp_path: Path):
    source = stream(with_bad_rows(tmp_path, 0.1), skip=True)
    assert len(some(source, 300)) == 300
    assert len(source.skipped) >= 30
    with pytest.raises(DataError, match="rows are bad .*more than the 30.0% that"):
        some(stream(with_bad_rows(tmp_path / "more", 1.0), skip=True), 600)


def test_a_stream_goes_on_behind_a_file_that_has_most_of_the_bad_rows(tmp_path: Path):
    write_images(tmp_path, drawn(1))
    for file, bad, good in (("a", 0, 600), ("b", 100, 200)):  # a third of b, a ninth of both
        rows = [{"image": "000.jpg", "caption": f"{file} {number}"} for number in range(good)]
        rows[good // 2 : good // 2] = [{"image": "gone.jpg", "caption": "x"}] * bad
        (tmp_path / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, again = (
        stream(str(tmp_path / "{a,b}.jsonl"), skip=True, shuffle_buffer=50) for _ in range(2)
    )
    expected = some(first, 800, seed=0)
    again.go_on(first.progress())
    pairs = islice(again.pairs(seed=0, skip=770), 30)
    assert [pair.caption for pair in pairs] == [caption for _, caption in expected[770:]]
    assert len(again.skipped) == 100


def test_a_stream_that_goes_on_opens_no_file_that_was_used_up(tmp_path: Path):
    """Files of which every pair was drawn are gone by then."""
    pairs = drawn(24)
    name = write_shards(tmp_path, pairs, shards=12)
    whole, first, again = (stream(name, shuffle_buffer=2) for _ in range(3))
    expected = some(whole, 24)
    some(first, 15)
    shard = {content: index // 2 for index, (_, content, _) in enumerate(pairs)}
    used_up = {*range(12)} - {shard[content] for content, _ in expected[15:]}
    assert len(used_up) > 4
    for number in used_up:
        (tmp_path / f"{number:05}.tar").unlink()
    again.go_on(first.progress())
    rest = [(read_place(p.place), p.caption) for p in islice(again.pairs(seed=0, skip=15), 9)]
    assert rest == expected[15:]


def test_a_stream_without_pairs_ends(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(DataError, match="x.jsonl: stream of jsonl without pairs"):
        some(stream(str(tmp_path / "x.jsonl")), 1)


def test_a_stream_that_is_cut_off_names_its_shard(tmp_path: Path):
    name = write_shards(tmp_path, drawn())
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(DataError, match=f"^{shard}: is cut off or no tar file"):
        some(stream(name), 8)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, tiny: OpenClipEncoder):
    content = drawn(1)[0][1]
    spoiled = content[:200] + b"\xff\xd9"  # ends as it should
    source = stream(write_parquet(tmp_path, [("a.jpg", spoiled, ["one"])]))
    for workers in (0, 1):
        with pytest.raises(DataError, match="row with the caption .*cannot be decoded"):
            batches_of(source, tiny, workers=workers)


def test_what_cannot_be_streamed(tmp_path: Path):
    with pytest.raises(
        DataError, match="table cannot be streamed, only jsonl, webdataset, parquet, hub"
    ):
        stream(write_table(tmp_path, drawn()))


def test_nothing_is_held_out_of_a_stream(tmp_path: Path):
    name = write_shards(tmp_path, drawn())
    with pytest.raises(ConfigError, match="data.val is missing: nothing can be held out"):
        build.build_data(DataConfig(train=name, streaming=True), seed=0)


def test_a_stream_of_unknown_length_needs_steps(tmp_path: Path):
    source = stream(write_shards(tmp_path, drawn()))
    with pytest.raises(ConfigError, match="train.steps is missing: .* does not tell how many"):
        build.count_steps(TrainConfig(batch_size=2), source, 1)
    assert build.count_steps(TrainConfig(batch_size=2, steps=7), source, 1) == 7


# --- the road -------------------------------------------------------------------------------------


def toy_rows(count: int) -> list[tuple[str, bytes, list[str]]]:
    toy, rows = ToyPairs("streamed", size=count, captions_per_image=2), []
    for index in range(count):
        content = io.BytesIO()
        toy.load_image(index).save(content, "PNG")
        rows.append((f"{index}.png", content.getvalue(), list(toy.captions[index])))
    return rows


def toy_parquet(folder: Path, count: int) -> str:
    return write_parquet(folder, toy_rows(count))


def test_a_stream_whose_captions_have_no_wrong_twins_is_refused(
    tmp_path: Path, tiny_name: str, table: Path
):
    content = (table.parent / "images" / "000.png").read_bytes()
    rows = [(f"{index}.png", content, ["ein Hund auf der Wiese"]) for index in range(16)]
    config = RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "data": {
                "train": write_parquet(tmp_path / "german", rows),
                "val": str(table),
                "streaming": True,
            },
            "loss": {"contrastive_weight": 1.0, "negatives": "swapped-words"},
            "train": {"batch_size": 8, "steps": 2},
            "out": tmp_path / "run",
        }
    )
    with pytest.raises(ConfigError, match="no captions in which two words can change places"):
        refine(config)


@pytest.mark.parametrize("prior", ["standard_normal", "gaussian_both"])
def test_the_road_from_a_stream(tmp_path: Path, tiny_name: str, table: Path, prior: str):
    config = RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "data": {
                "train": toy_parquet(tmp_path / "data", 40),
                "val": str(table),
                "streaming": True,
                "shuffle_buffer": 16,
            },
            "train": {"batch_size": 8, "precision": "fp32"},
            "prior": {"kind": prior},
            "out": tmp_path / "run",
            "report": False,
        }
    )
    scores = refine(config)
    assert (scores.recipe["steps"], scores.recipe["pairs"]) == (5, 40)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    again = refine(override(config, out=tmp_path / "again", train={"workers": 1, "steps": 3}))
    repeated = (tmp_path / "again" / "log.jsonl").read_text().splitlines()
    assert again.recipe["steps"] == len(repeated) == 3
    losses = [json.loads(line)["loss_total"] for line in repeated]
    assert losses == [line["loss_total"] for line in log[:3]]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address that it is served at."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args) -> None:
            pass

    (tmp_path / "served").mkdir()
    handler = partial(Handler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_shards_at_an_address(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    folder, address = served
    write_shards(folder, drawn())
    name = f"{address}/{{00000..00001}}.tar"
    assert sorted(content for content, _ in some(stream(name), 4)) == sorted(
        content for _, content, _ in drawn()
    )
    assert opened(name).captions == tuple(tuple(texts) for _, _, texts in drawn())
    with pytest.raises(DataError, match=r"00009.tar: cannot be read"):
        some(stream(f"{address}/00009.tar"), 1)


@pytest.mark.parametrize("write", [write_shards, write_parquet, write_hub])
def test_a_split_file_chooses_in_a_stream(write, tmp_path: Path):
    pairs = drawn(6)
    name = write(tmp_path / "data", pairs)
    (tmp_path / "list.txt").write_text("001.png\n004.jpg\n")
    source = stream(name, split_file=tmp_path / "list.txt")
    assert {content for content, _ in some(source, 6)} == {pairs[1][1], pairs[4][1]}
    assert source.length is None


def test_splits_of_a_streamed_dataset(tmp_path: Path):
    name = write_hub(tmp_path / "hub", drawn(6))
    assert len({content for content, _ in some(stream(name), 6)}) == 6
    write_image_folder(tmp_path / "files", drawn(6))
    assert len({content for content, _ in some(stream(f"hf:{tmp_path / 'files'}"), 18)}) == 6
