import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clip_refine.evaluation.retrieval import recall_at, retrieval, retrieval_ranks
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, seeds, shuffled

chunk_sizes = st.sampled_from([1, 2, 3, 5, 100])


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Features of −2 … 2, whose products are exact and tie often; no row is zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-2, 3, shape, generator=generator).double()
    drawn[..., 0] += (drawn == 0).all(dim=-1)
    return drawn


def drawn_owners(image_count: int, text_count: int, *, seed: int) -> Tensor:
    """An image for each caption, in no order, at least one caption an image."""
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(image_count, (text_count - image_count,), generator=generator)
    return torch.cat([torch.arange(image_count), extra])[shuffled(text_count, seed=seed)]


@repeatable
@given(seed=seeds, chunk_size=chunk_sizes)
def test_equals_the_naive_ranking_ties_included(seed: int, chunk_size: int):
    image, text = whole_numbers(6, 3, seed=seed), whole_numbers(11, 3, seed=seed + 1)
    owners = drawn_owners(6, 11, seed=seed)
    found = retrieval_ranks(image, text, owners, normalize=False, chunk_size=chunk_size)

    scores = (image @ text.T).tolist()
    captions = [{t for t in range(11) if owners[t] == i} for i in range(6)]
    images = [{int(owner)} for owner in owners]
    assert found.image_to_text.tolist() == loops.best_ranks(scores, captions)
    transposed = (text @ image.T).tolist()
    assert found.text_to_image.tolist() == loops.best_ranks(transposed, images)


@repeatable
@given(seed=seeds, chunk_size=chunk_sizes)
def test_recall_on_cosines_equals_the_naive_loop(seed: int, chunk_size: int):
    image, text = normals(9, 4, seed=seed), normals(9, 4, seed=seed + 1)
    found = retrieval(image, text, ks=(1, 3), chunk_size=chunk_size)
    cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=2)
    own = [{i} for i in range(9)]
    for k in (1, 3):
        forth = loops.recall_at(loops.best_ranks(cosines.tolist(), own), k)
        back = loops.recall_at(loops.best_ranks(cosines.T.tolist(), own), k)
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(forth)
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(back)


@pytest.mark.parametrize("chunk_size", [1, 7, 13, 64, 1000])
def test_chunks_equal_the_full_matrix(chunk_size: int):
    image, text = normals(53, 8, seed=1), normals(97, 8, seed=2)
    owners = drawn_owners(53, 97, seed=3)
    whole = retrieval_ranks(image, text, owners, chunk_size=10_000)
    chunked = retrieval_ranks(image, text, owners, chunk_size=chunk_size)
    assert torch.equal(chunked.image_to_text, whole.image_to_text)
    assert torch.equal(chunked.text_to_image, whole.text_to_image)


def test_more_items_than_are_looked_at_together():
    # the columns of a block are walked in pieces of 8192
    image, text = normals(9000, 2, seed=4), normals(9000, 2, seed=5)
    rows = slice(8990, 9000)
    owners = torch.arange(9000)
    found = retrieval_ranks(image, text, owners, normalize=False).image_to_text[rows]
    scores = image[rows] @ text.T
    own = scores.gather(1, owners[rows, None])
    assert torch.equal(found, (scores > own).sum(dim=1))


def test_by_hand_many_captions_an_image():
    # similarity[image, text]: image 0 owns captions 0 and 2, image 1 owns caption 1
    text = torch.eye(3)
    image = torch.tensor([[0.1, 0.3, 0.2], [0.3, 0.2, 0.1]])
    ranks = retrieval_ranks(image, text, torch.tensor([0, 1, 0]), normalize=False)
    assert ranks.image_to_text.tolist() == [1, 1]
    assert ranks.text_to_image.tolist() == [1, 1, 0]
    found = retrieval(image, text, torch.tensor([0, 1, 0]), ks=(1, 2), normalize=False)
    assert found == {
        "image_to_text_recall@1": 0.0,
        "image_to_text_recall@2": 1.0,
        "text_to_image_recall@1": pytest.approx(1 / 3),
        "text_to_image_recall@2": 1.0,
    }


def test_ties_go_to_the_lower_index():
    same = torch.ones(4, 3)
    ranks = retrieval_ranks(same, same)
    assert ranks.image_to_text.tolist() == [0, 1, 2, 3]
    assert ranks.text_to_image.tolist() == [0, 1, 2, 3]


def test_a_tie_between_own_captions_counts_for_the_first():
    # captions 0, 1, 2 tie for image 0, of which it owns 1 and 2: one stands before
    image, text = torch.ones(2, 2), torch.ones(3, 2)
    ranks = retrieval_ranks(image, text, torch.tensor([1, 0, 0]))
    assert ranks.image_to_text.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_copies_of_one_caption_tie_whatever_the_rounding(dtype: torch.dtype, chunk_size: int):
    # the same products come out with other last bits in other columns of a matrix product
    image, text = normals(37, 24, seed=1, dtype=dtype), normals(1, 24, seed=2, dtype=dtype)
    copies = text.repeat(37, 1)
    assert retrieval_ranks(image, copies, chunk_size=chunk_size).image_to_text.tolist() == [
        *range(37)
    ]
    raw = retrieval_ranks(image, copies, normalize=False, chunk_size=chunk_size)
    assert raw.image_to_text.tolist() == [*range(37)]


@repeatable
@given(seed=seeds)
def test_signs_and_shifts_of_scores_are_not_looked_at(seed: int):
    image, text = normals(8, 4, seed=seed), normals(8, 4, seed=seed + 1)
    plain = retrieval_ranks(image, text, normalize=False)
    # one more coordinate takes 100 from every score
    column = torch.full((8, 1), 10.0, dtype=torch.float64)
    below = retrieval_ranks(
        torch.cat([image, column], 1), torch.cat([text, -column], 1), normalize=False
    )
    assert torch.equal(plain.image_to_text, below.image_to_text)
    assert torch.equal(plain.text_to_image, below.text_to_image)


@repeatable
@given(seed=seeds)
def test_the_order_of_captions_does_not_matter_without_ties(seed: int):
    image, text = normals(5, 4, seed=seed), normals(9, 4, seed=seed + 1)
    owners, order = drawn_owners(5, 9, seed=seed), shuffled(9, seed=seed + 2)
    plain = retrieval_ranks(image, text, owners)
    reordered = retrieval_ranks(image, text[order], owners[order])
    assert torch.equal(reordered.image_to_text, plain.image_to_text)
    assert torch.equal(reordered.text_to_image, plain.text_to_image[order])


@repeatable
@given(seed=seeds)
def test_recall_grows_with_k_to_one(seed: int):
    found = retrieval(normals(8, 4, seed=seed), normals(8, 4, seed=seed + 1), ks=range(1, 9))
    for direction in ("image_to_text", "text_to_image"):
        recalls = [found[f"{direction}_recall@{k}"] for k in range(1, 9)]
        assert recalls == sorted(recalls)
        assert recalls[-1] == 1


def test_exchanging_the_modalities_exchanges_the_directions():
    image, text = normals(8, 4, seed=6), normals(8, 4, seed=7)
    forth, back = retrieval_ranks(image, text), retrieval_ranks(text, image)
    assert torch.equal(forth.image_to_text, back.text_to_image)
    assert torch.equal(forth.text_to_image, back.image_to_text)


def test_cosines_by_default_and_dot_products_by_wish():
    image = torch.tensor([[1.0, 0.0]]).repeat(2, 1)
    text = torch.tensor([[1.0, 1.0], [0.5, 0.0]])
    assert retrieval_ranks(image, text).image_to_text.tolist() == [1, 0]
    assert retrieval_ranks(image, text, normalize=False).image_to_text.tolist() == [0, 1]


def test_autocast_changes_nothing():
    image, text = normals(50, 8, seed=8).float(), normals(50, 8, seed=9).float()
    plain = retrieval_ranks(image, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = retrieval_ranks(image, text)
    assert torch.equal(plain.image_to_text, inside.image_to_text)


def test_mixed_precision_features_are_widened():
    image, text = normals(6, 4, seed=10).float(), normals(6, 4, seed=11)
    assert retrieval(image, text, ks=(6,))["image_to_text_recall@6"] == 1


def test_recall_by_hand():
    assert recall_at(torch.tensor([0, 1, 2, 7]), 2) == 0.5
    with pytest.raises(ValueError, match="at least 1, got 0"):
        recall_at(torch.tensor([0]), 0)


IMAGE, TEXT = normals(3, 4, seed=12), normals(5, 4, seed=13)


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        (None, "3 images and 5 captions do not pair up by row; pass text_to_image"),
        (torch.tensor([0, 1, 2]), r"must be \(5,\) whole numbers.*got \(3,\)"),
        (torch.tensor([0.0, 1, 2, 0, 1]), "whole numbers.*float32"),
        (torch.tensor([0, 1, 2, 3, 1]), "from 0 to 2, got 0 to 3"),
        (torch.tensor([0, 1, 2, -1, 1]), "from 0 to 2, got -1 to 2"),
        (torch.tensor([0, 0, 2, 0, 2]), "image 1 has no caption"),
    ],
)
def test_captions_without_a_place_are_refused(owners: Tensor | None, message: str):
    with pytest.raises(ValueError, match=message):
        retrieval(IMAGE, TEXT, owners)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must have one dimension, got 4 and 6"):
        retrieval(IMAGE, normals(3, 6, seed=14))
    broken = IMAGE.clone()
    broken[1, 2] = torch.nan
    with pytest.raises(ValueError, match="image features: row 1 is not finite"):
        retrieval(broken, IMAGE)
    with pytest.raises(ValueError, match="text features: row 0 is zero"):
        retrieval(IMAGE, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"must be \(rows, dim\), both at least 1; got \(0, 4\)"):
        retrieval(IMAGE[:0], IMAGE[:0])
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        retrieval(IMAGE, IMAGE, chunk_size=0)
