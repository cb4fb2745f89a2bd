"""The example runs as it stands, only shorter."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clip_refine.vectors.files import save_peer
from clip_refine.vectors.transforms import Fold

EXAMPLE = Path(__file__).parents[1] / "examples" / "01_by_hand.py"


def test_by_hand():
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), "2"], capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    assert "before: gap" in ran.stdout
    assert "after: gap" in ran.stdout


def test_it_stays_short():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed: pip install 'ray[data]'"
)
def test_ray_data(tmp_path: Path):
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    (tmp_path / "in").mkdir()
    table = pa.table({"id": list(range(50)), "image_embedding": list(rows)})
    pq.write_table(table, tmp_path / "in/a.parquet")
    fold = Fold.fit(torch.from_numpy(rows), torch.from_numpy(rows))
    save_peer(fold, tmp_path / "maps")
    example = EXAMPLE.with_name("02_ray_data.py")
    paths = [str(tmp_path / name) for name in ("maps", "in", "out")]
    subprocess.run([sys.executable, str(example), *paths], check=True, timeout=200)
    found = pq.read_table(tmp_path / "out").sort_by("id")
    mapped = np.stack([np.asarray(row) for row in found["image_embedding"].to_pylist()])
    expected = fold.transform_image(torch.from_numpy(rows)).numpy()
    assert np.abs(mapped - expected).max() < 1e-6
