"""The tasks of a suite."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_refine.config.suites import (
    ClusteringTask,
    CompositionTask,
    FewShotTask,
    GeometryTask,
    ImageNeighboursTask,
    LinearProbeTask,
    MixBenchTask,
    MixedDocumentsTask,
    MixedSearchTask,
    PairClusteringTask,
    RetrievalTask,
    SeparationTask,
    StorageTask,
    Task,
    TextNeighboursTask,
    ZeroShotTask,
)
from clip_refine.evaluation.bootstrap import (
    Bootstrap,
    Resampled,
    means,
    median_ranks,
    norm_of_mean,
    sums_in_groups,
)
from clip_refine.evaluation.classify import (
    CALIBRATION_BINS,
    can_halve,
    class_vectors,
    compositions,
    confusion_pairs,
    few_shot_hits,
    linear_probe_hits,
    per_class_recall,
    probe_halves,
    resampled_calibration_error,
    zero_shot_predictions,
    zero_shot_ranks,
)
from clip_refine.evaluation.geometry import (
    agreement,
    agreement_numbers,
    find_clusters,
    geometry,
    hubness_skewness,
    resampled_pairs,
)
from clip_refine.evaluation.retrieval import (
    KINDS,
    best_of,
    document_numbers,
    draw_documents,
    group_hits,
    joined,
    mixed_search_queries,
    retrieval_ranks,
    search,
    search_within,
    votes,
)
from clip_refine.evaluation.scores import KS, Answers, Outcome
from clip_refine.evaluation.separation import FEWEST, fit_probability, separation, threshold_numbers
from clip_refine.evaluation.similarity import Captions, average_precision, measured, unit_sides
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.results import FitProbability
from clip_refine.support.errors import DataError

NEIGHBOURS = 10
"""Of a vote, and of how often an item is among the nearest."""


@dataclass(frozen=True, eq=False)
class SourceFeatures:
    """What a model makes of a suite's source, and what is known of that."""

    image_features: Tensor  # (N, d)
    # (M, d), captions or texts of the layout; of classes the prompts, (C·T, d) class by class, or
    # none where the task needs none
    text_features: Tensor
    owners: Tensor  # (M,) int64, the image of each caption, rising
    labels: Tensor  # (N,) int64, the class of each image
    class_names: Sequence[str] = ()
    training: tuple[Tensor, Tensor] | None = None  # what a probe fits on, where not on half
    layout: Any = None  # `Compositions` or `Documents`
    logit_scale: float = 100.0  # the model's
    nonsense_features: Tensor | None = None  # (Q, d), of texts that describe no image
    first: Outcome | None = None  # what the first model did in this task, where this is another

    @property
    def pairs(self) -> EmbeddedPairs:
        """Images with all captions."""
        return EmbeddedPairs(self.image_features, self.text_features, self.owners)

    def pairs_by(self, protocol: str) -> EmbeddedPairs:
        """Images with all captions, or with the first of each."""
        pairs = self.pairs
        if protocol == "all-captions":
            return pairs
        first = pairs.first_caption_features
        return EmbeddedPairs(pairs.image_features, first, torch.arange(len(first)))


# --------------------------------------------------------------------------------------------------
# Tasks on images with captions: retrieval, mixed search, score usefulness, geometry.


PROTOCOLS = {
    "all-captions": "all captions of an image are its own",
    "first-caption": "one caption an image, the first; not comparable with all-captions",
}


def retrieval_task(task: RetrievalTask, source: SourceFeatures, bootstrap: Bootstrap) -> Outcome:
    """Recall at 1, 5 and 10, median rank and mAP in both directions."""
    pairs = source.pairs_by(task.protocol)
    image_unit, text_unit = unit_sides(pairs.image_features, pairs.text_features)
    captions = Captions(pairs.text_to_image, len(image_unit)).of_images(slice(len(image_unit)))
    statistics, answers, hubs = [], {}, {}
    for direction, queries, items, own, owners in (
        ("image_to_text", image_unit, text_unit, captions, None),
        ("text_to_image", text_unit, image_unit, pairs.text_to_image[:, None], pairs.text_to_image),
    ):
        found = search(queries, items, own)
        best = best_of(found.ranks)
        columns = {f"{direction}_recall@{k}": best < k for k in KS}
        columns[f"{direction}_mAP"] = average_precision(found.ranks)
        statistics += [
            means(columns, owners),
            median_ranks(f"{direction}_median_rank", best, owners),
        ]
        answers[direction] = Answers(found.first, owners)
        if len(items) > NEIGHBOURS:
            hubs[f"{direction}_hubness@{NEIGHBOURS}"] = Resampled(
                hubness_skewness(queries, items, k=NEIGHBOURS)
            )
    numbers = bootstrap.numbers(len(image_unit), *statistics) | hubs
    return Outcome(_sentence(task.protocol), _counts(pairs), numbers, answers=answers)


def mixed_search_task(
    task: MixedSearchTask, source: SourceFeatures, bootstrap: Bootstrap
) -> Outcome:
    """NDCG@10, the share of text first, and the rank of the right image; as `retrieval_task`."""
    pairs = source.pairs_by(task.protocol)
    owners = pairs.text_to_image
    found = mixed_search_queries(pairs.image_features, pairs.text_features, owners)
    return Outcome(
        protocol="every caption searches all images and all other captions; relevant are its "
        f"image and that image's other captions; {_sentence(task.protocol)}",
        counts=_counts(pairs),
        numbers=bootstrap.numbers(
            len(pairs.image_features),
            means({"ndcg@10": found.ndcg, "text_first_share": found.text_first}, owners),
            median_ranks("median_image_rank", found.image_rank, owners),
        ),
    )


def mixed_documents_task(
    task: MixedDocumentsTask, source: SourceFeatures, bootstrap: Bootstrap
) -> Outcome:
    """One document an image, of three kinds; the seed of `bootstrap` is that of which is which."""
    pairs = source.pairs
    count, owners = len(pairs.image_features), pairs.text_to_image
    drawn = draw_documents(owners, count, mixing=task.mixing, seed=bootstrap.seed)
    nothing = torch.nan
    is_text, is_image = drawn.kinds == KINDS.index("text"), drawn.kinds == KINDS.index("image")
    image_unit, text_unit = unit_sides(pairs.image_features, pairs.text_features)
    documents, kinds = joined(
        image_unit.masked_fill(is_text[:, None], nothing),
        text_unit[pairs.first_caption].masked_fill(is_image[:, None], nothing),
        image_weight=task.image_weight,
    )
    queries = torch.cat([image_unit[drawn.image_queries], text_unit[drawn.text_queries]])
    query_kinds = torch.arange(2).repeat_interleave(
        torch.tensor([len(drawn.image_queries), len(drawn.text_queries)])
    )
    of_images = torch.cat([drawn.image_queries, owners[drawn.text_queries]])
    found = search(queries, documents, of_images[:, None])
    shares = " : ".join(f"{share:g}" for share in task.mixing)
    return Outcome(
        protocol=f"documents that are an image, a text or both as {shares}, one an image, drawn by "
        f"the seed; both at {task.image_weight:g} of the image; every image and caption that is in "
        "no document searches them for its own",
        counts=_counts(pairs) | _kind_counts(query_kinds, kinds),
        numbers=document_numbers(found, query_kinds, kinds, of_images, bootstrap),
    )


def mixbench_task(task: MixBenchTask, source: SourceFeatures, bootstrap: Bootstrap) -> Outcome:
    """Documents and queries of a benchmark with its own judgements; intervals over queries."""
    layout, sides = source.layout, (source.image_features, source.text_features)
    nothing = sides[0].new_full((1, sides[0].shape[1]), torch.nan)
    images, texts = (torch.cat([side, nothing]) for side in sides)  # a missing side is −1: the last
    (queries, query_kinds), (documents, kinds) = (
        joined(images[places[:, 0]], texts[places[:, 1]], image_weight=task.image_weight)
        for places in (torch.tensor(layout.queries), torch.tensor(layout.documents))
    )
    relevant = nn.utils.rnn.pad_sequence([torch.tensor(own) for own in layout.relevant], True, -1)
    found = search(queries, documents, relevant)
    return Outcome(
        protocol="every query searches all documents; relevant is what the benchmark says; both "
        f"at {task.image_weight:g} of the image",
        counts={"images": len(sides[0])} | _kind_counts(query_kinds, kinds),
        numbers=document_numbers(found, query_kinds, kinds, torch.arange(len(queries)), bootstrap),
    )


def _kind_counts(queries: Tensor, documents: Tensor) -> dict[str, int]:
    return {
        f"{name}_{what}": int((kinds == number).sum())
        for what, kinds in (("queries", queries), ("documents", documents))
        for number, name in enumerate(KINDS)
    }


def text_neighbours_task(
    task: TextNeighboursTask, source: SourceFeatures, bootstrap: Bootstrap
) -> Outcome:
    """Text to text: every caption searches all others for those of its image."""
    pairs = source.pairs
    owners = pairs.text_to_image
    found = search_within(pairs.text_features, owners, k=max(KS))
    columns = {f"text_to_text_recall@{k}": group_hits(found, owners, k) for k in KS}
    columns["text_to_text_mAP"] = found.average_precision
    drawn, own = owners[found.queries].unique(return_inverse=True)
    return Outcome(
        protocol="every caption searches all other captions; relevant are those of its image; "
        "captions that are their image's only one search nothing",
        counts=_counts(pairs) | {"queries": len(own)},
        numbers=bootstrap.numbers(len(drawn), means(columns, own)),
    )


def pair_clustering_task(
    task: PairClusteringTask, source: SourceFeatures, bootstrap: Bootstrap
) -> Outcome:
    """Whether k-means on images and first captions together follows pairs or modality."""
    pairs, clusters = source.pairs, task.clusters
    sides = unit_sides(pairs.image_features, pairs.first_caption_features)
    count = len(sides[0])
    found = find_clusters(torch.cat(sides), clusters, seed=bootstrap.seed)
    together = (found[:count] == found[count:]).double()
    return Outcome(
        protocol=f"k-means with {clusters} clusters on images and their first captions together",
        counts=_counts(pairs) | {"clusters": clusters},
        numbers=_modality(found, count, torch.arange(count).repeat(2), bootstrap)
        | bootstrap.numbers(count, means({"pairs_together": together})),
    )


def _modality(
    found: Tensor, images: int, owners: Tensor, bootstrap: Bootstrap
) -> dict[str, Resampled]:
    is_text = (torch.arange(len(found)) >= images).long()
    return agreement_numbers("modality", found, is_text, owners, bootstrap)


def storage_task(task: StorageTask, source: SourceFeatures, bootstrap: Bootstrap) -> Outcome:
    """R@1 and the gap of vectors in the forms in which indexes hold them."""
    pairs = source.pairs_by(task.protocol)
    unit = unit_sides(pairs.image_features, pairs.text_features)
    owners, count, dim = pairs.text_to_image, len(unit[0]), unit[0].shape[1]
    numbers: dict[str, Resampled] = {}
    for form in FORMS:
        kept = EmbeddedPairs(*stored(*unit, form), owners)
        ranks = retrieval_ranks(kept.image_features, kept.text_features, owners)
        sides = unit_sides(kept.image_features, kept.first_caption_features)
        numbers[f"centroid_distance@{form}"] = norm_of_mean(sides[0] - sides[1], bootstrap)
        numbers |= bootstrap.numbers(
            count,
            means({f"image_to_text_recall@1,{form}": ranks.image_to_text < 1}),
            means({f"text_to_image_recall@1,{form}": ranks.text_to_image < 1}, owners),
        )
    return Outcome(
        protocol="vectors whole, their first half and quarter at norm 1 again, as int8 by each "
        f"dimension's range, and as signs; {_sentence(task.protocol)}",
        counts=_counts(pairs),
        numbers=numbers,
        details={"bytes_a_vector": {form: size(dim) for form, size in FORMS.items()}},
    )


FORMS: Mapping[str, Callable[[int], int]] = {
    "d": lambda dim: 4 * dim,
    "d/2": lambda dim: 4 * (dim // 2),
    "d/4": lambda dim: 4 * (dim // 4),
    "int8": lambda dim: dim,
    "binary": lambda dim: -(-dim // 8),
}
"""How vectors are stored, and the bytes of one: float32 whole, its first half and quarter
(Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022), eight bits or one a
dimension."""


@measured
def stored(image_unit: Tensor, text_unit: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Unit vectors as an index holds them in one of `FORMS`, read back; not scaled to 1 again.

    int8: 256 even steps between each dimension's least and greatest value in both together.
    binary: signs, 0 as +1; their cosine is 1 − 2 · Hamming / d.
    """
    dim = image_unit.shape[1]
    both = torch.cat([image_unit, text_unit])
    match form:
        case "d/2" | "d/4":
            both = both[:, : dim // int(form[2:])]
        case "int8":
            low, high = both.amin(dim=0), both.amax(dim=0)
            step = ((high - low) / 255).clamp(min=torch.finfo(both.dtype).tiny)
            both = ((both - low) / step).round() * step + low
        case "binary":
            both = torch.where(both >= 0, 1.0, -1.0).to(both.dtype)
    return both[: len(image_unit)], both[len(image_unit) :]


def separation_task(task: SeparationTask, source: SourceFeatures, bootstrap: Bootstrap) -> Outcome:
    """AUC of the cosine, and what the threshold at few false positives finds.

    Intervals are over captions' own pairs; wrong pairs and the threshold stay as they are. With
    `FEWEST` images or more also the probability that a pair fits, fitted on half of them, and what
    thresholds of the first model's fit do; without it those of its own.
    """
    pairs, rate = source.pairs_by(task.protocol), task.false_positive_rate
    owners = pairs.text_to_image
    sides = (pairs.image_features, pairs.text_features, owners)
    found = separation(*sides, false_positive_rate=rate)
    recall = f"recall@{100 * rate:g}%_false_positives"
    columns = {"auc": found.pair_auc, recall: found.pair_found}
    of_fit: dict[str, Resampled] = {}
    details: dict[str, Any] = {}
    if len(pairs.image_features) >= FEWEST:
        fit = fit_probability(
            *sides,
            false_positive_rate=rate,
            seed=bootstrap.seed,
            nonsense_features=source.nonsense_features,
        )
        known = source.first and source.first.details.get("fit")  # None of too few images
        first = FitProbability.model_validate(known) if known else fit
        of_fit = threshold_numbers(fit, first, *sides, bootstrap)
        found_any = fit.cutoffs["false_positive_rate"].nonsense_found
        if found_any is not None:
            of_fit["nonsense_found"] = Resampled(found_any)
        details = {"fit": fit.model_dump(mode="json")}
    return Outcome(
        protocol="cosines of every caption with its own image against those with every other; "
        f"{_sentence(task.protocol)}",
        counts=_counts(pairs) | {"wrong_pairs": found.wrong_pairs.pairs},
        numbers={
            **bootstrap.numbers(len(pairs.image_features), means(columns, owners)),
            "threshold": Resampled(found.threshold),
            "true_pair_mean": Resampled(found.true_pairs.mean),
            "true_pair_deviation": Resampled(found.true_pairs.deviation),
            "wrong_pair_mean": Resampled(found.wrong_pairs.mean),
            "wrong_pair_deviation": Resampled(found.wrong_pairs.deviation),
            **of_fit,
        },
        details={"histogram_range": [-1, 1], **details}
        | {
            name: {"pairs": kind.pairs, "histogram": kind.histogram.tolist()}
            for name, kind in (("true_pairs", found.true_pairs), ("wrong_pairs", found.wrong_pairs))
        },
    )


def geometry_task(task: GeometryTask, source: SourceFeatures, bootstrap: Bootstrap) -> Outcome:
    """The shape of the shared space; intervals for means over pairs and what follows from such."""
    pairs = source.pairs_by("first-caption")
    sides = pairs.image_features, pairs.text_features
    found = geometry(*sides, seed=bootstrap.seed)
    return Outcome(
        protocol="every image with its first caption",
        counts=_counts(pairs),
        numbers={name: Resampled(value) for name, value in found.items()}
        | resampled_pairs(*unit_sides(*sides), bootstrap),
    )


def _sentence(protocol: str) -> str:
    return f"{protocol}: {PROTOCOLS[protocol]}"


def _counts(pairs: EmbeddedPairs) -> dict[str, int]:
    return {"images": len(pairs.image_features), "captions": len(pairs.text_features)}


# --------------------------------------------------------------------------------------------------
# Tasks on images with classes: zero-shot classification and probes.


HALVES = "half of the images of each class train, the other half tests"
TRAIN_SOURCE = "trained on a source of its own"


def zero_shot_task(task: ZeroShotTask, source: SourceFeatures, bootstrap: Bootstrap) -> Outcome:
    """Top-1, top-5, mean per-class recall and calibration, with every class and confusion."""
    images, labels, class_names = source.image_features, source.labels, source.class_names
    prompts = source.text_features.view(len(class_names), -1, images.shape[1])
    class_features = class_vectors(prompts)
    ranks = zero_shot_ranks(images, class_features, labels)
    found = zero_shot_predictions(images, class_features, logit_scale=source.logit_scale)
    correct = found.predicted == labels
    recall = per_class_recall(found.predicted, labels, len(class_features))
    sizes = labels.bincount(minlength=len(class_features))
    hits, drawn = sums_in_groups(correct, labels), sums_in_groups(torch.ones(len(labels)), labels)
    numbers = bootstrap.numbers(
        len(labels),
        means({"top1": ranks == 0, "top5": ranks < 5}),
        # over the classes that have images in a resample
        lambda counts: {"mean_per_class_recall": (hits(counts) / drawn(counts)).nanmean(dim=1)},
    )
    error = resampled_calibration_error(found.confidence, correct, bootstrap)
    numbers = {**numbers, "expected_calibration_error": error}
    classes = zip(class_names, sizes.tolist(), recall.tolist(), strict=True)
    confusions = confusion_pairs(found.predicted, labels, len(class_features))
    return Outcome(
        protocol="every image once; the class with the nearest mean prompt",
        counts={"images": len(labels), "classes": len(class_features)},
        numbers=numbers,
        details={
            "per_class": [
                {"class": name, "images": size, "recall": value if size else None}
                for name, size, value in classes
            ],
            "confusions": [
                {
                    "class": class_names[pair.label],
                    "taken_for": class_names[pair.predicted],
                    "images": pair.images,
                    "share": pair.share,
                }
                for pair in confusions
            ],
            "logit_scale": source.logit_scale,
            "calibration_bins": CALIBRATION_BINS,
        },
        answers={"": Answers(found.predicted.cpu(), truth=labels)},
    )


def image_neighbours_task(
    task: ImageNeighboursTask, source: SourceFeatures, bootstrap: Bootstrap
) -> Outcome:
    """Image to image: every image searches all others for those of its class."""
    labels = source.labels
    found = search_within(source.image_features, labels, k=NEIGHBOURS)
    columns = {f"image_to_image_recall@{k}": group_hits(found, labels, k) for k in KS}
    columns["image_to_image_mAP"] = found.average_precision
    right = votes(found, labels)
    return Outcome(
        protocol="every image searches all others; relevant are those of its class; images that "
        "are their class's only one search nothing; the class that most of the nearest "
        f"{NEIGHBOURS} have is k-NN's",
        counts={"images": len(labels), "queries": len(found.queries)},
        numbers=bootstrap.numbers(len(found.queries), means(columns))
        | bootstrap.numbers(len(labels), means({f"knn_accuracy@{NEIGHBOURS}": right})),
    )


def clustering_task(task: ClusteringTask, source: SourceFeatures, bootstrap: Bootstrap) -> Outcome:
    """k-means on images, prompts and both against classes, and of both against modality.

    Images are drawn anew, prompts stay; those alone have no interval, and no number where every
    class has one prompt.
    """
    labels, class_count = source.labels, len(source.class_names)
    images, prompts = unit_sides(source.image_features, source.text_features)
    prompt_labels = torch.arange(len(prompts)) // (len(prompts) // class_count)
    own, fixed = torch.arange(len(images)), torch.full((len(prompts),), -1)
    truth, owners = torch.cat([labels, prompt_labels]), torch.cat([own, fixed])

    def found(rows: Tensor) -> Tensor:
        return find_clusters(rows, class_count, seed=bootstrap.seed)

    numbers = agreement_numbers("image", found(images), labels, own, bootstrap)
    if len(prompts) > class_count:
        alone = agreement(found(prompts), prompt_labels)
        numbers |= {f"text_{name}": Resampled(value) for name, value in alone.items()}
    together = found(torch.cat([images, prompts]))
    numbers |= agreement_numbers("both", together, truth, owners, bootstrap)
    numbers |= _modality(together, len(images), owners, bootstrap)
    return Outcome(
        protocol="k-means with as many clusters as classes, on images, on prompts, on both",
        counts={"images": len(images), "classes": class_count, "texts": len(prompts)},
        numbers=numbers,
    )


def composition_task(
    task: CompositionTask, source: SourceFeatures, bootstrap: Bootstrap
) -> Outcome:
    """Every comparison of `compositions`, over all and by category; images are drawn anew."""
    layout = source.layout
    hits = compositions(source.image_features, source.text_features, paired=layout.paired)
    step = 2 if layout.paired else 1
    categories = list(layout.categories[::step])
    owners = torch.tensor(layout.places[::step]).unique(return_inverse=True)[1]
    numbers = bootstrap.numbers(int(owners.max()) + 1, means(hits, owners))
    for category in dict.fromkeys(categories) if len(set(categories)) > 1 else ():
        chosen = torch.tensor([other == category for other in categories])
        drawn, own = owners[chosen].unique(return_inverse=True)
        columns = {f"{name}@{category}": right[chosen] for name, right in hits.items()}
        numbers |= bootstrap.numbers(len(drawn), means(columns, own))
    return Outcome(
        protocol="two images with two texts each; all of the named comparisons must be right"
        if layout.paired
        else "an image must be nearer to its own texts than to the wrong one",
        counts={"images": len(source.image_features), "items": len(categories)},
        numbers=numbers,
    )


def linear_probe_task(
    task: LinearProbeTask, source: SourceFeatures, bootstrap: Bootstrap
) -> Outcome:
    """Accuracy of a logistic regression on the images that it was not fitted on."""
    generator = np.random.default_rng(bootstrap.seed)
    train, test, how = _split(source, generator)
    correct, strength = linear_probe_hits(*train, *test, generator)
    return Outcome(
        protocol=f"logistic regression, {how}; C chosen on half of the training images",
        counts=_class_counts(train, test),
        numbers=bootstrap.numbers(len(correct), means({"accuracy": correct})),
        details={"C": strength},
    )


def few_shot_task(task: FewShotTask, source: SourceFeatures, bootstrap: Bootstrap) -> Outcome:
    """Mean accuracy over draws of few training images a class."""
    draws = task.draws
    train, test, how = _split(source, np.random.default_rng(bootstrap.seed))
    columns, deviations, by_draw = {}, {}, {}
    for count in task.shots:
        hits = few_shot_hits(*train, *test, shots=count, draws=draws, seed=bootstrap.seed)
        name = f"accuracy@{count}-shot"
        columns[name] = hits.double().mean(dim=0)
        of_draws = hits.double().mean(dim=1)
        by_draw[name] = of_draws.tolist()
        deviations[f"deviation_over_draws@{count}-shot"] = Resampled(of_draws.std().item())
    fewest = int(train[1].unique(return_counts=True)[1].min())
    return Outcome(
        protocol=f"logistic regression on K images a class, mean of {draws} draws; {how}",
        counts=_class_counts(train, test)
        | {"draws": draws, "fewest_training_images_a_class": fewest},
        numbers=bootstrap.numbers(len(test[1]), means(columns)) | deviations,
        details={"by_draw": by_draw},
    )


Split = tuple[Tensor, Tensor]


def _split(source: SourceFeatures, generator: np.random.Generator) -> tuple[Split, Split, str]:
    """What a probe is fitted on: its own source, or half of these images; what it is tested on."""
    features, labels = source.image_features, source.labels
    if source.training is not None:
        return source.training, (features, labels), TRAIN_SOURCE
    if not can_halve(labels):
        raise DataError(
            "a probe on half of the images needs two classes, one of them with two images; there "
            f"are {len(labels)} images of {len(labels.unique())} classes. Name a `train` source."
        )
    train, test = probe_halves(features, labels, generator)
    return (features[train], labels[train]), (features[test], labels[test]), HALVES


def _class_counts(train: Split, test: Split) -> dict[str, int]:
    return {
        "images": len(test[1]),
        "training_images": len(train[1]),
        "classes": len(train[1].unique()),
    }


# --------------------------------------------------------------------------------------------------
# What a suite asks for → the function that measures it.


_MEASURES: dict[type, Callable[[Any, SourceFeatures, Bootstrap], Outcome]] = {
    ZeroShotTask: zero_shot_task,
    RetrievalTask: retrieval_task,
    MixedSearchTask: mixed_search_task,
    MixedDocumentsTask: mixed_documents_task,
    MixBenchTask: mixbench_task,
    SeparationTask: separation_task,
    ImageNeighboursTask: image_neighbours_task,
    TextNeighboursTask: text_neighbours_task,
    ClusteringTask: clustering_task,
    PairClusteringTask: pair_clustering_task,
    StorageTask: storage_task,
    CompositionTask: composition_task,
    GeometryTask: geometry_task,
    LinearProbeTask: linear_probe_task,
    FewShotTask: few_shot_task,
}


def measure_task(task: Task, source: SourceFeatures, *, bootstrap: Bootstrap) -> Outcome:
    """One task of a suite, with its settings, on one source's features."""
    return _MEASURES[type(task)](task, source, bootstrap)
