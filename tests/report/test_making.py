"""How a run was made, without the folders of whoever made it."""

from clip_refine.config import RefineConfig
from clip_refine.report.tables import all_settings, command, making_facts, short_path
from tests.report.test_score_lines import MEASURED


def test_facts():
    scores = MEASURED.model_copy(update={"recipe": {"pairs": 5000, "steps": 39}})
    config = RefineConfig.model_validate(
        {"data": {"train": "/home/me/photos/captions.csv"}, "seed": 0}
    )
    facts = making_facts(scores, config.model_dump(mode="json"), {}, "/home/me/photos/val.csv")
    assert facts["Losses"] == "RaFA × 1, HyCD × 1"
    assert facts["Training images"] == "5,000 from …/photos/captions.csv"
    assert facts["Steps"] == "39 of 512 pairs, 1 epoch"
    assert facts["Held-out images"] == "1,000 from …/photos/val.csv"
    assert facts["Seed"] == "0"


def test_steps_that_were_asked_for_are_no_epoch():
    scores = MEASURED.model_copy(update={"recipe": {"pairs": 5000, "steps": 39}})
    settings = RefineConfig.model_validate({"train": {"steps": 39}}).model_dump(mode="json")
    shown = making_facts(scores, settings, {}, "toy")["Steps"]
    assert shown == "39 of 512 pairs, as many as were asked for"


def test_a_result_that_lies_on_the_way_says_so():
    ways = [None, {"weight": 0.5, "tried": {}}, {"weight": 0.25, "tried": {"0": 0.1}}]
    shown = []
    for way in ways:
        recipe = {"pairs": 5000, "steps": 39, "interpolation": way}
        scores = MEASURED.model_copy(update={"recipe": recipe})
        settings = RefineConfig().model_dump(mode="json")
        shown.append(making_facts(scores, settings, {}, "toy").get("Interpolation"))
    assert shown == [
        None,
        "0.5 of the way from the model to its refinement",
        "0.25 of the way from the model to its refinement, chosen on held-out training pairs",
    ]


def test_commands_can_be_pasted():
    made = {"command": ["/opt/bin/clip-refine", "refine", "--data.train", "my file.csv"]}
    assert command(made) == "clip-refine refine --data.train 'my file.csv'"
    assert command({"command": ["train.py"]}) == ""
    assert command({}) == ""


def test_only_paths_are_shortened():
    for kept in ("hf-hub:ORG/NAME", "https://example.org/a/b/c", "s3://bucket/a/b", "at 1/2"):
        assert short_path(kept) == kept
    assert short_path("local-dir:/a/b/c/model") == "local-dir:…/c/model"
    assert short_path("/home/me/x/a.csv\n/home/me/y/b.csv") == "…/y/b.csv"
    assert short_path("file:///home/me/photos/a.csv") == "file://…/photos/a.csv"


def test_folders_with_spaces_are_left_out_of_commands_and_settings():
    path = "/home/some one/my photos/captions.csv"
    words = ["/opt/bin/clip-refine", "refine", "--data.train", path, f"--data.val={path}"]
    assert "some one" not in command({"command": words})
    assert "'.../my photos/captions.csv'" in command({"command": words})
    assert "some one" not in all_settings({"data": {"train": path, "lists": [path]}})
