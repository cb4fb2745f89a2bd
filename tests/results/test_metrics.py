"""One table of metrics: every number that is measured has a row, and directions are said once."""

import subprocess
import sys
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter

from clip_refine.config.suites import PromptedTask, Task
from clip_refine.data.labelled import Compositions, Documents
from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.scores import (
    ModelFeatures,
    Outcome,
    TaskFeatures,
    against,
    score_features,
)
from clip_refine.evaluation.tasks import SourceFeatures, measure_task
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.results import flat
from clip_refine.results.metrics import METRICS, metric
from tests.reference.draws import normals

TASKS: list[dict[str, object]] = [
    *({"kind": kind} for kind in ("retrieval", "mixed-search", "mixed-documents", "geometry")),
    *({"kind": kind} for kind in ("separation", "text-neighbours", "pair-clustering", "storage")),
    *({"kind": kind} for kind in ("zero-shot", "image-neighbours", "clustering", "linear-probe")),
    {"kind": "few-shot-probe", "shots": [1], "draws": 2},
    {"kind": "mixbench"},
    *({"kind": "composition", "name": name} for name in ("two texts", "three texts", "paired")),
]
"""Every kind of task with settings for 48 images, but for what they are measured on."""


def found_by(settings: dict[str, object]) -> dict[str, Outcome]:
    """What two models find."""
    task = TypeAdapter(Task).validate_python({"source": "?", **settings})
    texts_each = {"composition": 3 if task.name == "three texts" else 2, "zero-shot": 1}
    texts = texts_each.get(task.kind_name, 2) * (3 if isinstance(task, PromptedTask) else 48)
    owners = torch.arange(48).repeat_interleave(2)
    fitting = task.kind_name == "separation"
    layouts = {
        "composition": Compositions(["a", "b"] * 24, range(48), paired=task.name == "paired"),
        "mixbench": Documents(
            [(0, -1), (-1, 0), (1, 1)], [(2, -1), (-1, 2), (3, 3)], [[0], [1, 2], [2]]
        ),
    }
    outcomes = {
        model: measure_task(
            task,
            SourceFeatures(
                normals(48, 6, seed=seed),
                # of pairs some must fit for a threshold to be precise
                normals(texts, 6, seed=seed + 1)
                + (3 * normals(48, 6, seed=seed)[owners] if fitting else 0),
                owners,
                torch.arange(48) % 3,
                class_names="abc",
                layout=layouts.get(task.kind_name),
                nonsense_features=normals(5, 6, seed=seed + 2),
            ),
            bootstrap=Bootstrap(2),
        )
        for model, seed in (("first", 0), ("second", 2))
    }
    return {name: against(outcomes["first"], own, Bootstrap(2)) for name, own in outcomes.items()}


def test_every_measured_number_has_a_row_and_every_row_is_measured():
    kinds = {
        get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(Task)[0])
    }
    assert {settings["kind"] for settings in TASKS} == kinds
    names = [name for settings in TASKS for name in found_by(settings)["second"].numbers]
    image, text = normals(48, 6, seed=0), normals(48, 6, seed=1)
    pairs = EmbeddedPairs(image, text, torch.arange(48))
    labels, classes = torch.arange(48) % 3, text[:3]
    scores = score_features(
        ModelFeatures(pairs, [TaskFeatures("t", image, classes, labels)]), seed=0
    )
    names += [*scores.headline, "linear_probe", *scores.retrieval, *scores.geometry]
    names += scores.zero_shot["t"]
    assert {metric(name).name for name in names} == set(METRICS)
    with pytest.raises(KeyError, match="no metric of this name"):
        metric("recal@1")
    assert len(flat(scores.model_dump(include={"geometry", "retrieval"}))) == 12 + 6


@pytest.mark.parametrize("settings", TASKS, ids=lambda settings: str(settings["kind"]))
def test_numbers_lie_in_their_range_and_a_model_has_not_changed_against_itself(
    settings: dict[str, object],
):
    found = found_by(settings)
    for name, number in (pair for own in found.values() for pair in own.numbers.items()):
        unit = metric(name).unit
        if unit.startswith("share, 0–1"):
            assert 0 <= number.value <= 1, name
        if unit.startswith("index"):
            assert -0.5 <= number.value <= 1, name
    unmoved = {
        name: number.value
        for name, number in found["first"].numbers.items()
        if name.endswith("churn") or name == "classes_lost"
    }
    assert all(value == 0 for value in unmoved.values())
    assert unmoved.keys() <= found["second"].numbers.keys()


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
        "precision@first_threshold": None,
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
