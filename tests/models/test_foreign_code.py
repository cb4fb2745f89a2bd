"""A model's folder or a run's settings bring code along: none of it runs, and nobody is asked."""

import json
import shutil
import sys
from pathlib import Path

import open_clip
import pytest

from clip_refine.cli import main
from clip_refine.config import EvaluateConfig, ModelConfig, RefineConfig, load_config
from clip_refine.models import load_open_clip, load_transformers
from clip_refine.models.open_clip import _check_settings
from clip_refine.models.transformers import SentenceFolder, quiet_transformers
from clip_refine.roads import build
from clip_refine.support.errors import ConfigError, ModelError
from tests.models.test_factory import MODULE
from tests.models.tiny_transformers import word_tokenizer, write_clip

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
class Tokenizer(PreTrainedTokenizerFast): pass
class Config(BertConfig): model_type = "evil"
class Model(BertModel): config_class = Config
"""


def test_links_out_of_a_models_folder_are_not_copied_beside_the_refined_one(tmp_path: Path):
    """Small files are written again as they were; those of the Hub's cache are all links."""
    secret = tmp_path / "credentials.json"
    secret.write_text('{"password": 1}')
    hub = tmp_path / "hub/models--a--b"
    blob, cached, sent = hub / "blobs/0f", hub / "snapshots/1", tmp_path / "sent"
    modules = [{"path": "", "type": "sentence_transformers.models.CLIPModel"}]
    for folder in (blob.parent, cached, sent):
        folder.mkdir(parents=True)
        (folder / "modules.json").write_text(json.dumps(modules))
    name = "config_sentence_transformers.json"
    blob.write_text("{}")
    (cached / name).symlink_to(blob)
    found = SentenceFolder.find(str(cached))
    assert found
    assert found.files[name] == b"{}"
    for folder in (cached, sent):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(ModelError, match=f"{name}: is a link out of the model's folder"):
            SentenceFolder.find(str(folder))
    blob.parent.rename(hub / "others")
    (hub / "blobs").symlink_to(tmp_path)  # which would have it inside
    with pytest.raises(ModelError, match=f"{name}: is a link out"):
        SentenceFolder.find(str(cached))


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a folder's code writes; every question on the terminal is answered with y."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: (tmp_path / "asked").write_text("") and "y")
    return tmp_path / "marker"


def change_json(path: Path, **changes: object) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**known, **changes}), encoding="utf-8")


def with_tokenizer_code(folder: Path, marker: Path) -> None:
    """The issue's attack: a tokenizer's file of code, and settings that trust it."""
    word_tokenizer().save_pretrained(str(folder))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    auto_map = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    change_json(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")


def open_clip_folder(tiny_name: str, folder: Path, **text: object) -> Path:
    shutil.copytree(tiny_name.removeprefix("local-dir:"), folder)
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"]["text_cfg"] |= text
    change_json(folder / "open_clip_config.json", **settings)
    return folder


@pytest.fixture
def trusting(tiny_name: str, tmp_path: Path, marker: Path) -> Path:
    trust = {"trust_remote_code": True}
    folder = open_clip_folder(
        tiny_name, tmp_path / "trusting", hf_tokenizer_name="x", tokenizer_kwargs=trust
    )
    with_tokenizer_code(folder, marker)
    return folder


@pytest.fixture
def tower(tiny_name: str, tmp_path: Path, marker: Path) -> Path:
    """A text tower in a folder with code, which Transformers asks about."""
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "code.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    change_json(tmp_path / "tower" / "config.json", model_type="evil", auto_map=auto_map)
    return open_clip_folder(tiny_name, tmp_path / "m", hf_model_name=str(tmp_path / "tower"))


@pytest.fixture
def transformers_folder(tmp_path: Path, marker: Path) -> Path:
    folder = write_clip(tmp_path / "clip")
    (folder / "code.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    change_json(folder / "config.json", model_type="evil", auto_map=auto_map)
    return folder


def commands(model: Path, table: Path, out: Path) -> dict[str, list[str]]:
    named = ["--model.name", str(model)]
    train = ["--data.train", str(table), "--train.batch-size", "8", "--train.device", "cpu"]
    return {
        "check": ["data", "check", str(table), *named],
        "evaluate": ["evaluate", *named, "--data.val", str(table), "--device", "cpu"],
        "refine": ["refine", *named, *train, "--data.val", str(table)],
        "export": ["export", str(model), "--to", "open_clip", "--out", str(out)],
        "interpolate": ["interpolate", str(model), str(model), "--out", str(out)],
        "fold": ["fold", str(model), "--data.train", str(table), "--out", str(out)],
        "suite": ["evaluate", "--suite", "toy", "--models", str(model), "--device", "cpu"],
    }


@pytest.mark.parametrize("attack", ["trusting", "tower", "transformers_folder"])
def test_no_verb_runs_a_models_code(
    attack: str,
    request: pytest.FixtureRequest,
    table: Path,
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    model = request.getfixturevalue(attack)
    for name, arguments in commands(model, table, tmp_path / "out").items():
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        said = capsys.readouterr().err
        assert stopped.value.code == 2, (name, said)
        assert "never run here" in said or "is not handed on to another library" in said, said
    assert not marker.exists()
    assert not (tmp_path / "asked").exists()
    assert not list((tmp_path / "modules").rglob("code.py"))  # nor copied to where it is found


def test_the_attack_is_one(trusting: Path, marker: Path):
    """What the tests above refuse does run where nothing refuses it."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(trusting), trust_remote_code=True)
    assert marker.exists()
    marker.unlink()
    with quiet_transformers(), pytest.raises(ValueError, match="code of its own"):
        AutoTokenizer.from_pretrained(str(trusting), trust_remote_code=True)
    assert not marker.exists()


def test_the_same_settings_from_the_hub(
    trusting: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
):
    def find(model_id: str, filename: str = "x", **_: object) -> str:
        return str(trusting / filename)

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", find)
    monkeypatch.setattr("clip_refine.models.open_clip.download_pretrained_from_hf", find)
    with pytest.raises(ModelError, match="tokenizer_kwargs.trust_remote_code is not handed on"):
        load_open_clip("hf-hub:evil/model")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        ("text_cfg", {"tokenizer_kwargs": {"subfolder": "a"}}, "tokenizer_kwargs.subfolder"),
        ("text_cfg", {"norm_kwargs": {"device": "cuda"}}, "norm_kwargs.device"),
        ("vision_cfg", {"act_kwargs": "x"}, "act_kwargs is not handed on"),
        ("vision_cfg", {"timm_model_name": "hf-hub:evil/x"}, "names a model elsewhere"),
        ("vision_cfg", {"timm_model_kwargs": {"pretrained_cfg": {}}}, "kwargs.pretrained_cfg is"),
        ("text_cfg", {"hf_model_config": {"auto_map": {}}}, "hf_model_config.auto_map is not"),
    ],
)
def test_settings_that_are_not_handed_on(
    tiny_name: str, tmp_path: Path, group: str, changes: dict, message: str
):
    folder = open_clip_folder(tiny_name, tmp_path / "model")
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"][group] |= changes
    change_json(folder / "open_clip_config.json", **settings)
    with pytest.raises(ModelError, match=message):
        load_open_clip(f"local-dir:{folder}")


def test_settings_that_are(tiny_name: str, tmp_path: Path):
    kwargs = {"clean": "canonicalize"}
    folder = open_clip_folder(tiny_name, tmp_path / "model", tokenizer_kwargs=kwargs)
    assert load_open_clip(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("group", "changes", "name"),
    [
        ("text_cfg", {"layers": 10**30}, "text_cfg.layers"),
        ("vision_cfg", {"layers": [3, 4, 1001, 3]}, "vision_cfg.layers"),
        (
            "vision_cfg",
            {"timm_model_kwargs": {"depth": 1e30}},
            "vision_cfg.timm_model_kwargs.depth",
        ),
    ],
)
def test_layers_without_end(
    tiny_name: str, tmp_path: Path, group: str, changes: dict[str, object], name: str
):
    """Each is made, so that a folder of some bytes would take all memory."""
    folder = open_clip_folder(tiny_name, tmp_path / "model")
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"][group] |= changes
    change_json(folder / "open_clip_config.json", **settings)
    with pytest.raises(ModelError, match=f"model_cfg.{name} asks for more than 1000 layers"):
        load_open_clip(f"local-dir:{folder}")


def test_layers_without_end_in_a_transformers_model(tmp_path: Path):
    folder = write_clip(tmp_path / "clip")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_json(folder / "config.json", text_config={**text, "num_hidden_layers": 10**30})
    with pytest.raises(ModelError, match="text_config.num_hidden_layers of its config.json asks"):
        load_transformers(str(folder))


def test_a_transformers_model_that_asks_for_kernels(tmp_path: Path):
    folder = write_clip(tmp_path / "clip")
    change_json(folder / "config.json", quantization_config={"quant_method": "evil"})
    with pytest.raises(ModelError, match="asks for code of elsewhere"):
        load_transformers(str(folder))


# --------------------------------------------------------------------------------------------------
# A factory in a run's settings.


@pytest.fixture
def received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Path, tiny_name: str) -> Path:
    """A run folder whose settings name a module that leaves a trace when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    trace = f"from pathlib import Path\nPath({str(tmp_path / 'marker')!r}).write_text('')\n"
    (tmp_path / "evil_module.py").write_text(trace + MODULE, encoding="utf-8")
    run = tmp_path / "run"
    shutil.copytree(tiny_name.removeprefix("local-dir:"), run / "model")
    (run / "scores.json").write_text("{}", encoding="utf-8")
    settings = {"model": {"factory": "evil_module:build"}, "data": {"train": str(table)}}
    (run / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return run


@pytest.mark.parametrize(
    "arguments",
    [
        "evaluate --suite toy --models {run} --device cpu",
        "evaluate --config {run}/evaluate.yaml --device cpu",
        "explore {run} --images {table} --no-browser --device cpu",
        "refine --config {run}/config.yaml --out again --train.batch-size 8 --data.val {table}",
        "report {run}",
        "compare --config {run}/compare.yaml --data.train toy --data.val {table} --out compared",
        "evaluate --model.name factory:evil_module:build --data.val {table}",
    ],
)
def test_a_run_does_not_say_what_is_imported(
    received: Path, table: Path, arguments: str, capsys: pytest.CaptureFixture[str]
):
    evaluate = {"suite": "toy", "models": ["factory:evil_module:build"]}
    (received / "evaluate.yaml").write_text(json.dumps(evaluate), encoding="utf-8")
    compare = {"model": {"name": "factory:evil_module:build"}, "data": {"train": str(table)}}
    compare |= {"train": {"batch_size": 8}}
    (received / "compare.yaml").write_text(json.dumps(compare), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main([word.format(run=received, table=table) for word in arguments.split()])
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2
    assert not (received.parent / "marker").exists()
    if not arguments.startswith("report"):
        assert "imported only where the command line names it" in said
        assert "evil_module:build" in said


def test_the_command_line_may_name_it(received: Path):
    config = load_config(RefineConfig, received / "config.yaml")
    assert config.model == ModelConfig(name="factory:evil_module:build")
    with pytest.raises(ModelError, match="--model.factory evil_module:build"):
        build.build_model(config.model)
    build.build_model(build.named_model("factory:evil_module:build"))
    assert (received.parent / "marker").exists()
    path = received / "evaluate.yaml"
    path.write_text("models: ['factory:evil_module:build']", encoding="utf-8")
    with pytest.raises(ConfigError, match="--models factory:evil_module:build"):
        load_config(EvaluateConfig, path)


def test_settings_of_all_models_that_open_clip_knows_are_let_through(tmp_path: Path):
    folder = Path(open_clip.__file__).parent / "model_configs"
    settings = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    # open_clip's own tokenizer takes more tokens, which only make it longer
    more = {"tokenizer_kwargs": {"additional_special_tokens": ["<box>"]}}
    settings.append({**settings[0], "text_cfg": {**settings[0]["text_cfg"], **more}})
    assert len(settings) > 100
    for number, one in enumerate(settings):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"model_cfg": one}), encoding="utf-8")
        _check_settings(path)
