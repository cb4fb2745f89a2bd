"""The command line: help at once, one message for each mistake, settings from file and flags."""

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from clip_refine.cli import HELP, VERBS, main
from clip_refine.config.runs import CompareConfig
from clip_refine.data import read_class_folders
from clip_refine.roads.compare import compare
from clip_refine.support.errors import ConfigError, TrainingError
from clip_refine.toy import ToyPairs
from tests.report.test_comparison_page import COMPARISON, line


def test_help_teaches_every_verb(capsys: pytest.CaptureFixture[str]):
    main([])
    assert capsys.readouterr().out == HELP
    assert all(f"clip-refine {verb}" in HELP for verb in VERBS)


@pytest.fixture(scope="module")
def helped() -> dict[str, list]:
    """Of each verb what its help says, and what heavy it imports; all in one process."""
    program = (
        "import io, json, sys; from contextlib import redirect_stdout\n"
        "from clip_refine.cli import VERBS, main\n"
        "def heavy(): return {'torch', 'open_clip', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "found = {}\n"
        "for verb in VERBS:\n"
        "    before = heavy()\n"
        "    with redirect_stdout(io.StringIO()) as said:\n"
        "        try: main([verb, '--help'])\n"
        "        except SystemExit: pass\n"
        "    found[verb] = [said.getvalue(), sorted(heavy() - before)]\n"
        "print(json.dumps(found))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


@pytest.mark.parametrize("verb", list(VERBS))
def test_verb_help_needs_no_torch(verb: str, helped: dict[str, list]):
    said, heavy = helped[verb]
    assert not heavy
    assert "default" in said


def test_settings_come_from_defaults_then_file_then_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\ntrain: {epochs: 5, batch_size: 64}\n")
    main(["refine", "--config", str(file), "--train.epochs", "2", "--print-config"])
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["seed"], settings["train"]["epochs"]) == (3, 2)
    assert (settings["train"]["batch_size"], settings["train"]["learning_rate"]) == (64, 1e-6)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["refine", "--config"], "clip-refine refine: --config needs a value after it."),
        (["refine", "--recipe"], "clip-refine refine: --recipe needs a value after it."),
        (["refine", "--json=1"], "clip-refine refine: --json takes no value."),
        (["evaluate", "--recipe", "hycd"], "Unrecognized options: --recipe"),
    ],
)
def test_flags_that_are_read_first(
    arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("refine good.csv", "good.csv: captioned images are given as --data.train good.csv,"),
        ("evaluate good.csv", "as --data.val good.csv, a model as --model.name good.csv."),
        ("compare --seeds 2 --train.lr 1e-3", "--train.lr: did you mean --train.learning-rate"),
        ("tune --trial.bs 8 --bs 8", "--bs: did you mean --train.batch-size"),
    ],
)
def test_words_without_their_flag_and_abbreviations(
    arguments: str, hint: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert hint in said
    assert said.count("did you mean") + said.count("captioned images") == 1


def test_lists_take_commas_or_spaces(capsys: pytest.CaptureFixture[str]):
    for words in (["--recipes", "a,b", "c"], ["--recipes=a,b,c"], ["--recipes", "a", "b", "c"]):
        main(["compare", *words, "--seeds", "2", "--print-config"])
        assert yaml.safe_load(capsys.readouterr().out)["recipes"] == ["a", "b", "c"]


def test_what_is_not_there_is_said_before_a_library_is_loaded(tmp_path: Path):
    """Loading torch and open_clip takes seconds; both faults are of a moment."""
    nowhere = str(tmp_path / "runs" / "nowhere")
    data = ["--data.train", str(tmp_path / "no.csv")]
    data_val, out = ["--data.val", "toy", "--model.name", "toy"], ["--out", "x"]
    cut = ["--top", "1", "--bottom", "1"]
    for name in ("captions.csv", "photo-clip", "a.jsonl", "1.tar"):
        (tmp_path / name).touch()
    mistakes = {
        "no such folder. Give an open_clip": [
            *("refine", "--model.name", f"local-dir:{nowhere}", "--data.train", "toy"),
        ],
        "no such open_clip architecture. There is no folder": ["evaluate", "--model.name", nowhere],
        "no such open_clip architecture. Did you mean ViT-B-32": ["fold", "ViT-B-33", "--out", "x"],
        "Did you mean RN50": ["compare", "--models", "ViT-B-32", "RN5O", "--data.train", "toy"],
        "no.csv: cannot be read": ["tune", *data],
        "captons.csv: cannot be read (No such file or directory). Check the path. Did you mean "
        "captions.csv?": ["refine", "--data.train", "captons.csv"],
        "There is no folder or file of this name either. Did you mean photo-clip?": [
            *("evaluate", "--model.name", "photoclip", "--data.val", "toy"),
        ],
        "other.csv: cannot be read": ["evaluate", "--data.val", f"{tmp_path}/other.csv#kind=table"],
        "There is no folder or file": ["export", nowhere, "--to", "open_clip", "--out", "x"],
        "there.csv: cannot be read": ["data", "check", "there.csv"],
        "classes: cannot be read": [
            "evaluate",
            *data_val,
            "--evaluation.zero-shot",
            "toy",
            "classes",
        ],
        "here.csv: cannot be read": ["refine", *data_val, "--guard", "--guard.pairs", "here.csv"],
        "images: cannot be read": ["refine", *data_val, "--data.image-folder", "images"],
        "no suite of this name": ["evaluate", "--suite", "mine.yaml"],
        "DIR: cannot be read": ["evaluate", "--suite", "paper", "--data-root", "DIR"],
        "runs/here: cannot be read": ["explore", "runs/here"],
        "photo: cannot be read": ["explore", ".", "--images", "photo"],
        "--port 70000: must be 1 to 65535": ["explore", ".", "--port", "70000"],
        "no such open_clip architecture. There is no f": ["interpolate", "a", "b", "--out", "x"],
        "maps: cannot be read": ["vectors", "apply", "maps", ".", "--side", "text", "--out", "x"],
        "old.npy: cannot be read": ["vectors", "apply", ".", "old.npy", "--side", "text", *out],
        "text.npy: cannot be read": ["vectors", "refine", "captions.csv,text.npy", *out],
        "pairs.npz: cannot be read": ["vectors", "compare", "pairs.npz", *out],
        "map: cannot be read": ["vectors", "evaluate", "hf:a/b", "--map", ".", "map"],
        "a.npy: cannot be read": ["vectors", "align", "a.npy", ".", *out],
        "folded: cannot be read": ["vectors", "fold", "folded", *out],
        "Did you mean RN101": ["vectors", "isoclip", *out, *cut, "--model.name", "RN11"],
        "f.npz: cannot be read": ["posthoc", "fit", "nnn", "f.npz", *out],
        "peer: cannot be read": ["posthoc", "apply", "peer", "f.npz", *out],
        "neither scores.json nor": ["report", "nowhere"],
        "train.steps is missing: a.jsonl does not tell how many": [
            *("refine", "--data.train", "a.jsonl", "--data.streaming", *data_val),
        ],
        "train.steps is missing: {1..9}.tar does not tell": [
            *("refine", "--data.train", "{1..9}.tar", "--data.streaming", *data_val),
        ],
        "runs/gone: cannot be read": ["refine", "--resume", "runs/gone", *data_val],
    }
    program = (
        "import sys, json; from clip_refine.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert stop.code == 2\n"
        "heavy = {'torch', 'open_clip', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    given = json.dumps([*mistakes.values()])
    shown = subprocess.run(
        [sys.executable, "-c", program, given], capture_output=True, text=True, cwd=tmp_path
    )
    assert shown.returncode == 0, shown.stderr
    for fault, said in zip(mistakes, shown.stderr.splitlines(), strict=True):
        assert fault in said


@pytest.mark.parametrize("words", [["--help"], ["--seeds", "two"]])
@pytest.mark.parametrize("plain", [False, True])
def test_no_color(words: list[str], plain: bool):
    """Of a terminal, where help and errors are coloured otherwise."""
    ours, theirs = pty.openpty()
    colours = {"NO_COLOR": "1"} if plain else {}
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    told = subprocess.Popen(
        [sys.executable, "-m", "clip_refine", "compare", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color", **colours},
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the end of a terminal
        while block := os.read(ours, 1 << 16):
            shown += block
    os.close(ours)
    told.wait()
    assert (b"\x1b[" in shown) != plain
    assert b"--seeds" in shown


def test_a_given_default_is_no_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "compare.yaml"
    file.write_text("recipes: [centred]\nloss: {rafa_weight: 1.0}\n")
    for words in (
        ["--recipes", "centred", "--loss.rafa-weight", "1"],
        ["--recipes=centred", "--loss.rafa-weight=1"],
        ["--config", str(file)],
    ):
        with pytest.raises(SystemExit):
            main(["compare", *words, "--data.train", "toy", "--out", str(tmp_path / "x")])
        assert "loss.rafa_weight 1.0: every recipe here has its own" in capsys.readouterr().err
    # behind a comparison's own file, which has all settings
    main(["compare", "--recipes", "balanced", "centred", "--print-config"])
    file.write_text(capsys.readouterr().out)
    data = ["--config", str(file), "--data.train", "toy", "--out", str(tmp_path / "x")]
    with pytest.raises(SystemExit):
        main(["compare", *data, "--loss.rafa-weight", "1", "--recipes", "centred"])
    assert "loss.rafa_weight 1.0: every recipe here has its own" in capsys.readouterr().err
    normalize = ["--recipes", "contrastive-raw", "--loss.contrastive-normalize"]
    for words, own in ((normalize, True), (["--loss.no-contrastive-normalize"], False)):
        main(["compare", *words, "--print-config"])
        assert yaml.safe_load(capsys.readouterr().out)["loss"]["contrastive_normalize"] == own
    with pytest.raises(SystemExit):
        main(["tune", *normalize, "--data.train", "toy", "--out", str(tmp_path / "x")])
    assert "loss.contrastive_normalize True: every recipe" in capsys.readouterr().err


def test_models_with_a_slash_and_a_tag(capsys: pytest.CaptureFixture[str]):
    main(["refine", "--model.name", "ViT-B/32@openai", "--print-config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert (model["name"], model["pretrained"]) == ("ViT-B-32", "openai")
    main(["refine", "--model.name", "ViT-B/32", "--model.pretrained", "x", "--print-config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert (model["name"], model["pretrained"]) == ("ViT-B-32", "x")
    for verb in ("export", "interpolate", "fold"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "name, ARCH@TAG, or factory:MODULE:FUNCTION@RUN" in shown


def test_models_alone_are_all_that_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    named = tmp_path / "named.yaml"
    named.write_text("model: {name: D}\n")
    plain = tmp_path / "plain.yaml"
    plain.write_text("seeds: 1\n")
    for words, model, others in (
        (["--models", "B@tag", "C"], ("B", "tag"), ["C"]),
        (["--models", "factory:a:b", "C"], ("factory:a:b", None), ["C"]),
        (["--config", str(plain), "--models=B,C"], ("B", None), ["C"]),
        (["--config", str(named), "--models", "B", "C"], ("D", None), ["B", "C"]),
        (["--model.name", "ViT-B-32", "--models", "B", "C"], ("ViT-B-32", None), ["B", "C"]),
        ([], ("ViT-B-32", None), []),
    ):
        main(["compare", *words, "--print-config"])
        found = yaml.safe_load(capsys.readouterr().out)
        assert (found["model"]["name"], found["model"]["pretrained"]) == model
        assert found["models"] == others


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [(["--help"], ""), (["--help"], "1"), (["refine", "--help"], "")]
)
def test_a_reader_that_has_seen_enough_is_no_error(arguments: list[str], unbuffered: str):
    read, write = os.pipe()
    os.close(read)
    told = subprocess.run(
        [sys.executable, "-m", "clip_refine", *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        text=True,
    )
    os.close(write)
    assert (told.returncode, told.stderr) == (1, "")


def test_another_broken_pipe_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def break_off(arguments: list[str]) -> None:
        raise BrokenPipeError("of a worker")

    monkeypatch.setitem(VERBS, "demo", break_off)
    with pytest.raises(SystemExit) as stop:
        main(["demo"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "clip-refine demo: of a worker.\n"
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main(["demo", "--debug"])


def test_ctrl_c_ends_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    for verb, left in (("demo", "nothing was written"), ("compare", "finished runs are kept")):
        monkeypatch.setitem(VERBS, verb, interrupt)
        with pytest.raises(SystemExit) as stop:
            main([verb])
        assert stop.value.code == 130
        assert capsys.readouterr().err == f"\nclip-refine {verb}: stopped; {left}.\n"


def test_names_of_a_comparison_are_no_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    swept = COMPARISON.model_copy(
        update={"summary": (*COMPARISON.summary[:2], line("hycd[loss.alpha=0]", 0.7, 0.35))}
    )
    monkeypatch.setattr("clip_refine.roads.compare.compare", lambda config: swept)
    main(["compare"])
    shown = capsys.readouterr().out
    assert shown.startswith("Take hycd[loss.alpha=0]: it is better in mean R@1")
    assert "Report: runs/" in shown


def test_demo_runs_the_toy_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from clip_refine import cli

    seen = []
    monkeypatch.setattr(cli, "refine", seen.append)
    main(["demo", "--out", str(tmp_path / "x"), "--seed", "4"])
    assert (seen[0].model.name, seen[0].data.train, seen[0].seed) == ("toy", "toy", 4)


def test_a_run_from_the_command_line(
    table: Path, tiny_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    main(
        [
            *("refine", "--model.name", tiny_name, "--data.train", str(table)),
            *("--data.val", str(table), "--train.batch-size", "32", "--out", str(out)),
        ]
    )
    shown = capsys.readouterr()
    assert "centroid distance" in shown.out
    assert "The gap " in shown.out
    assert f"Report: {out}/report.html" in shown.out.replace("\n", "")
    assert (out / "scores.json").is_file()
    main(["report", str(out)])
    assert capsys.readouterr().out.strip() == f"{out}/report.html"
    main(["evaluate", "--model.name", f"local-dir:{out}/model", "--data.val", str(table)])
    assert "image to text R@1" in capsys.readouterr().out


def test_machines_get_json_and_nothing_else(
    table: Path, tiny_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    main(
        [
            *("refine", "--json", "--no-report", "--model.name", tiny_name),
            *("--data.train", str(table), "--data.val", str(table)),
            *("--train.batch-size", "32", "--out", str(out)),
        ]
    )
    shown = capsys.readouterr().out
    assert json.loads(shown) == json.loads((out / "scores.json").read_text())


def test_errors_go_to_standard_error_with_status_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["refine", "--data.train", "nowhere.csv"])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "clip-refine refine: nowhere.csv: cannot be read" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: you tried to allocate 9 bytes"), 1, "out of memory"),
        (RuntimeError("[gloo/x.cc] reset by peer"), 1, "another process of this run has ended"),
        (RecursionError(), 2, "nested too deeply"),
        (OSError(28, "No space left on device", "runs/a"), 1, "runs/a: No space left on device"),
        (ZeroDivisionError("x" * 9), 1, "failed: ZeroDivisionError: xxxxxxxxx. This should not"),
        (TrainingError("loss is nan"), 1, "loss is nan"),
        (ConfigError("a\x1b[2J" + "b" * 10_000), 2, "a\ufffd[2Jbbb"),
    ],
)
def test_every_failure_is_one_message(
    error: Exception,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setitem(VERBS, "demo", fail)
    with pytest.raises(SystemExit) as stop:
        main(["demo"])
    shown = capsys.readouterr().err
    assert (stop.value.code, shown.count("\n")) == (status, 1)
    assert said in shown
    assert len(shown) < 8100
    with pytest.raises(type(error)):
        main(["demo", "--debug"])


def test_several_processes_do_not_write_one_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main(["vectors", "align", "old.npy", "new.npy", "--out", "maps"])
    assert stop.value.code == 2
    assert "vectors align runs in one process: several would all do" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["vectors", "apply", "--help"])
    assert stop.value.code == 0


def test_a_full_disk_and_a_terminal_of_few_letters():
    command = [sys.executable, "-m", "clip_refine", "--help"]
    with open("/dev/full", "w") as full:
        told = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert told.returncode == 1
    assert told.stderr.startswith("clip-refine --help: No space left on device.")
    assert "Traceback" not in told.stderr
    code = "from clip_refine.cli import main, say, VERBS\nVERBS['x'] = lambda _: say('\u03b1')\n"
    told = subprocess.run(
        [sys.executable, "-c", code + "main(['x'])"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (told.returncode, told.stdout, told.stderr) == (0, "?\n", "")


def test_names_from_data_move_no_cursor(capsys: pytest.CaptureFixture[str]):
    from rich.table import Table

    from clip_refine.support.console import PlainConsole

    table = Table("\x1b]0;title\x07")
    table.add_row("cat\x1b[2J\u202e")
    PlainConsole(force_terminal=True, color_system=None).print(table, "dog\x1b[2J")
    shown = capsys.readouterr().out
    assert "\x1b]" not in shown
    assert "[2J" in shown
    assert "\x1b[2J" not in shown
    assert "\u202e" not in shown
    with pytest.raises(SystemExit):
        main(["refine", "\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["refine", "compare", "suite"])
def test_names_of_classes_move_no_cursor_whatever_shows_them(
    verb: str,
    tmp_path: Path,
    table: Path,
    tiny_name: str,
    held_out: ToyPairs,
    capsys: pytest.CaptureFixture[str],
):
    """Neither on a terminal nor in a file that somebody may look at with `cat`."""
    there, out = tmp_path / "kinds\x1b[2J", tmp_path / "out"
    for index in range(24):
        folder = there / ("\x1b[31mred", "blue\u202e")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        held_out.load_image(index).save(folder / f"{index}.png")
    kinds = tmp_path / "kinds"  # a name that may be an argument
    kinds.symlink_to(there)
    suite = tmp_path / "mine.yaml"
    tasks = [{"kind": kind, "source": "kinds"} for kind in ("zero-shot", "linear-probe")]
    place = {"kind": "folder", "path": there.name}
    sources = {"kinds": {"at": place, "note": "\x1b[2J"}}
    suite.write_text(json.dumps({"sources": sources, "tasks": tasks, "resamples": 20}))
    model, to = ["--model.name", tiny_name], ["--out", str(out / "scores.json")]
    if verb == "suite":
        main(["evaluate", *model, "--suite", str(suite), "--cache", str(tmp_path), *to])
    elif verb == "refine":
        data = ["--data.train", str(table), "--data.val", str(table), "--train.batch-size", "32"]
        main(["refine", *model, *data, "--evaluation.zero-shot", str(kinds), "--out", str(out)])
    else:
        settings = {"recipes": ("hycd",), "seeds": 1, "learning_rates": (1e-4,), "resamples": 2}
        more = {"model": {"name": tiny_name}, "train": {"batch_size": 60}, "out": out}
        compare(
            CompareConfig.model_validate({**settings, **more, "cache": tmp_path / "cache"}),
            train_pairs=ToyPairs("compare", size=220),
            held_out=held_out,
            tasks=[read_class_folders(kinds, templates=["a {}"])],
        )
        main(["report", str(out)])
    shown = capsys.readouterr()
    texts = {"what is shown": shown.out + shown.err}
    for path in out.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            texts[path.name] = path.read_text(encoding="utf-8")
    assert any("[2J" in text for text in texts.values())
    moving = "[\x00-\x08\x0b-\x1f\x7f]"
    assert not [name for name, text in texts.items() if re.search(moving, text)]
    turning = [name for name, text in texts.items() if "\u202e" in text]
    assert not [name for name in turning if not name.endswith(".json")]  # which is for programs


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["re"], {"refine", "report"}),
        (["refine", "--train.learning-r"], {"--train.learning-rate"}),
        (["vectors", "iso"], {"isoclip"}),
        (["data", "check", "captions.csv", "--sh"], {"--sheet"}),
        (["refine", "--fail"], {"--fail-if-worse"}),
        (["vectors", "apply", "--verb"], {"--verbose"}),
        (["refine", "--config", "capt"], {"captions.csv"}),
        (["report", "capt"], {"captions.csv"}),
        (["vectors", "align", "captions.csv", "p"], {"photos"}),
        (["vectors", "align", "captions.csv", "with"], {"with blanks"}),
    ],
)
def test_bash_completes_verbs_settings_and_files(
    words: list[str], completed: set[str], completion: Path, tmp_path: Path
):
    (tmp_path / "captions.csv").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "with blanks").touch()
    typed = " ".join(f"'{word}'" for word in ("clip-refine", *words))
    script = (
        f"source {completion}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}\n"
        "read -r _ _ function _ <<< $(complete -p clip-refine)\n"
        '$function; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert {*filter(None, ran.stdout.split("\n"))} == completed, ran.stderr


@pytest.fixture(scope="module")
def completion(tmp_path_factory) -> Path:
    ran = subprocess.run(
        [sys.executable, "-m", "clip_refine", "--print-completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
    )
    path = tmp_path_factory.mktemp("shell") / "clip-refine.bash"
    path.write_text(ran.stdout)
    return path


def test_zsh_finds_its_function(capsys: pytest.CaptureFixture[str]):
    main(["--print-completion", "zsh"])
    assert capsys.readouterr().out.startswith("#compdef clip-refine\n")
