"""Whether a model hears the order of words: an image against texts of nearly the same words.

Sources: SugarCrepe (Hsieh et al., NeurIPS 2023, arXiv 2306.14610), SugarCrepe++ (Dumpala et al.,
NeurIPS 2024, arXiv 2406.11171), Winoground (Thrush et al., CVPR 2022, arXiv 2204.03162).
"""

from torch import Tensor

from clip_refine.evaluation.similarity import measured, tie_width, unit_sides


@measured
def compositions(
    image_features: Tensor, text_features: Tensor, *, paired: bool = False
) -> dict[str, Tensor]:
    """Which comparisons are right; what ties counts as wrong, chance is ½ for two texts.

    Of (N·T, d) texts every image has T, its own first, the wrong one last; T is 2, or 3 where a
    text and its paraphrase are both its own. Not paired, (N,) bool: `composition_accuracy`, all own
    texts nearer to the image than the wrong one; with T = 3 also `text_only_accuracy`, the own
    texts nearer to each other than either is to the wrong one. `paired`, where images 2i and 2i + 1
    are described by each other's wrong text, (N/2,), Winoground's: `text_score`, both images nearer
    to their own text, `image_score`, both texts nearer to their own image, `group_score`, both.
    """
    image, text = unit_sides(image_features, text_features)
    count, texts = len(image), len(text) // len(image)
    if (
        len(text) != count * texts
        or texts not in ((2,) if paired else (2, 3))
        or (paired and count % 2)
    ):
        raise ValueError(
            "compositions are images with two texts each, own and wrong, or three, own, own and "
            f"wrong; paired ones an even number with two. Got {count} images and {len(text)} texts"
        )
    tie = tie_width(image.dtype)
    text = text.view(count, texts, -1)
    own, wrong = text[:, :-1], text[:, -1]
    scores = (own @ image[:, :, None])[:, :, 0]
    right = (scores > (wrong * image).sum(dim=1, keepdim=True) + tie).all(dim=1)
    if paired:
        elsewhere = (own[:, 0] * image.view(-1, 2, image.shape[1]).flip(1).flatten(0, 1)).sum(dim=1)
        found = (scores[:, 0] > elsewhere + tie).view(-1, 2).all(dim=1)
        both = right.view(-1, 2).all(dim=1)
        return {"text_score": both, "image_score": found, "group_score": both & found}
    hits = {"composition_accuracy": right}
    if texts == 3:
        together = (own[:, 0] * own[:, 1]).sum(dim=1, keepdim=True)
        apart = (own @ wrong[:, :, None])[:, :, 0]
        hits["text_only_accuracy"] = (together > apart + tie).all(dim=1)
    return hits
