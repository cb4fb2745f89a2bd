"""The house stands as it is drawn: imports point one way, and no page of docs/ is hidden."""

import re
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def test_imports_point_one_way(capsys: pytest.CaptureFixture[str]):
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml")) == 0, capsys.readouterr().out


def test_the_documentation_site_lists_every_page():
    """`make docs` would say so, too, where it can be run."""
    listed = re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    made = {"index.md", "tutorial.md", "api.md"}  # by tools/docs_site.py
    assert sorted(listed) == sorted(pages | made)


def test_every_promise_names_tests_that_there_are():
    """docs/security.md: promise → test."""
    told = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+)[ `]", told)
    assert len(named) > 5
    for table in re.findall(r"\| promise \| test \| .*\n\|[-|]+\n((?:\|.*\n)+)", told):
        assert all("tests/" in row.split("|")[2] for row in table.splitlines()), table
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
