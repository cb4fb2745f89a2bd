"""The cache of `datasets`, away from the user's."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    folder: Path = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", folder / "downloads")
