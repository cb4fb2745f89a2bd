"""What the documentation site has besides docs/: README.md first, the API's pages, the examples."""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config) -> Files:
    """Add pages that are made of other files."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = re.sub(r'(\]\(|src=")docs/', r"\1", readme)
    rooms = re.findall(r'^    "(clip_refine.*)",$', (ROOT / "tests/test_api.py").read_text(), re.M)
    pages = {"index.md": readme, "api.md": "# API\n\n" + "".join(f"::: {r}\n\n" for r in rooms)}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / "examples").iterdir()):
        if path.is_file():
            files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links to the examples, which lie beside docs/ in the repository and inside it here."""
    return markdown.replace("](../examples/", "](examples/")
