"""k-means, and whether its clusters follow classes or modality."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from clip_refine.evaluation.bootstrap import Bootstrap, interval
from clip_refine.evaluation.geometry import agreement, agreement_numbers, find_clusters
from clip_refine.evaluation.scores import Outcome
from clip_refine.models.embed import EmbeddedPairs
from tests.evaluation.measured import task_on_classes, task_on_pairs
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, seeds, shuffled

LABELS = torch.arange(60) % 3
CENTRES = 5 * torch.eye(6, dtype=torch.float64)[:3]


def groupings(size: int) -> st.SearchStrategy[list[int]]:
    drawn = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    return drawn.filter(lambda groups: 1 < len(set(groups)) < size)


def values(found: Outcome) -> dict[str, float]:
    return {name: number.value for name, number in found.numbers.items()}


@repeatable
@given(found=groupings(12), truth=groupings(12), seed=seeds)
def test_agreement_equals_the_naive_loops_and_no_name_matters(
    found: list[int], truth: list[int], seed: int
):
    numbers = agreement(torch.tensor(found), torch.tensor(truth))
    assert numbers["v_measure"] == pytest.approx(loops.v_measure(found, truth))
    assert numbers["v_measure"] == pytest.approx(normalized_mutual_info_score(truth, found))
    assert numbers["adjusted_rand"] == pytest.approx(loops.adjusted_rand(found, truth))
    order = shuffled(12, seed=seed)
    renamed = agreement(7 - torch.tensor(found)[order], torch.tensor(truth)[order] + 5)
    assert renamed == pytest.approx(numbers)


def test_resamples_are_of_rows_and_what_stays_stays():
    found, truth = torch.arange(8) % 2, torch.tensor([0, 1, 0, 0, 1, 1, 0, 1])
    owners = torch.tensor([0, 1, 2, 3, 3, -1, -1, -1])
    bootstrap = Bootstrap(5, 1)
    numbers = agreement_numbers("x", found, truth, owners, bootstrap)
    plain = agreement(found, truth)
    assert {f"x_{name}": value for name, value in plain.items()} == pytest.approx(
        {name: number.value for name, number in numbers.items()}
    )
    drawn = []
    for row in torch.cat(list(bootstrap.counts(4))).long().tolist():
        rows = [
            place
            for place, owner in enumerate(owners.tolist())
            for _ in range(row[owner] if owner >= 0 else 1)
        ]
        drawn.append(agreement(found[rows], truth[rows])["v_measure"])
    shift = 2 * (sum(drawn) / 5 - plain["v_measure"])
    assert numbers["x_v_measure"].draws.tolist() == pytest.approx([v - shift for v in drawn])
    # copies of a row lift a resample's, but not the value: its draws lie around it, not below
    rand = numbers["x_adjusted_rand"]
    assert rand.draws.mean().item() == pytest.approx(rand.value)


def test_images_and_prompts_in_one_cone_cluster_by_class_and_in_two_by_modality():
    image = CENTRES[LABELS] + 0.3 * normals(60, 6, seed=0)
    prompts = CENTRES.repeat_interleave(20, dim=0) + 0.3 * normals(60, 6, seed=1)
    for gap in (0.0, 30.0):
        shift = gap * torch.eye(6, dtype=torch.float64)[5]
        of_classes = {"prompts": prompts - shift, "class_names": "abc"}
        found = task_on_classes("clustering", image + shift, LABELS, Bootstrap(10), **of_classes)
        together, by_modality = values(found)["both_v_measure"], values(found)["modality_v_measure"]
        assert (together > 0.95, by_modality > 0.7) == (
            (True, False) if gap == 0 else (False, True)
        )
        for name, number in found.numbers.items():
            low, high = interval(number)
            assert (low is None) == name.startswith("text_")
            assert low is None or low <= number.value <= (high or 0)


def test_pairs_cluster_together_without_a_gap():
    image = CENTRES[LABELS] + 0.1 * normals(60, 6, seed=0)
    owners = torch.arange(60)
    for gap, together in ((0.0, 1.0), (30.0, 0.0)):
        shift = gap * torch.eye(6, dtype=torch.float64)[5]
        pairs = EmbeddedPairs(image + shift, image - shift, owners)
        found = task_on_pairs("pair-clustering", pairs, Bootstrap(10), clusters=3)
        assert values(found)["pairs_together"] == together
        assert (values(found)["modality_v_measure"] > 0.6) == (gap > 0)


def test_one_prompt_a_class_has_no_number_of_its_own():
    image = CENTRES[LABELS] + 0.3 * normals(60, 6, seed=0)
    of_classes = {"prompts": CENTRES, "class_names": "abc"}
    found = task_on_classes("clustering", image, LABELS, Bootstrap(2), **of_classes)
    assert not any(name.startswith("text_") for name in found.numbers)


def test_the_seed_decides_and_too_many_clusters_are_refused():
    rows = normals(40, 4, seed=0)
    assert torch.equal(find_clusters(rows, 5, seed=1), find_clusters(rows, 5, seed=1))
    with pytest.raises(ValueError, match="k-means needs 2 to 40 clusters"):
        find_clusters(rows, 41)
