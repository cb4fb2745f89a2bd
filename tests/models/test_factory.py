"""A model of the user's own: by `--model.factory`, and passed from Python."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file

from clip_refine import cli
from clip_refine.config import EvaluateConfig, ModelConfig, load_config, override
from clip_refine.config.runs import RefineConfig
from clip_refine.models.checkpoints import how_to_load
from clip_refine.results import BaseModelFacts, Provenance, RunScores, read
from clip_refine.roads import build
from clip_refine.roads.explore import open_explorer
from clip_refine.roads.export import export
from clip_refine.roads.refine import refine
from clip_refine.roads.suites import expand_models
from clip_refine.saving import onnx, save_model
from clip_refine.saving.folder import ONNX, model_card
from clip_refine.support.errors import ClipRefineError, ModelError
from clip_refine.toy import ToyPairs
from tests.conftest import needs_onnx
from tests.models.tiny_transformers import clip_tokenizer
from tests.roads.test_export import code_blocks, run_the_cards_lines

MODULE = """
import torch

class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image = torch.nn.Linear(192, 4)
        self.text = torch.nn.Embedding(128, 4)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def preprocess(self, image):
        rows = torch.tensor(list(image.resize((8, 8)).tobytes())).view(8, 8, 3)
        return rows.permute(2, 0, 1) / 255

    def tokenizer(self, texts):
        return torch.tensor([[ord(text[0]), ord(text[-1])] for text in texts])

    @property
    def logit_scale(self):
        return self.scale.exp()

    def encode_image(self, pixels):
        return self.image(pixels.flatten(1))

    def encode_text(self, tokens):
        return self.text(tokens).mean(dim=1)

class Half(torch.nn.Module):
    def encode_image(self, pixels):
        return pixels

def build():
    return Mine()

def half():
    return Half()

def number():
    return 3

def fails():
    raise OSError("no weights at /mine")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request) -> str:
    """A module in the current folder, under a name of its own for every test."""
    name = f"my_models_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_a_factory_in_the_current_folder(
    module: str, tmp_path: Path, pairs: ToyPairs, held_out: ToyPairs, monkeypatch
):
    config = RefineConfig.model_validate(
        {
            "model": {"factory": f"{module}:build"},
            "train": {"batch_size": 32, "precision": "fp32"},
            "out": tmp_path / "run",
        }
    )
    scores = refine(config, train_pairs=pairs, held_out=held_out)
    assert scores.recipe["model"] == f"factory:{module}:build"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    written = load_config(RefineConfig, tmp_path / "run" / "config.yaml")
    assert written.model == ModelConfig(name=f"factory:{module}:build")
    refined: Any = build.build_model(ModelConfig(factory=f"{module}:build"))
    refined.load_state_dict(load_file(tmp_path / "run" / "model" / "model.safetensors"))
    run_the_cards_lines(tmp_path / "run" / "model", refined, pairs.load_image(0), monkeypatch)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("{module}", "expected a module and a function in it, as in my_package.models:build"),
        ("nowhere:build", "there is no module nowhere, neither in .* nor among the installed"),
        ("{module}.sub:build", "there is no module|is not a package"),
        ("{module}:make", "has no function make. It has Mine, Half, build, half, number, fails"),
        ("{module}:fails", r"OSError in .*my_models.*, line \d+: no weights at /mine"),
        ("{module}:number", "int cannot be refined: it is no torch.nn.Module"),
        ("{module}:half", "has no encode_text, no preprocess, no tokenizer, no logit_scale"),
    ],
)
def test_factories_that_do_not_work(module: str, function: str, message: str):
    with pytest.raises(ModelError, match=message):
        build.build_model(ModelConfig(factory=function.format(module=module)))


def test_a_module_whose_own_import_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_factory.py").write_text("import torch\nimport not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ModelError, match=r"ModuleNotFoundError in .*broken_factory.py, line 2"):
        build.build_model(ModelConfig(factory="broken_factory:build"))


@pytest.fixture
def run(module: str, tmp_path: Path, table: Path) -> Path:
    """A run of a model that a factory made."""
    config = RefineConfig.model_validate(
        {
            "model": {"factory": f"{module}:build"},
            "data": {"train": str(table), "val": str(table)},
            "train": {"batch_size": 32, "precision": "fp32", "learning_rate": 1e-2},
            "report": False,
            "out": tmp_path / "run",
        }
    )
    refine(config)
    return config.out


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("place", ["", "model", "model/model.safetensors"])
def test_its_run_is_loaded_again(module: str, run: Path, place: str):
    config = ModelConfig(factory=f"{module}:build", pretrained=str(run / place))
    found, saved = weights(build.build_model(config)), load_file(run / "model/model.safetensors")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    word = build.named_model(f"factory:{module}:build@{run / place}")
    assert word == config
    assert build.label_models([word.title]) == {(run / place).name: config}


@needs_onnx
def test_its_onnx_card_runs(module: str, run: Path, tmp_path: Path, pairs: ToyPairs, monkeypatch):
    refined = f"factory:{module}:build@{run}"
    export(refined, to="onnx", out=tmp_path / "onnx")
    model = build.build_model(build.named_model(refined))
    run_the_cards_lines(tmp_path / "onnx", model, pairs.load_image(0), monkeypatch)
    # of an object nobody knows what makes it
    settings = json.loads(Path("onnx_config.json").read_text())
    provenance = Provenance(version="1", made="refined", base=BaseModelFacts(name="mine"))
    Path("README.md").write_text(model_card(provenance, [ONNX], onnx=settings))
    (block,) = code_blocks(Path(), "python")
    exec(block, {})


def test_every_verb_takes_it(module: str, run: Path, table: Path, tmp_path: Path, capsys):
    made, refined = f"factory:{module}:build", f"factory:{module}:build@{run}"
    scores = read(RunScores, run / "scores.json")
    flags = ["--model.factory", f"{module}:build", "--model.pretrained", str(run)]
    cli.main(["evaluate", *flags, "--data.val", str(table), "--json"])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["retrieval"] == pytest.approx(scores.after.retrieval)
    assert "was trained on 64 of these 64 images" in " ".join(shown.err.split())
    # all of the way is the run
    out = tmp_path / "all"
    cli.main(["interpolate", made, refined, "--weight", "1", "--out", str(out)])
    whole, saved = (load_file(at / "model.safetensors") for at in (out, run / "model"))
    assert all(torch.equal(whole[name], saved[name]) for name in saved)
    cli.main(["fold", refined, "--data.train", str(table), "--out", str(tmp_path / "folded")])
    assert (tmp_path / "folded" / "model.safetensors").is_file()
    with pytest.raises(ModelError, match="open_clip builds no Mine"):  # and is not to
        export(refined, to="open_clip", out=tmp_path / "exported")
    of_suite = expand_models(EvaluateConfig(suite="toy", models=(refined,)))
    assert [*of_suite.values()] == [build.named_model(made), build.named_model(refined)]
    explorer = open_explorer(run, factory=f"{module}:build", limit=20)
    model: Any = explorer.refined.embedder.model
    assert torch.equal(model.state_dict()["scale"], saved["scale"])
    assert explorer.base.name == f"{module}:build"


def test_without_the_function_an_error_names_it(module: str, run: Path):
    assert how_to_load(run / "model").endswith(f"build --model.pretrained {run / 'model'}")
    for name in (run, run / "model"):
        advice = f"--model.factory {module}:build --model.pretrained {name}"
        with pytest.raises(ModelError, match=rf"its model was made by {module}:build.* {advice}"):
            build.check_model(ModelConfig(name=str(name)))


def test_weights_of_another_model_and_damaged_ones(module: str, run: Path, tmp_path: Path):
    file = run / "model" / "model.safetensors"
    other = tmp_path / f"{module}_other.py"
    other.write_text(MODULE.replace("Linear(192, 4)", "Linear(192, 5)"), encoding="utf-8")
    mistakes = {
        (f"{module}_other", str(run)): "is of another model than the factory makes: image.bias",
        (module, "openai"): "openai: holds no weights for a model that a factory makes",
        (module, str(tmp_path / "images")): "images: holds no weights",
    }
    for (made, pretrained), message in mistakes.items():
        with pytest.raises(ModelError, match=message):
            build.build_model(ModelConfig(factory=f"{made}:build", pretrained=pretrained))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for pretrained in (run, file):
        with pytest.raises(ClipRefineError, match="is not what was written there"):
            build.build_model(ModelConfig(factory=f"{module}:build", pretrained=str(pretrained)))


def test_one_object_for_all_is_refused(tmp_path: Path, module: str):
    once = f"{MODULE}\none = Mine()\ndef build():\n    return one\n"
    (tmp_path / f"{module}_once.py").write_text(once, encoding="utf-8")
    build.build_model(ModelConfig(factory=f"{module}_once:build"))
    with pytest.raises(ModelError, match="gave the same object as before"):
        build.build_model(ModelConfig(factory=f"{module}_once:build"))


def test_a_logarithm_given_as_the_logit_scale_is_remarked_on(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / f"{module}.py"
    path.write_text(MODULE.replace("2.0", "4.6"), encoding="utf-8")
    build.build_model(ModelConfig(factory=f"{module}:build"))
    assert "logit_scale" not in capsys.readouterr().err
    again = MODULE.replace("2.0", "4.6").replace("self.scale.exp()", "self.scale")
    (tmp_path / f"{module}_log.py").write_text(again, encoding="utf-8")
    build.build_model(ModelConfig(factory=f"{module}_log:build"))
    said = " ".join(capsys.readouterr().err.split())
    assert "its logit_scale is 4.6, where trained models have 10 to 100" in said
    assert "return its .exp()" in said


def test_a_save_of_its_own_is_used(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model: Any = build.build_model(ModelConfig(factory=f"{module}:build"))
    provenance = Provenance(version="1", made="refined", base=BaseModelFacts(name="mine"))
    save_model(model, tmp_path / "weights", provenance)
    (block,) = code_blocks(tmp_path / "weights", "python")  # what makes it nobody can know
    monkeypatch.chdir(tmp_path / "weights")
    names: dict[str, Any] = {}
    exec(block, names)
    assert all(torch.equal(names["weights"][name], own) for name, own in model.state_dict().items())
    calls = []
    monkeypatch.setattr(
        type(model), "save", lambda self, folder, metadata: calls.append(metadata), raising=False
    )
    (tmp_path / "own").mkdir()
    save_model(model, tmp_path / "own", provenance)
    assert calls == [provenance.header()]
    assert code_blocks(tmp_path / "own", "python") == []
    assert "its class reads them" in (tmp_path / "own" / "README.md").read_text(encoding="utf-8")


def test_an_object_that_lacks_something(pairs: ToyPairs, held_out: ToyPairs, tmp_path: Path):
    config = override(RefineConfig(out=tmp_path / "run"), train={"batch_size": 16})
    with pytest.raises(ModelError, match="object cannot be refined: it is no torch.nn.Module"):
        refine(config, model=object(), train_pairs=pairs, held_out=held_out)


def test_another_librarys_tokenizer_is_saved_as_it_is(tmp_path: Path):
    """open_clip's cleaning is written for open_clip's models, whose settings say which it is."""
    clip_tokenizer(16).save_pretrained(tmp_path / "from")
    tokenizer = HFTokenizer(str(tmp_path / "from"), context_length=16)
    files: Any = SimpleNamespace(full_length_tokenizer=tokenizer, format="pytorch")
    (tmp_path / "to").mkdir()
    said = onnx._write_tokenizer(files, tmp_path / "to", 16, cleaning=True)
    assert said["tokenizer"] == "AutoTokenizer, files beside"
    assert (tmp_path / "to" / "tokenizer_config.json").is_file()
