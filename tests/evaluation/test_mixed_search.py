import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from clip_refine.evaluation.geometry import text_first_share
from clip_refine.evaluation.retrieval import mixed_search, mixed_search_queries
from tests.evaluation.test_retrieval import drawn_owners
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, seeds


@repeatable
@given(seed=seeds, chunk_size=st.sampled_from([1, 3, 100]), k=st.sampled_from([1, 3, 10]))
def test_equals_the_naive_loop_and_scikit_learn(seed: int, chunk_size: int, k: int):
    image, text = normals(5, 4, seed=seed), normals(9, 4, seed=seed + 1)
    owners = drawn_owners(5, 9, seed=seed)
    found = mixed_search_queries(image, text, owners, k=k, chunk_size=chunk_size)
    index = torch.cat([image, text])
    cosines = torch.nn.functional.cosine_similarity(text[:, None], index[None], dim=2).tolist()
    for query, scores in enumerate(cosines):
        scores[5 + query] = -2.0
        siblings = {t for t in range(9) if t != query and owners[t] == owners[query]}
        own = {int(owners[query])} | {5 + t for t in siblings}
        relevant = [item in own for item in range(14)]
        assert found.ndcg[query].item() == pytest.approx(loops.ndcg(scores, own, k))
        assert found.ndcg[query].item() == pytest.approx(ndcg_score([relevant], [scores], k=k))
        order = loops.ranking(scores)
        assert int(found.image_rank[query]) == order.index(int(owners[query]))
        assert bool(found.text_first[query]) == (order[0] >= 5)


@repeatable
@given(seed=seeds)
def test_with_one_caption_an_image_the_share_is_the_geometrys(seed: int):
    image, text = (
        torch.nn.functional.normalize(normals(20, 4, seed=number)) for number in (seed, seed + 1)
    )
    assert mixed_search(image, text)["text_first_share"] == text_first_share(image, text)


def test_by_hand():
    # captions 0 and 1 are of image 0; the third is of image 1 and lies on image 0
    image = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    text = torch.tensor([[0.0, 0.1, 1.0], [0.1, 0.0, 1.0], [1.0, 0.0, 0.01]])
    found = mixed_search_queries(image, text, torch.tensor([0, 0, 1]))
    # query 0: caption 1, image 1, caption 2, image 0; own: caption 1 and image 0
    # query 1: caption 0, caption 2, image 0; query 2: image 0, caption 1, caption 0, image 1
    assert found.image_rank.tolist() == [3, 2, 3]
    assert found.text_first.tolist() == [True, True, False]
    ideal = 1 + 1 / 1.5849625
    first, second = (1 + 1 / 2.32192809) / ideal, (1 + 1 / 2) / ideal
    assert found.ndcg.tolist() == pytest.approx([first, second, 1 / 2.32192809])
    scores = mixed_search(image, text, torch.tensor([0, 0, 1]))
    assert scores["median_image_rank"] == 4.0


def test_equally_near_images_stand_before_captions():
    same = torch.ones(3, 2)
    found = mixed_search_queries(same, same)
    assert found.text_first.tolist() == [False] * 3
    assert found.image_rank.tolist() == [0, 1, 2]


def test_images_nearer_than_all_captions_are_found_first():
    image = normals(30, 8, seed=0)
    near = mixed_search(image, image + 0.01 * normals(30, 8, seed=1))
    assert near == {"ndcg@10": 1.0, "text_first_share": 0.0, "median_image_rank": 1.0}


def test_one_caption_is_no_index():
    with pytest.raises(ValueError, match="one caption alone"):
        mixed_search(torch.eye(2)[:1], torch.eye(2)[:1])
