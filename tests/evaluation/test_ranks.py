import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from clip_refine.evaluation import similarity
from clip_refine.evaluation.retrieval import best_of, retrieval_ranks, search
from clip_refine.evaluation.similarity import (
    Captions,
    average_precision,
    best_rank,
    median_rank,
    ndcg,
    partner_ranks,
    unit_sides,
)
from tests.evaluation.test_retrieval import drawn_owners, whole_numbers
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, seeds

PARTNERS = torch.tensor([[4, 1, -1], [0, -1, -1], [8, 3, 6]])


def own_items(partners: torch.Tensor) -> list[set[int]]:
    return [{item for item in row if item >= 0} for row in partners.tolist()]


@repeatable
@given(seed=seeds, k=st.sampled_from([1, 2, 5, 20]))
def test_equals_the_naive_loops_and_scikit_learn(seed: int, k: int):
    similarity = normals(3, 9, seed=seed)
    ranks = partner_ranks(similarity, PARTNERS, tie=0)
    precision, gain = average_precision(ranks), ndcg(ranks, k=k)
    for query, own in enumerate(own_items(PARTNERS)):
        scores = similarity[query].tolist()
        relevant = np.array([item in own for item in range(9)])
        assert sorted(r + 1 for r in ranks[query].tolist() if r >= 0) == loops.places(scores, own)
        assert precision[query].item() == pytest.approx(loops.average_precision(scores, own))
        assert precision[query].item() == pytest.approx(average_precision_score(relevant, scores))
        assert gain[query].item() == pytest.approx(loops.ndcg(scores, own, k))
        assert gain[query].item() == pytest.approx(ndcg_score([relevant], [scores], k=k))


@repeatable
@given(seed=seeds)
def test_ties_stand_in_the_order_of_their_index(seed: int):
    similarity = whole_numbers(3, 9, seed=seed)
    ranks = partner_ranks(similarity, PARTNERS, tie=0)
    for query, own in enumerate(own_items(PARTNERS)):
        found = sorted(r + 1 for r in ranks[query].tolist() if r >= 0)
        assert found == loops.places(similarity[query].tolist(), own)


def test_by_hand():
    ranks = torch.tensor([[0, 1], [1, -1], [11, 0]])
    assert average_precision(ranks).tolist() == pytest.approx([1, 1 / 2, (1 + 2 / 12) / 2])
    ideal = 1 + 1 / np.log2(3)
    assert ndcg(ranks).tolist() == pytest.approx([1, 1 / np.log2(3), 1 / ideal])
    assert ndcg(ranks, k=1).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="k of at least 1, got 0"):
        ndcg(ranks, k=0)


@repeatable
@given(seed=seeds, count=st.integers(1, 9))
def test_the_median_is_numpys(seed: int, count: int):
    ranks = torch.randint(20, (count,), generator=torch.Generator().manual_seed(seed))
    assert median_rank(ranks) == np.median(ranks.numpy() + 1)


@repeatable
@given(seed=seeds, chunk_size=st.sampled_from([1, 2, 5, 100]))
def test_the_best_of_all_ranks_is_the_best_rank(seed: int, chunk_size: int):
    image, text = whole_numbers(6, 3, seed=seed), whole_numbers(11, 3, seed=seed + 1)
    owners = drawn_owners(6, 11, seed=seed)
    best = retrieval_ranks(image, text, owners)
    sides = unit_sides(image, text)
    captions = Captions(owners, 6).of_images(slice(0, 6))
    found = search(*sides, captions, chunk_size=chunk_size).ranks
    missing = (found < 0).sum(dim=1)
    assert missing.tolist() == (owners.bincount().max() - owners.bincount()).tolist()
    assert best_of(found).tolist() == best.image_to_text.tolist()
    found = search(*sides[::-1], owners[:, None], chunk_size=chunk_size).ranks
    assert found[:, 0].tolist() == best.text_to_image.tolist()


def test_ties_are_counted_across_blocks_of_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(similarity, "COLUMNS_AT_ONCE", 3)
    scores = torch.full((2, 8), 0.5)
    scores[1, 2] = 0.9
    # before item 7: all seven equals; before item 4: the higher one and three equals
    assert best_rank(scores, torch.tensor([[7], [4]]), tie=0.0).tolist() == [7, 4]
