"""Near duplicates: those that a comparison of all pairs finds, and quickly."""

import numpy as np
import pytest
from PIL import ImageEnhance

from clip_refine.roads.check import near_groups, scan_image
from clip_refine.toy import ToyPairs
from tests.data.files import encoded


def all_pairs(hashes: np.ndarray, distance: int) -> list[list[int]]:
    """By looking at every pair, in plain Python."""
    group = list(range(len(hashes)))
    for first in range(len(hashes)):
        for second in range(first):
            if bin(int(hashes[first]) ^ int(hashes[second])).count("1") <= distance:
                old, new = group[first], group[second]
                group = [new if number == old else number for number in group]
    found = [[i for i, own in enumerate(group) if own == number] for number in set(group)]
    return sorted(members for members in found if len(members) > 1)


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_the_groups_of_a_naive_search(distance: int):
    random = np.random.default_rng(distance)
    centres = random.integers(0, 2**64, 25, dtype=np.uint64)
    hashes = centres[random.integers(0, 25, 90)]
    for _ in range(5):
        hashes = hashes ^ (np.uint64(1) << random.integers(0, 64, 90, dtype=np.uint64))
    hashes[:10] = hashes[10:20]
    assert near_groups(hashes, distance) == all_pairs(hashes, distance)


def test_no_images_and_many_equal_ones():
    assert near_groups(np.empty(0, np.uint64), 4) == []
    (group,) = near_groups(np.full(5000, 7, np.uint64), 4)
    assert group == list(range(5000))


def test_other_quality_size_and_brightness_look_the_same_and_other_scenes_do_not():
    photo, other_scene = (ToyPairs("look", size=2).load_image(i).resize((300, 200)) for i in (0, 1))
    others = [
        encoded(photo, "PNG"),
        encoded(photo.resize((150, 100)), "JPEG", quality=60),
        encoded(ImageEnhance.Brightness(photo).enhance(1.1), "WEBP"),
    ]
    look = scan_image(encoded(photo, "JPEG", quality=95), "photo").look
    for other in others:
        assert (scan_image(other, "other").look ^ look).bit_count() <= 4
    assert (scan_image(encoded(other_scene, "PNG"), "scene").look ^ look).bit_count() > 8
