"""Rivals of the bench do the same work as ours, and its rows run."""

import argparse
import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

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
