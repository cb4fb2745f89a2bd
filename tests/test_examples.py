"""The example runs as it stands, only shorter."""

import subprocess
import sys
from pathlib import Path

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
