"""A model on the line between two saved ones."""

from pathlib import Path

import pytest
import torch

from clip_refine.cli import main
from clip_refine.models import OpenClipEncoder, load_open_clip


@pytest.fixture
def moved(tiny: OpenClipEncoder, tmp_path: Path) -> Path:
    with torch.no_grad():
        tiny.clip.visual.proj.add_(1.0)
    tiny.save(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_half_way_from_a_model_to_a_run(
    tiny_name: str, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "half"
    main(["interpolate", tiny_name, str(moved), "--weight", "0.25", "--out", str(out)])
    assert "0.25 of the way" in capsys.readouterr().out
    before, between = load_open_clip(tiny_name), load_open_clip(f"local-dir:{out}")
    shift = between.clip.visual.proj - before.clip.visual.proj
    assert torch.allclose(shift, torch.full_like(shift, 0.25), atol=1e-6)
    assert torch.equal(between.clip.text_projection, before.clip.text_projection)
    main(["interpolate", tiny_name, str(moved), "--out", str(out), "--overwrite"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weight", "2"], "weight: must be from 0 to 1"),
        (["--out", "."], "exists already"),
    ],
)
def test_what_is_refused(
    more: list[str],
    message: str,
    tiny_name: str,
    moved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit):
        main(["interpolate", tiny_name, str(moved), "--out", str(tmp_path / "x"), *more])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
