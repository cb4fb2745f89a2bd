"""Stored vectors through maps on a cluster, with Ray Data: `python 02_ray_data.py MAPS IN OUT`.

IN is a folder of Parquet files with a column `image_embedding` of lists; OUT gets the same rows
with that column mapped. Ray reads, spreads and writes; the map is one function of a batch.
Needs `pip install 'ray[data]'`.
"""

import sys
from pathlib import Path

import numpy as np
import ray
import torch

from clip_refine.vectors.files import load_peer


class MapImages:
    """One a worker, so that the maps are read once and not for each batch."""

    def __init__(self, maps: str) -> None:
        self.peer = load_peer(Path(maps))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with mapped vectors of the type they came in."""
        stored = np.stack(batch["image_embedding"])
        mapped = self.peer.transform_image(torch.from_numpy(stored)).numpy()
        return {**batch, "image_embedding": mapped.astype(stored.dtype)}


def main(maps: str, source: str, out: str) -> None:
    ray.init()
    vectors = ray.data.read_parquet(source)
    # from one worker on: as many as there are cores would leave none to read with, for ever
    workers = (1, max(1, int(ray.cluster_resources()["CPU"]) - 1))
    mapped = vectors.map_batches(
        MapImages, fn_constructor_args=(maps,), batch_size=16384, concurrency=workers
    )
    mapped.write_parquet(out)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:4])
