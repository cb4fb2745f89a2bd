"""What saved models say about themselves."""

from pathlib import Path

import pytest

from clip_refine.cli import main
from clip_refine.results import BaseModelFacts, Provenance
from clip_refine.saving import base_model, read_provenance, write_card
from clip_refine.saving.folder import data_facts
from clip_refine.toy import ToyPairs


def card(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def test_names_without_paths(tmp_path: Path):
    (tmp_path / "weights.pt").touch()
    run = card(tmp_path / "runs" / "mine" / "model", "---\nlicense: mit\n---\n")
    names = {
        ("ViT-B-32", None): BaseModelFacts(
            name="ViT-B-32 (openai)", hub_id="timm/vit_base_patch32_clip_224.openai"
        ),
        ("ViT-B-32", str(tmp_path / "weights.pt")): BaseModelFacts(name="ViT-B-32 (weights.pt)"),
        ("hf-hub:org/name", None): BaseModelFacts(name="org/name", hub_id="org/name"),
        ("transformers:org/name", None): BaseModelFacts(name="org/name", hub_id="org/name"),
        (f"local-dir:{run}", None): BaseModelFacts(name="mine", licence="mit"),
        (str(run.parent), None): BaseModelFacts(name="mine", licence="mit"),
        (f"transformers:{run}", None): BaseModelFacts(name="mine", licence="mit"),
        (str(tmp_path / "weights.pt"), None): BaseModelFacts(name="weights.pt"),
        ("factory:own.models:make", None): BaseModelFacts(name="a model made by own.models:make"),
        ("python:Own", None): BaseModelFacts(name="a Python object of class Own"),
    }
    for (name, pretrained), facts in names.items():
        assert base_model(name, pretrained) == facts


@pytest.mark.parametrize(
    "text",
    [
        "no front matter",
        "---\n: [\n---\n",
        "---\nlicense: other\n---\n",
        "---\n- a\n---\n",
        "---\n",
    ],
)
def test_a_licence_that_is_not_known(tmp_path: Path, text: str):
    assert base_model(str(card(tmp_path / "base", text))).licence is None


def test_names_of_data(tmp_path: Path):
    class Named(ToyPairs):
        pass

    pairs = Named("facts", size=3, captions_per_image=2)
    names = {
        f"{tmp_path}/captions.csv": "captions.csv",
        f"{tmp_path}/captions.csv (training part)": "captions.csv (training part)",
        "data/captions.csv": "captions.csv",
        "org/dataset": "org/dataset",
        str(tmp_path): tmp_path.name,
    }
    for name, shown in names.items():
        pairs.name = name
        assert data_facts(pairs).name == shown
    assert (data_facts(pairs).images, data_facts(pairs).captions) == (3, 6)


def test_a_model_between_two_says_so(tiny_name: str, tmp_path: Path):
    main(["interpolate", tiny_name, tiny_name, "--out", str(tmp_path / "half")])
    card_text = (tmp_path / "half" / "README.md").read_text(encoding="utf-8")
    assert "Weights between two models: 0.5 of the way from" in card_text
    found = read_provenance(tmp_path / "half")
    assert found is not None
    assert found.made == "interpolated"


def test_facts_of_another_version_are_left_alone(tmp_path: Path):
    write_card(tmp_path, Provenance(version="1", made="converted", base=BaseModelFacts(name="x")))
    assert read_provenance(tmp_path) is not None
    (tmp_path / "provenance.json").write_text('{"other": 1}')
    assert read_provenance(tmp_path) is None
