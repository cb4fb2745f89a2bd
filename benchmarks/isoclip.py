"""IsoCLIP on vectors of one modality: mAP of text→text and image→image search, and what it costs.

`python benchmarks/isoclip.py MODEL PAIRS IMAGES`, where PAIRS are captioned images with several
captions (relevant to a caption are its image's others) and IMAGES a folder a class.
"""

import sys

import torch
from torch import Tensor

from clip_refine.config import DataConfig, EvaluationConfig, ModelConfig
from clip_refine.evaluation import Embedder, retrieval
from clip_refine.evaluation.geometry import centroid_distance
from clip_refine.evaluation.scores import embed_tasks
from clip_refine.models.embed import embed_pairs
from clip_refine.models.weights import output_projection
from clip_refine.roads import build
from clip_refine.roads.vector_maps import try_inputs
from clip_refine.vectors.maps import IsoClip
from clip_refine.vectors.transforms import unit_rows

DROPPED = ((0, 0), (1, 0), (10, 0), (0, 10), (0, 50), (0, 100), (10, 50), (10, 100), (25, 100))


def mean_average_precision(rows: Tensor, groups: Tensor) -> float:
    """Of each row searching all others, those of its group being relevant."""
    unit = unit_rows("rows", rows)
    found = []
    for start in range(0, len(unit), 256):
        cosines = unit[start : start + 256] @ unit.T
        own = torch.arange(start, start + len(cosines))
        cosines[torch.arange(len(cosines)), own] = -2
        order = cosines.argsort(dim=1, descending=True)[:, :-1]
        hits = (groups[order] == groups[own, None]).double()
        precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
        found.append((precision * hits).sum(1) / hits.sum(1).clamp(min=1))
    return float(torch.cat(found).mean())


def main(name: str, source: str, folder: str) -> None:
    model = build.build_model(ModelConfig(name=name))
    embedder = Embedder(model, torch.device("cpu"), 64, 0)
    pairs = embed_pairs(embedder, build.build_held_out(DataConfig(val=source), seed=0))
    [task] = embed_tasks(embedder, build.build_tasks(EvaluationConfig(zero_shot=(folder,))))
    pixels, tokens = try_inputs(model)
    image, text = (lambda: model.encode_image(pixels)), (lambda: model.encode_text(tokens))
    projections = (
        output_projection(model, image, "image", other=text),
        output_projection(model, text, "text", other=image),
    )
    print("| top, bottom | text→text mAP | image→image mAP | gap | R@1 i→t | R@1 t→i |")
    print("|---|---|---|---|---|---|")
    for top, bottom in DROPPED:
        maps = IsoClip.from_projections(*projections, top=top, bottom=bottom)
        texts = maps.transform_text(pairs.text_features)
        images = maps.transform_image(pairs.image_features)
        across = retrieval(images, texts, pairs.text_to_image, ks=[1])
        numbers = (
            mean_average_precision(texts, pairs.text_to_image),
            mean_average_precision(maps.transform_image(task.image_features), task.labels),
            centroid_distance(images, texts[pairs.first_caption]),
            *across.values(),
        )
        print(f"| {top}, {bottom} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:4])
