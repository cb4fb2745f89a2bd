"""Pairs per second of our refine step against a textbook loop: `python benchmarks/step.py`.

`--profile` shows where a step's time goes instead, in turn with PyTorch's own attention and
patches, and two floors measured in the same minute: its arithmetic at the rate of the largest
matrix product, which no other product reaches, in float32, too, and its own products one by one,
each in its own shape, layout and precision, forward and backward, without anything between them.
The roofline adds to these what optimiser, gradient norm and casts of weights must move, at the rate
at which a thread copies: no kernel could avoid that share. `--no-onednn` leaves oneDNN out of it
all; what PyTorch's large pages do is seen with THP_MEM_ALLOC_ENABLE=1 in the environment.

`--what` measures shortcuts, each in turn with what was done before it, in CPU seconds:

    python benchmarks/step.py --model ViT-B-32 --threads 1 --rounds 5 \\
        --batch-size 128 --micro-batch 32 --what lengths casts parts
    python benchmarks/step.py --model ViT-B-32 --threads 1 --rounds 5 \\
        --batch-size 32 --what tower trunk trunk-kept

The textbook loop is the method as one would first write it: full-length text, float32, AdamW one
parameter at a time. Both take the same batches of the same data, in turn, and the ratio is taken
within each round, because the machine's speed drifts.
"""

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy, linear, log_softmax, mse_loss, softmax
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from clip_refine.config import RefineConfig
from clip_refine.data import EpochPlan, PairBatch, read_table
from clip_refine.models import OpenClipEncoder, Teacher, load_open_clip
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.models.encoder import quick_on_cpu
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.roads.plan import choose_precision
from clip_refine.support.console import quietly
from clip_refine.toy import ToyPairs, model_directory
from clip_refine.train import Trainer, loop, towers
from clip_refine.train.part import compiled_blocks
from clip_refine.train.teacher_cache import CachedTeacher
from clip_refine.train.towers import encode_pairs, parts_by_length


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


def our_trainer(
    student: OpenClipEncoder,
    pairs: ToyPairs,
    batch_size: int,
    micro_batch: int | None = None,
    parameters: str = "all",
    stay: ExitStack | None = None,
) -> Trainer:
    """Of a part of the model for as long as `stay`."""
    train = {"batch_size": batch_size, "micro_batch": micro_batch or batch_size}
    config = RefineConfig.model_validate({"train": {**train, "parameters": parameters}})
    accelerator = Accelerator()
    model = build.build_student(student, config, accelerator.device)
    with quietly():
        precision = choose_precision(config.train, model, pairs, accelerator)
    teacher, prior = Teacher(model), StandardNormal()
    if stay:
        stay.enter_context(build.build_part(config, model, accelerator))
    else:
        quick_on_cpu(model)  # as `refine` does for as long as it trains
    return build.build_trainer(config, model, teacher, precision, prior, accelerator, steps=1)


def our_step(student: OpenClipEncoder, pairs: ToyPairs, batch_size: int) -> Callable[..., object]:
    trainer = our_trainer(student, pairs, batch_size)
    return lambda batch, number: trainer.step(number, batch, steps=1)


# --------------------------------------------------------------------------------------------------
# Shortcuts, each beside what was done before.


Run = Callable[[], object]
WAS: dict[str, dict[str, Callable[..., Any]]] = {
    "lengths": {"parts_by_length": lambda tokens, _, size: parts_by_length(tokens, None, size)},
    "casts": {"weights_cast_once": lambda *_: nullcontext()},
}
WAS["parts"] = WAS["lengths"] | WAS["casts"]
SHORTCUTS = {
    "lengths": "parts of a batch by length of captions",
    "casts": "weights cast once for all parts",
    "parts": "both",
    "tower": "text-tower: the image tower asked once, for the live teacher, too",
    "trunk": "projections: the trunk asked once, for the live teacher, too",
    "trunk-kept": "projections, a later epoch: the trunk looked up, not only the teacher",
}


def shortcut(
    what: str,
    model: OpenClipEncoder,
    pairs: ToyPairs,
    batch: PairBatch,
    parts: int | None,
    stay: ExitStack,
) -> tuple[Run, Run]:
    """A step without it and one with it, for as long as `stay`."""
    size = len(batch.indices)
    if what in WAS:
        trainer = our_trainer(model, pairs, size, parts)

        def as_it_was() -> None:
            with ExitStack() as stay:
                for name, function in WAS[what].items():
                    for module in (loop, towers):
                        if hasattr(module, name):
                            stay.enter_context(patch.object(module, name, function))
                trainer.step(1, batch, steps=1)

        return as_it_was, lambda: trainer.step(1, batch, steps=1)
    chosen = "text-tower" if what == "tower" else "projections"
    trainer = was = our_trainer(model, pairs, size, parts, chosen, stay)
    if what == "tower":
        assert trainer.frozen == (True, False)
        was = replace(trainer, frozen=(False, False))
    else:
        heads = build.find_heads(model, trainer.config, trainer.accelerator)
        assert heads
        before, teacher = trainer.teacher, Teacher(model, heads)
        if what == "trunk-kept":
            before, teacher = (looked_up(one, batch, trainer) for one in (before, teacher))
        trainer, was = (replace(trainer, teacher=one) for one in (teacher, before))
        trainer.towers = type(trainer.towers)(model, trainer.precision, heads)
    return lambda: was.step(1, batch, steps=1), lambda: trainer.step(1, batch, steps=1)


def looked_up(teacher: Teacher, batch: PairBatch, trainer: Trainer) -> Teacher:
    """One that has the batch's features already."""
    found = encode_pairs(teacher, batch.pixels, batch.tokens, trainer.precision)
    count = len(batch.indices)
    cached = CachedTeacher(EmbeddedPairs(*found, torch.arange(count)), heads=teacher.heads)
    [_] = cached.follow(
        [replace(batch, indices=range(count))], EpochPlan(range(count), [0] * count)
    )
    return cached


def show_shortcuts(options: argparse.Namespace, model: OpenClipEncoder, pairs: ToyPairs) -> None:
    """CPU seconds, which other jobs on the machine change least."""
    size, shared = options.batch_size, options.captions
    source = read_table(shared).captions if shared.exists() else pairs.captions
    texts = [source[index % len(source)][0] for index in range(size)]
    pixels = torch.stack([model.preprocess(pairs.load_image(index)) for index in range(size)])
    batch = PairBatch(pixels, model.tokenizer(texts), range(size))
    parts = options.micro_batch or size
    print(f"{options.model}, batch {size} in parts of {parts}, {options.threads} threads, CPU s")
    print("| shortcut | before | now | times as fast |\n|---|---|---|---|", flush=True)
    for what in options.what:
        with ExitStack() as stay:
            own = copy.deepcopy(model)
            runs = shortcut(what, own, pairs, batch, options.micro_batch, stay)
            spent = [[seconds_of(run) for run in runs] for _ in range(options.rounds + 1)][1:]
        before, now = zip(*spent, strict=True)
        times = [old / new for old, new in spent]
        print(
            f"| {SHORTCUTS[what]} | {' | '.join(map(spread, (before, now, times)))} |", flush=True
        )


def seconds_of(run: Run) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


# --------------------------------------------------------------------------------------------------
# Where a step's time goes.


KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention, convolution": ("_scaled_dot_product", "convolution", "mkldnn_convolution"),
    "casts and copies": ("copy_", "_to_copy", "cat", "fill_"),
    "layer norm": ("native_layer_norm",),
    "GELU": ("gelu",),
    "softmax": ("_softmax",),
    "optimiser": ("_fused_adamw_",),
    "gradient norm": ("linalg_vector_norm", "_foreach_norm", "mul_"),
}


def kind_of(operator: str) -> str:
    if not operator.startswith("aten::"):
        return "Python and autograd"
    name = operator.removeprefix("aten::")
    found = (k for k, names in KINDS.items() if name in names or name.startswith(names[0] + "_"))
    return next(found, "element by element")


class Products(TorchDispatchMode):
    """Matrix products, attentions and convolutions of what runs within, by what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, called: Any, types: Any, given: Any = (), named: Any = None
    ) -> Any:
        if called.overloadpacket in flop_registry:
            self.found[called, tuple(map(described, given)), tuple((named or {}).items())] += 1
        return called(*given, **(named or {}))

    def seconds(self) -> float:
        """CPU seconds of all of them, each alone with its operands at hand."""
        return sum(count * alone(*what) for what, count in self.found.items())


def described(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return "tensor", tuple(given.shape), given.stride(), given.dtype
    return tuple(given) if isinstance(given, list) else given


def alone(called: Any, given: Any, named: Any) -> float:
    """CPU seconds of one call, the mean of a tenth of a second."""
    arguments = [
        made_like(*what[1:]) if isinstance(what, tuple) and what[:1] == ("tensor",) else what
        for what in given
    ]
    called(*arguments, **dict(named))
    count, begin = 0, time.process_time()
    while time.process_time() - begin < 0.1:
        called(*arguments, **dict(named))
        count += 1
    return (time.process_time() - begin) / count


def made_like(shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers laid out so; rows may be one row expanded."""
    taken = 1 + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    return torch.randn(taken).to(dtype).as_strided(shape, stride)


def product_rate(rows: int, width: int, dtype: torch.dtype) -> float:
    """FLOP a second of CPU time of the image tower's largest product, in a quarter of a second."""
    given, weight = torch.randn(rows, width).to(dtype), torch.randn(4 * width, width).to(dtype)
    linear(given, weight)
    count, begin = 0, time.process_time()
    while time.process_time() - begin < 0.25:
        linear(given, weight)
        count += 1
    return 8 * count * rows * width**2 / (time.process_time() - begin)


def copy_rate() -> float:
    """Bytes read and written a second of CPU time by one copy after another, a quarter of one."""
    given = torch.randn(2**26)  # 256 MiB, more than one core's caches
    copied = given.clone()
    count, begin = 0, time.process_time()
    while time.process_time() - begin < 0.25:
        copied.copy_(given)
        count += 1
    return 2 * 4 * count * len(given) / (time.process_time() - begin)


def moved_bytes(trained: int, frozen: int, *, cast: bool) -> int:
    """What a step reads and writes of so many weights whatever its batch, each once."""
    adamw = 4 * (4 + 3)  # weight, gradient and both moments in; weight and moments out
    norm = 4  # each gradient is read once
    there_and_back = (4 + 2) + (2 + 4)  # a weight to bf16, its gradient from there
    return trained * (adamw + norm + there_and_back * cast) + frozen * (4 + 2) * cast


def show_profile(options: argparse.Namespace, model: OpenClipEncoder, pairs: ToyPairs) -> None:
    """CPU seconds, which other jobs on the machine change least."""
    size, micro = options.batch_size, options.micro_batch or options.batch_size
    texts = [pairs.captions[index][0] for index in range(size)]
    begin = time.process_time()
    pixels = torch.stack([model.preprocess(pairs.load_image(index)) for index in range(size)])
    batch = PairBatch(pixels, model.tokenizer(texts), range(size))
    data = time.process_time() - begin
    with FlopCounterMode(display=False) as counter:  # without a graph attention is not counted
        model.encode_image(batch.pixels[:2])
        model.encode_text(batch.tokens[:2])
    work = 4 * size * counter.get_total_flops() / 2  # a student there and back, a teacher there
    trainer = our_trainer(model, pairs, size, options.micro_batch)
    towers = (model, trainer.teacher.encoder)
    visual = model.clip.visual
    rows, width = micro * (visual.positional_embedding.shape[0]), visual.conv1.out_channels
    dtype = torch.bfloat16 if trainer.precision.image_bf16 else torch.float32
    names = (
        "PyTorch's own",
        "ours",
        "floor",
        "float32 floor",
        "its own products",
        "moves",
        "roofline",
    )
    spent: dict[str, list[float]] = {name: [] for name in names}
    number = 0

    def step() -> float:
        nonlocal number
        number += 1
        begin = time.process_time()
        trainer.step(number, batch, steps=1)
        return time.process_time() - begin

    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    frozen = sum(w.numel() for w in trainer.teacher.encoder.parameters())
    moved = moved_bytes(trained, frozen, cast=dtype is torch.bfloat16)
    with Products() as products:
        step()
    stay = ExitStack()
    if options.compile:
        spent["compiled"], begin = [], time.perf_counter()
        stay.enter_context(compiled_blocks(*towers))
        step()
        print(f"the first compiled step: {time.perf_counter() - begin:.0f} s")
        torch.compiler.set_stance("force_eager")
    modules = [module for tower in towers for module in tower.modules()]
    quick = [(module, vars(module)["forward"]) for module in modules if "forward" in vars(module)]
    for _ in range(options.rounds):
        spent["ours"].append(step())
        if options.compile:
            with torch.compiler.set_stance("default"):
                spent["compiled"].append(step())
        spent["floor"].append(work / product_rate(rows, width, dtype))
        spent["float32 floor"].append(work / product_rate(rows, width, torch.float32))
        spent["its own products"].append(products.seconds())
        spent["moves"].append(moved / copy_rate())
        spent["roofline"].append(spent["its own products"][-1] + spent["moves"][-1])
        for module, _ in quick:
            del module.forward
        spent["PyTorch's own"].append(step())
        for module, forward in quick:
            module.forward = forward
    stay.close()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    shares = dict.fromkeys([*KINDS, "element by element", "Python and autograd"], 0.0)
    for event in found.key_averages():
        shares[kind_of(event.key)] += event.self_cpu_time_total
    whole = sum(shares.values())
    print(
        f"{options.model}, batch {size} in parts of {micro}, {dtype}, {work / 1e12:.2f} TFLOP, "
        f"{moved / 1e9:.1f} GB of weights, gradients and moments moved"
    )
    print("| share of a step | % |\n|---|---|")
    for kind, time_spent in shares.items():
        print(f"| {kind} | {100 * time_spent / whole:.0f} |")
    for name, values in spent.items():
        print(f"{name:>19}: {spread(values)} CPU s")
    print(f"{'a batch drawn':>19}: {data:.2f} CPU s")
    for what, a, b in (
        *([("by compiling", "ours", "compiled")] if options.compile else []),
        ("times as fast", "PyTorch's own", "ours"),
        ("of the floor", "floor", "ours"),
        ("of its own products", "its own products", "ours"),
        ("of the roofline", "roofline", "ours"),
        ("moves in a step", "moves", "ours"),
        ("of it before", "floor", "PyTorch's own"),
    ):
        ratios = [one / other for one, other in zip(spent[a], spent[b], strict=True)]
        print(f"{what:>19}: {spread(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="toy", help="toy, or an architecture (random weights)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--micro-batch", type=int, help="of profile and shortcuts")
    parser.add_argument("--no-onednn", action="store_true", help="mkldnn switched off")
    parser.add_argument("--compile", action="store_true", help="a row more of the profile")
    parser.add_argument("--what", nargs="+", choices=list(SHORTCUTS), help="shortcuts to measure")
    own = Path(__file__).parents[2] / "shared" / "data" / "flickr8k" / "refine" / "captions.csv"
    parser.add_argument("--captions", type=Path, default=own, help="of shortcuts; drawn without it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.mkldnn.set_flags(not options.no_onednn)
    toy = f"local-dir:{model_directory()}"
    model = load_open_clip(toy) if options.model == "toy" else random_model(options.model)
    pairs = ToyPairs("bench", size=options.batch_size)
    if options.profile or options.what:
        (show_profile if options.profile else show_shortcuts)(options, model, pairs)
        return
    twin = copy.deepcopy(model)
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
