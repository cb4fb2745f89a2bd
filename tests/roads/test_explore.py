"""Searching two models side by side: what is found, what is shown, what cannot be opened."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_refine.config.runs import RefineConfig
from clip_refine.evaluation import Embedder
from clip_refine.models import OpenClipEncoder
from clip_refine.roads.explore import SearchIndex, launch, open_explorer, renderer
from clip_refine.roads.refine import refine
from clip_refine.support.errors import ClipRefineError, ConfigError
from clip_refine.toy import ToyPairs

HARM = '"><script>alert(1)</script>'


@pytest.fixture
def run(tiny_name: str, table: Path, tmp_path: Path) -> Path:
    config = RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "data": {"train": str(table), "val": str(table)},
            "train": {"batch_size": 32, "learning_rate": 1e-3, "precision": "fp32"},
            "out": tmp_path / "run",
            "report": False,
        }
    )
    refine(config)
    return config.out


def test_hits_are_the_nearest(tiny: OpenClipEncoder, pairs: ToyPairs):
    captions = [texts[0] for texts in pairs.captions]
    index = SearchIndex(Embedder(tiny, torch.device("cpu"), 32), pairs, captions, "base")
    image = index.by_image(pairs.load_image(9), mixed=False, count=3)
    assert (image[0].image, image[0].rank) == (9, 1)
    assert image[0].cosine == pytest.approx(1, abs=1e-5)
    query = captions[4]
    text = index.by_text(query, mixed=True, count=2 * len(pairs))
    assert query not in [hit.caption for hit in text]  # itself is no news
    cosines = [hit.cosine for hit in text]
    assert cosines == sorted(cosines, reverse=True)
    only_images = index.by_text(query, mixed=False, count=5)
    assert all(hit.image is not None for hit in only_images)
    expected = (index.image_unit @ index.text_unit[4]).topk(5).indices.tolist()
    assert [hit.image for hit in only_images] == expected


def test_both_models_of_a_run_on_its_own_pairs(run: Path):
    explorer = open_explorer(run, limit=20)
    assert (len(explorer.images), len(explorer.captions)) == (20, 60)
    assert explorer.base.image_unit.shape == explorer.refined.image_unit.shape
    assert not torch.allclose(explorer.base.image_unit, explorer.refined.image_unit, atol=1e-3)


def test_what_is_shown_is_escaped(run: Path, tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ('a"b', "<i>c"):
        Image.new("RGB", (300, 100)).save(folder / f"{name}.png")
    explorer = open_explorer(run, str(folder))
    assert explorer.captions == []
    base, refined = renderer(explorer)("a dog", None, False)
    for shown in (base, refined):
        assert shown.count('class="hit"') == 2
        assert "a&quot;b.png" in shown
        assert "<i>c" not in shown
    assert renderer(explorer)("  ", None, False) == ("", "")
    explorer.captions.append(HARM)
    explorer.base.text_unit = explorer.refined.text_unit = explorer.base.image_unit[:1]
    assert "&gt;&lt;script&gt;" in renderer(explorer)("a dog", None, True)[0]
    assert "<script>" not in renderer(explorer)("a dog", None, True)[0]


def test_what_cannot_be_opened(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ClipRefineError, match="holds no run"):
        open_explorer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipRefineError, match="holds no images"):
        open_explorer(run, str(tmp_path / "empty"))
    explorer = open_explorer(run, limit=11)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'clip-refine\[app\]'"):
        launch(explorer, port=None, browser=False)
