"""Searching two models side by side: what is found, what is shown, what cannot be opened."""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image

from clip_refine.config.runs import RefineConfig, VectorsConfig
from clip_refine.evaluation import Embedder
from clip_refine.models import OpenClipEncoder
from clip_refine.report.tables import short_path
from clip_refine.roads.explore import (
    Explorer,
    Hit,
    SearchIndex,
    _examples,
    _page,
    launch,
    open_explorer,
    renderer,
    what_changed,
)
from clip_refine.roads.refine import refine
from clip_refine.roads.vector_maps import refine_vectors
from clip_refine.support.errors import ClipRefineError, ConfigError
from clip_refine.toy import ToyPairs
from clip_refine.vectors.files import FeatureSet, write_features

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


def test_words_that_several_images_have_are_found_once(tiny: OpenClipEncoder, pairs: ToyPairs):
    captions = ["a dog", "a cat", "a dog", "a dog", "a bird"]
    index = SearchIndex(Embedder(tiny, torch.device("cpu"), 32), pairs, captions, "base")
    found = index.by_text("a fish", mixed=True, count=len(pairs) + len(captions))
    texts = [hit.caption for hit in found if hit.caption]
    assert sorted(texts) == ["a bird", "a cat", "a dog"]
    assert [hit.rank for hit in found] == list(range(1, len(pairs) + 4))


def test_both_models_of_a_run_on_its_own_pairs(run: Path):
    explorer = open_explorer(run, limit=20)
    assert explorer.images is not None
    assert (len(explorer.images), len(explorer.captions)) == (20, 60)
    assert explorer.base.image_unit.shape == explorer.refined.image_unit.shape
    assert not torch.allclose(explorer.base.image_unit, explorer.refined.image_unit, atol=1e-3)


def test_models_recipe_and_run_are_named(run: Path, tiny_name: str):
    explorer = open_explorer(run, limit=12)
    assert (explorer.base.name, explorer.refined.name) == (
        short_path(tiny_name),
        "clip-refine, run run",
    )
    examples = _examples(explorer)
    assert len(examples) == 4
    assert set(examples) <= set(explorer.captions)


def test_what_changed_for_a_query_is_said_in_a_line(run: Path):
    explorer = open_explorer(run, limit=12)
    said, base, refined = renderer(explorer)("a red circle", None, False)
    assert said == what_changed(
        explorer.base.by_text("a red circle", mixed=False, count=12),
        explorer.refined.by_text("a red circle", mixed=False, count=12),
    )
    assert said.startswith("12 of 12 the same")
    moved = refined.count("(was ")
    assert (moved > 0) == ("at another rank" in said)
    assert base.count("(then ") == moved  # each has its place on the other side


def test_no_mixed_index_without_captions_and_no_image_query_without_a_model(run: Path, maps: Path):
    def visible(explorer: Explorer) -> dict[str, bool]:
        gradio = MagicMock()  # the true one leaves event loops behind
        _page(gradio, explorer)
        [image] = [
            call.kwargs["visible"] for call in gradio.Column.mock_calls if "visible" in call.kwargs
        ]
        return {"mixed": gradio.Checkbox.call_args.kwargs["visible"], "image": image}

    explorer = open_explorer(run, limit=12)
    assert visible(explorer) == {"mixed": True, "image": True}
    explorer.captions.clear()
    assert visible(explorer) == {"mixed": False, "image": True}
    assert visible(open_explorer(maps)) == {"mixed": True, "image": False}


def test_what_changed_by_hand():
    was = [Hit(1, 7, None, 0.9), Hit(2, 8, None, 0.8), Hit(3, None, "a dog", 0.7)]
    now = [Hit(1, 7, None, 0.9), Hit(2, None, "a dog", 0.8), Hit(3, 9, None, 0.7)]
    assert what_changed(was, now) == (
        "2 of 3 the same, 1 of them at another rank, by 1 at most; the same stands first."
    )


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Maps learnt on the stored vectors of 40 images, of which every fourth has two captions."""
    generator = torch.Generator().manual_seed(0)
    owners = torch.cat([torch.arange(40), torch.arange(0, 40, 4)]).sort().values
    image = torch.randn(40, 8, generator=generator)
    text = image[owners] + torch.randn(len(owners), 8, generator=generator) / 4
    pairs = tmp_path / "pairs.safetensors"
    write_features(pairs, FeatureSet(image, text, owners), note={})
    config = VectorsConfig(steps=3, batch_size=16, resamples=5)
    refine_vectors(str(pairs), config, tmp_path / "maps")
    return tmp_path / "maps"


def test_stored_vectors_are_searched_by_what_is_stored(maps: Path):
    explorer = open_explorer(maps, limit=20)
    assert explorer.images is None
    assert (len(explorer.base.image_unit), len(explorer.captions)) == (20, 25)
    assert explorer.refined.name == "centred, maps maps"
    said, base, refined = renderer(explorer)("image 3", None, False)
    assert "of 12 the same" in said
    assert '<div class="text">image 3</div><div class="score">1<br>cosine 1.000' in base
    assert refined.count('class="text"') == 12
    assert renderer(explorer)("Image 3", None, False) == (said, base, refined)
    # by number, or by words of it; itself is no news among the captions
    hits = explorer.base.by_text("caption 5", mixed=True, count=45)
    assert hits == explorer.base.by_text("5 of image 4", mixed=True, count=45)
    assert "caption 5 of image 4" not in [hit.caption for hit in hits]
    for query in ("a dog", "image 20", "caption " + "9" * 5000):
        said, *shown = renderer(explorer)(query, None, False)
        assert "Without a model a query is image 0 to 19, caption 0 to 24" in said
        assert shown == ["", ""]


def test_stored_vectors_show_the_pairs_they_were_made_of(maps: Path, tmp_path: Path):
    pairs, lines = ToyPairs("stored", 40), ["image,caption"]
    for index, (caption,) in enumerate(pairs.captions):
        pairs.load_image(index).save(tmp_path / f"{index}.png")
        lines += [f'{index}.png,"{caption} {n}"' for n in range(1 + (index % 4 == 0))]
    table = tmp_path / "shown.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    explorer = open_explorer(maps, str(table))
    _, base, _ = renderer(explorer)("image 3", None, False)
    assert "data:image/jpeg" in base
    assert renderer(explorer)(explorer.captions[7], None, False)[0] != ""
    table.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(ClipRefineError, match=r"39 images with 49 captions are not those of"):
        open_explorer(maps, str(table))
    # one that is lost while the page is open
    (tmp_path / "9.png").write_bytes(b"no image")
    said, *shown = renderer(explorer)("image 9", None, False)
    assert "9.png: is not a readable image" in said
    assert shown == ["", ""]


@pytest.mark.parametrize("data", ["{train: python}", "{train: [1, 2]}", "3"])
def test_stored_vectors_that_settings_do_not_name(tmp_path: Path, data: str):
    (tmp_path / "peer.json").touch()
    (tmp_path / "config.yaml").write_text(f"data: {data}\n")
    with pytest.raises(ClipRefineError, match="its vectors were given in Python"):
        open_explorer(tmp_path)


def test_stored_vectors_that_have_gone(maps: Path):
    (maps.parent / "pairs.safetensors").unlink()
    with pytest.raises(ClipRefineError, match=r"cannot be read .*maps was learnt on it. If that"):
        open_explorer(maps)


def test_what_is_shown_is_escaped(run: Path, tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ('a"b', "<i>c"):
        Image.new("RGB", (300, 100)).save(folder / f"{name}.png")
    explorer = open_explorer(run, str(folder))
    assert explorer.captions == []
    assert _examples(explorer) == ["a person", "an animal", "a building", "a red thing"]
    _, base, refined = renderer(explorer)("a dog", None, False)
    for shown in (base, refined):
        assert shown.count('class="hit"') == 2
        assert "a&quot;b.png" in shown
        assert "<i>c" not in shown
    assert renderer(explorer)("  ", None, False) == ("", "", "")
    explorer.captions.append(HARM)
    explorer.base.text_unit = explorer.refined.text_unit = explorer.base.image_unit[:1]
    assert "&gt;&lt;script&gt;" in renderer(explorer)("a dog", None, True)[1]
    assert "<script>" not in renderer(explorer)("a dog", None, True)[1]


def test_what_cannot_be_opened(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "comparison.json").touch()
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ClipRefineError, match="holds a comparison. Give one run"):
        open_explorer(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ClipRefineError, match="holds no run"):
        open_explorer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipRefineError, match="holds no images"):
        open_explorer(run, str(tmp_path / "empty"))
    explorer = open_explorer(run, limit=11)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'clip-refine\[app\]'"):
        launch(explorer, port=None, browser=False)
