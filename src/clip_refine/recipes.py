"""Named objectives: what each row of the paper's tables and each of its critics sets."""

from typing import Any

_HYCD_ONLY = {"rafa_weight": 0.0}
_CONTRASTIVE_ONLY = {"rafa_weight": 0.0, "hycd_weight": 0.0, "contrastive_weight": 1.0}
_NOTHING_YET = {"rafa_weight": 0.0, "hycd_weight": 0.0}

RECIPES: dict[str, dict[str, Any]] = {
    "clip-refine": {},
    "clip-refine-paper": {"feature_scale": "as-is"},
    "balanced": {
        **_HYCD_ONLY,
        "anchor_weight": 20.0,
        "anchor_shift": 0.25,
        "feature_scale": "canonical",
    },
    "hycd": _HYCD_ONLY,
    "self-kd": {**_HYCD_ONLY, "alpha": 0.0},
    "hycd+align": {**_HYCD_ONLY, "alignment_weight": 1.0},
    "rafa": {"hycd_weight": 0.0},
    "contrastive": _CONTRASTIVE_ONLY,
    "contrastive-raw": {**_CONTRASTIVE_ONLY, "contrastive_normalize": False},
    "contrastive+anchor": {**_CONTRASTIVE_ONLY, "anchor_weight": 1.0},
    "m2-mix": {**_CONTRASTIVE_ONLY, "m2_mix_weight": 1.0},
    "feature-distillation": {**_NOTHING_YET, "anchor_weight": 1.0},
    "logit-distillation": {**_NOTHING_YET, "logit_distillation_weight": 1.0},
}
"""Settings of `loss` that differ from its defaults in `config.py`."""
