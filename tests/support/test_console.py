"""What is shown on a terminal stands as it is."""

import io

import pytest
from rich.console import Console

from clip_refine.support import console


def test_titles_and_remarks_are_no_markup_and_no_commands(monkeypatch: pytest.MonkeyPatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(console, "console", terminal)
    assert list(console.Bar("Reading a[/b]", 1).over([1])) == [1]
    console.remark("[/a]\x1bX")
    assert "a]\ufffdX" in terminal.file.getvalue()  # pyright: ignore
    assert "Reading a[/b]" in terminal.file.getvalue()  # pyright: ignore
