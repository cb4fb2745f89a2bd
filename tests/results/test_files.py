"""Files of results: read back as they were written, refused with one text a kind."""

from pathlib import Path

import pytest

from clip_refine.results import (
    Comparison,
    ComparisonRow,
    Evidence,
    Interval,
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


def test_results_are_tables():
    def scores(gap: float, r1: float) -> Scores:
        return Scores(
            geometry={"centroid_distance": gap},
            retrieval={"image_to_text_recall@1": r1},
            zero_shot={},
            pairs=10,
            captions=10,
        )

    change = Interval(mean=0.25, low=0.1, high=0.3)
    found = RunScores(
        before=scores(0.8, 0.5),
        after=scores(0.2, 0.75),
        difference={"retrieval.image_to_text_recall@1": change},
        recipe={},
        seconds={},
    ).to_pandas()
    assert list(found.columns) == ["score", "before", "after", "change", "low", "high"]
    recall = found.set_index("score").loc["retrieval.image_to_text_recall@1"]
    assert list(recall) == [0.5, 0.75, 0.25, 0.1, 0.3]
    assert found.set_index("score").loc["geometry.centroid_distance"].isna().sum() == 2
    row = ComparisonRow(
        recipe="pre-trained",
        seed=1,
        learning_rate=None,
        steps=0,
        pairs=0,
        geometry={"centroid_distance": 0.8},
        retrieval={},
        zero_shot={"cifar10": {"top1": 0.5}},
        linear_probe={},
        selection=None,
        seconds=0.0,
        peak_memory=0.0,
    )
    table = Comparison(rows=(row,), summary=(), learning_rates=()).to_pandas()
    assert table["zero_shot.cifar10.top1"].tolist() == [0.5]
