"""What an epoch costs from one GPU to sixty-four, by arithmetic: the tables of docs/scale.md.

    python benchmarks/scale.py

Counted: floating-point operations of both towers on the meta device, parameters, bytes. Taken from
data sheets or assumed, and to be replaced by your own: everything in `ASSUMED`.
"""

from collections.abc import Iterator

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

MODELS = ("ViT-B-32", "ViT-L-14", "ViT-H-14")
PAIRS = (100_000, 10_000_000, 1_000_000_000)
GPUS = (1, 8, 64)
TOKENS = 16  # to which most captions' batches are cut; the towers' own length is 77
BATCH = 512  # pairs a GPU
ASSUMED = {
    "peak": 989e12,  # H100 SXM, bf16, dense, by its data sheet
    "utilisation": 0.4,  # of it; the aim of benchmarks/gpu.py, not yet measured by us
    "cores": 16,  # that decode, a GPU
    "decoded": 150.0,  # images a second and core; benchmarks/bench.py --rows loader has yours
    "image": 50e3,  # bytes of a stored photograph
    "disk": 2e9,  # bytes a second and machine of 8 GPUs
    "nvlink": 450e9,  # bytes a second between GPUs of one machine
    "network": 50e9,  # bytes a second between machines
}


def forward_flops(name: str) -> tuple[float, int, int]:
    """Operations of both towers for one pair, parameters, dimension of the features."""
    config = open_clip.get_model_config(name)
    assert config is not None
    with torch.device("meta"):
        model = open_clip.CLIP(**config).eval()
        pixels = torch.empty(1, 3, *[config["vision_cfg"]["image_size"]] * 2)
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        model.positional_embedding = torch.nn.Parameter(model.positional_embedding[:TOKENS])
        model.attn_mask = model.attn_mask[:TOKENS, :TOKENS]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.encode_image(pixels)
            model.encode_text(tokens)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return float(counter.get_total_flops()), parameters, config["embed_dim"]


def seconds(
    flops: float, parameters: int, dim: int, pairs: int, gpus: int, *, cached: bool
) -> dict[str, float]:
    """What each part of one epoch takes by itself; the largest is what the epoch waits for."""
    machines, steps = -(-gpus // 8), pairs / (BATCH * gpus)
    link = ASSUMED["network"] if machines > 1 else ASSUMED["nvlink"]
    # gradients there and back; features of all, and their gradients there and back
    moved = 2 * 4 * parameters + 3 * 2 * 4 * dim * BATCH * gpus
    # both directions of the student, forward and backward, and of the teacher: own rows with all
    similarities = 2 * 4 * 2 * dim * BATCH * BATCH * gpus * steps
    stored = 3 * 224**2 if cached else ASSUMED["image"]
    decoding = 0.0 if cached else pairs / gpus / (ASSUMED["cores"] * ASSUMED["decoded"])
    rate = ASSUMED["peak"] * ASSUMED["utilisation"]
    return {
        "arithmetic": (4 * flops * pairs / gpus + similarities) / rate,
        "decoding": decoding,
        "disk": pairs * stored / machines / ASSUMED["disk"],
        "network": moved * steps / link if gpus > 1 else 0.0,
    }


def shown(taken: float) -> str:
    """Seconds as people say them."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if taken >= 1.5 * size:
            return f"{taken / size:.3g} {unit}"
    return f"{taken:.2g} s"


def rows() -> Iterator[str]:
    """Both tables."""
    counted = {name: forward_flops(name) for name in MODELS}
    yield "| model | parameters | GFLOP forward a pair | GFLOP trained | state GB | gradients GB |"
    yield "|---|---|---|---|---|---|"
    for name, (flops, parameters, _) in counted.items():
        state = (16 + 4) * parameters / 1e9  # weights, gradient, two moments; the teacher's weights
        yield (
            f"| {name} | {parameters / 1e6:.0f} M | {flops / 1e9:.1f} | {4 * flops / 1e9:.1f} | "
            f"{state:.1f} | {4 * parameters / 1e9:.1f} |"
        )
    yield ""
    yield "| model | pairs | GPUs | epoch | waits for | with pixels cached | waits for |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in counted.items():
        for pairs in PAIRS:
            for gpus in GPUS:
                cells = []
                for cached in (False, True):
                    parts = seconds(*found, pairs, gpus, cached=cached)
                    slowest = max(parts, key=parts.__getitem__)
                    cells += [shown(parts[slowest]), slowest]
                yield f"| {name} | {pairs:,} | {gpus} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in rows():
        print(line)
