"""Tasks of a suite: their numbers are the metrics', their intervals are of images drawn anew."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from clip_refine.evaluation.bootstrap import (
    Bootstrap,
    Resampled,
    interval,
    means,
    median_ranks,
    sums_in_groups,
)
from clip_refine.evaluation.classify import few_shot_hits, linear_probe, zero_shot_scores
from clip_refine.evaluation.geometry import geometry, hubness_skewness
from clip_refine.evaluation.retrieval import mixed_search, retrieval
from clip_refine.evaluation.scores import Outcome, mean_of
from clip_refine.evaluation.separation import separation
from clip_refine.evaluation.similarity import unit_sides
from clip_refine.models.embed import EmbeddedPairs
from tests.evaluation.measured import task_on_classes, task_on_pairs
from tests.reference.draws import normals, repeatable, seeds

BOOTSTRAP = Bootstrap(50, 3, "somewhere")
OWNERS = torch.tensor([0, 0, 1, 2, 2, 2, *range(3, 20)])


def drawn_pairs(seed: int = 0) -> EmbeddedPairs:
    image = normals(20, 6, seed=seed)
    return EmbeddedPairs(image, image[OWNERS] + normals(23, 6, seed=seed + 1), OWNERS)


def drawn_classes(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.arange(60) % 6
    classes = normals(6, 5, seed=seed)
    return classes[labels] + normals(60, 5, seed=seed + 1), classes, labels


def drawn_indices(count: int, bootstrap: Bootstrap) -> list[list[int]]:
    """The items of each resample, from their counts."""
    counts = torch.cat(list(bootstrap.counts(count)))
    return [torch.repeat_interleave(torch.arange(count), row.long()).tolist() for row in counts]


def values(found: Outcome) -> dict[str, float]:
    return {name: number.value for name, number in found.numbers.items()}


def all_resampled(found: Outcome) -> dict[str, torch.Tensor]:
    """Draws of those numbers that have some, with a value that is in their interval."""
    drawn = {name: number.draws for name, number in found.numbers.items() if len(number.draws)}
    for name, draws in drawn.items():
        assert len(draws) == BOOTSTRAP.resamples
        low, high = interval(found.numbers[name])
        assert low is not None
        assert high is not None
        assert low <= found.numbers[name].value <= high
    return drawn


@repeatable
@given(seed=seeds, queries=st.integers(5, 20))
def test_resampled_queries_equal_drawing_their_images(seed: int, queries: int):
    owners = torch.cat([torch.arange(5), torch.arange(queries - 5) % 5])
    ranks = torch.randint(9, (queries,), generator=torch.Generator().manual_seed(seed)).double()
    bootstrap = Bootstrap(7, seed)
    sums = sums_in_groups(ranks, (ranks > 4).long(), owners)
    found = bootstrap.numbers(
        5,
        means({"mean": ranks}, owners),
        median_ranks("median", ranks, owners),
        lambda counts: {f"sum {group}": column for group, column in enumerate(sums(counts).T)},
    )
    assert found["mean"].value == pytest.approx(float(ranks.mean()))
    assert found["median"].value == np.median(ranks) + 1
    for number, images in enumerate(drawn_indices(5, bootstrap)):
        drawn = np.array([v for i in images for v, o in zip(ranks, owners, strict=True) if o == i])
        assert found["mean"].draws[number].item() == pytest.approx(drawn.mean())
        assert found["median"].draws[number].item() == np.median(drawn) + 1
        for group in range(int(ranks.max() > 4) + 1):
            expected = drawn[(drawn > 4) == bool(group)].sum()
            assert found[f"sum {group}"].draws[number].item() == pytest.approx(expected)


def test_zero_shot_numbers_are_the_metrics_and_scikit_learns():
    image, classes, labels = drawn_classes()
    names = [f"class {number}" for number in range(6)]
    of_classes = {"prompts": classes, "class_names": names, "logit_scale": 10.0}
    found = task_on_classes("zero-shot", image, labels, BOOTSTRAP, **of_classes)
    metrics = zero_shot_scores(image, classes, labels)
    assert {name: values(found)[name] for name in metrics} == pytest.approx(metrics)
    cosines = torch.nn.functional.cosine_similarity(image[:, None], classes[None], dim=2)
    for k in (1, 5):
        theirs = top_k_accuracy_score(labels, cosines, k=k)
        assert values(found)[f"top{k}"] == pytest.approx(theirs)
    assert found.counts == {"images": 60, "classes": 6}
    recalls = [row["recall"] for row in found.details["per_class"]]
    assert np.mean(recalls) == pytest.approx(metrics["mean_per_class_recall"])
    confused = sum(pair["images"] for pair in found.details["confusions"])
    assert confused == pytest.approx(60 * (1 - metrics["top1"]))
    assert found.details["confusions"][0]["class"] in names
    assert all_resampled(found).keys() == found.numbers.keys()


def test_resampled_recalls_equal_drawing_the_images():
    image, classes, labels = drawn_classes(5)
    of_classes = {"prompts": classes, "class_names": ["?"] * 6}
    found = task_on_classes("zero-shot", image, labels, BOOTSTRAP, **of_classes)
    for number, drawn in enumerate(drawn_indices(60, BOOTSTRAP)):
        again = zero_shot_scores(image[drawn], classes, labels[drawn])
        for name in ("top1", "top5", "mean_per_class_recall"):
            assert found.numbers[name].draws[number].item() == pytest.approx(again[name])


@pytest.mark.parametrize("protocol", ["all-captions", "first-caption"])
def test_retrieval_numbers_are_the_metrics(protocol: str):
    pairs = drawn_pairs()
    found = task_on_pairs("retrieval", pairs, BOOTSTRAP, protocol=protocol)
    text, owners = pairs.text_features, OWNERS
    if protocol == "first-caption":
        text, owners = text[[0, 2, 3, *range(6, 23)]], torch.arange(20)
    metrics = retrieval(pairs.image_features, text, owners)
    assert {name: values(found)[name] for name in metrics} == pytest.approx(metrics)
    assert found.protocol.startswith(protocol)
    assert found.counts == {"images": 20, "captions": len(text)}
    hubs = {"image_to_text_hubness@10", "text_to_image_hubness@10"}
    assert all_resampled(found).keys() == found.numbers.keys() - hubs
    unit = unit_sides(pairs.image_features, text)
    assert values(found)["text_to_image_hubness@10"] == hubness_skewness(*unit[::-1])
    cosines = unit[1] @ unit[0].T
    assert torch.equal(found.answers["text_to_image"].first, cosines.argmax(dim=1))
    assert torch.equal(found.answers["image_to_text"].first, cosines.argmax(dim=0))


def test_mixed_search_and_separation_and_geometry_are_the_metrics():
    pairs = drawn_pairs()
    sides = (pairs.image_features, pairs.text_features, OWNERS)
    mixed = task_on_pairs("mixed-search", pairs, BOOTSTRAP, protocol="all-captions")
    assert values(mixed) == pytest.approx(mixed_search(*sides))
    settings = {"protocol": "all-captions", "false_positive_rate": 0.05}
    apart = task_on_pairs("separation", pairs, BOOTSTRAP, **settings)
    metrics = separation(*sides, false_positive_rate=0.05)
    assert values(apart)["auc"] == pytest.approx(metrics.auc)
    assert values(apart)["recall@5%_false_positives"] == pytest.approx(metrics.recall)
    assert sum(apart.details["wrong_pairs"]["histogram"]) == 19 * 23
    shape = task_on_pairs("geometry", pairs, BOOTSTRAP)
    first = pairs.first_caption_features
    assert values(shape) == pytest.approx(geometry(pairs.image_features, first, seed=3))
    found = all_resampled(shape)
    for number, drawn in enumerate(drawn_indices(20, BOOTSTRAP)):
        again = geometry(pairs.image_features[drawn], first[drawn], k=3)
        for name in ("true_pair_cosine", "alignment"):
            assert found[name][number].item() == pytest.approx(again[name], abs=1e-6), name
    # what follows from a distance does so draw by draw
    squared = found["centroid_distance"] * found["centroid_distance"].abs()
    assert torch.allclose(found["centroid_squared_over_dim"], squared / 6)
    assert torch.allclose(found["residual_alignment"], found["alignment"] - squared)
    assert set(found) == {
        *("centroid_distance", "centroid_squared_over_dim", "true_pair_cosine"),
        *("alignment", "residual_alignment"),
    }


def test_probes_equal_the_metric_and_take_training_images():
    image, _, labels = drawn_classes()
    halves = task_on_classes("linear-probe", image, labels, BOOTSTRAP)
    assert values(halves)["accuracy"] == pytest.approx(linear_probe(image, labels, seed=3))
    assert halves.counts == {"images": 30, "training_images": 30, "classes": 6}
    more, _, more_labels = drawn_classes()
    own = (more, more_labels)
    trained = task_on_classes("linear-probe", image, labels, BOOTSTRAP, training=own)
    assert trained.counts["training_images"] == 60
    assert values(trained)["accuracy"] > values(halves)["accuracy"] - 0.1


def test_more_shots_find_more_and_draws_are_named():
    image, _, labels = drawn_classes()
    few = {"shots": (1, 4, 16), "draws": 4}
    found = task_on_classes("few-shot-probe", image, labels, BOOTSTRAP, **few)
    accuracy = [values(found)[f"accuracy@{shots}-shot"] for shots in (1, 4, 16)]
    assert accuracy[0] < accuracy[2]
    by_draw = found.details["by_draw"]["accuracy@4-shot"]
    assert np.mean(by_draw) == pytest.approx(accuracy[1])
    assert np.std(by_draw, ddof=1) == pytest.approx(values(found)["deviation_over_draws@4-shot"])
    assert found.counts["fewest_training_images_a_class"] == 5
    # five images a class are there, so 16 shots are all of them, in every draw
    assert values(found)["deviation_over_draws@16-shot"] == 0


def test_one_shot_uses_one_image_a_class():
    # an image far away on its own axis for each class; the test images lie on the same axes
    train = torch.eye(4).repeat(3, 1) + 0.01 * normals(12, 4, seed=0)
    labels = torch.arange(4).repeat(3)
    hits = few_shot_hits(train, labels, torch.eye(4), torch.arange(4), shots=1, draws=3, seed=0)
    assert hits.shape == (3, 4)
    assert hits.all()
    with pytest.raises(ValueError, match="both must be at least 1"):
        few_shot_hits(train, labels, train, labels, shots=0, draws=1, seed=0)


def test_two_models_on_the_same_images_are_drawn_alike_and_two_sources_are_not():
    image, classes, labels = drawn_classes()

    def top1(source: str) -> torch.Tensor:
        drawn, of_classes = Bootstrap(50, 3, source), {"prompts": classes, "class_names": ["?"] * 6}
        found = task_on_classes("zero-shot", image, labels, drawn, **of_classes)
        return found.numbers["top1"].draws

    assert torch.equal(top1("here"), top1("here"))
    assert not torch.equal(top1("here"), top1("there"))


def test_the_mean_over_tasks():
    parts = {
        name: Outcome("?", {"images": 4}, {"top1": Resampled(value, torch.tensor([value, 0.0]))})
        for name, value in (("a", 0.5), ("b", 1.0))
    }
    found = mean_of(parts, "top1")
    assert values(found) == {"top1": 0.75}
    assert found.numbers["top1"].draws.tolist() == [0.75, 0.0]
    assert found.counts == {"tasks": 2, "images": 8}
