"""The losses once more, as loops over Python floats: slow, plain, and only to compare with.

One function a formula. `Rows` is a matrix as nested lists, row i of image and text being a pair.
"""

import math

Rows = list[list[float]]
Captions = list[int] | None  # equal numbers for equal captions; None where all differ


def dot(one: list[float], other: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def squared_distance(one: list[float], other: list[float]) -> float:
    return math.fsum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def unit(rows: Rows) -> Rows:
    return [[value / math.sqrt(dot(row, row)) for value in row] for row in rows]


def similarities(image: Rows, text: Rows, scale: float) -> Rows:
    return [[scale * dot(i, t) for t in text] for i in image]


def transposed(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def log_softmax(row: list[float]) -> list[float]:
    largest = max(row)
    log_sum = largest + math.log(math.fsum(math.exp(value - largest) for value in row))
    return [value - log_sum for value in row]


def rafa(image: Rows, text: Rows, references: Rows, reduction: str) -> float:
    total = 0.0
    for i, reference in enumerate(references):
        total += squared_distance(image[i], reference) + squared_distance(text[i], reference)
    batch, dim = len(image), len(image[0])
    return total / (batch * dim) if reduction == "mean" else total / (2 * batch)


def true_share(captions: Captions, i: int, j: int) -> float:
    if captions is None:
        return float(i == j)
    return (captions[i] == captions[j]) / captions.count(captions[i])


def hycd(
    image: Rows,
    text: Rows,
    teacher_image: Rows,
    teacher_text: Rows,
    alpha: float,
    scale: float,
    captions: Captions = None,
) -> float:
    student = similarities(image, text, scale)
    teacher = similarities(teacher_image, teacher_text, scale)
    directions = ((student, teacher), (transposed(student), transposed(teacher)))
    return sum(mean_divergence(s, t, alpha, captions) for s, t in directions) / 2


def mean_divergence(student: Rows, teacher: Rows, alpha: float, captions: Captions) -> float:
    total = 0.0
    for i, (student_row, teacher_row) in enumerate(zip(student, teacher, strict=True)):
        log_p, log_q = log_softmax(student_row), log_softmax(teacher_row)
        for j in range(len(student_row)):
            target = alpha * true_share(captions, i, j) + (1 - alpha) * math.exp(log_q[j])
            if target > 0:
                total += target * (math.log(target) - log_p[j])
    return total / len(student)


def is_false(teacher: Rows | None, captions: Captions, i: int, j: int) -> bool:
    """Whether the teacher holds candidate j nearer to query i than the query's own."""
    own = true_share(captions, i, j) > 0
    return teacher is not None and not own and teacher[i][j] > teacher[i][i]


def contrastive(
    image: Rows,
    text: Rows,
    scale: float,
    captions: Captions = None,
    teacher: Rows | None = None,
    wrong: Rows | None = None,
) -> float:
    logits = similarities(image, text, scale)
    extra = similarities(image, wrong or [], scale)
    none = [[] for _ in image]
    sides = ((logits, teacher, extra), (transposed(logits), teacher and transposed(teacher), none))
    total = 0.0
    for rows, judged, more in sides:
        for i, row in enumerate(rows):
            kept = [j for j in range(len(row)) if not is_false(judged, captions, i, j)]
            log_p = log_softmax([row[j] for j in kept] + more[i])
            for j, value in zip(kept, log_p, strict=False):
                total -= true_share(captions, i, j) * value
    return total / (2 * len(image))


def sigmoid_contrastive(
    image: Rows,
    text: Rows,
    scale: float,
    bias: float,
    captions: Captions = None,
    teacher: Rows | None = None,
) -> float:
    total = 0.0
    for i, row in enumerate(similarities(image, text, scale)):
        for j, similarity in enumerate(row):
            of_text = is_false(teacher and transposed(teacher), captions, j, i)
            if is_false(teacher, captions, i, j) or of_text:
                continue
            sign = 1 if true_share(captions, i, j) else -1
            total += math.log(1 + math.exp(-sign * (similarity + bias)))
    return total / len(image)


def feature_distillation(image: Rows, text: Rows, teacher_image: Rows, teacher_text: Rows) -> float:
    total = 0.0
    for i in range(len(image)):
        total += squared_distance(image[i], teacher_image[i])
        total += squared_distance(text[i], teacher_text[i])
    return total / (len(image) * len(image[0]))


def logit_distillation(
    image: Rows, text: Rows, teacher_image: Rows, teacher_text: Rows, scale: float
) -> float:
    student = similarities(image, text, scale)
    teacher = similarities(teacher_image, teacher_text, scale)
    distances = [squared_distance(s, t) for s, t in zip(student, teacher, strict=True)]
    return sum(distances) / len(image) ** 2


def alignment(image: Rows, text: Rows) -> float:
    return sum(squared_distance(i, t) for i, t in zip(image, text, strict=True)) / len(image)


def centroid_uniformity(image: Rows, text: Rows) -> float:
    both = zip(unit(image), unit(text), strict=True)
    middles = unit([[a + b for a, b in zip(i, t, strict=True)] for i, t in both])
    potentials = [
        math.exp(-2 * squared_distance(middles[i], middles[j]))
        for i in range(len(middles))
        for j in range(i)
    ]
    return math.log(math.fsum(potentials) / len(potentials))


def covariance(rows: Rows, i: int, j: int) -> float:
    columns = transposed(rows)
    means = [math.fsum(column) / len(rows) for column in columns]
    return math.fsum((row[i] - means[i]) * (row[j] - means[j]) for row in rows) / len(rows)


def covariance_matching(image: Rows, text: Rows) -> float:
    image, text, total = unit(image), unit(text), 0.0
    for i in range(len(image[0])):
        for j in range(len(image[0])):
            total += (covariance(image, i, j) - covariance(text, i, j)) ** 2
    return total


def geodesic_mix(image: list[float], text: list[float], share: float) -> list[float]:
    angle = math.acos(dot(image, text))
    of_image = math.sin(share * angle) / math.sin(angle)
    of_text = math.sin((1 - share) * angle) / math.sin(angle)
    return [of_image * a + of_text * b for a, b in zip(image, text, strict=True)]


def m2_mix(
    image: Rows,
    text: Rows,
    scale: float,
    shares: list[float],
    captions: Captions = None,
    teacher: Rows | None = None,
) -> float:
    image, text = unit(image), unit(text)
    mixed = [geodesic_mix(*parts) for parts in zip(image, text, shares, strict=True)]
    total = 0.0
    judged = teacher and transposed(teacher)
    for queries, partners, judge in ((image, text, teacher), (text, image, judged)):
        for i, query in enumerate(queries):
            positive = math.exp(scale * dot(query, partners[i]))
            negatives = sum(
                math.exp(scale * dot(query, mixed[j]))
                for j in range(len(mixed))
                if not true_share(captions, i, j) and not is_false(judge, captions, i, j)
            )
            total -= math.log(positive / (positive + negatives))
    return total / (2 * len(image))
