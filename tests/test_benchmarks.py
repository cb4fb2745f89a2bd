"""Rivals of the bench do the same work as ours; what needs a GPU runs on a CPU, at a small size."""

import argparse
import ast
import importlib
import runpy
from pathlib import Path
from typing import Any

import open_clip
import pytest

from tests.conftest import TINY

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("bench")


def test_loops_beside_ours_find_the_same(bench: Any):
    retrieval, geometry = bench.metrics(argparse.Namespace(pairs=300))
    theirs, ours = retrieval.theirs().tolist(), list(retrieval.ours().values())
    assert theirs == pytest.approx(ours)
    names = ("centroid_distance", "alignment", "uniformity_log", "hubness_skewness")
    numbers = geometry.ours()
    expected = [numbers[name] for name in (*names, "text_first_share")]
    assert geometry.theirs().tolist() == pytest.approx(expected, rel=0.01)


def test_a_round_is_a_ratio_and_patience_ends_them(bench: Any):
    row = bench.Row("what", "rival", lambda: 6.0, lambda: 2.0, unit="GiB")
    assert bench.measure(row, 3, 10) == [(6.0, 2.0)]
    row = bench.Row("what", "rival", lambda: None, lambda: None)
    assert len(bench.measure(row, 3, 10)) == 3
    assert len(bench.measure(row, 3, 0)) == 1


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_what_scripts_import_is_there(script: Path):
    """No other test runs most of them, and modules move."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clip_refine"):
            exec(compile(ast.Module([node], []), str(script), "exec"), {})


def test_a_state_is_saved_and_read_as_runs_do_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    command = ["saving.py", "--millions", "0.01", "--rounds", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    runpy.run_path(str(BENCHMARKS / "saving.py"), run_name="__main__")
    assert "read back, verified: " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_gpus_counts_attention(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Without a graph it is one call that PyTorch's counter does not know."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-of-tests", TINY)
    monkeypatch.syspath_prepend(BENCHMARKS)
    size = ["--batch", "4", "--micro", "2", "--steps", "1"]
    command = ["gpu.py", "--device", "cpu", "--models", "tiny-of-tests", "tiny-of-tests", *size]
    monkeypatch.setattr("sys.argv", command)
    found = runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    first, second = (row for row in rows if row[0] == "| tiny-of-tests")
    assert [first[2], second[2]] == ["4", "2"]
    assert float(first[5]) > 0  # times as fast
    aims = [row for row in rows if row[-1] == "other machine |"]
    assert len(aims) == 3
    assert float(aims[2][2]) > 0  # seconds of an epoch

    def block(tokens: int, width: int) -> int:
        """Query, key, value and output, both layers behind, and attention itself."""
        return 2 * tokens * width * (4 + 8) * width + 4 * tokens**2 * width

    image = 2 * 9 * 32 * 3 * 16**2 + 2 * block(1 + 9, 32) + 2 * 32 * 16
    text = 2 * block(16, 16) + 2 * 16 * 16  # 8 words, begin and end, in the next 8
    model = found["random_model"]("tiny-of-tests")
    batch = found["PairBatch"](
        found["torch"].zeros(2, 3, 48, 48),
        model.tokenizer(["a photo of a dog in the park"] * 2),
        (),
    )
    assert found["forward_flops"](model, batch) == image + text
