"""Features are computed once, also by several processes, also after an interruption."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_refine.config import EvaluationConfig
from clip_refine.data import Subset
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.models.embed import Embedder, FeatureStore, embed_pairs, image_fingerprints
from clip_refine.roads import build
from clip_refine.support.cache import RowCache
from clip_refine.support.errors import ModelError
from clip_refine.toy import ToyPairs
from tests.several import in_processes


def embedder(model: OpenClipEncoder) -> Embedder:
    return Embedder(model, torch.device("cpu"), 5, visible=False)


def test_features_are_the_models_and_are_computed_once(
    tiny: OpenClipEncoder, tmp_path: Path, pairs: ToyPairs, monkeypatch: pytest.MonkeyPatch
):
    store, model = FeatureStore(tmp_path), embedder(tiny)
    contents = image_fingerprints(pairs, "", visible=False)
    texts = [text for captions in pairs.captions for text in captions]
    store.add_images(model, pairs, contents, "")
    store.add_texts(model, texts, "")
    torch.testing.assert_close(store.images(contents), model.images(pairs, ""))
    torch.testing.assert_close(store.texts(texts), model.texts(texts, ""))

    monkeypatch.setattr(tiny, "encode_image", None)
    monkeypatch.setattr(tiny, "encode_text", None)
    store.add_images(model, pairs, contents, "")
    store.add_texts(model, texts, "")


def test_on_a_cpu_few_at_a_time_unless_given(
    tiny: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch
):
    """By 256 they were more than a step of 32 takes, 6.5 GB of photo-clip's where 3 were said."""
    sizes: list[int] = []
    encode = OpenClipEncoder.encode_image

    def counted(self: OpenClipEncoder, pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(OpenClipEncoder, "encode_image", counted)
    pairs, accelerator = ToyPairs("forty", 40), build.build_accelerator("cpu")
    for batch_size in (None, 256, 20):
        config = EvaluationConfig(batch_size=batch_size)
        assert len(build.build_embedder(tiny, accelerator, config, 0).images(pairs, "")) == 40
    assert sizes == [32, 8, 40, 20, 20]


def test_an_interruption_costs_little(tiny: OpenClipEncoder, tmp_path: Path, pairs: ToyPairs):
    contents = image_fingerprints(pairs, "", visible=False)

    class Interrupted(ToyPairs):
        def load_image(self, index: int) -> Image.Image:
            if index == 40:
                raise KeyboardInterrupt
            return super().load_image(index)

    store, model = FeatureStore(tmp_path), embedder(tiny)
    interrupted = Interrupted("tests", size=64, captions_per_image=3)
    with pytest.raises(KeyboardInterrupt):
        store.add_images(model, interrupted, contents, "")
    assert RowCache(tmp_path / "images", flag="").missing(contents) == list(range(40, 64))
    store.add_images(model, pairs, contents, "")
    torch.testing.assert_close(store.images(contents), model.images(pairs, ""))


class Counting(ToyPairs):
    loaded = 0

    def load_image(self, index: int) -> Image.Image:
        self.loaded += 1
        return super().load_image(index)


def encode(name: str, folder: Path) -> None:
    pairs = Counting("shared-work", size=21)
    group = build.build_accelerator("cpu")
    store, model = FeatureStore(folder), replace(embedder(load_open_clip(name)), group=group)
    contents = image_fingerprints(pairs, "", visible=False)
    store.add_images(model, pairs, contents, "")
    store.add_texts(model, [captions[0] for captions in pairs.captions], "")
    pairs.loaded = 0
    features = embed_pairs(model, pairs)
    shares = {(0, 1): 21, (0, 2): 5 + 5 + 1, (1, 2): 5 + 5}
    assert pairs.loaded == shares[group.process_index, group.num_processes]
    few = model.images(Subset(pairs, [3], "one batch"), ""), model.texts(["one", "two"], "")
    torch.save([*vars(features).values(), *few], folder / f"{group.process_index}.pt")
    mine = f"{group.process_index} of {group.num_processes}"
    (folder / f"{mine}.txt").write_text("done")


@pytest.mark.timeout(120)
def test_two_processes_share_the_work(tiny_name: str, tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    encode(tiny_name, tmp_path / "one")
    in_processes(2, encode, tiny_name, tmp_path / "two")
    for number in range(2):  # without a store everyone gets all, bit by bit
        features = (torch.load(tmp_path / at) for at in ("one/0.pt", f"two/{number}.pt"))
        assert all(map(torch.equal, *features))
    done = {path.name for path in (tmp_path / "two").glob("*.txt")}
    assert done == {"0 of 2.txt", "1 of 2.txt"}
    pairs = ToyPairs("shared-work", size=21)
    contents = image_fingerprints(pairs, "", visible=False)
    alone, together = (FeatureStore(tmp_path / folder) for folder in ("one", "two"))
    torch.testing.assert_close(alone.images(contents), together.images(contents))
    assert (tmp_path / "two" / "images" / "rows").stat().st_size == 21 * 16 * 4  # once each
    texts = [captions[0] for captions in pairs.captions]
    torch.testing.assert_close(alone.texts(texts), together.texts(texts))


def test_a_part_is_what_the_part_would_give(tiny: OpenClipEncoder, tmp_path: Path):
    pairs, model = ToyPairs("tests", size=9, captions_per_image=3), embedder(tiny)
    pairs.captions = tuple(texts[: 1 + i % 3] for i, texts in enumerate(pairs.captions))
    whole = embed_pairs(model, pairs, FeatureStore(tmp_path))
    indices = [7, 0, 5, 2]
    found, expected = whole.part(indices), embed_pairs(model, Subset(pairs, indices, "part"))
    torch.testing.assert_close(found.image_features, expected.image_features)
    torch.testing.assert_close(found.text_features, expected.text_features)
    assert found.text_to_image.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 3]
    assert found.first_caption.tolist() == [0, 2, 3, 6]
    assert torch.equal(found.first_caption_features, found.text_features[[0, 2, 3, 6]])


def test_features_that_are_not_finite_are_named(tiny: OpenClipEncoder, tmp_path: Path):
    pairs, model = ToyPairs("tests", size=7), embedder(tiny)
    with torch.no_grad():
        tiny.clip.visual.proj[0, 0] = torch.nan
    store = FeatureStore(tmp_path)
    with pytest.raises(ModelError, match=r"features of toy-tests\[0\] are not finite"):
        embed_pairs(model, pairs, store)
    assert not list(tmp_path.rglob("rows"))
