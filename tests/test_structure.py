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
    made = {"index.md", "tutorial.md", "api.md"}  # by tools/docs_site.py
    assert sorted(listed) == sorted(pages | made)


def test_every_test_that_a_page_names_is_there():
    """As `tests/FILE.py`, `tests/FOLDER` or `tests/FILE.py -k WORD`, in docs/log.md, too."""
    named, missing = 0, []
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"((?:tests/[\w/]+(?:\.\w+)? ?)+)(-k (?:\w+|\"[\w ]+\"))?", text):
            paths = [ROOT / name for name in match[1].split()]
            source = "".join(path.read_text("utf-8") for path in paths if path.is_file())
            words = {*re.findall(r"\w+", match[2] or "k")} - {"k", "or", "and", "not"}
            # a word of a test's name, or of what it is given
            tests = [rf"(def|class) [tT]est\w*{word}|\"[\w.]*{word}" for word in words]
            found = all(path.exists() for path in paths)
            found = found and all(re.search(test, source) for test in tests)
            named += len(paths)
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
