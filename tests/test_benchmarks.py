"""Benchmarks that need a GPU run on a CPU, at a small size, and count what there is to count."""

import runpy
from pathlib import Path

import open_clip
import pytest

from tests.conftest import TINY

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


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
