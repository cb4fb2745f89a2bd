"""The metrics once more, as loops over Python floats: slow, plain, and only to compare with."""

import math

import numpy as np

from tests.reference.losses import Rows, dot, squared_distance


def centroid(rows: Rows) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def centroid_distance(image: Rows, text: Rows) -> float:
    return math.sqrt(squared_distance(centroid(image), centroid(text)))


def centroid_squared_over_dim(image: Rows, text: Rows) -> float:
    return squared_distance(centroid(image), centroid(text)) / len(image[0])


def true_pair_cosine(image: Rows, text: Rows) -> float:
    return sum(dot(i, t) for i, t in zip(image, text, strict=True)) / len(image)


def alignment(image: Rows, text: Rows) -> float:
    return sum(squared_distance(i, t) for i, t in zip(image, text, strict=True)) / len(image)


def centred(rows: Rows) -> Rows:
    middle = centroid(rows)
    return [[value - mean for value, mean in zip(row, middle, strict=True)] for row in rows]


def residual_alignment(image: Rows, text: Rows) -> float:
    return alignment(centred(image), centred(text))


def uniformity_mean(image: Rows, text: Rows) -> float:
    every = image + text
    kernels = [
        math.exp(-2 * squared_distance(every[i], every[j]))
        for i in range(len(every))
        for j in range(i + 1, len(every))
    ]
    return math.fsum(kernels) / len(kernels)


def mean_cosine_of_strangers(rows: Rows) -> float:
    count = len(rows)
    cosines = [dot(rows[i], rows[j]) for i in range(count) for j in range(count) if i != j]
    return math.fsum(cosines) / len(cosines)


def relative_modality_gap(image: Rows, text: Rows) -> float:
    a = (1 - true_pair_cosine(image, text)) / 2
    b_image = (1 - mean_cosine_of_strangers(image)) / 2
    b_text = (1 - mean_cosine_of_strangers(text)) / 2
    return a / (a + (b_image + b_text) / 2)


def text_first_share(image: Rows, text: Rows) -> float:
    count = 0
    for i, query in enumerate(text):
        best_image = max(dot(query, item) for item in image)
        best_text = max(dot(query, item) for j, item in enumerate(text) if j != i)
        count += best_text > best_image
    return count / len(text)


def ranking(scores: list[float]) -> list[int]:
    """Items from the best score to the worst, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda item: (-scores[item], item))


def hubness_skewness(image: Rows, text: Rows, k: int) -> float:
    counts = [0] * len(text)
    for query in image:
        for item in ranking([dot(query, row) for row in text])[:k]:
            counts[item] += 1
    mean = sum(counts) / len(counts)
    second = sum((count - mean) ** 2 for count in counts) / len(counts)
    third = sum((count - mean) ** 3 for count in counts) / len(counts)
    return third / second**1.5 if second else 0.0


def effective_rank(image: Rows, text: Rows) -> float:
    rows = centred(image + text)
    dim = len(rows[0])
    covariance = [
        [math.fsum(row[a] * row[b] for row in rows) / len(rows) for b in range(dim)]
        for a in range(dim)
    ]
    eigenvalues = [max(value, 0.0) for value in np.linalg.eigvalsh(np.array(covariance)).tolist()]
    shares = [value / sum(eigenvalues) for value in eigenvalues]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


def best_ranks(scores: Rows, partners: list[set[int]]) -> list[int]:
    """0-based rank of each row's best-placed partner."""
    return [
        min(place for place, item in enumerate(ranking(row)) if item in own)
        for row, own in zip(scores, partners, strict=True)
    ]


def recall_at(ranks: list[int], k: int) -> float:
    return sum(rank < k for rank in ranks) / len(ranks)


def mean_per_class_recall(predicted: list[int], labels: list[int]) -> float:
    recalls = []
    for label in sorted(set(labels)):
        own = [p for p, actual in zip(predicted, labels, strict=True) if actual == label]
        recalls.append(sum(p == label for p in own) / len(own))
    return sum(recalls) / len(recalls)


def places(scores: list[float], own: set[int]) -> list[int]:
    """1-based ranks of all own items."""
    return [place for place, item in enumerate(ranking(scores), start=1) if item in own]


def average_precision(scores: list[float], own: set[int]) -> float:
    found = places(scores, own)
    return sum(number / place for number, place in enumerate(found, start=1)) / len(own)


def ndcg(scores: list[float], own: set[int], k: int) -> float:
    gain = sum(1 / math.log2(place + 1) for place in places(scores, own) if place <= k)
    return gain / sum(1 / math.log2(place + 1) for place in range(1, min(k, len(own)) + 1))


def expected_calibration_error(confidence: list[float], correct: list[bool], bins: int) -> float:
    error = 0.0
    for number in range(bins):
        inside = [
            i
            for i, value in enumerate(confidence)
            if number / bins < value <= (number + 1) / bins or (number == 0 and value == 0)
        ]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(accuracy - mean)
    return error


def area_under_the_curve(true: list[float], wrong: list[float]) -> float:
    beaten = sum((t > w) + (t == w) / 2 for t in true for w in wrong)
    return beaten / len(true) / len(wrong)


def joined(image: list[float] | None, text: list[float] | None, weight: float) -> list[float]:
    """What is an image, a text or both as one unit vector, from unit vectors."""
    if image is None or text is None:
        (only,) = (side for side in (image, text) if side is not None)
        return only
    mean = [weight * i + (1 - weight) * t for i, t in zip(image, text, strict=True)]
    norm = math.sqrt(dot(mean, mean))
    return [value / norm for value in mean]


def group_average_precision(rows: Rows, groups: list[int]) -> list[float]:
    """Of every row that has others of its group, among all other rows."""
    found = []
    for i, query in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        own = {place for place, j in enumerate(others) if groups[j] == groups[i]}
        if own:
            found.append(average_precision([dot(query, rows[j]) for j in others], own))
    return found


def mutual_information(a: list[int], b: list[int]) -> float:
    count = len(a)
    total = 0.0
    for left in set(a):
        for right in set(b):
            both = sum(x == left and y == right for x, y in zip(a, b, strict=True)) / count
            if both:
                total += both * math.log(both / (a.count(left) / count) / (b.count(right) / count))
    return total


def v_measure(found: list[int], truth: list[int]) -> float:
    """Harmonic mean of homogeneity and completeness; the entropy of a grouping is its MI."""
    entropies = [mutual_information(side, side) for side in (truth, found)]
    shared = mutual_information(found, truth)
    homogeneity, completeness = (shared / own if own else 1.0 for own in entropies)
    both = homogeneity + completeness
    return 2 * homogeneity * completeness / both if both else 0.0


def adjusted_rand(found: list[int], truth: list[int]) -> float:
    pairs = [(i, j) for i in range(len(found)) for j in range(i)]
    in_found = sum(found[i] == found[j] for i, j in pairs)
    in_truth = sum(truth[i] == truth[j] for i, j in pairs)
    in_both = sum(found[i] == found[j] and truth[i] == truth[j] for i, j in pairs)
    expected, most = in_found * in_truth / len(pairs), (in_found + in_truth) / 2
    return (in_both - expected) / (most - expected)


def int8(rows: Rows) -> Rows:
    """Each dimension in 256 even steps between its least and greatest value."""
    columns = []
    for column in zip(*rows, strict=True):
        step = (max(column) - min(column)) / 255
        columns.append(
            [round((value - min(column)) / step) * step + min(column) for value in column]
        )
    return [list(row) for row in zip(*columns, strict=True)]


def winoground(scores: list[list[float]]) -> tuple[bool, bool]:
    """Text and image score of one item; scores[text][image], text i describes image i."""
    text = scores[0][0] > scores[1][0] and scores[1][1] > scores[0][1]
    image = scores[0][0] > scores[0][1] and scores[1][1] > scores[1][0]
    return text, image
