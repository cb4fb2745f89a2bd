"""The house stands as it is drawn: imports point one way, and no page of docs/ is hidden."""

import ast
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
    assert sorted(listed) == sorted({*pages, "index.md", "api.md"})  # made by tools/docs_site.py


def test_every_test_that_a_page_names_is_there():
    """As `tests/FILE.py`, `tests/FOLDER` or `tests/FILE.py -k WORD`, in docs/log.md, too."""
    named, missing = 0, []
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"(tests/[\w/]+(?:\.\w+)?)(?: -k (\w+))?", text):
            path, word = ROOT / match[1], match[2] or ""
            found = path.exists()
            if found and word:
                found = re.search(rf"(def|class) [tT]est\w*{word}", path.read_text("utf-8"))
            named += 1
            missing += [] if found else [f"{page.name}: {match[0]}"]
    assert not missing
    assert named > 50


def test_every_promise_names_its_tests():
    """docs/security.md: promise → test."""
    told = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    tables = re.findall(r"\| promise \| test \| .*\n\|[-|]+\n((?:\|.*\n)+)", told)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 5
    assert not [row for row in rows if "tests/" not in row.split("|")[2]]


def test_a_skip_for_want_of_a_package_says_how_to_have_it():
    bare = []
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                said = [ast.unparse(k.value) for k in node.keywords if k.arg == "reason"]
                bare += [] if said else [f"{file}:{node.lineno}"]
    assert not bare
