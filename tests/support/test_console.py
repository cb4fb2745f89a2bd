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


def test_without_a_terminal_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(console.TALK, "pace", 0.0)
    bar = console.Bar("Refining", 3, transient=True)
    for _ in bar.over("abc"):
        bar.remark("loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["Refining: 1 of 3", "Refining: 2 of 3"]
    assert lines[0].endswith("loss 1.5")
    assert lines[1].endswith(" s left, loss 1.5")
    monkeypatch.setattr(console.TALK, "pace", 30.0)
    assert list(console.Bar("Refining", 3, transient=True).over("abc")) == list("abc")
    assert capsys.readouterr().err == ""


def test_no_colour_has_no_bold_either(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = console.PlainConsole(file=io.StringIO(), force_terminal=True)
    terminal.print("[bold]a[/bold] [red]b[/red]")
    assert terminal.file.getvalue() == "a b\n"  # pyright: ignore


def test_quiet_and_verbose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(console, "TALK", console.Talk())
    monkeypatch.setattr(console.console, "quiet", False)
    console.talk(quiet=True, verbose=False)
    console.remark("hidden")
    with console.quietly():
        pass
    console.remark("hidden")
    assert capsys.readouterr().err == ""
    console.talk(quiet=False, verbose=True)
    assert console.TALK.pace == 1
    console.TALK.pace = 0.0
    list(console.Bar("Steps", 2, transient=True).over("ab"))
    assert "Steps: 1 of 2" in capsys.readouterr().err
