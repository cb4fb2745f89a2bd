"""Some changed files of every kind, and those that once went wrong; `make fuzz` reads on."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, changed
from tests.fuzz.trial import CORPUS, judged


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_give_our_own_errors(name: str, tmp_path: Path):
    target = TARGETS[name]
    files = target.prepare(tmp_path / "sound")

    @seed(0)
    @settings(
        max_examples=8 if target.slow else 60,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def trial(data: st.DataObject) -> None:
        file, content = data.draw(changed(files))
        assert judged(target, tmp_path / "sound", file, content) is None

    trial()


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: path.name)
def test_files_that_once_went_wrong(path: Path, tmp_path: Path):
    target = TARGETS[path.parent.name]
    files = target.prepare(tmp_path / "sound")
    file = next(name for name in files if path.name.endswith(name.replace("/", "+")))
    assert judged(target, tmp_path / "sound", file, path.read_bytes()) is None
