"""What the documentation site has besides docs/: README.md first, a tutorial, API and examples."""

import json
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


class Comments(griffe.Extension):
    """Shows what a comment beside a field, or above it, says of it."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        if attr.docstring or not attr.lineno or not isinstance(attr.parent, griffe.Class):
            return
        lines = attr.lines_collection[attr.filepath]
        said = [lines[attr.lineno - 1].partition("  # ")[2]]
        above = attr.lineno - 2
        while not said[-1] and lines[above].lstrip().startswith("#"):
            said.insert(0, lines[above].strip("# "))
            above -= 1
        if text := " ".join(filter(None, said)):
            attr.docstring = griffe.Docstring(f"{text[0].upper()}{text[1:]}.", parent=attr)


def tutorial() -> str:
    """The quick-start notebook as a page."""
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    code = "```python\n{}\n```"
    return "\n\n".join(text if kind == "markdown" else code.format(text) for kind, text in cells)


def on_files(files: Files, config) -> Files:
    """Add pages that are made of other files."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = re.sub(r'(\]\(|src=")docs/', r"\1", readme)
    rooms = re.findall(r'^    "(clip_refine.*)",$', (ROOT / "tests/test_api.py").read_text(), re.M)
    api = "# API\n\n" + "".join(f"::: {room}\n\n" for room in rooms)
    pages = {"index.md": readme, "tutorial.md": tutorial(), "api.md": api}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / "examples").iterdir()):
        if path.is_file():
            files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links to the examples, which lie beside docs/ in the repository and inside it here."""
    return markdown.replace("](../examples/", "](examples/")
