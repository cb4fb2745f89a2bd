"""Examples and classes that changed: by hand."""

import torch

from clip_refine.evaluation.evidence import caption_ranking, image_ranking
from clip_refine.evaluation.scores import ModelFeatures, TaskFeatures, measure, task_changes
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.toy import ToyClasses, ToyPairs

PAIRS = ToyPairs("changes", size=3)
TASK = ToyClasses("toy_shape", size=16)


def model(texts: torch.Tensor, images: torch.Tensor):
    pairs = EmbeddedPairs(torch.eye(3), texts, torch.arange(3))
    labels = torch.tensor(TASK.labels)
    return measure(ModelFeatures(pairs, [TaskFeatures("shapes", images, torch.eye(8), labels)]))


# before, captions 0 and 1 lie on each other's image, and all images of class 1 are taken for 0
BEFORE = model(torch.eye(3)[[1, 0, 2]], torch.eye(8)[[0, 0, *range(2, 8)] * 2])
# after, caption 2 does so with 0, and one image of class 3 is taken for 2
AFTER = model(torch.eye(3)[[2, 1, 0]], torch.eye(8)[[0, 1, 2, 2, *range(4, 8), *range(8)]])
CAPTIONS = [captions[0] for captions in PAIRS.captions]


def test_captions_as_queries():
    found = caption_ranking(BEFORE, AFTER, PAIRS)
    assert (found.queries, found.improved, found.worsened) == (3, 1, 1)
    (better,), (worse,) = found.most_improved, found.most_worsened
    # image 0 is the nearest; images 1 and 2 are equally far, and the lower index stands first
    assert (better.caption, better.image) == (CAPTIONS[1], 1)
    assert (better.rank_before, better.rank_after) == (2, 1)
    assert (better.first_before, better.first_after) == (0, 1)
    assert (worse.caption, worse.image, worse.rank_before) == (CAPTIONS[2], 2, 1)
    assert (worse.first_before, worse.first_after) == (2, 0)


def test_images_as_queries():
    found = image_ranking(BEFORE, AFTER, PAIRS)
    assert (found.queries, found.improved, found.worsened) == (3, 1, 1)
    better, worse = found.most_improved[0], found.most_worsened[0]
    assert (better.image, better.caption, better.rank_after) == (1, CAPTIONS[1], 1)
    assert (better.first_before, better.first_after) == (CAPTIONS[0], CAPTIONS[1])
    assert (worse.image, worse.rank_before) == (2, 1)
    assert worse.first_after == CAPTIONS[0]


def test_classes_and_confusions():
    (task,) = task_changes(BEFORE, AFTER, [TASK])
    shares = {found.name: (found.images, found.before, found.after) for found in task.classes}
    names = TASK.class_names
    assert shares[names[1]] == (2, 0.0, 1.0)
    assert shares[names[3]] == (2, 1.0, 0.5)
    assert shares[names[0]] == (2, 1.0, 1.0)
    # two images of eight classes say nothing for certain; where none moved there is nothing to say
    ends = {found.name: (found.low, found.high) for found in task.classes}
    assert ends[names[1]][0] < 0 < ends[names[1]][1]
    assert ends[names[0]] == (0.0, 0.0)
    confused = [(pair.label, pair.predicted, pair.before, pair.after) for pair in task.confusions]
    assert confused == [(names[1], names[0], 2, 0), (names[3], names[2], 0, 1)]
