"""NNN and DN against the authors' package, where it is installed (PyPI `nnn-retrieval`, MIT).

Run it without installing anything here:
`pip install --no-deps --target nnn nnn-retrieval`, then
`PYTHONPATH=nnn python -m pytest tests/vectors/test_nnn_parity.py`.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from clip_refine.vectors.transforms import DistributionNormalisation, NearestNeighbourNormalisation
from tests.vectors.cases import DIM, drawn, image_bias, text_bias, unit

nnn = pytest.importorskip("nnn", reason="nnn-retrieval is not installed: make parity")

# raw features of several lengths: theirs expects unit features, ours makes them
IMAGE, TEXT = drawn(0, 40, 50, torch.float32)
FITTED = drawn(1, 200, 300, torch.float32)
NEIGHBOURS, ALPHA = 32, 0.75


def scores_of(ranker, queries: Tensor, item_count: int) -> Tensor:
    """(queries, items), from the ranker's sorted lists."""
    distances, indices = ranker.search(unit(queries).numpy(), item_count)
    scores = np.empty_like(distances)
    np.put_along_axis(scores, indices, distances, axis=1)
    return torch.from_numpy(scores)


def ranker_of(kind: str, items: Tensor, queries_fitted: Tensor, **settings):
    arguments = (nnn.NNNRetriever(DIM), unit(items).numpy(), unit(queries_fitted).numpy())
    return getattr(nnn, kind)(*arguments, NEIGHBOURS, 64, **settings)


def test_nnn():
    peer = NearestNeighbourNormalisation.fit(*FITTED, neighbours=NEIGHBOURS, alpha=ALPHA)
    found = peer.similarity(IMAGE, TEXT)
    ranker = ranker_of("NNNRanker", TEXT, FITTED[0], alternate_weight=ALPHA)
    image_to_text = scores_of(ranker, IMAGE, len(TEXT))
    assert_close(found + image_bias(peer, IMAGE)[:, None], image_to_text, rtol=0, atol=2e-6)
    ranker = ranker_of("NNNRanker", IMAGE, FITTED[1], alternate_weight=ALPHA)
    text_to_image = scores_of(ranker, TEXT, len(IMAGE))
    assert_close(found.T + text_bias(peer, TEXT)[:, None], text_to_image, rtol=0, atol=2e-6)


def test_distribution_normalisation():
    ranker = ranker_of(
        "DNRanker",
        TEXT,
        FITTED[0],
        alternate_weight=0.0,
        retrieval_dev_embeds=unit(FITTED[1]).numpy(),
        query_dev_embeds=unit(FITTED[0]).numpy(),
    )
    found = DistributionNormalisation.fit(*FITTED).similarity(IMAGE, TEXT)
    assert_close(found, scores_of(ranker, IMAGE, len(TEXT)), rtol=0, atol=2e-6)
