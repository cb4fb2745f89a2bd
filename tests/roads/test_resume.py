"""A run that was stopped goes on as if it had not been; what is finished is never lost."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clip_refine.config import RefineConfig, load_config, override
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.roads import build
from clip_refine.roads import refine as road
from clip_refine.roads.refine import refine
from clip_refine.support.errors import ConfigError, FailedError, OutputError
from clip_refine.train import Trainer
from clip_refine.train.state import SavedState, States, fitting
from tests.data.layouts import write_parquet, write_shards
from tests.data.test_streams import toy_parquet, toy_rows
from tests.several import in_processes

TOOL = Path(__file__).parents[2] / "tools" / "kill_runs.py"


@pytest.fixture
def config(tiny_name: str, table: Path, tmp_path: Path) -> RefineConfig:
    """Two epochs of four steps, saved after every third."""
    return RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "data": {
                "train": str(table),
                "val": str(table),
                "cache_folder": str(tmp_path / "cache"),
            },
            "train": {
                "batch_size": 16,
                "learning_rate": 1e-3,
                "precision": "fp32",
                "epochs": 2,
                "save_every": 3,
            },
            "out": tmp_path / "run",
            "report": False,
            "seed": 1,
        }
    )


def outcome(out: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in line.items() if "second" not in k} for line in log]
    return steps, load_file(out / "model" / "open_clip_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    steps, weights = outcome(one)
    assert outcome(other)[0] == steps
    assert all(torch.equal(outcome(other)[1][name], value) for name, value in weights.items())


def stopped(config: RefineConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hidden folder of a run that was stopped in this step."""
    usual = Trainer.step

    def one_step(self: Trainer, number: int, *rest: Any, **named: Any) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return usual(self, number, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", one_step)
        with pytest.raises(KeyboardInterrupt):
            refine(config)
    return config.out.parent / ".run.partial"


# what has a state of its own
CASES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "a schedule": {"train": {"schedule": "cosine", "warmup_steps": 2}},
    "dropout in adapters": {"train": {"parameters": "lora", "dropout": "on"}},
    "worker processes": {"train": {"workers": 2}},
    "folded": {"loss": {"fold": 1.0, "feature_scale": "canonical"}},
    "a prior that was measured": {"prior": {"kind": "gaussian_both"}},
    "a mix and independent references": {
        "loss": {"m2_mix_weight": 0.5, "references": "independent", "rafa_decay": "linear"}
    },
    "part of the way": {"interpolate": 0.5},
}


@pytest.mark.parametrize(
    ("case", "step"),
    [*((case, 5) for case in CASES), ("as it comes", 8), ("dropout in adapters", 8)],
)
def test_it_is_the_same_bit_by_bit(
    case: str, step: int, config: RefineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = override(config, **CASES[case])
    refine(override(config, out=tmp_path / "unbroken"))
    partial = stopped(config, step, monkeypatch)
    saved = [path.name for path in sorted((partial / "state").iterdir())]
    assert saved == [f"step-{number:09}" for number in (3, 6) if number < step]
    refine(override(config, resume="auto"))
    assert_same(tmp_path / "unbroken", config.out)
    assert not (config.out / "state").exists()
    assert not list(tmp_path.glob(".run*"))


def test_parts_that_memory_halved_are_no_other_parts(
    config: RefineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """As if only eight pairs fitted: it is recorded, and a run that goes on begins there."""
    encode = OpenClipEncoder.encode_image

    def limited(self: OpenClipEncoder, pixels: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and len(pixels) > 8:
            raise torch.OutOfMemoryError("a lot")
        return encode(self, pixels)

    monkeypatch.setattr("clip_refine.roads.refine.say_plan", lambda *_: None)
    monkeypatch.setattr(OpenClipEncoder, "encode_image", limited)
    refine(override(config, out=tmp_path / "unbroken"))
    stopped(config, 5, monkeypatch)
    capsys.readouterr()
    refine(override(config, resume="auto"))
    assert "bit by bit" not in capsys.readouterr().err
    assert_same(tmp_path / "unbroken", config.out)
    for out in (tmp_path / "unbroken", config.out):
        assert load_config(RefineConfig, out / "config.yaml").train.micro_batch == 8


@pytest.mark.parametrize("mixed", [False, True])
def test_a_stream_goes_on_without_what_was_seen(
    mixed: bool,
    config: RefineConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    names = [toy_parquet(tmp_path / "a", 40), toy_parquet(tmp_path / "b", 24)]
    data = {"train": names if mixed else names[0], "streaming": True, "shuffle_buffer": 7}
    if mixed:
        data["weights"] = [2, 1]
    config = override(config, data=data, train={"batch_size": 8, "steps": 11, "epochs": 1})
    refine(override(config, out=tmp_path / "unbroken"))
    stopped(config, 8, monkeypatch)
    refine(override(config, resume="auto"))
    assert_same(tmp_path / "unbroken", config.out)


def stopped_in_both(config: RefineConfig, rank: int, patch: pytest.MonkeyPatch) -> None:
    """Of two processes; what is left lies there for a run called `alone`, too."""
    partial = stopped(config, 5, patch)
    torch.distributed.barrier()
    if rank == 0:
        shutil.copytree(partial, partial.with_name(".alone.partial"))
    torch.distributed.barrier()


def one_of_two(settings: str, streamed: str) -> None:
    """A run that is not stopped, one that is, and the same going on, by one of two processes."""
    rank = build.build_accelerator("cpu").process_index
    config = RefineConfig.model_validate_json(settings)
    refine(override(config, out=config.out.parent / "unbroken"))
    with pytest.MonkeyPatch().context() as patch:
        stopped_in_both(config, rank, patch)
    refine(override(config, resume="auto"))
    refine(override(config, out=config.out.parent / "grown", resume="auto"))
    stream = RefineConfig.model_validate_json(streamed)
    with pytest.MonkeyPatch().context() as patch:
        stopped(stream, 3, patch)
    torch.distributed.barrier()
    refine(override(stream, resume="auto"))


@pytest.mark.timeout(300)
def test_two_processes_go_on_bit_by_bit_one_goes_on_as_two_and_two_as_one(
    config: RefineConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    stopped(config, 5, monkeypatch).rename(tmp_path / ".grown.partial")  # of one process
    data = {"train": toy_parquet(tmp_path / "a", 40), "streaming": True, "shuffle_buffer": 7}
    more = {"batch_size": 8, "steps": 6, "epochs": 1, "save_every": 1}
    stream = override(config, data=data, train=more, out=tmp_path / "stream")
    in_processes(2, one_of_two, config.model_dump_json(), stream.model_dump_json())
    assert_same(tmp_path / "unbroken", config.out)
    refine(override(config, out=tmp_path / "alone", resume="auto"))
    assert "goes on, but not bit by bit: processes 2 then" in capsys.readouterr().err
    together = outcome(config.out)[0]
    for name in ("alone", "grown"):
        for one, other in zip(outcome(tmp_path / name)[0], together, strict=True):
            assert one == pytest.approx(other, rel=1e-3)  # the same pairs and references
    refine(override(stream, out=tmp_path / "whole stream"))
    (steps, weights), (expected, alone) = map(outcome, (stream.out, tmp_path / "whole stream"))
    for one, other in zip(steps, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    # Adam makes whole steps of gradients that are 0 but for rounding, as those of keys' biases
    start = load_open_clip(config.model.name).clip.state_dict()
    apart = sum(float((weights[name] - value).square().sum()) for name, value in alone.items())
    moved = sum(float((start[name] - value).square().sum()) for name, value in alone.items())
    assert apart < 0.1**2 * moved


def read_own_files(settings: str) -> None:
    """A run by one of two processes, one that is stopped and goes on; each reads its own files."""
    rank, said = build.build_accelerator("cpu").process_index, []
    config = RefineConfig.model_validate_json(settings)
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr("clip_refine.data.pairs.remark", lambda text, *_: said.append(text))
        refine(override(config, out=config.out.parent / "unbroken"))
        stopped_in_both(config, rank, patch)
        refine(override(config, resume="auto"))
    if rank == 0:
        (config.out.parent / "said").write_text("\n".join(said))


@pytest.mark.timeout(300)
def test_two_processes_that_read_their_own_files_go_on_bit_by_bit(
    config: RefineConfig, tmp_path: Path
):
    rows = toy_rows(116)
    pairs, held_out = rows[:96], [*rows[2:96:24], *rows[96:]]  # one of each file, too
    for at in range(9, 96, 24):
        pairs[at] = (f"{at}.png", b"no image", ["a circle"])
    shards = write_shards(tmp_path / "shards", pairs, shards=4)
    data = {"train": shards, "streaming": True, "shuffle_buffer": 3, "own_files": True}
    data |= {"skip_bad": True, "max_bad": 0.3, "val": write_parquet(tmp_path, held_out)}
    more = {"batch_size": 8, "steps": 6, "epochs": 1, "save_every": 2}
    config = override(config, data=data, train=more)
    in_processes(2, read_own_files, config.model_dump_json())
    assert_same(tmp_path / "unbroken", config.out)
    # each process has read one file of four to its end
    for out in (tmp_path / "unbroken", config.out):
        assert (out / "skipped.jsonl").read_text().count('"problem"') == 2
    assert (tmp_path / "said").read_text().count("Beware: 2 of the 24 held-out images") == 2
    with pytest.raises(ConfigError, match="data.own_files 'of 2 processes', now it is None"):
        refine(override(config, out=tmp_path / "alone", resume="auto"))


def share_weights(settings: str) -> None:
    """Runs by one of two processes that share the weights out (FSDP2), and by one that does not."""
    rank = build.build_accelerator("cpu").process_index
    config = RefineConfig.model_validate_json(settings)
    last = {"parameters": "last-blocks", "blocks": 1, "gradient_checkpointing": True}
    some = override(config, train={**last, "micro_batch": 5, "clip_norm": 0.1, "layer_decay": 0.5})
    with pytest.MonkeyPatch().context() as patch:
        for name, one in (("all", config), ("some", some)):
            refine(override(one, out=config.out.parent / name))
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "2")
        for name, one in (("all shared", config), ("some shared", some)):
            refine(override(one, out=config.out.parent / name))
        partial = stopped(config, 4, patch)
        with pytest.raises(ConfigError, match="PEFT's layers cannot be shared out"):
            refine(override(config, train={"parameters": "lora"}, out=config.out.parent / "lora"))
    torch.distributed.barrier()
    if rank == 0:
        shutil.copytree(partial, partial.with_name(".alone.partial"))
    torch.distributed.barrier()
    refine(override(config, resume="auto"))


@pytest.mark.timeout(300)
def test_shared_weights_are_the_same_run(config: RefineConfig, tmp_path: Path):
    """With folds, scales, guard and interpolation; their states go on in other ways, too."""
    config = override(
        config,
        train={"epochs": 1, "learning_rate": 1e-4},
        loss={"fold": 1.0, "feature_scale": "canonical"},
        interpolate=0.5,
        guard={"every": 2, "pairs": config.data.val, "bound": 100.0},
    )
    in_processes(2, share_weights, config.model_dump_json())
    refine(override(config, out=tmp_path / "alone", resume="auto"))
    for name, like in (
        ("all shared", "all"),
        ("some shared", "some"),
        ("run", "all"),
        ("alone", "all"),
    ):
        (steps, weights), (expected, before) = outcome(tmp_path / name), outcome(tmp_path / like)
        for step, one in zip(steps, expected, strict=True):
            assert step == pytest.approx(one, rel=2e-3), (name, one)
        for (
            key,
            value,
        ) in before.items():  # Adam makes steps of gradients that are 0 but for rounding
            assert torch.allclose(weights[key], value, atol=1e-3), (name, key)


@pytest.mark.parametrize("more", [{}, {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}])
def test_another_fsdp_is_refused(more: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="Give --fsdp_version 2 and no --fsdp_offload_params"):
        build.build_accelerator("cpu")


def test_fsdps_other_options_are_said_to_change_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM": "true"}
    for name, value in options.items():
        monkeypatch.setenv(name, value)
    build.build_accelerator("cpu")
    assert "Of FSDP's options FSDP_CPU_RAM change nothing" in capsys.readouterr().err


def test_a_run_goes_on_elsewhere_and_for_longer(
    config: RefineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    longer = override(config, train={"epochs": 3})
    refine(override(longer, out=tmp_path / "unbroken"))
    stopped(config, 5, monkeypatch)
    refine(override(longer, resume=str(config.out), out=tmp_path / "on"))
    assert_same(tmp_path / "unbroken", tmp_path / "on")


@pytest.mark.parametrize(
    "changing",
    [
        {"loss": {"contrastive_weight": 1.0, "contrastive_scale_end": 20.0}},
        {"loss": {"rafa_decay": "linear"}},
        {"train": {"schedule": "cosine"}},
    ],
)
def test_what_changes_evenly_over_a_run_is_of_its_length(
    changing: dict[str, Any], config: RefineConfig, monkeypatch: pytest.MonkeyPatch
):
    config = override(config, **changing)
    stopped(config, 5, monkeypatch)
    with pytest.raises(ConfigError, match=r"train.epochs 2, now it is 3"):
        refine(override(config, resume="auto", train={"epochs": 3}))


def test_it_says_what_does_not_go_on(
    config: RefineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match="no state of a run is there"):
        refine(override(config, resume=str(tmp_path / "nowhere")))
    stopped(config, 5, monkeypatch)
    on = override(config, resume="auto")
    for change, what in (
        ({"train": {"batch_size": 8}}, "train.batch_size 16, now it is 8"),
        ({"loss": {"alpha": 0.2}}, "loss.alpha 0.5, now it is 0.2"),
        ({"seed": 2}, "seed 1, now it is 2"),
        ({"train": {"schedule": "cosine"}}, "train.epochs None, now it is 2"),
    ):
        with pytest.raises(ConfigError, match=f"was saved with .*{what}"):
            refine(override(on, **change))
    with pytest.raises(ConfigError, match="step 3 is taken, but this run is to end after 2"):
        refine(override(on, train={"steps": 2}))
    table = tmp_path / "captions.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *lines[4:], *lines[1:4]]) + "\n")
    with pytest.raises(ConfigError, match="other training pairs"):
        refine(on)


def test_a_state_that_rotted_gives_way_to_the_one_before(
    config: RefineConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    refine(override(config, out=tmp_path / "unbroken"))
    partial = stopped(config, 8, monkeypatch)
    with (partial / "state" / "step-000000006" / "state.safetensors").open("r+b") as file:
        file.seek(-9, 2)
        [byte] = file.read(1)
        file.seek(-9, 2)
        file.write(bytes([byte ^ 4]))
    refine(override(config, resume="auto"))
    said = capsys.readouterr().err
    assert "step-000000006: cannot be used" in said
    assert "Going on at step 3" in said
    assert_same(tmp_path / "unbroken", config.out)


def test_a_run_that_is_complete_is_not_made_again(config: RefineConfig):
    scores = refine(config)
    assert refine(override(config, resume="auto")) == scores
    with pytest.raises(ConfigError, match=r"a complete run with seed 1, now it is 43\. Choose an"):
        refine(override(config, resume="auto", seed=43))
    with pytest.raises(OutputError, match="exists already"):
        refine(config)


# --------------------------------------------------------------------------------------------------
# What goes wrong where nothing may be lost.


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_while_saving_ends_no_training(
    config: RefineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("clip_refine.train.state.save_file", full)
    refine(config)
    assert "step 3 could not be saved (No space left on device)" in capsys.readouterr().err


def only_in(place: Path, usual: Callable[..., None]) -> Callable[..., None]:
    def save(model: Any, folder: Path, provenance: Any) -> None:
        if not folder.is_relative_to(place):
            full()
        usual(model, folder, provenance)

    return save


def test_a_full_disk_at_the_end_loses_no_model(
    config: RefineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    refine(override(config, out=tmp_path / "unbroken"))
    there = tmp_path / "elsewhere"
    there.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(there))
        patch.setattr(road, "save_model", only_in(there, road.save_model))
        with pytest.raises(FailedError, match=r"cannot be written there \(.*it is in .*/model"):
            refine(config)
    [model] = there.glob("*/model/open_clip_model.safetensors")
    expected = outcome(tmp_path / "unbroken")[1]
    assert all(torch.equal(value, expected[name]) for name, value in load_file(model).items())
    refine(override(config, resume="auto"))  # from the last state
    assert_same(tmp_path / "unbroken", config.out)


def test_a_finished_model_is_found_by_the_next_run(
    config: RefineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = override(config, train={"save_every": "never"}, report=True)
    with monkeypatch.context() as patch:
        patch.setattr(road, "gather_evidence", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            refine(config)
    refine(config)
    aside = config.out.parent / "run-unfinished"
    assert f"its finished model is {aside}/model" in capsys.readouterr().err
    assert_same(aside, config.out)


def test_a_folder_that_vanished_is_no_success(
    config: RefineConfig, monkeypatch: pytest.MonkeyPatch
):
    usual = road.train_student

    def vanish(*given: Any, **named: Any) -> Any:
        trained = usual(*given, **named)
        shutil.rmtree(config.out.parent / ".run.partial")
        return trained

    monkeypatch.setattr(road, "train_student", vanish)
    with pytest.raises(FailedError, match="was removed while .* refined model is in") as error:
        refine(config)
    kept = Path(str(error.value).split("model is in ")[1].split(";")[0])
    assert (kept / "open_clip_model.safetensors").is_file()


def test_too_little_room_is_said_at_the_start(
    config: RefineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    usage = shutil.disk_usage(config.out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**28))
    with pytest.raises(OutputError, match=r"the refined model's weights take .* free there"):
        refine(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**28 + 4 * 10**6))
    refine(config)
    assert "may take up to" in capsys.readouterr().err


@pytest.mark.timeout(600)
def test_killed_at_random_moments_and_by_signals(tmp_path: Path):
    """Three kills and three signals; tools/kill_runs.py does more of them."""
    command = [sys.executable, str(TOOL), "--folder", str(tmp_path / "runs")]
    command += ["--moments", "2", "--images", "256", "--signals"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 as they should be" in done.stdout


class Steps:
    """What a trainer has to save, of one weight."""

    def agree(self, asked: int, due: int) -> tuple[int, int]:
        return asked, due

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"weight": torch.zeros(2)}, {}


def save(run: Path, step: int) -> None:
    States(folder=run, every="1", about={}).after(step, 9, Steps(), lambda: None)


def test_two_states_stay_and_what_a_killed_run_left_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    left = [tmp_path / "state" / f".step-00000000{step}.partial" for step in (2, 3)]
    for folder in left:
        (folder / "deep").mkdir(parents=True)
    save(tmp_path, 1)
    said = capsys.readouterr().err
    assert all(f"Cleared {folder}, which a run that was killed had left" in said for folder in left)
    for step in (2, 3):
        save(tmp_path, step)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [
        "step-000000002",
        "step-000000003",
    ]
    save(tmp_path, 2)  # by a run that went back, since the last one could not be used
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-000000002"]
    assert "Cleared" not in capsys.readouterr().err


def test_a_state_is_found_after_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, synced = tmp_path / "runs" / ".mine.partial", list[int]()
    run.mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", lambda opened: synced.append(os.fstat(opened).st_ino))
    save(run, 1)
    state = run / "state" / "step-000000001"
    files = [state / "state.safetensors", state / "state.json", state / "SHA256SUMS", state]
    above = [run / "state", run, run.parent, tmp_path]
    for path in (*files, *above):
        assert path.stat().st_ino in synced, path
    last = max(map(synced.index, (path.stat().st_ino for path in files)))
    assert last < min(synced.index(path.stat().st_ino) for path in above)


def test_a_run_that_begins_is_not_said_to_go_on(capsys: pytest.CaptureFixture[str]):
    States(folder=None, every="never", about={}).decide({"micro_batch": 32, "precision": "fp32"})
    assert capsys.readouterr().err == ""


def test_room_for_a_guards_best_weights_is_counted(
    config: RefineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Three states of weights and two moments, or of four times the weights: 4 MB each."""
    student, first = torch.nn.Linear(1000, 1000, bias=False), SimpleNamespace(is_main_process=True)
    usage = shutil.disk_usage(config.out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**28 + 5 * 10**6))
    for guard in ({}, {"every": 2}):
        road._output(override(config, guard=guard), first, student, None)  # pyright: ignore
    said = capsys.readouterr().err.replace("\n", " ")
    assert re.findall(r"up to (\d+) MB", said) == ["36", "48"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("other shapes")])
def test_a_full_device_does_not_make_a_state_wrong(error: Exception, tmp_path: Path):
    """Which would be advised to be left behind."""
    full = isinstance(error, torch.OutOfMemoryError)
    kind = torch.OutOfMemoryError if full else ConfigError
    message = "full" if full else "does not fit this run"
    with pytest.raises(kind, match=message), fitting(SavedState(tmp_path, {})):
        raise error
