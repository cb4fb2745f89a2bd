"""Every loss as one function of the same five tensors, beside its naive loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clip_refine import losses
from clip_refine.losses.matching import unit_pairs
from tests.reference import losses as loops
from tests.reference.draws import normals


class Inputs(NamedTuple):
    image: Tensor
    text: Tensor
    teacher_image: Tensor
    teacher_text: Tensor
    references: Tensor


def made_inputs(
    batch: int = 4, dim: int = 5, *, seed: int, dtype: torch.dtype = torch.float64
) -> Inputs:
    return Inputs(*normals(5, batch, dim, seed=seed, dtype=dtype))


@dataclass(frozen=True)
class Case:
    name: str
    loss: Callable[[Inputs], Tensor]
    loop: Callable[..., float]
    is_pair_symmetric: bool = True
    uses_teacher: bool = False


def judged(x: Inputs) -> tuple[Tensor, Tensor]:
    return unit_pairs(x.teacher_image, x.teacher_text)


def judged_rows(teacher_image: loops.Rows, teacher_text: loops.Rows) -> loops.Rows:
    return loops.similarities(loops.unit(teacher_image), loops.unit(teacher_text), 1)


MIX = torch.tensor(0.3, dtype=torch.float64)

CASES = [
    Case(
        "rafa-mean",
        lambda x: losses.rafa_loss(x.image, x.text, x.references),
        lambda i, t, ti, tt, r: loops.rafa(i, t, r, "mean"),
    ),
    Case(
        "rafa-sum",
        lambda x: losses.rafa_loss(x.image, x.text, x.references, reduction="sum"),
        lambda i, t, ti, tt, r: loops.rafa(i, t, r, "sum"),
    ),
    Case(
        "hycd-raw",
        lambda x: losses.hycd_loss(*x[:4], alpha=0.3, temperature=0.7),
        lambda i, t, ti, tt, r: loops.hycd(i, t, ti, tt, 0.3, 1 / 0.7),
        uses_teacher=True,
    ),
    Case(
        "hycd-unit",
        lambda x: losses.hycd_loss(*x[:4], alpha=0.5, temperature=0.1, normalize=True),
        lambda i, t, ti, tt, r: loops.hycd(*map(loops.unit, (i, t, ti, tt)), 0.5, 10),
        uses_teacher=True,
    ),
    Case(
        "contrastive-unit",
        lambda x: losses.contrastive_loss(x.image, x.text, logit_scale=7.0),
        lambda i, t, ti, tt, r: loops.contrastive(loops.unit(i), loops.unit(t), 7),
    ),
    Case(
        "contrastive-raw",
        lambda x: losses.contrastive_loss(x.image, x.text, logit_scale=0.5, normalize=False),
        lambda i, t, ti, tt, r: loops.contrastive(i, t, 0.5),
    ),
    Case(
        "sigmoid-contrastive",
        lambda x: losses.sigmoid_contrastive_loss(
            x.image, x.text, logit_scale=4.0, logit_bias=-2.0
        ),
        lambda i, t, ti, tt, r: loops.sigmoid_contrastive(loops.unit(i), loops.unit(t), 4, -2),
    ),
    Case(
        "contrastive-masked",
        lambda x: losses.contrastive_loss(x.image, x.text, logit_scale=7.0, teacher_unit=judged(x)),
        lambda i, t, ti, tt, r: loops.contrastive(
            loops.unit(i), loops.unit(t), 7, None, judged_rows(ti, tt)
        ),
        uses_teacher=True,
    ),
    Case(
        "contrastive-wrong-texts",
        lambda x: losses.contrastive_loss(
            x.image, x.text, logit_scale=7.0, wrong_text_features=x.references.detach()
        ),
        lambda i, t, ti, tt, r: loops.contrastive(
            loops.unit(i), loops.unit(t), 7, wrong=loops.unit(r)
        ),
        is_pair_symmetric=False,  # there are wrong texts, and no wrong images
    ),
    Case(
        "sigmoid-contrastive-masked",
        lambda x: losses.sigmoid_contrastive_loss(
            x.image, x.text, logit_scale=4.0, logit_bias=-2.0, teacher_unit=judged(x)
        ),
        lambda i, t, ti, tt, r: loops.sigmoid_contrastive(
            loops.unit(i), loops.unit(t), 4, -2, None, judged_rows(ti, tt)
        ),
        uses_teacher=True,
    ),
    Case(
        "feature-distillation",
        lambda x: losses.feature_distillation_loss(*x[:4]),
        lambda i, t, ti, tt, r: loops.feature_distillation(i, t, ti, tt),
        uses_teacher=True,
    ),
    Case(
        "logit-distillation-raw",
        lambda x: losses.logit_distillation_loss(*x[:4]),
        lambda i, t, ti, tt, r: loops.logit_distillation(i, t, ti, tt, 1),
        uses_teacher=True,
    ),
    Case(
        "logit-distillation-unit",
        lambda x: losses.logit_distillation_loss(*x[:4], temperature=0.1, normalize=True),
        lambda i, t, ti, tt, r: loops.logit_distillation(*map(loops.unit, (i, t, ti, tt)), 10),
        uses_teacher=True,
    ),
    Case(
        "alignment-raw",
        lambda x: losses.alignment_loss(x.image, x.text),
        lambda i, t, ti, tt, r: loops.alignment(i, t),
    ),
    Case(
        "alignment-unit",
        lambda x: losses.alignment_loss(x.image, x.text, normalize=True),
        lambda i, t, ti, tt, r: loops.alignment(loops.unit(i), loops.unit(t)),
    ),
    Case(
        "centroid-uniformity",
        lambda x: losses.centroid_uniformity_loss(x.image, x.text),
        lambda i, t, ti, tt, r: loops.centroid_uniformity(i, t),
    ),
    Case(
        "covariance",
        lambda x: losses.covariance_loss(x.image, x.text),
        lambda i, t, ti, tt, r: loops.covariance_matching(i, t),
    ),
    Case(
        "m2-mix",
        lambda x: losses.m2_mix_loss(x.image, x.text, logit_scale=3.0, mix=MIX),
        lambda i, t, ti, tt, r: loops.m2_mix(i, t, 3, [0.3] * len(i)),
        # exchanging the modalities turns a share of λ into one of 1 − λ
        is_pair_symmetric=False,
    ),
    Case(
        "m2-mix-masked",
        lambda x: losses.m2_mix_loss(
            x.image, x.text, logit_scale=3.0, mix=MIX, teacher_unit=judged(x)
        ),
        lambda i, t, ti, tt, r: loops.m2_mix(i, t, 3, [0.3] * len(i), None, judged_rows(ti, tt)),
        is_pair_symmetric=False,
        uses_teacher=True,
    ),
]
