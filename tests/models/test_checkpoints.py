"""Weights by path: OpenAI's TorchScript archives, training checkpoints, bare state dicts."""

import argparse
import json
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clip_refine.config import ModelConfig
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.models.checkpoints import is_torchscript, read_torchscript
from clip_refine.models.encoder import save_weights
from clip_refine.roads import build
from clip_refine.support.errors import ModelError

OPENAI = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
RESNET = {
    **OPENAI,
    "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 64, "patch_size": None},
}
TEXTS = ["a red circle", "two dogs"]


class AsOpenAiNamesIt(torch.nn.Module):
    """CLIP's parts under the names of OpenAI's archives, with the numbers they hold besides."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        for name in ("visual", "transformer", "token_embedding", "ln_final"):
            setattr(self, name, getattr(clip, name))
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, getattr(clip, name))
        self.register_buffer("input_resolution", torch.tensor(64))
        self.register_buffer("context_length", torch.tensor(24))
        self.register_buffer("vocab_size", torch.tensor(49408))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.visual(pixels) * self.logit_scale + self.token_embedding.weight.sum()


def random_clip(config: dict, seed: int = 0) -> open_clip.CLIP:
    torch.manual_seed(seed)
    return open_clip.CLIP(**config).eval()


def write_archive(path: Path, clip: open_clip.CLIP) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and what OpenAI did
        torch.jit.trace(AsOpenAiNamesIt(clip), torch.randn(1, 3, 64, 64)).save(str(path))
    return path


def load(path: Path, name: str | None = None) -> OpenClipEncoder:
    config = ModelConfig(name=name, pretrained=str(path)) if name else ModelConfig(name=str(path))
    model = build.build_model(config)
    assert isinstance(model, OpenClipEncoder)
    return model


def assert_same(model: OpenClipEncoder, clip: open_clip.CLIP) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model.encode_image(pixels), clip.encode_image(pixels), atol=1e-6)
        tokens = model.full_length_tokenizer(TEXTS)
        assert torch.allclose(
            model.encode_text(model.tokenizer(TEXTS)), clip.encode_text(tokens), atol=1e-5
        )


@pytest.fixture
def tiny_arch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture that open_clip lists, small enough to test with; and its twin."""
    plain = {**OPENAI, "quick_gelu": False}
    known = {"tiny-arch": plain, "tiny-arch-quickgelu": OPENAI}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**known, "tiny-resnet": RESNET})


@pytest.mark.parametrize("config", [OPENAI, RESNET], ids=["vit", "resnet"])
def test_openais_archive(config: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    clip = random_clip(config)
    path = write_archive(tmp_path / "ViT-tiny.pt", clip)
    model = load(path)
    assert_same(model, clip)
    assert "OpenAI's weights, with QuickGELU" in " ".join(capsys.readouterr().err.split())
    model.save(tmp_path / "saved")
    assert_same(load_open_clip(f"local-dir:{tmp_path / 'saved'}"), clip)


def test_an_archive_is_read_as_torch_jit_reads_it(tmp_path: Path):
    path = write_archive(tmp_path / "archive.pt", random_clip(OPENAI))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(path).state_dict()
    found = read_torchscript(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_an_archive_for_a_named_architecture(tiny_arch, tmp_path: Path):
    clip = random_clip(OPENAI)
    path = write_archive(tmp_path / "archive.pt", clip)
    assert_same(load(path, "tiny-arch-quickgelu"), clip)


def test_code_in_an_archive_is_not_run(tmp_path: Path):
    class Boom:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("x",))

    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bad/data.pkl", pickle.dumps({"a": Boom()}, protocol=2))
        archive.writestr("bad/constants.pkl", b"")
        archive.writestr("bad/version", "3")
    assert is_torchscript(path)
    with pytest.raises(ModelError, match="weights cannot be read"):
        load(path)
    assert not (tmp_path / "ran").exists()


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "model.", ""]


def named(clip: open_clip.CLIP, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": weight.clone() for name, weight in clip.state_dict().items()}


@pytest.mark.parametrize("prefix", [*PREFIXES, "model_state_dict."])
def test_safetensors_with_a_wrappers_names(
    tiny_arch, tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
):
    clip = random_clip({**OPENAI, "quick_gelu": False})
    path = tmp_path / "weights.safetensors"
    save_file(named(clip, prefix), path)
    assert_same(load(path, "tiny-arch"), clip)
    said = " ".join(capsys.readouterr().err.split())
    assert ("left out of their names" in said) == bool(prefix)
    model = {"model_cfg": {**OPENAI, "quick_gelu": False}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(model))
    path.rename(tmp_path / "open_clip_model.safetensors")
    assert_same(load(tmp_path), clip)


def test_weights_of_the_hub_are_cleaned_like_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def download(repo_id: str, filename: str, **_: object) -> str:
        assert repo_id == "ORG/NAME"
        if not (tmp_path / filename).is_file():
            raise FileNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", download)
    clip = random_clip({**OPENAI, "quick_gelu": False})
    model = {"model_cfg": {**OPENAI, "quick_gelu": False}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(model))
    with pytest.raises(ModelError, match=r"hf-hub:ORG/NAME: could not be loaded: Failed to downl"):
        load_open_clip("hf-hub:ORG/NAME")
    save_file(named(clip, "module."), tmp_path / "open_clip_model.safetensors")
    assert_same(load_open_clip("hf-hub:ORG/NAME"), clip)
    assert "'module.' left out of their names" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files(tiny_arch, tmp_path: Path, kind: str):
    clip = random_clip({**OPENAI, "quick_gelu": False})
    weights = named(clip, "module.")
    names = list(weights)
    listing = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = tmp_path / f"open_clip_model-{number}.{kind}"
        content = {name: weights[name] for name in part}
        save_file(content, file) if kind == "safetensors" else torch.save(content, file)
        listing |= dict.fromkeys(part, file.name)
    index = tmp_path / f"open_clip_model.{kind}.index.json"
    index.write_text(json.dumps({"weight_map": listing}))
    assert_same(load(index, "tiny-arch"), clip)
    model = {"model_cfg": {**OPENAI, "quick_gelu": False}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(model))
    assert_same(load(tmp_path), clip)
    file.unlink()
    with pytest.raises(ModelError, match=rf"its part open_clip_model-1.{kind} is not beside it"):
        load(index, "tiny-arch")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_weights_among_a_trainers_other_things(tiny_arch, tmp_path: Path, key: str):
    clip = random_clip({**OPENAI, "quick_gelu": False})
    torch.save({"epoch": 3, key: clip.state_dict(), "loss": torch.tensor(0.3)}, tmp_path / "w.pt")
    assert_same(load(tmp_path / "w.pt", "tiny-arch"), clip)


def test_weights_under_a_name_of_ones_own_are_pointed_at(tiny_arch, tmp_path: Path):
    clip = random_clip(OPENAI)
    torch.save({"ema": clip.state_dict(), "loss": torch.tensor(0.3)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds no weights but those under 'ema'"):
        load(tmp_path / "w.pt", "tiny-arch")


def test_two_models_in_one_file_are_not_mixed(tiny_arch, tmp_path: Path):
    clip = random_clip(OPENAI)
    torch.save({**named(clip, ""), **named(clip, "model.")}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="two weights called .*, one of them as model"):
        load(tmp_path / "w.pt", "tiny-arch")


def test_what_is_missing_or_left_over_is_named(tiny_arch, tmp_path: Path):
    weights = named(random_clip(OPENAI), "")
    del weights["logit_scale"]
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="logit_scale") as raised:
        load(tmp_path / "w.pt", "tiny-arch")
    assert "They are weights of tiny-arch" not in str(raised.value)
    torch.save({**named(random_clip(OPENAI), ""), "extra.weight": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"Unexpected.*extra\.weight"):
        load(tmp_path / "w.pt", "tiny-arch")


@pytest.mark.parametrize(
    ("tower", "setting", "value", "message"),
    [
        ("text_cfg", "context_length", 32, "has 24 positions in the file and 32 in this model"),
        ("vision_cfg", "image_size", 96, "has 17 positions in the file and 37 in this model"),
    ],
)
def test_position_tables_are_not_resized(
    tmp_path: Path, tower: str, setting: str, value: int, message: str
):
    settings = {**OPENAI, tower: {**OPENAI[tower], setting: value}}
    config = {"model_cfg": settings, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(named(random_clip(OPENAI), ""), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def run_of(clip: open_clip.CLIP, architecture: str, path: Path) -> Path:
    name = f"2026_01_01-model_{architecture}-lr_0.001-b_64-j_4-p_amp"
    torch.save({"name": name, "state_dict": clip.state_dict()}, path)
    return path


def test_a_runs_name_does_not_hide_the_activation(
    tiny_arch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain = run_of(random_clip({**OPENAI, "quick_gelu": False}), "tiny-arch", tmp_path / "plain.pt")
    load(plain)
    said = " ".join(capsys.readouterr().err.split())
    assert "weights of tiny-arch, as their run is called, with GELU" in said
    assert f"--model.name tiny-arch-quickgelu --model.pretrained {plain}" in said
    clip = random_clip(OPENAI)
    quick = run_of(clip, "tiny-arch-quickgelu", tmp_path / "quick.pt")
    assert_same(load(quick), clip)
    assert_same(load(quick, "tiny-arch"), clip)
    assert "used with QuickGELU, since their run is called" in " ".join(
        capsys.readouterr().err.split()
    )
    archive = write_archive(tmp_path / "archive.pt", clip)
    model = load(archive, "tiny-arch")
    assert_same(model, clip)
    assert model.model_config["quick_gelu"] is True


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_training_checkpoint(tiny_arch, tmp_path: Path, prefix: str):
    clip = random_clip({**OPENAI, "quick_gelu": False})
    optimiser = torch.optim.AdamW(clip.parameters())
    clip.encode_image(torch.randn(1, 3, 64, 64)).sum().backward()
    optimiser.step()
    stored = {
        "epoch": 3,
        "name": "2026_01_01-model_tiny-arch-lr_0.001-b_64-j_4-p_amp",
        "state_dict": {f"{prefix}{name}": weight for name, weight in clip.state_dict().items()},
        "optimizer": optimiser.state_dict(),
        "best": np.float64(0.5),
        "steps": np.int64(7),
        "args": argparse.Namespace(lr=1e-3, model="tiny-arch"),
    }
    torch.save(stored, tmp_path / "epoch_3.pt")
    assert_same(load(tmp_path / "epoch_3.pt"), clip)  # the run's name says which of the twins
    assert_same(load(tmp_path / "epoch_3.pt", "tiny-arch"), clip)


def test_openais_state_dict_without_the_archive(tmp_path: Path):
    clip = random_clip(OPENAI)
    torch.save(AsOpenAiNamesIt(clip).half().state_dict(), tmp_path / "weights.pt")
    assert_same(load(tmp_path / "weights.pt"), clip.half().float())


def test_safetensors_tell_their_architecture(tiny_arch, tmp_path: Path):
    clip = random_clip(RESNET)
    save_file(clip.state_dict(), tmp_path / "weights.safetensors")
    model = load(tmp_path / "weights.safetensors")
    assert_same(model, clip)
    assert model.model_config["vision_cfg"]["layers"] == [1, 2, 1, 1]


@pytest.mark.parametrize("name", [None, "tiny-resnet"])
def test_a_file_of_ours_knows_its_checksum_wherever_it_is(
    tiny_arch, tmp_path: Path, name: str | None
):
    clip = random_clip(RESNET)
    file = tmp_path / "elsewhere.safetensors"
    save_weights(clip.state_dict(), file, {"recipe": "mine", "made": "refined"})
    assert_same(load(file, name), clip)
    written = file.read_bytes()
    save_weights(clip.state_dict(), file, {"made": "refined", "recipe": "mine"})
    assert file.read_bytes() == written
    for place in (-1, -3000, written.index(b"mine")):
        spoilt = bytearray(written)
        spoilt[place] ^= 1
        file.write_bytes(spoilt)
        with pytest.raises(ModelError, match=r"elsewhere.safetensors: is not what was written"):
            load(file, name)


def test_models_of_open_clip_4_that_are_no_two_towers(tiny_arch, tmp_path: Path, monkeypatch):
    sound = {"embed_dim": 8, "audio_cfg": {}, "text_cfg": {}}
    writes = {**OPENAI, "genlip_cfg": {}}
    known = {"sound": sound, "writes": writes, "tiny-resnet": RESNET}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)
    save_file(random_clip(RESNET).state_dict(), tmp_path / "weights.safetensors")
    assert load(tmp_path / "weights.safetensors").model_config["vision_cfg"] == RESNET["vision_cfg"]
    for name in ("sound", "writes"):
        with pytest.raises(ModelError, match=f"'{name}': open_clip's model for sound, or for"):
            load(tmp_path / "weights.safetensors", name)


def test_every_architecture_of_one_shape_is_named(tiny_arch, tmp_path: Path):
    torch.save(random_clip(OPENAI).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="fit tiny-arch and tiny-arch-quickgelu.*activation"):
        load(tmp_path / "weights.pt")


def test_what_the_weights_are_where_they_do_not_fit(tiny_arch, tmp_path: Path):
    torch.save(random_clip(OPENAI).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="They are weights of tiny-arch or tiny-arch-quickgelu"):
        load(tmp_path / "weights.pt", "tiny-resnet")


class Trainer:
    """Something of a trainer's own, which is not unpickled."""


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"state_dict": {"a": torch.ones(1)}, "trainer": Trainer()}, "holds more than weights"),
        ({"epoch": 1}, "holds no weights"),
        ([1, 2], "holds no weights"),
        ({"a": torch.ones(2)}, "no architecture of open_clip .* has these 1 weights"),
    ],
)
def test_files_that_hold_no_model(tiny_arch, tmp_path: Path, stored: object, message: str):
    torch.save(stored, tmp_path / "file.pt")
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "file.pt")


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_damaged_files(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(ModelError, match=r"damaged|no file of weights"):
        load(tmp_path / name)


def test_a_truncated_archive(tmp_path: Path):
    whole = write_archive(tmp_path / "archive.pt", random_clip(OPENAI)).read_bytes()
    (tmp_path / "part.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"damaged|no file of weights"):
        load(tmp_path / "part.pt")


def test_a_file_gets_the_preprocessing_that_all_published_weights_have(
    tiny_arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tags = {tag: {"mean": (0.5,) * 3, "std": (0.25,) * 3, "url": "x"} for tag in ("a", "b")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-resnet", tags)
    torch.save(random_clip(RESNET).state_dict(), tmp_path / "weights.pt")
    model = load(tmp_path / "weights.pt", "tiny-resnet")
    assert "mean=(0.5, 0.5, 0.5)" in str(model.preprocess)
    assert "std=(0.25, 0.25, 0.25)" in str(model.preprocess)
    monkeypatch.setitem(tags["b"], "mean", (0.1,) * 3)
    model = load(tmp_path / "weights.pt", "tiny-resnet")
    assert "mean=(0.48145466" in str(model.preprocess)
