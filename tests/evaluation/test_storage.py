"""Vectors as indexes hold them: cut, int8, binary."""

import pytest
import torch
from hypothesis import given
from torch.nn.functional import normalize

from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.geometry import centroid_distance
from clip_refine.evaluation.retrieval import retrieval
from clip_refine.evaluation.tasks import FORMS, stored
from clip_refine.models.embed import EmbeddedPairs
from tests.evaluation.measured import task_on_pairs
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, seeds


def sides(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = normals(20, 16, seed=seed)
    return normalize(image), normalize(image + normals(20, 16, seed=seed + 1))


@repeatable
@given(seed=seeds)
def test_the_forms_equal_the_naive_loops(seed: int):
    image, text = sides(seed)
    rows = image.tolist() + text.tolist()
    assert torch.cat(stored(image, text, "d")).tolist() == rows
    assert torch.cat(stored(image, text, "d/4")).tolist() == [row[:4] for row in rows]
    assert torch.allclose(
        torch.cat(stored(image, text, "int8")), torch.tensor(loops.int8(rows)).double()
    )
    signs = [[1.0 if value >= 0 else -1.0 for value in row] for row in rows]
    assert torch.cat(stored(image, text, "binary")).tolist() == signs


@repeatable
@given(seed=seeds)
def test_int8_is_near_and_storing_again_changes_nothing(seed: int):
    image, text = sides(seed)
    once = stored(image, text, "int8")
    assert torch.allclose(torch.cat(once), torch.cat([image, text]), atol=1 / 255)
    for form in ("int8", "binary"):
        kept = stored(image, text, form)
        assert torch.allclose(torch.cat(stored(*kept, form)), torch.cat(kept))


def test_the_cosine_of_signs_counts_bits():
    image, text = sides(0)
    bits = [side > 0 for side in stored(image, text, "binary")]
    hamming = (bits[0][:, None] != bits[1][None]).sum(dim=2)
    cosines = torch.nn.functional.cosine_similarity(
        *(
            side[:, None] if place == 0 else side[None]
            for place, side in enumerate(stored(image, text, "binary"))
        ),
        dim=2,
    )
    assert torch.allclose(cosines, 1 - 2 * hamming.double() / 16)


def test_the_task_gives_every_form_its_recall_gap_and_bytes():
    image, text = sides(3)
    owners = torch.arange(20)
    pairs = EmbeddedPairs(5 * image, text, owners)
    found = task_on_pairs("storage", pairs, Bootstrap(10), protocol="all-captions")
    assert set(found.numbers) == {
        name
        for form in FORMS
        for name in (
            f"image_to_text_recall@1,{form}",
            f"text_to_image_recall@1,{form}",
            f"centroid_distance@{form}",
        )
    }
    for form in FORMS:
        kept = tuple(normalize(side) for side in stored(image, text, form))
        recall = retrieval(*kept, ks=[1])["text_to_image_recall@1"]
        assert found.numbers[f"text_to_image_recall@1,{form}"].value == recall
        gap = found.numbers[f"centroid_distance@{form}"]
        assert gap.value == pytest.approx(centroid_distance(*kept))
        assert len(gap.draws) == 10
    assert found.details["bytes_a_vector"] == {
        "d": 64,
        "d/2": 32,
        "d/4": 16,
        "int8": 16,
        "binary": 2,
    }
