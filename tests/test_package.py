"""The sdist, the wheel made from it, and the wheel installed where none of this checkout is."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import clip_refine

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: object, cwd: Path) -> str:
    """What a command prints that knows nothing of this checkout."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    plain = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=plain, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("checkout")
    names = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
    for name in (*names, "CITATION.cff"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "tests"):
        unwanted = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=copy)
    (made,) = (copy / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def environment(sdist: Path, tmp_path_factory) -> Path:
    """A new environment with the wheel; the packages that it needs are those of this one."""
    folder = tmp_path_factory.mktemp("elsewhere")
    made = ("--no-deps", "--no-index", "--quiet")
    run(*PIP, "wheel", *made, "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*PIP, "--python", folder / "env", "install", *made, wheel, cwd=folder)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_sdist_holds_what_it_should(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    assert {"LICENSE", "CITATION.cff", "README.md", "src/clip_refine/py.typed"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_the_wheel_says_what_it_is(environment: Path):
    (site,) = (environment / "env" / "lib").glob("python*/site-packages")
    (info,) = site.glob("clip_refine-*.dist-info")
    stated = message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert stated["Version"] == clip_refine.__version__
    assert stated["License-Expression"] == "Apache-2.0"
    assert (info / "licenses" / "LICENSE").is_file()
    assert set(stated.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    urls = [f"{name}, {url}" for name, url in PROJECT["urls"].items()]
    assert stated.get_all("Project-URL") == urls
    needed = {Requirement(one) for one in stated.get_all("Requires-Dist") if "extra" not in one}
    assert needed == set(map(Requirement, PROJECT["dependencies"]))
    shipped = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*")}
    for file in shipped:  # each file, data too
        if "__pycache__" not in file.parts and ".egg-info" not in str(file):
            assert (site / file).exists(), file


def test_what_it_needs_is_there_and_fits(environment: Path):
    said = run(*PIP, "--python", environment / "env", "check", cwd=environment)
    assert "No broken requirements" in said


def test_a_resolver_finds_what_it_needs_in_the_index(environment: Path):
    """For an environment with nothing in it; only metadata are fetched."""
    uv = shutil.which("uv") or Path(sys.executable).with_name("uv")
    if not Path(uv).exists():
        pytest.skip("uv is not installed, and pip takes minutes; make parity")
    run(sys.executable, "-m", "venv", "--without-pip", environment / "empty", cwd=environment)
    (wheel,) = environment.glob("*.whl")
    where = ("--python", environment / "empty", "--constraint", ROOT / "constraints.txt")
    asked = [uv, "pip", "install", "--dry-run", *where, wheel]
    done = subprocess.run(list(map(str, asked)), capture_output=True, text=True, timeout=200)
    if "Failed to fetch" in done.stderr or "client error" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    found = {canonicalize_name(name) for name in re.findall(r"^ \+ ([^=@ ]+)", done.stderr, re.M)}
    needed = {canonicalize_name(Requirement(one).name) for one in PROJECT["dependencies"]}
    assert needed | {"clip-refine"} <= found


def test_it_runs_from_anywhere(environment: Path, table: Path):
    at = environment / "env" / "bin"
    where = run(at / "python", "-c", "import clip_refine as c; print(c.__file__)", cwd=table.parent)
    assert where.startswith(str(environment))
    assert run(at / "clip-refine", "--version", cwd=table.parent).strip() == clip_refine.__version__
    assert "clip-refine demo" in run(at / "clip-refine", "--help", cwd=table.parent)
    few = ("--train.batch-size", 32, "--train.steps", 1)
    data = ("--data.train", table.name, "--data.val", table.name, *few)
    run(at / "clip-refine", "refine", "--model.name=toy", *data, "--out=runs/a", cwd=table.parent)
    out = table.parent / "runs" / "a"
    for name in ("report.html", "scores.json", "model/open_clip_model.safetensors"):
        assert (out / name).is_file(), name


def test_how_to_cite_it():
    stated = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(stated)
    assert stated["license"] == PROJECT["license"]
    paper = stated["preferred-citation"]
    card = ROOT / "src/clip_refine/report/templates/model_card.md.jinja"
    bibtex = card.read_text(encoding="utf-8")
    assert paper["title"] in bibtex
    assert all(who["family-names"] in bibtex for who in paper["authors"])
