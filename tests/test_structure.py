"""The house stands as it is drawn: imports point one way, rooms stay small."""

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "clip_refine").rglob("*.py"))


def test_imports_point_one_way(capsys: pytest.CaptureFixture[str]):
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml")) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_rooms_are_small(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 320
