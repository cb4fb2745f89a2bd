import pickle
from collections import Counter

import numpy as np
import pytest

from clip_refine import toy
from clip_refine.data.pairs import ImageCaptions, LabelledImages
from clip_refine.support.errors import DataError
from clip_refine.toy import (
    BACKGROUNDS,
    CAPTION_TEMPLATES,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    ToyClasses,
    ToyPairs,
    toy_tasks,
    toy_train,
    toy_val,
)

ATTRIBUTE_WORDS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "place": tuple(place.split()[-1] for place in PLACES),
    "background": BACKGROUNDS,
}

PINNED_CAPTIONS = (
    ("a dotted picture, and in the middle a small circle in red",),
    ("a small turquoise square on a white background",),
    ("a yellow shape on the right of a black picture",),
)
PINNED_BRIGHTNESS = [213.1, 240.7, 28.1]


def pixels(world: ToyPairs | ToyClasses, index: int) -> np.ndarray:
    return np.asarray(world.load_image(index))


def mentioned(caption: str) -> dict[str, str]:
    """The attribute words in `caption`, found without knowing its template."""
    words = caption.replace(",", "").split()
    return {
        attribute: word
        for attribute, allowed in ATTRIBUTE_WORDS.items()
        for word in words
        if word in allowed
    }


def is_true(caption: str, scene: object) -> bool:
    said = mentioned(caption)
    return all(getattr(scene, name).split()[-1] == word for name, word in said.items())


@pytest.fixture(autouse=True)
def _drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from what conftest.py keeps."""
    monkeypatch.setattr(toy, "draw_scenes", toy.draw_scenes.__wrapped__)


def test_same_world_twice_in_any_order():
    first, second = ToyPairs("train", 20), ToyPairs("train", 20)
    forwards = [pixels(first, index) for index in range(20)]
    backwards = [pixels(second, index) for index in reversed(range(20))][::-1]
    assert first.scenes == second.scenes
    assert first.captions == second.captions
    np.testing.assert_array_equal(forwards, backwards)


def test_pixels_and_words_are_pinned():
    """Another Pillow or numpy must not draw another world unnoticed: the weights fit this one."""
    pairs = ToyPairs("train", 3)
    assert pairs.captions == PINNED_CAPTIONS
    assert [round(float(pixels(pairs, index).mean()), 1) for index in range(3)] == pytest.approx(
        PINNED_BRIGHTNESS, abs=0.5
    )


def test_a_shorter_world_is_the_beginning_of_a_longer_one():
    short, long = ToyPairs("train", 5), ToyPairs("train", 50)
    assert long.captions[:5] == short.captions
    np.testing.assert_array_equal(pixels(long, 4), pixels(short, 4))


def test_same_world_after_pickling():
    pairs = ToyPairs("train", 5, mismatched=0.5)
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.captions == pairs.captions
    np.testing.assert_array_equal(pixels(copy, 4), pixels(pairs, 4))


@pytest.mark.parametrize(
    "other", [ToyPairs("val", 50), ToyPairs("train", 50, seed=1)], ids=["split", "seed"]
)
def test_another_stream_is_another_world(other: ToyPairs):
    train = ToyPairs("train", 50)
    same_scenes = sum(a == b for a, b in zip(train.scenes, other.scenes, strict=True))
    assert same_scenes <= 2
    assert not any(np.array_equal(pixels(train, i), pixels(other, i)) for i in range(50))


def test_captions_say_what_is_drawn():
    pairs = ToyPairs("train", 500, captions_per_image=3)
    for scene, captions in zip(pairs.scenes, pairs.captions, strict=True):
        assert len(set(captions)) == 3
        for caption in captions:
            assert len(mentioned(caption)) >= 2
            assert is_true(caption, scene)


def test_every_template_is_used():
    pairs = ToyPairs("train", 2, captions_per_image=len(CAPTION_TEMPLATES))
    expected = {template.format(**_words(pairs.scenes[1])) for template in CAPTION_TEMPLATES}
    assert set(pairs.captions[1]) == expected


def _words(scene: object) -> dict[str, str]:
    return {name: getattr(scene, name) for name in ATTRIBUTE_WORDS}


def test_the_drawn_shape_has_the_captions_colour():
    pairs = ToyPairs("train", 200)
    for index, scene in enumerate(pairs.scenes):
        distance = np.abs(pixels(pairs, index).astype(int) - COLOURS[scene.colour]).max(axis=2)
        assert (distance <= 21).sum() >= 15


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mismatched_share_is_exact(share: float):
    pairs = ToyPairs("train", 200, mismatched=share)
    wrong = [i for i, source in enumerate(pairs.caption_sources) if source != i]
    assert len(wrong) == round(share * 200)
    for index, (caption,) in enumerate(pairs.captions):
        assert is_true(caption, pairs.scenes[pairs.caption_sources[index]])


def test_mismatched_captions_are_mostly_false():
    pairs = ToyPairs("train", 500, mismatched=0.3)
    false = sum(not is_true(c[0], s) for c, s in zip(pairs.captions, pairs.scenes, strict=True))
    assert 0.27 <= false / 500 <= 0.3


@pytest.mark.parametrize("attribute", list(ATTRIBUTE_WORDS))
def test_scenes_are_balanced(attribute: str):
    counts = Counter(getattr(scene, attribute) for scene in ToyPairs("train", 4000).scenes)
    expected = 4000 / len(ATTRIBUTE_WORDS[attribute])
    assert len(counts) == len(ATTRIBUTE_WORDS[attribute])
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


@pytest.mark.parametrize(
    ("name", "classes"), [("toy_colour_shape", 64), ("toy_shape", 8), ("toy_colour", 8)]
)
def test_classes_are_balanced_and_true(name: str, classes: int):
    task = ToyClasses(name, 2 * classes + 1)
    assert len(set(task.class_names)) == classes
    assert set(Counter(task.labels).values()) == {2, 3}
    for label, scene in zip(task.labels, task.scenes, strict=True):
        assert is_true(task.class_names[label], scene)
    assert all(template.count("{}") == 1 for template in task.templates)


def test_tasks_share_no_image_with_the_training_pairs():
    train = ToyPairs("train", 64)
    task = ToyClasses("toy_colour_shape", 64)
    assert not {pixels(train, i).tobytes() for i in range(64)} & {
        pixels(task, i).tobytes() for i in range(64)
    }


def test_worlds_fit_the_protocols():
    pairs: ImageCaptions = ToyPairs("train", 2)
    task: LabelledImages = ToyClasses("toy_shape", 2)
    for world, name in ((pairs, "toy-train"), (task, "toy_shape")):
        assert world.name == name
        assert len(world) == 2
        assert world.load_image(1).mode == "RGB"
        assert world.load_image(1).size == (48, 48)
        assert world.image_name(1) == f"{name}[1]"


def test_ready_made_worlds():
    train, val = toy_train(), toy_val()
    assert (train.name, len(train), val.name, len(val)) == ("toy-train", 6000, "toy-val", 1000)
    assert train.caption_sources == tuple(range(6000))
    assert [task.name for task in toy_tasks()] == ["toy_colour_shape", "toy_shape", "toy_colour"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToyPairs("train", 0), "size is 0"),
        (lambda: ToyPairs("train", 5, captions_per_image=13), "captions_per_image is 13"),
        (lambda: ToyPairs("train", 5, mismatched=1.5), "mismatched is 1.5"),
        (lambda: ToyPairs("train", 1, mismatched=1.0), "no other image"),
        (lambda: ToyClasses("toy_size", 5), "toy_colour_shape, toy_shape, toy_colour"),
        (lambda: ToyClasses("toy_shape", -1), "size is -1"),
        (lambda: ToyClasses("toy_shape", 5, seed=-1), "seed is -1"),
    ],
)
def test_bad_arguments_are_refused(make, message: str):
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_outside_is_refused(index: int):
    with pytest.raises(IndexError):
        ToyPairs("train", 3).load_image(index)
