"""What is trained and what stays: towers, projections, blocks, adapters, recomputed activations."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_refine.config import RefineConfig, TrainConfig, override
from clip_refine.models import OpenClipEncoder, Teacher, load_open_clip, load_transformers
from clip_refine.models.weights import output_layer
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.roads.refine import refine
from clip_refine.support.errors import ConfigError, ModelError
from clip_refine.toy import ToyPairs
from clip_refine.train import TowerPrecision
from clip_refine.train.part import (
    compiled_blocks,
    heads_on_frozen,
    learning_rates,
    trained_part,
)
from clip_refine.train.towers import prepare_student
from tests.conftest import TINY, needs, write_model
from tests.models import tiny_transformers
from tests.models.test_families import COCA, write_family

RESNET = {
    **TINY,
    "vision_cfg": {"image_size": 48, "layers": [1, 1, 1, 2], "width": 16, "patch_size": None},
}
TEXTS = ["a red circle", "a small blue star in the upper left", "dog"]
PROJECTIONS = {"clip.visual.proj", "clip.text_projection"}
FINAL_NORMS = {
    f"clip.{norm}.{part}" for norm in ("visual.ln_post", "ln_final") for part in ("weight", "bias")
}


@pytest.fixture(scope="module")
def names(tiny_name: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    needs("transformers", "hf")
    base = tmp_path_factory.mktemp("parts")
    return {
        "open_clip": tiny_name,
        "resnet": write_model(base / "resnet", RESNET),
        "transformers": str(tiny_transformers.write_clip(base / "clip")),
        "siglip": str(tiny_transformers.write_siglip(base / "siglip")),
        "coca": write_family(tmp_path_factory.mktemp("coca"), COCA),
    }


class OwnAttention(torch.nn.Module):
    """As in open_clip 4: no `nn.MultiheadAttention`, but its names; it calls only `out_proj`."""

    def __init__(self, like: Any, *, split: bool) -> None:
        super().__init__()
        self.heads, self.in_proj_bias = like.num_heads, like.in_proj_bias
        self.out_proj = torch.nn.Linear(*like.out_proj.weight.shape)
        self.out_proj.load_state_dict(like.out_proj.state_dict())
        parts = like.in_proj_weight.detach().chunk(3) if split else [None] * 3
        for name, part in zip("qkv", parts, strict=True):
            part = None if part is None else torch.nn.Parameter(part.clone())
            self.register_parameter(f"{name}_proj_weight", part)
        self.in_proj_weight = None if split else like.in_proj_weight

    def forward(self, *given: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Any:
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        weights = weights if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        sides = [
            torch.nn.functional.linear(*one).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in zip(given, weights, self.in_proj_bias.chunk(3), strict=True)
        ]
        mixed = torch.nn.functional.scaled_dot_product_attention(*sides, attn_mask=attn_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def load(names: dict[str, str], kind: str) -> Any:
    """A model; of kind "fused" and "split" with attention of its own."""
    name = names["open_clip" if kind in ("fused", "split") else kind]
    model: Any = (load_open_clip if name.startswith("local-dir:") else load_transformers)(name)
    if kind in ("fused", "split"):
        for block in (*model.clip.visual.transformer.resblocks, *model.clip.transformer.resblocks):
            block.attn = OwnAttention(block.attn, split=kind == "split")
    prepare_student(model, logit_scale=False, logit_bias=False)
    return model


@pytest.fixture
def student(tiny: OpenClipEncoder) -> OpenClipEncoder:
    prepare_student(tiny, logit_scale=False, logit_bias=False)
    return tiny


def features(model: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = 48 if isinstance(model, OpenClipEncoder) else tiny_transformers.SIZE
    pixels = torch.randn(3, 3, size, size, generator=generator)
    return model.encode_image(pixels), model.encode_text(model.tokenizer(TEXTS))


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("recipe", "trained"), [("hycd", False), ("contrastive", True)])
def test_a_logit_scale_is_trained_only_where_a_loss_looks_at_it(
    tiny: OpenClipEncoder, recipe: str, trained: bool
):
    """Data-parallel training waits for the gradient of every trained parameter."""
    config = RefineConfig.model_validate({"recipe": recipe, "train": {"logit_scale": "trained"}})
    student: Any = build.build_student(tiny, config, torch.device("cpu"))
    assert student.clip.logit_scale.requires_grad == trained


def test_one_tower(student: OpenClipEncoder):
    with trained_part(student, TrainConfig(parameters="image-tower")) as part:
        images = trained_names(student)
        assert {name for name in images if not name.startswith("clip.visual.")} == set()
        assert part.trained == sum(p.numel() for p in student.clip.visual.parameters())
    with trained_part(student, TrainConfig(parameters="text-tower")):
        texts = trained_names(student)
    assert not images & texts
    assert images | texts == {name for name, _ in student.named_parameters()} - {"clip.logit_scale"}


def test_projections_and_last_blocks(student: OpenClipEncoder):
    with trained_part(student, TrainConfig(parameters="projections")):
        assert trained_names(student) == PROJECTIONS
    with trained_part(student, TrainConfig(parameters="last-blocks", blocks=1)) as part:
        names = trained_names(student)
        blocks = {n for n in names if ".resblocks.1." in n}
        assert names - blocks == PROJECTIONS | FINAL_NORMS
        assert len(blocks) == 24
        assert "the last 1 blocks of each tower" in str(part)
    with trained_part(student, TrainConfig(parameters="last-blocks", blocks=2)):
        assert {n for n in trained_names(student) if ".resblocks.0." in n}
    with (
        pytest.raises(ModelError, match=r"train.blocks 3: the image tower has 2 blocks"),
        trained_part(student, TrainConfig(parameters="last-blocks", blocks=3)),
    ):
        pass


@pytest.mark.parametrize("kind", ["resnet", "transformers", "siglip"])
def test_last_blocks_of_other_architectures(names: dict[str, str], kind: str):
    model = load(names, kind)
    with trained_part(model, TrainConfig(parameters="last-blocks", blocks=1)):
        last = trained_names(model)
    with trained_part(model, TrainConfig(parameters="image-tower")):
        image = trained_names(model)
    expected = {
        "resnet": ("clip.visual.layer4.1.", "clip.visual.attnpool."),
        "transformers": ("model.vision_model.encoder.layers.1.", "model.visual_projection"),
        "siglip": ("model.vision_model.encoder.layers.1.", "model.vision_model.head."),
    }[kind]
    after = ("model.vision_model.post_layernorm.",)
    assert {n for n in image & last if not n.startswith((*expected, *after))} == set()
    assert all(any(n.startswith(start) for n in last) for start in expected)


def test_a_tower_without_a_projection(names: dict[str, str]):
    model = load(names, "siglip")
    before = trained_names(model)
    with (
        pytest.raises(ModelError, match="the image tower does not end in a projection"),
        trained_part(model, TrainConfig(parameters="projections")),
    ):
        pass
    assert trained_names(model) == before


def test_all_is_as_it_was_after_the_part(student: OpenClipEncoder):
    student.clip.visual.conv1.weight.requires_grad_(False)
    before = trained_names(student)
    with trained_part(student, TrainConfig(parameters="image-tower")):
        assert "clip.visual.conv1.weight" not in trained_names(student)  # the user froze it
    assert trained_names(student) == before
    student.clip.logit_scale.requires_grad_(True)
    with trained_part(student, TrainConfig(parameters="projections")):
        assert trained_names(student) == PROJECTIONS | {"clip.logit_scale"}


@pytest.mark.parametrize("kind", ["open_clip", "fused", "split", "coca", "transformers", "siglip"])
def test_adapters_begin_at_the_base_and_merge_into_it(names: dict[str, str], kind: str):
    needs("peft", "peft")
    model = load(names, kind)
    with torch.no_grad():
        base = features(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with trained_part(model, TrainConfig(parameters="lora", lora_rank=4, lora_alpha=8.0)) as part:
        assert "LoRA of rank 4 beside" in str(part)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert part.trained == sum(parameter.numel() for parameter in trained)
        with torch.no_grad():
            for ours, before in zip(features(model), base, strict=True):
                assert torch.allclose(ours, before, atol=1e-5)
        optimiser = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(2):
            optimiser.zero_grad()
            image, text = features(model)
            (image.square().mean() + text.square().mean()).backward()
            # nothing runs past an adapter: all of them have a gradient
            assert all(parameter.grad is not None for parameter in trained)
            optimiser.step()
        with torch.no_grad():
            unmerged = features(model)
        with_gradients = features(model)  # PyTorch's fast attention runs only without
    with torch.no_grad():
        merged = features(model)
    for ours, slow, plain, before in zip(merged, with_gradients, unmerged, base, strict=True):
        assert torch.allclose(ours, plain, atol=1e-5)
        assert torch.allclose(ours, slow, atol=1e-5)
        assert not torch.allclose(ours, before, atol=1e-3)
    assert {n: w.shape for n, w in model.state_dict().items()} == {
        n: w.shape for n, w in weights.items()
    }
    assert not [module for module in model.modules() if "lora" in type(module).__module__]
    attention = [n for n in weights if re.search(r"(in|\b[qkv])_proj(_|\.)weight", n)]
    attention = [n for n in attention if "text_decoder" not in n]  # CoCa's, of no feature
    assert len(attention) >= 4
    assert all(not torch.equal(model.state_dict()[n], weights[n]) for n in attention)


@pytest.mark.parametrize("choice", ["all", "last-blocks", "lora"])
@pytest.mark.parametrize("kind", ["open_clip", "fused", "resnet", "transformers", "siglip"])
def test_recomputed_activations_give_the_same_gradients(
    names: dict[str, str], kind: str, choice: Any
):
    model = load(names, kind)
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        with trained_part(
            model, TrainConfig(parameters=choice, blocks=1, gradient_checkpointing=recomputed)
        ):
            image, text = features(model)
            (image.square().mean() + text.square().mean()).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
    assert len(gradients[0]) > 3
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, atol=1e-6)


def test_recomputed_activations_take_less_memory(student: OpenClipEncoder):
    kept = []
    for recomputed in (False, True):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with (
            trained_part(student, TrainConfig(parameters="all", gradient_checkpointing=recomputed)),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            features(student)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_frozen_output_layers_are_found(student: OpenClipEncoder):
    student.requires_grad_(False)
    [found] = output_layer(student, lambda: features(student)[0], "image")
    assert found is student.clip.visual.proj
    assert not any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("kind", ["open_clip", "resnet", "transformers"])
def test_heads_are_the_layers_that_towers_end_in(names: dict[str, str], kind: str):
    """Also where a matrix is symmetric, so that rows could pass for columns."""
    model = load(names, kind)
    config = TrainConfig(parameters="projections")
    with torch.no_grad():
        for parameter in output_layer(model, lambda: features(model)[1], "text"):
            if len(set(parameter.shape)) == 1 < parameter.ndim:
                parameter.copy_(parameter + parameter.T)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    heads = heads_on_frozen(model, config)
    assert heads
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    trunk = Teacher(model, heads).encoder
    with torch.no_grad():
        for scale in (1.0, 2.0):  # the model's own weights, as they are by now
            for head, given, found in zip(heads, features(trunk), features(model), strict=True):
                torch.testing.assert_close(head(given), found)
                head.layer[0].mul_(scale).add_(torch.randn_like(head.layer[0]))
    for moving in ({"dropout": "on"}, {"normalization_statistics": "updated"}):
        assert heads_on_frozen(model, override(config, **moving)) is None
    assert heads_on_frozen(load(names, "siglip"), config) is None
    # a model of the user's own that does something behind its last layer
    encode, see = model.encode_text, model.encode_image
    model.encode_text = lambda tokens: encode(tokens).relu()
    assert heads_on_frozen(model, config) is None
    model.encode_text = lambda tokens: encode(tokens)[:, torch.arange(16).flip(0)]
    assert heads_on_frozen(model, config) is None  # where an identity takes no such index, too
    model.shared = torch.nn.Linear(16, 16, bias=False)  # behind both
    model.encode_text = lambda tokens: model.shared(encode(tokens))
    model.encode_image = lambda pixels: model.shared(see(pixels))
    assert heads_on_frozen(model, config) is None


@pytest.fixture
def config(tmp_path: Path) -> RefineConfig:
    return RefineConfig.model_validate(
        {
            "train": {"batch_size": 32, "learning_rate": 1e-2, "precision": "fp32"},
            "loss": {"feature_scale": "canonical"},
            "out": tmp_path / "run",
        }
    )


IMAGE_TOWER = {"parameters": "image-tower"}
LAST_BLOCKS = {"parameters": "last-blocks", "blocks": 1}
ADAPTERS = {"parameters": "lora", "lora_rank": 2}
RECOMPUTED = {"parameters": "projections", "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("open_clip", IMAGE_TOWER),
        ("open_clip", ADAPTERS),
        ("open_clip", RECOMPUTED),
        ("transformers", LAST_BLOCKS),
        ("transformers", ADAPTERS),
    ],
)
def test_the_road_at_canonical_scale(
    names: dict[str, str],
    kind: str,
    settings: dict[str, Any],
    config: RefineConfig,
    pairs: ToyPairs,
    held_out: ToyPairs,
    capsys: pytest.CaptureFixture[str],
):
    """Frozen and adapted output layers are scaled for training and back."""
    before = load(names, kind).state_dict()
    model = load(names, kind)
    refine(override(config, train=settings), model=model, train_pairs=pairs, held_out=held_out)
    assert "Trained are" in capsys.readouterr().err
    after = model.state_dict()
    assert after.keys() == before.keys()
    moved = {n for n in after if not torch.allclose(after[n], before[n], rtol=1e-5, atol=1e-7)}
    assert moved
    if settings["parameters"] != "lora":
        with trained_part(
            model, TrainConfig(parameters=settings["parameters"], blocks=settings.get("blocks", 2))
        ):
            assert moved <= trained_names(model)
    saved = config.out / "model"
    name = f"local-dir:{saved}" if kind == "open_clip" else str(saved)
    again = load({kind: name}, kind)
    with torch.no_grad():
        for ours, loaded in zip(features(model), features(again), strict=True):
            assert torch.allclose(ours, loaded, atol=1e-5)


def test_adapters_and_dropout_follow_the_seed(
    tiny_name: str, config: RefineConfig, pairs: ToyPairs, held_out: ToyPairs, tmp_path: Path
):
    settings = {"parameters": "lora", "dropout": "on"}
    runs = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)  # the world outside has no say
        model = load_open_clip(tiny_name)
        seeded = override(config, train=settings, seed=seed, out=tmp_path / str(number))
        refine(seeded, model=model, train_pairs=pairs, held_out=held_out)
        runs.append(model.clip.visual.transformer.resblocks[0].attn.in_proj_weight)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_statistics_are_not_counted_twice(config: RefineConfig):
    settings = {"gradient_checkpointing": True, "normalization_statistics": "updated"}
    with pytest.raises(ConfigError, match="would count each batch twice"):
        override(config, train=settings)


def test_a_model_without_blocks(config: RefineConfig):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with (
        pytest.raises(ModelError, match="Sequential has no list of blocks"),
        trained_part(model, TrainConfig(parameters="all", gradient_checkpointing=True)),
    ):
        pass


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's own, which it would not show
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_compiled_blocks_take_the_same_steps(
    config: RefineConfig,
    tiny_name: str,
    pairs: ToyPairs,
    held_out: ToyPairs,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    compile, asked = torch.compile, []

    def traced(function: Any, **settings: Any) -> Any:
        """Without C++, whose compiler may not be here, and takes long."""
        asked.append(function)
        return compile(function, backend="aot_eager", **settings)

    monkeypatch.setattr(torch, "compile", traced)
    common = {"learning_rate": 1e-4, "gradient_checkpointing": True, "micro_batch": 16}
    names, losses = [], []
    for given in (False, True):
        model, out = load_open_clip(tiny_name), tmp_path / str(given)
        settings = override(config, train={**common, "compile": given}, out=out)
        refine(settings, model=model, train_pairs=pairs, held_out=held_out)
        names.append(list(model.state_dict()))
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        losses.append([line["loss_total"] for line in lines])
        assert not any(module._compiled_call_impl for module in model.modules())
    assert len(asked) == 1 + 2 * TINY["vision_cfg"]["layers"]  # a try, the student's, the teacher's
    assert names[0] == names[1]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_cannot_be_compiled(
    student: OpenClipEncoder, config: RefineConfig, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match="dropout in its own order"):
        override(config, train={"compile": True, "dropout": "on"})
    resnet = torch.nn.Linear(2, 2)
    for name in ("preprocess", "tokenizer", "encode_image", "encode_text"):
        setattr(resnet, name, getattr(student, name))
    with pytest.raises(ModelError, match="no list of blocks"), compiled_blocks(resnet):
        pass
    monkeypatch.setattr(torch, "compile", lambda _: 1 / 0)
    with (
        pytest.raises(ModelError, match=r"not work here \(division by zero"),
        compiled_blocks(student),
    ):
        pass


def test_a_choice_with_nothing_left_to_train(student: OpenClipEncoder):
    student.requires_grad_(False)
    with (
        pytest.raises(ModelError, match="train.parameters all: nothing of it is left to train"),
        trained_part(student, TrainConfig(parameters="all")),
    ):
        pass


def test_a_comparison_trains_each_variant_from_the_whole_model(student: OpenClipEncoder):
    """A swept choice of parameters does not freeze what the next variant trains."""
    settings = RefineConfig()
    for choice in ("projections", "all"):
        prepared = build.build_student(student, settings, torch.device("cpu"))
        with trained_part(prepared, TrainConfig(parameters=choice)) as part:
            pass
    assert part.trained == part.total - 1  # the logit scale is frozen


def test_learning_rates_by_tower_and_depth(student: OpenClipEncoder):
    """Two blocks a tower: what follows them has all, each block half of the next, the start a half
    of the first's; the logit scale is no tower's."""
    config = TrainConfig(learning_rate=1.0, text_learning_rate=0.5, layer_decay=0.5)
    rates = learning_rates(student, config)
    found = {name: rates.get(id(parameter)) for name, parameter in student.named_parameters()}
    assert found["clip.visual.proj"] == 1
    assert found["clip.visual.ln_post.weight"] == 1
    assert found["clip.visual.transformer.resblocks.1.mlp.c_fc.weight"] == 0.5
    assert found["clip.visual.transformer.resblocks.0.ln_1.bias"] == 0.25
    assert found["clip.visual.conv1.weight"] == 0.125
    assert found["clip.text_projection"] == 0.5
    assert found["clip.transformer.resblocks.0.attn.in_proj_weight"] == 0.125
    assert found["clip.token_embedding.weight"] == 0.0625
    assert found["clip.logit_scale"] is None
    assert all(rate for name, rate in found.items() if name != "clip.logit_scale")


def test_every_family_has_depths(names: dict[str, str]):
    for kind in ("resnet", "transformers", "siglip"):
        student = load(names, kind)
        rates = learning_rates(student, TrainConfig(learning_rate=1.0, layer_decay=0.5))
        assert {1.0, 0.5, 0.25} < set(rates.values()), kind


def test_the_optimiser_has_each_rate(student: OpenClipEncoder):
    config = override(RefineConfig(), train={"image_learning_rate": 2e-4, "layer_decay": 0.5})
    accelerator = build.build_accelerator("cpu")
    trainer = build.build_trainer(
        config,
        student,
        Teacher(student),
        TowerPrecision.from_name("fp32"),
        StandardNormal(),
        accelerator,
        steps=1,
    )
    rates = learning_rates(student, config.train)
    groups = trainer.schedule.optimizer.param_groups
    for group in groups:
        assert all(
            group["lr"] == rates.get(id(parameter), config.train.learning_rate)
            for parameter in group["params"]
        )
    assert sum(len(group["params"]) for group in groups) == len(
        [p for p in student.parameters() if p.requires_grad]
    )
