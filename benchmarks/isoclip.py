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
from clip_refine.evaluation.retrieval import search_within
from clip_refine.evaluation.scores import embed_tasks
from clip_refine.models.embed import embed_pairs
from clip_refine.roads import build
from clip_refine.roads.vector_maps import output_projections
from clip_refine.vectors.transforms import IsoClip

DROPPED = ((0, 0), (1, 0), (10, 0), (0, 10), (0, 50), (0, 100), (10, 50), (10, 100), (25, 100))


def mean_average_precision(rows: Tensor, groups: Tensor) -> float:
    return search_within(rows, groups).average_precision.mean().item()


def main(name: str, source: str, folder: str) -> None:
    model = build.build_model(ModelConfig(name=name))
    embedder = Embedder(model, torch.device("cpu"), 64, 0)
    pairs = embed_pairs(embedder, build.build_held_out(DataConfig(val=source), seed=0))
    [task] = embed_tasks(embedder, build.build_tasks(EvaluationConfig(zero_shot=(folder,))))
    projections = output_projections(model)
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
