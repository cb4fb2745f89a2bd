"""Pairs per second of our refine step against a textbook loop: `python benchmarks/step.py`.

The textbook loop is the method as one would first write it: full-length text, float32, AdamW one
parameter at a time. Both take the same batches of the same data, in turn, and the ratio is taken
within each round, because the machine's speed drifts.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy, log_softmax, mse_loss, softmax

from clip_refine.config import RefineConfig
from clip_refine.data import EpochPlan, PairBatch
from clip_refine.models import OpenClipEncoder, Teacher, load_open_clip
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.roads.plan import choose_precision
from clip_refine.toy import ToyPairs, model_directory


def random_model(architecture: str) -> OpenClipEncoder:
    torch.manual_seed(0)
    clip, _, preprocess = open_clip.create_model_and_transforms(architecture)
    config = open_clip.get_model_config(architecture)
    return OpenClipEncoder(clip, preprocess, open_clip.get_tokenizer(architecture), config)


def textbook_step(student: OpenClipEncoder) -> Callable[[PairBatch, torch.Tensor], None]:
    teacher = copy.deepcopy(student.clip)
    model = student.clip
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.1, foreach=False)

    def step(batch: PairBatch, tokens: torch.Tensor) -> None:
        image, text = model.encode_image(batch.pixels), model.encode_text(tokens)
        with torch.no_grad():
            similarity = teacher.encode_image(batch.pixels) @ teacher.encode_text(tokens).T
        reference = torch.randn_like(image)
        loss = mse_loss(image, reference) + mse_loss(text, reference)
        for mine, theirs in ((image @ text.T, similarity), (text @ image.T, similarity.T)):
            target = 0.5 * torch.eye(len(image), device=image.device) + 0.5 * softmax(theirs, -1)
            loss = loss - 0.5 * (target * log_softmax(mine, -1)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def trainer_step(student: OpenClipEncoder) -> Callable[[PairBatch, torch.Tensor], None]:
    """A step of open_clip's trainer with `--distill-model` and `--precision amp_bf16`.

    Its contrastive loss plus the cross-entropy to the teacher's softmax, both directions,
    full-length text, its own AdamW settings.
    """
    teacher = copy.deepcopy(student.clip).eval()
    model = student.clip.train()
    spared = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimiser = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6)

    def step(batch: PairBatch, tokens: torch.Tensor) -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image, text, scale = model(batch.pixels, tokens)
            with torch.no_grad():
                teacher_image, teacher_text, teacher_scale = teacher(batch.pixels, tokens)
            logits = scale * image @ text.T
            target = teacher_scale * teacher_image @ teacher_text.T
            labels = torch.arange(len(image))
            loss = sum(
                cross_entropy(mine, labels) / 2
                - (softmax(theirs, 1) * log_softmax(mine, 1)).sum(1).mean() / 2
                for mine, theirs in ((logits, target), (logits.T, target.T))
            )
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)

    return step


def our_step(student: OpenClipEncoder, pairs: ToyPairs, batch_size: int) -> Callable[..., object]:
    config = RefineConfig.model_validate({"train": {"batch_size": batch_size}})
    accelerator = Accelerator()
    model = build.build_student(student, config, accelerator.device)
    precision = choose_precision(config.train, model, pairs, accelerator)
    trainer = build.build_trainer(
        config, model, Teacher(model), precision, StandardNormal(), accelerator, steps=1
    )
    return lambda batch, number: trainer.step(number, batch, steps=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="toy", help="toy, or an architecture (random weights)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    toy = f"local-dir:{model_directory()}"
    model = load_open_clip(toy) if options.model == "toy" else random_model(options.model)
    twin = copy.deepcopy(model)
    pairs = ToyPairs("bench", size=options.batch_size)
    device = Accelerator().device
    order = EpochPlan(range(len(pairs)), [0] * len(pairs)).order
    texts = [pairs.captions[i][0] for i in order]
    pixels = torch.stack([model.preprocess(pairs.load_image(i)) for i in order])
    batch = PairBatch(pixels, model.tokenizer(texts), order).to(device)
    full_length = model.full_length_tokenizer(texts).to(device)
    ours, textbook = our_step(model, pairs, options.batch_size), textbook_step(twin.to(device))

    rates: dict[str, list[float]] = {"textbook": [], "ours": []}
    for number in range(1, options.rounds + 2):
        for name, run in (
            ("textbook", lambda: textbook(batch, full_length)),
            ("ours", lambda number=number: ours(batch, number)),
        ):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            rates[name].append(options.batch_size / (time.perf_counter() - start))
    print(f"{options.model}, batch {options.batch_size}, {device}, {options.threads} threads")
    for name, values in rates.items():
        print(f"{name:>9}: {spread(values[1:])} pairs/s")
    ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates["textbook"], strict=True)]
    print(f"{'ratio':>9}: {spread(ratios[1:])}")


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.2f} (min {min(values):.2f}, max {max(values):.2f})"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
