"""Files of results: read back as they were written, refused with one text a kind."""

from pathlib import Path

import pytest

from clip_refine.results import (
    Comparison,
    Evidence,
    Record,
    RunScores,
    Scores,
    SuiteScores,
    flat,
    headline,
    read,
)
from clip_refine.support.errors import DataError

KINDS = {
    RunScores: "is no scores.json of a run (",
    Comparison: "is no comparison.json (",
    SuiteScores: "holds no scores of a suite (",
    Evidence: "is no report.json of this version (",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"{}", b"no JSON", b"\xff\xfe", b""])
def test_what_is_something_else_is_said(kind: type[Record], content: bytes, tmp_path: Path):
    path = tmp_path / "file.json"
    with pytest.raises(DataError, match=r"file.json: cannot be read \(No such file"):
        read(kind, path)
    path.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        read(kind, path)
    assert f"{path}: {KINDS[kind]}" in str(refusal.value)
    assert ("--no-report" in str(refusal.value)) == (kind is Evidence)


def test_written_and_read(tmp_path: Path):
    side = Scores(
        geometry={"centroid_distance": 0.5}, retrieval={}, zero_shot={}, pairs=1, captions=2
    )
    run = RunScores(before=side, after=side, recipe={"model": "ö"}, seconds={})
    run.write(tmp_path / "scores.json")
    assert read(RunScores, tmp_path / "scores.json") == run
    assert (tmp_path / "scores.json").read_text(encoding="utf-8") == run.text


def test_the_headline_by_hand():
    retrieval = {"image_to_text_recall@1": 0.5, "text_to_image_recall@1": 0.25}
    assert headline({"centroid_distance": 0.75}, retrieval, [0.5, 1.0]) == {
        "gap": 0.75,
        "mean_recall@1": 0.375,
        "zero_shot_top1": 0.75,
    }
    assert set(headline({"centroid_distance": 1}, retrieval, [])) == {"gap", "mean_recall@1"}


def test_flat():
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": 2}) == {"a.b.c": 1, "e": 2}
