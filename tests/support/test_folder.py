"""A folder of results: whole or not at all, and one writer at a time."""

from pathlib import Path

import pytest

from clip_refine.support.errors import OutputError
from clip_refine.support.folder import complete_folder


def test_a_second_run_does_not_clear_what_the_first_writes(tmp_path: Path):
    out = tmp_path / "new" / "out"
    with complete_folder(out, overwrite=False) as folder:
        (folder / "scores.json").write_text("hours of work")
        for overwrite in (False, True):
            with (
                pytest.raises(OutputError, match="another run is writing it"),
                complete_folder(out, overwrite=overwrite),
            ):
                pass
    assert (out / "scores.json").read_text() == "hours of work"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with complete_folder(out, overwrite=True):
        pass
    assert not list(out.iterdir())
