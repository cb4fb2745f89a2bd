"""The gradient of a batch is the same in one go and in parts."""

import copy
import gc
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clip_refine.config import RefineConfig, override
from clip_refine.config.settings import RECIPES
from clip_refine.data import PairBatch
from clip_refine.losses import PairFeatures
from clip_refine.losses.objective import OwnLoss
from clip_refine.models import OpenClipEncoder, Teacher
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.support.errors import TrainingError
from clip_refine.toy import ToyPairs
from clip_refine.train import StudentTowers, TowerPrecision, Trainer
from clip_refine.train.towers import (
    TowerOutput,
    bytes_per_pair,
    fitting_size,
    memory_of,
    parts_by_length,
)
from tests.train.test_loop import CONFIG, FP32, train

SIZE = 12


class Dropping(nn.Module):
    """A dual encoder with dropout and BatchNorm, which each meet parts in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout())
        self.text = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(24, 8), nn.Dropout())
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0))
        self.tokenizer = self.preprocess = None

    @property
    def logit_scale(self) -> Tensor:
        return self.log_scale.exp()

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.image(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.text(tokens)


def own_loss(student: PairFeatures, teacher: PairFeatures, logit_scale: Tensor) -> Tensor:
    """Looks at neither the scale nor the image tower."""
    return (student.text_features - teacher.text_features.flip(0)).square().mean()


MASKED = {"false_negatives": "masked", "positives": "same-caption"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    **{recipe: {"recipe": recipe} for recipe in RECIPES},
    "independent references": {"loss": {"references": "independent", "rafa_reduction": "sum"}},
    "shared captions": {"loss": {"positives": "same-caption", "normalize": True}},
    "wrong captions": {"recipe": "contrastive", "loss": {**MASKED, "negatives": "swapped-words"}},
    "sigmoid": {"recipe": "contrastive", "loss": {**MASKED, "contrastive_form": "sigmoid"}},
    "mixtures": {"recipe": "m2-mix", "loss": MASKED},
}


def random_batch(model: Any) -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    small = isinstance(model, Dropping)
    side = 2 if small else model.clip.visual.image_size[0]
    pixels = torch.randn(SIZE, 3, side, side, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 9, (SIZE, 3 if small else 16), generator=generator)
    return PairBatch(pixels, tokens, range(SIZE))


def gradients(
    config: RefineConfig, model: nn.Module, micro_batch: int | None, **more: Tensor | None
) -> list[Tensor]:
    """Of every weight in float64, None left out; `more` of the batch."""
    student = copy.deepcopy(model).double()
    own = own_loss if config.loss.own_weight else None
    trainer = trainer_of(config, student, micro_batch, own)
    torch.manual_seed(3)
    student.train(config.train.dropout == "on")
    for module in student.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    batch = replace(random_batch(model), **more)
    trainer._gradient(1, batch, 4)  # pyright: ignore[reportPrivateUsage]
    return [p.grad for p in student.parameters() if p.grad is not None]


def trainer_of(
    config: RefineConfig,
    student: nn.Module,
    micro_batch: int | None,
    objective: OwnLoss | None = None,
) -> Trainer:
    accelerator = build.build_accelerator("cpu")
    other = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    trainer = build.build_trainer(
        config,
        student,
        Teacher(other),
        FP32,
        StandardNormal(),
        accelerator,
        steps=4,
        objective=objective,
    )
    gap = torch.linspace(-1, 1, 8, dtype=torch.float64)
    return replace(trainer, micro_batch=micro_batch, centroid_gap=gap)


def assert_equal(config: RefineConfig, model: nn.Module, **more: Tensor | None) -> list[Tensor]:
    whole = gradients(config, model, None, **more)
    assert len(whole) > 1
    for size in (1, 5, 11):
        for one, other in zip(whole, gradients(config, model, size, **more), strict=True):
            assert (one - other).abs().max() <= 1e-10 * max(1.0, float(one.abs().max()))
    return whole


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_of_every_objective(name: str):
    torch.manual_seed(0)
    config = RefineConfig.model_validate({"train": {"batch_size": SIZE}, **OBJECTIVES[name]})
    model = Dropping()
    tokens = random_batch(model).tokens
    tokens = torch.cat([tokens[:-1], tokens[:1]])  # two captions are one
    wrong = tokens.flip(1) if config.loss.negatives == "swapped-words" else None
    assert_equal(config, model, tokens=tokens, wrong_tokens=wrong)


def test_what_dropout_drops_is_dropped_again(monkeypatch: pytest.MonkeyPatch):
    """The second time a part is encoded, as if its graph had been kept from the first."""
    torch.manual_seed(0)
    config = override(CONFIG, train={"batch_size": SIZE, "dropout": "on"})
    model = Dropping()
    in_parts = gradients(config, model, 5)
    again = gradients(config, model, 5)
    assert all(map(torch.equal, in_parts, again))
    towers = StudentTowers.forward

    def with_graphs(self: StudentTowers, pixels: Tensor, tokens: Tensor, _: Any) -> TowerOutput:
        parts = [towers(self, *part) for part in zip(pixels.split(5), tokens.split(5), strict=True)]
        sides = zip(*(part.features for part in parts), strict=True)
        return parts[0]._replace(features=PairFeatures(*map(torch.cat, sides)))

    monkeypatch.setattr(StudentTowers, "forward", with_graphs)
    for one, other in zip(gradients(config, model, None), in_parts, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_a_trained_scale_and_bias(form: str):
    torch.manual_seed(0)
    config = RefineConfig.model_validate(
        {"recipe": "contrastive", "loss": {"contrastive_form": form}, "train": {"batch_size": SIZE}}
    )
    scale, bias, *_ = assert_equal(config, Dropping())
    assert scale.abs() > 1e-3
    assert bias.ndim or bias.abs() > 1e-3  # softmax has none


def test_wrong_captions_and_masks():
    torch.manual_seed(0)
    loss = {"negatives": "swapped-words", "false_negatives": "masked"}
    config = RefineConfig.model_validate(
        {"recipe": "contrastive", "loss": loss, "train": {"batch_size": SIZE}}
    )
    model = Dropping()
    wrong = random_batch(model).tokens.flip(1)
    assert_equal(config, model, wrong_tokens=wrong)
    plain = gradients(override(config, loss={"negatives": "in-batch"}), model, None)
    found = gradients(config, model, None, wrong_tokens=wrong)
    assert not all(map(torch.allclose, plain, found))
    own = random_batch(model).tokens
    for twins in (own, own.roll(1, dims=0)):  # nothing could be exchanged; another image has it
        same = gradients(config, model, None, wrong_tokens=twins)
        for one, other in zip(plain, same, strict=True):
            torch.testing.assert_close(one, other)


def test_adapters_of_a_real_architecture(tiny: OpenClipEncoder):
    config = override(CONFIG, train={"parameters": "lora"})
    student = build.build_student(tiny, config, torch.device("cpu"))
    with build.build_part(config, student, build.build_accelerator("cpu")):
        for name, parameter in student.named_parameters():
            if "lora_B" in name:  # else zero, and so all gradients of the other factor
                nn.init.normal_(parameter)
        assert_equal(config, student)


TEXTS = ["a", "a red circle and a small blue star, and one more in the corner", "two words"]


def test_captions_of_like_length_are_encoded_together(
    tiny: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch
):
    """Also two texts an image; the gradient is that of the batch in its own order."""
    config = RefineConfig.model_validate({"recipe": "clip-refine", "train": {"batch_size": SIZE}})
    tokens = tiny.tokenizer(TEXTS * (SIZE // 3))
    assert_equal(config, tiny, tokens=tokens)
    encode, widths = OpenClipEncoder.encode_text, []

    def watched(self: OpenClipEncoder, tokens: Tensor) -> Tensor:
        widths.append(tokens.shape[1])
        return encode(self, tokens)

    monkeypatch.setattr(OpenClipEncoder, "encode_text", watched)
    gradients(config, tiny, SIZE // 3, tokens=tokens)
    assert widths == [8, 8, 24] * 3  # the student, its teacher, the student with its graph
    parts = parts_by_length(torch.stack([tokens, tokens.roll(1, 0)], 1), torch.arange(24) % 9, 5)
    assert [tuple(part.shape) for _, part in parts] == [(5, 2, 8), (5, 2, 8), (2, 2, 8)]
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == [*range(SIZE)]


def test_weights_are_cast_once_for_all_parts(tiny: OpenClipEncoder):
    """Once for features without a graph, once with: not for every part."""
    config = override(CONFIG, train={"batch_size": SIZE})
    trainer = trainer_of(config, tiny, 3)
    trainer.towers.precision = TowerPrecision(True, True)  # pyright: ignore
    trainer.precision = TowerPrecision(True, True)
    batch = random_batch(tiny)
    casts: Counter[int] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, called: Any, types: Any, given: Any = (), named: Any = None):
            if called is torch.ops.aten._to_copy.default and isinstance(given[0], nn.Parameter):
                casts[id(given[0])] += 1
            return called(*given, **(named or {}))

    with Watch():
        trainer._gradient(1, replace(batch, pixels=batch.pixels.float()), 4)
    layers = [module for module in tiny.modules() if isinstance(module, nn.Linear)]
    assert {casts[id(layer.weight)] for layer in layers} == {2}
    layers = [m for m in trainer.teacher.encoder.modules() if isinstance(m, nn.Linear)]
    assert {casts[id(layer.weight)] for layer in layers} == {1}
    assert not any(layer.weight.requires_grad for layer in layers)


@pytest.mark.parametrize("recipe", ["clip-refine", "contrastive"])
@pytest.mark.parametrize("size", [SIZE, 5])
def test_a_frozen_tower_is_asked_once(
    tiny: OpenClipEncoder, recipe: str, size: int, monkeypatch: pytest.MonkeyPatch
):
    """Its features are its teacher's, or those of the pass without a graph."""
    train = {"batch_size": SIZE, "micro_batch": size, "parameters": "text-tower"}
    config = RefineConfig.model_validate({"recipe": recipe, "train": train})
    accelerator, seen = build.build_accelerator("cpu"), []
    student = build.build_student(tiny, config, accelerator.device)
    encode = OpenClipEncoder.encode_image

    def watched(self: OpenClipEncoder, pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(OpenClipEncoder, "encode_image", watched)
    found = []
    with build.build_part(config, student, accelerator):
        more = Teacher(student), FP32, StandardNormal(), accelerator
        for frozen in ((True, False), (False, False)):
            trainer = build.build_trainer(config, student, *more, steps=1)
            assert trainer.frozen == (True, False)
            batch = random_batch(tiny)
            seen.clear()
            replace(trainer, frozen=frozen)._gradient(
                1, replace(batch, pixels=batch.pixels.float()), 1
            )
            found.append([p.grad for p in student.parameters() if p.grad is not None])
            asked = sum(seen)
            student.zero_grad(set_to_none=True)
            assert asked == SIZE or not frozen[0]
    passes = (size < SIZE) + 1 + (recipe == "clip-refine")
    assert asked == passes * SIZE
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("recipe", ["clip-refine", "contrastive", "wrong captions"])
@pytest.mark.parametrize("size", [SIZE, 5])
def test_a_frozen_trunk_is_asked_once(
    tiny: OpenClipEncoder, recipe: str, size: int, monkeypatch: pytest.MonkeyPatch
):
    """By student and teacher in all, in one go and in parts; gradients are the same bit by bit."""
    train = {"batch_size": SIZE, "micro_batch": size, "parameters": "projections"}
    wrong = recipe == "wrong captions"  # which no teacher is asked for
    loss = {"recipe": "contrastive", "loss": {"negatives": "swapped-words"}}
    config = RefineConfig.model_validate(
        {**(loss if wrong else {"recipe": recipe}), "train": train}
    )
    accelerator, seen = build.build_accelerator("cpu"), Counter[str]()
    student = build.build_student(tiny, config, accelerator.device)
    for name in ("encode_image", "encode_text"):
        encode = getattr(OpenClipEncoder, name)

        def watched(self: Any, given: Tensor, name: str = name, encode: Any = encode) -> Tensor:
            seen[name] += len(given)
            return encode(self, given)

        monkeypatch.setattr(OpenClipEncoder, name, watched)
    heads = build.find_heads(student, config.train, accelerator)
    found, batch = [], random_batch(tiny)
    twins = batch.tokens.flip(1) if wrong else None
    batch = replace(batch, pixels=batch.pixels.float(), wrong_tokens=twins)
    with build.build_part(config, student, accelerator):
        for used in (heads, None):
            more = Teacher(student, used), FP32, StandardNormal(), accelerator
            trainer = build.build_trainer(config, student, *more, steps=1)
            seen.clear()
            trainer._gradient(1, batch, 1)
            found.append([p.grad for p in student.parameters() if p.grad is not None])
            student.zero_grad(set_to_none=True)
            each = 1 + (size < SIZE)
            passes = 1 if used else each + (recipe == "clip-refine")
            texts = bool(used) + 2 * each if wrong else passes
            assert seen == {"encode_image": passes * SIZE, "encode_text": texts * SIZE}
    assert len(found[0]) == 2
    assert all(map(torch.equal, *found))


def test_training_in_parts_is_training(tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path):
    twin = copy.deepcopy(tiny)
    train(tiny, pairs, CONFIG, tmp_path, plain=True)
    train(twin, pairs, override(CONFIG, train={"micro_batch": 6}), tmp_path, plain=True)
    for name, weight in tiny.state_dict().items():
        assert torch.allclose(weight, twin.state_dict()[name], atol=1e-6), name


def out_of_memory(kind: str) -> None:
    """As a GPU's allocator says it, and as a CPU's does."""
    if kind == "cpu":
        torch.empty(10**16)
    raise torch.OutOfMemoryError("a lot")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_too_little_memory_halves_the_parts(
    kind: str,
    tiny: OpenClipEncoder,
    pairs: ToyPairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """As if only four pairs fitted: the weights come out as of parts that fit from the start."""
    twin = copy.deepcopy(tiny)
    train(twin, pairs, override(CONFIG, train={"micro_batch": 4}), tmp_path)
    encode, fits = OpenClipEncoder.encode_image, [4]

    def limited(self: OpenClipEncoder, pixels: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(pixels) > fits[0]:
            out_of_memory(kind)
        return encode(self, pixels)

    monkeypatch.setattr(OpenClipEncoder, "encode_image", limited)
    train(tiny, pairs, CONFIG, tmp_path)
    assert "going on with --train.micro-batch 4" in capsys.readouterr().err
    for name, weight in tiny.state_dict().items():
        assert torch.equal(weight, twin.state_dict()[name]), name
    fits[0] = 0
    with pytest.raises(TrainingError, match="too little memory for 1 pairs at a time"):
        train(tiny, pairs, CONFIG, tmp_path)


def test_parts_are_not_halved_where_statistics_are_updated(
    tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Parts are encoded twice, so that running statistics would count every pair twice."""

    def never(self: OpenClipEncoder, pixels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("a lot")

    config = override(CONFIG, train={"normalization_statistics": "updated"})
    teacher = Teacher(tiny)
    monkeypatch.setattr(OpenClipEncoder, "encode_image", never)
    trainer = build.build_trainer(
        config, tiny, teacher, FP32, StandardNormal(), build.build_accelerator("cpu"), steps=1
    )
    with pytest.raises(TrainingError, match="too little memory for 12 pairs at a time"):
        trainer.step(1, random_batch(tiny), steps=1)


def test_what_a_graph_keeps_is_counted():
    """A linear layer keeps its input, 10 numbers of 4 bytes a pair; its weights are shared."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 7)

        def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
            return self.layer(pixels)

    one = One()
    assert bytes_per_pair(one, torch.randn(6, 10), torch.zeros(6, 1)) == 40  # pyright: ignore
    assert fitting_size(one, per_pair=40, memory=2000) == 1
    assert fitting_size(one, per_pair=40, memory=4000) == 8  # 77 weights, 5 times 308 bytes
    assert fitting_size(one, per_pair=40, memory=4000, copies=3) == 16


def test_counting_keeps_nothing():
    """ReLU saves its own result, which a hook must not hand back: a convolutional tower's graphs
    stayed for the whole run, 1.2 GB of RN50's at four pairs."""
    results = []

    class Convolving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, pixels: Tensor, tokens: Tensor) -> TowerOutput:
            images = self.layer(pixels).relu()
            results.append(weakref.ref(images))
            return TowerOutput(PairFeatures(images.mean((2, 3)), tokens), tokens, None)

    counted = bytes_per_pair(Convolving(), torch.randn(2, 3, 5, 5), torch.zeros(2, 1))
    assert counted >= 4 * (3 + 4) * 25  # pixels, and ReLU's result
    gc.collect()
    assert [result() for result in results] == [None, None]


def test_what_all_pairs_share_is_no_part_of_a_pair(tiny: OpenClipEncoder):
    """Autocast's bf16 copies of the weights are in every graph; what they take is none of a pair's.

    Else a pair of ViT-B/32 would seem to take 150 MB more than it does, from two pairs tried.
    """
    generator = torch.Generator().manual_seed(0)
    side = tiny.clip.visual.image_size[0]  # pyright: ignore
    pixels = torch.randn(8, 3, side, side, generator=generator)
    tokens = torch.randint(1, 9, (8, 16), generator=generator)
    for name in ("fp32", "bf16"):
        towers = StudentTowers(tiny, TowerPrecision.from_name(name))
        few, many = (bytes_per_pair(towers, pixels[:n], tokens[:n]) for n in (1, 8))
        assert few == pytest.approx(many, rel=0.01)


def test_a_container_has_no_more_than_its_limit(tmp_path: Path):
    cpu, own = torch.device("cpu"), tmp_path / "proc" / "self" / "cgroup"
    own.parent.mkdir(parents=True)
    machine = memory_of(cpu, tmp_path)  # there is no such file but on Linux

    def write(name: str, text: str) -> None:
        file = tmp_path / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    own.write_text("0::/jobs/mine\n")  # version 2; outer groups hold, too
    write("jobs/mine/memory.max", "max")
    assert memory_of(cpu, tmp_path) == machine
    write("jobs/memory.max", "3000")
    assert memory_of(cpu, tmp_path) == 3000
    write("memory.max", "2000")  # all that a container sees
    assert memory_of(cpu, tmp_path) == 2000
    own.write_text("5:cpu:/\n4:memory:/host/path/unseen\n")  # version 1
    assert memory_of(cpu, tmp_path) == machine
    write("memory/memory.limit_in_bytes", "9223372036854771712")  # its word for no limit
    assert memory_of(cpu, tmp_path) == machine
    write("memory/memory.limit_in_bytes", "1000")
    assert memory_of(cpu, tmp_path) == 1000


def test_the_count_grows_with_the_architecture():
    text = CLIPTextCfg(context_length=16, vocab_size=64, width=64, heads=2, layers=2)
    per_pair = []
    for layers in (2, 4):
        vision = CLIPVisionCfg(layers=layers, width=64, patch_size=8, image_size=32)
        clip = CLIP(16, vision, text)
        encoder = OpenClipEncoder(
            clip, lambda image: image, lambda texts: torch.ones(len(texts), 16, dtype=int), {}
        )  # pyright: ignore
        towers = StudentTowers(encoder, TowerPrecision.from_name("fp32"))
        tokens = torch.randint(1, 60, (2, 16))
        per_pair.append(bytes_per_pair(towers, torch.randn(2, 3, 32, 32), tokens))
    blocks = (per_pair[1] - per_pair[0]) / 2
    # 17 tokens of width 64: at least input, two norms, query-key-value, attention and MLP (4 × 2)
    assert 17 * 64 * 4 * 10 < blocks < 17 * 64 * 4 * 40
