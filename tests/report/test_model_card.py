"""The README.md of a saved model."""

import pytest
import yaml

from clip_refine.models.encoder import OPEN_CLIP, OWN, TRANSFORMERS
from clip_refine.results import BaseModelFacts, DataFacts, Interval, Provenance, RunScores, Scores
from clip_refine.saving.folder import IMMICH, ONNX, model_card

NASTY = "x|y <script>alert(1)</script> [a](b) `c` *d*\n# e"


def provenance(**changes) -> Provenance:
    facts = {
        "version": "1.2.3",
        "made": "refined",
        "base": BaseModelFacts(name="ViT-B-32 (openai)", hub_id="timm/vit.openai", licence="mit"),
        "recipe": "clip-refine",
        "train": DataFacts(name="coco.csv", images=1000, captions=5000, fingerprint="ab" * 16),
        "settings": {"train.learning_rate": 1e-6},
        **changes,
    }
    return Provenance(**facts)


def scores(task: str = "pets") -> RunScores:
    def side(value: float) -> Scores:
        return Scores(
            geometry={"centroid_distance": value},
            retrieval={"image_to_text_recall@1": value},
            zero_shot={task: {"top1": value, "top5": value, "mean_per_class_recall": value}},
            pairs=500,
            captions=2500,
        )

    return RunScores(
        before=side(0.5),
        after=side(0.625),
        difference={
            "retrieval.image_to_text_recall@1": Interval(mean=0.125, low=0.1, high=0.15),
        },
        recipe={},
        seconds={"total": 1.0},
    )


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_what_the_hub_reads():
    front = front_matter(model_card(provenance(), [TRANSFORMERS, OPEN_CLIP]))
    assert front["library_name"] == "transformers"
    assert front["base_model"] == "timm/vit.openai"
    assert front["license"] == "mit"
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert {"clip-refine", "open_clip", "transformers"} <= set(front["tags"])


def test_what_people_read():
    card = model_card(provenance().measured(scores()), [OPEN_CLIP])
    assert "| image to text R@1 | 0.500 | 0.625 | +0.125 (+0.100 to +0.150) |" in card
    assert "| centroid distance (the gap) | 0.500 | 0.625 | +0.125 |" in card
    assert "500 held-out images with 2,500 captions" in card
    assert "coco.csv: 1,000 images, 5,000 captions" in card
    assert "| train.learning\\_rate | 1e-06 |" in card
    assert "licence applies to them: mit." in card
    assert "2504.12717" in card
    assert "open_clip.create_model_and_transforms" in card
    assert "version = {1.2.3}" in card


@pytest.mark.parametrize(
    "library", [OPEN_CLIP, TRANSFORMERS, "sentence-transformers", ONNX, IMMICH, OWN]
)
def test_every_format_has_code(library: str):
    card = model_card(provenance(train=None, settings={}), [library])
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, library, "exec")
    assert "## Data" not in card
    assert "## Recipe" not in card


def test_an_unknown_licence_is_said():
    card = model_card(provenance(base=BaseModelFacts(name="mine")), [OPEN_CLIP])
    assert front_matter(card)["license"] == "unknown"
    assert "base_model" not in front_matter(card)
    assert "look it up before you share" in card


def test_user_text_is_escaped():
    base = BaseModelFacts(name=NASTY, licence="mit\nlibrary_name: evil")
    data = DataFacts(name=NASTY, images=1, captions=1, fingerprint="0")
    card = model_card(provenance(base=base, train=data).measured(scores(NASTY)), [OPEN_CLIP])
    assert "<script>" not in card
    assert "\n# e" not in card
    assert front_matter(card)["library_name"] == "open_clip"
    row = next(line for line in card.splitlines() if line.startswith("| zero-shot"))
    assert row.replace("\\|", "").count("|") == 5
