"""One table of metrics: every number that is measured has a row, and directions are said once."""

import subprocess
import sys

import pytest
import torch

from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.scores import ModelFeatures, TaskFeatures, score_features
from clip_refine.evaluation.tasks import (
    few_shot_task,
    geometry_task,
    linear_probe_task,
    mixed_search_task,
    retrieval_task,
    separation_task,
    zero_shot_task,
)
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.results import flat
from clip_refine.results.metrics import METRICS, metric
from tests.reference.draws import normals


def test_every_measured_number_has_a_row_and_every_row_is_measured():
    image, text = normals(24, 6, seed=0), normals(24, 6, seed=1)
    pairs = EmbeddedPairs(image, text, torch.arange(24))
    labels = torch.arange(24) % 3
    classes, bootstrap = text[:3], Bootstrap(2)
    names = [
        *retrieval_task(pairs, protocol="all-captions", bootstrap=bootstrap).numbers,
        *mixed_search_task(pairs, protocol="all-captions", bootstrap=bootstrap).numbers,
        *separation_task(
            pairs, protocol="all-captions", false_positive_rate=0.005, bootstrap=bootstrap
        ).numbers,
        *geometry_task(pairs, bootstrap=bootstrap).numbers,
        *zero_shot_task(
            image, classes, labels, class_names="abc", logit_scale=1.0, bootstrap=bootstrap
        ).numbers,
        *linear_probe_task(image, labels, None, bootstrap=bootstrap).numbers,
        *few_shot_task(image, labels, None, shots=[1], draws=2, bootstrap=bootstrap).numbers,
    ]
    scores = score_features(
        ModelFeatures(pairs, [TaskFeatures("t", image, classes, labels)]), seed=0
    )
    names += [*scores.headline, "linear_probe", *scores.retrieval, *scores.geometry]
    names += scores.zero_shot["t"]
    assert {metric(name).name for name in names} == set(METRICS)
    with pytest.raises(KeyError, match="no metric of this name"):
        metric("recal@1")
    assert len(flat(scores.model_dump(include={"geometry", "retrieval"}))) == 12 + 6


def test_directions():
    directions = {
        "auc": True,
        "image_to_text_recall@10": True,
        "recall@1%_false_positives": True,
        "accuracy@4-shot": True,
        "effective_rank": True,
        "gap": False,
        "image_to_text_median_rank": False,
        "residual_alignment": False,
        "threshold": None,
        # neither is better by itself: wrong pairs may be as near
        "true_pair_cosine": None,
        "true_pair_mean": None,
    }
    assert {name: metric(name).higher_is_better for name in directions} == directions


def test_headings_hold_the_depth():
    assert metric("mean_recall@10").short == "mean R@10"
    assert metric("text_to_image_recall@1").short == "R@1 t→i"
    assert metric("gap").heading == metric("centroid_distance").heading
    assert metric("gap").short == "gap"


def test_the_table_needs_no_torch():
    code = (
        "import sys, clip_refine.results.metrics\n"
        "assert not {'torch', 'open_clip', 'accelerate', 'sklearn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
