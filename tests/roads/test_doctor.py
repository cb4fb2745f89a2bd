"""What is broken is named with what to do, and only then is the exit code 1."""

import json
import shutil
import socket
import sys
import tempfile
import time
from collections import namedtuple

import pytest
from huggingface_hub import constants

from clip_refine.cli import main
from clip_refine.roads import doctor


def looked_at(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    main(["doctor", "--json"])
    return {one["about"]: one for one in json.loads(capsys.readouterr().out)}


def test_where_nothing_is_broken(capsys: pytest.CaptureFixture[str]):
    found = looked_at(capsys)
    assert {"python", "torch", "transformers", "cpu", "results", "cache", "hub"} <= found.keys()
    assert "pytest" not in found  # of [dev], which only who works on the program needs
    assert not any(one["advice"] for one in found.values())
    assert "GB free of" in found["cpu"]["found"]
    assert "--train.precision auto is " in found["cpu"]["found"]
    main(["doctor"])
    shown = capsys.readouterr().out
    assert all(one["found"] in shown for about, one in found.items() if about == "torch")
    assert "!" not in shown
    assert shown.endswith("Nothing to see to.\n")


@pytest.mark.parametrize(
    ("installed", "found"), [("0.3", "0.3 (>=0.5)"), (None, "not installed (>=0.5)")]
)
def test_a_library_out_of_bounds(monkeypatch, capsys, installed: str | None, found: str):
    versions = {"safetensors": installed, "optuna": None}  # the second belongs to an extra
    known = doctor.package_version
    monkeypatch.setattr(
        doctor, "package_version", lambda name: versions[name] if name in versions else known(name)
    )
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert found in shown
    assert "pip install 'safetensors>=0.5'" in shown
    assert shown.count("\n!") == 1
    assert shown.endswith("1 to see to: safetensors.\n")


@pytest.mark.parametrize(
    ("versions", "broken"),
    [
        ({"onnx": None, "torch": "2.9.0"}, ""),
        ({"onnx": "1.20", "torch": "2.9.0"}, "torch"),
        ({"transformers": "4.50", "sentence-transformers": None}, "transformers"),
    ],
)
def test_what_an_extra_asks_for_counts_where_it_is_there(monkeypatch, versions, broken: str):
    versions = {"onnxruntime": "1.30", "onnxscript": "0.7"} | versions
    known = doctor.package_version
    monkeypatch.setattr(
        doctor, "package_version", lambda name: versions[name] if name in versions else known(name)
    )
    assert {one.about for one in doctor.examine() if one.advice} == {broken} - {""}


@pytest.mark.parametrize(
    ("part", "module"),
    [("libraries", "packaging.requirements"), ("devices", "open_clip"), ("hub", "huggingface_hub")],
)
def test_a_library_that_cannot_be_imported(monkeypatch, capsys, part: str, module: str):
    """Whatever it is, the rest is looked at all the same."""
    monkeypatch.setitem(sys.modules, module, None)  # Python's own way to say that it fails
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json"])
    assert stop.value.code == 1
    found = {one["about"]: one for one in json.loads(capsys.readouterr().out)}
    assert found[part]["found"].startswith(f"fails: import of {module} halted")
    assert found[part]["advice"]
    shown = {"libraries": "torch", "devices": "cpu", "disks": "results", "hub": "hub"}
    assert {name for other, name in shown.items() if other != part} <= found.keys()


def test_no_folder_for_temporary_files(monkeypatch):
    """As on a full disk, where Python tries to write in each."""

    def fail() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    found = {one.about: one for one in doctor.examine()}
    assert found["disks"].found == "fails: No usable temporary directory found"
    assert found["disks"].advice
    assert "hub" in found


def test_a_full_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert {one.advice for one in doctor._disks()} == {"Free some space, or choose another folder."}


def test_a_hub_that_does_not_answer_is_waited_for_shortly_and_breaks_nothing(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "_HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        begin = time.monotonic()
        [found] = doctor._hub()
    assert time.monotonic() - begin < 5
    assert found.found.startswith(f"{address} no answer within 0.3 s")
    assert not found.advice
