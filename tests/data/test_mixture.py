"""Several sources as one, and every caption as a pair."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from clip_refine.config import DataConfig, RefineConfig, TrainConfig
from clip_refine.data import EpochPlan, EveryCaption, Mixture, Subset, hold_out, image_batches
from clip_refine.data.pairs import image_bytes, image_fingerprint
from clip_refine.models import OpenClipEncoder
from clip_refine.roads import build
from clip_refine.support.errors import ConfigError
from clip_refine.toy import ToyPairs
from tests.data.files import drawn_files
from tests.data.layouts import drawn, opened, write_coco, write_table

FIRST = ToyPairs("first", size=30, captions_per_image=2)
SECOND = ToyPairs("second", size=90)


def order_of(pairs, seed: int = 0) -> list[int]:
    return list(EpochPlan.draw(pairs, generator=torch.Generator().manual_seed(seed)).order)


def test_without_weights_every_image_is_used_once():
    mixture = Mixture([FIRST, SECOND])
    assert len(mixture) == 120
    assert sorted(order_of(mixture)) == list(range(120))
    assert mixture.captions[29:31] == [FIRST.captions[29], SECOND.captions[0]]
    assert mixture.image_name(30) == SECOND.image_name(0)
    assert mixture.load_image(119).tobytes() == SECOND.load_image(89).tobytes()
    assert mixture.name == "toy-first + toy-second"


@pytest.mark.parametrize(("weights", "expected"), [((2, 1), 80), ((1, 1), 60), ((0.1, 0.9), 12)])
def test_each_source_gives_its_share(weights: tuple[float, float], expected: int):
    mixture = Mixture([FIRST, SECOND], weights)
    order = order_of(mixture)
    assert len(order) == 120
    assert sum(index < 30 for index in order) == expected
    for part in (range(30), range(30, 120)):
        counts = Counter(index for index in order if index in part)
        times = [counts[index] for index in part]
        assert max(times) - min(times) <= 1
    assert order == order_of(mixture)
    assert order != order_of(mixture, seed=1)
    halves = [sum(index < 30 for index in order[:60]), sum(index < 30 for index in order[60:])]
    assert min(halves) > expected / 5, "shuffled over the whole epoch"


def test_shares_hold_in_a_part_of_a_mixture():
    mixture = Mixture([FIRST, SECOND], (1, 1))
    part = Subset(mixture, range(20, 60), "part")
    order = order_of(part)
    assert len(order) == 40
    assert sum(index < 10 for index in order) == 20
    only_second = Subset(mixture, range(40, 60), "second alone")
    assert sorted(order_of(only_second)) == list(range(20))


def test_images_of_a_mixture_are_told_apart_by_content(tmp_path: Path):
    files = opened(write_table(tmp_path, drawn()))
    mixture = Subset(Mixture([FIRST, files]), range(29, 34), "part")
    assert image_bytes(mixture, 0) is None
    assert image_bytes(mixture, 1) == drawn()[0][1]
    assert image_fingerprint(mixture, 2) == image_fingerprint(files, 1)


def test_weights_need_a_source_each():
    with pytest.raises(ValueError, match="3 weights for 1 sources"):
        Mixture([FIRST], (1, 2, 3))
    with pytest.raises(ConfigError, match="data.weights: 2 numbers for 1 sources in data.train"):
        build.build_data(DataConfig(train="toy", weights=(1, 2)), seed=0)


def test_every_caption_is_a_pair():
    every = EveryCaption(FIRST)
    assert len(every) == 60
    plan = EpochPlan.draw(every, generator=torch.Generator().manual_seed(0))
    assert sorted(plan.order) == list(range(60))
    texts = [every.captions[i][plan.caption_choice[i]] for i in plan.order]
    assert sorted(texts) == sorted(text for captions in FIRST.captions for text in captions)
    assert [every.image_name(i) for i in (0, 1, 2)] == [FIRST.image_name(i) for i in (0, 0, 1)]
    mixture = EveryCaption(Mixture([FIRST, SECOND], (3, 1)))
    assert abs(sum(index < 60 for index in order_of(mixture)) - 3 / 4 * len(mixture)) < 1


def test_images_are_held_out_with_all_their_captions():
    every = EveryCaption(ToyPairs("many", size=250, captions_per_image=2))
    training, held_out = hold_out(every, fraction=0.1, seed=1)
    assert (len(training), len(held_out)) == (300, 100)
    assert all(len(texts) == 2 for texts in held_out.captions)
    names = {training.image_name(i) for i in range(300)}
    assert not names & {held_out.image_name(i) for i in range(100)}


def test_an_image_of_two_sources_is_not_held_out_and_trained_on():
    same = [ToyPairs("many", size=300, captions_per_image=count) for count in (1, 2)]
    whole, rest = hold_out(Mixture([*same, ToyPairs("others", size=50)]), fraction=0.1, seed=1)
    parts = hold_out(whole, fraction=0.1, seed=1)
    for training, held_out in ((whole, rest), parts):
        names = [held_out.image_name(i) for i in range(len(held_out))]
        assert len(names) == len(set(names)) == 100
        assert not {training.image_name(i) for i in range(len(training))} & set(names)


def test_settings_mix_sources(tmp_path: Path, tiny: OpenClipEncoder):
    first = write_table(tmp_path / "a", drawn(12))
    second = write_coco(tmp_path / "b", drawn(4))
    data = DataConfig(train=(first, second), weights=(1, 3), captions="all", val=first)
    training, held_out = build.build_data(data, seed=0)
    assert isinstance(training, EveryCaption)
    assert (len(training), len(held_out)) == (48, 12)
    config = RefineConfig(data=data, train=TrainConfig(batch_size=6, steps=9), seed=1)
    batches = list(build.build_batches(config, training, tiny, build.build_accelerator("cpu")))
    assert len(batches) == build.count_steps(config.train, training, 1) == 9
    of_second = [sum(i >= 36 for i in batch.indices) for batch in batches[:8]]
    assert sum(of_second) == 36
    pixels = next(image_batches(training, batch_size=2, preprocess=tiny.preprocess))
    assert torch.equal(pixels[0], pixels[1])


def test_streams_are_mixed_with_weights_only(tmp_path: Path):
    sources = (str(tmp_path / "a.tar"), str(tmp_path / "b.tar"))
    (tmp_path / "a.tar").touch()
    (tmp_path / "b.tar").touch()
    with pytest.raises(ConfigError, match="data.weights is missing"):
        build.build_data(DataConfig(train=sources, val="toy", streaming=True), seed=0)


def test_an_object_of_the_users_own_goes_through_every_view(tmp_path: Path):
    files = drawn_files(tmp_path / "files", 3)
    plain = WithoutContent(files)
    for view in (Subset(plain, [2, 0], "part"), Mixture([plain]), EveryCaption(plain)):
        assert image_bytes(view, 0) is None
        assert list(view.skipped) == []
        assert view.mixing is None
    part = Subset(Mixture([FIRST, files], (1, 1)), [32, 30], "part")
    assert image_bytes(part, 0) == files.paths[2].read_bytes()
    assert part.image_name(0) == str(files.paths[2])
    assert part.captions == [("picture 2",), ("picture 0",)]
    assert part.mixing == ([1, 1], (1, 1))


class WithoutContent:
    """Only what the protocol asks for."""

    def __init__(self, source) -> None:
        self.name = "own"
        self.captions = source.captions
        self.load_image = source.load_image
        self.image_name = source.image_name

    def __len__(self) -> int:
        return len(self.captions)
