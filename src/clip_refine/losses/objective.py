"""Which losses are added, with which weights: one weighted sum for every recipe."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from clip_refine.losses.alignment import alignment_loss
from clip_refine.losses.contrastive import contrastive_loss, sigmoid_contrastive_loss
from clip_refine.losses.distillation import feature_distillation_loss, logit_distillation_loss
from clip_refine.losses.hycd import hycd_loss
from clip_refine.losses.mixup import m2_mix_loss
from clip_refine.losses.rafa import RafaReduction, rafa_loss

Given = TypeVar("Given")


class PairFeatures(NamedTuple):
    """Raw features of a batch of pairs, (B, d) each; row i of both is pair i."""

    image_features: Tensor
    text_features: Tensor


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The terms of one step, each already multiplied by its weight; None where not computed.

    Example:
        >>> terms = LossTerms(rafa=torch.tensor(1.5), hycd=torch.tensor(2.0))
        >>> terms.total.item()
        3.5
        >>> terms.as_floats()
        {'rafa': 1.5, 'hycd': 2.0, 'total': 3.5}
    """

    rafa: Tensor | None = None
    hycd: Tensor | None = None
    contrastive: Tensor | None = None
    alignment: Tensor | None = None
    anchor: Tensor | None = None
    m2_mix: Tensor | None = None
    logit_distillation: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The sum of the terms present, a scalar to call `backward` on.

        Raises:
            ValueError: If there is no term.
        """
        present = list(self._present().values())
        if not present:
            raise ValueError("no loss term is present, so there is nothing to minimise")
        return torch.stack(present).sum()

    def as_floats(self) -> dict[str, float]:
        """Each term present and `total`, read from the device in one go."""
        named = self._present() | {"total": self.total}
        values = torch.stack([value.detach() for value in named.values()]).tolist()
        return dict(zip(named, values, strict=True))

    def _present(self) -> dict[str, Tensor]:
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in every.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """L = Σ weight · term over the terms whose weight is not 0, as a function of features.

    The method's own settings have no defaults here: `clip_refine.config` states them once. The
    rivals' weights default to 0, which means that their terms are not computed.

    Attributes:
        rafa_weight: Of `rafa_loss`, on raw features.
        hycd_weight: Of `hycd_loss`.
        alpha: HyCD's share of the one-hot part.
        temperature: Of HyCD and of logit distillation; None for 1 / the model's logit scale. The
            scale is then a constant of these terms: as it divides the teacher's similarities too,
            lowering it would shrink the loss without learning anything.
        normalize: Whether HyCD and logit distillation see unit features.
        rafa_reduction: `"mean"` or `"sum"`, see `rafa_loss`.
        contrastive_weight: Of `contrastive_loss`.
        contrastive_form: `softmax` for `contrastive_loss`, `sigmoid` for SigLIP's.
        contrastive_normalize: Whether the contrastive term sees unit features.
        contrastive_scale: Logit scale of the contrastive and the m²-mix term; None for the
            model's own, which is trained by them where the model lets it.
        alignment_weight: Of `alignment_loss`, on raw features.
        anchor_weight: Of `feature_distillation_loss`.
        anchor_shift: The share of the way to each other that the teacher's centroids go before
            the student is anchored to its features: 0 for none, 1 where they meet.
        m2_mix_weight: Of `m2_mix_loss`, always on unit features.
        logit_distillation_weight: Of `logit_distillation_loss`.
    """

    rafa_weight: float
    hycd_weight: float
    alpha: float
    temperature: float | None
    normalize: bool
    rafa_reduction: RafaReduction
    contrastive_weight: float = 0.0
    contrastive_form: Literal["softmax", "sigmoid"] = "softmax"
    contrastive_normalize: bool = True
    contrastive_scale: float | None = None
    alignment_weight: float = 0.0
    anchor_weight: float = 0.0
    anchor_shift: float = 0.0
    m2_mix_weight: float = 0.0
    logit_distillation_weight: float = 0.0

    def __post_init__(self) -> None:
        weights = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name.endswith("_weight")
        }
        for name, weight in weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"{name} must be finite and at least 0, got {weight}")
        if not any(weights.values()):
            raise ValueError(f"at least one weight must be above 0: {', '.join(weights)}")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher's features."""
        return bool(self.hycd_weight or self.anchor_weight or self.logit_distillation_weight)

    @property
    def needs_centroid_gap(self) -> bool:
        """Whether the teacher's centroids must be known."""
        return bool(self.anchor_weight and self.anchor_shift)

    @property
    def needs_references(self) -> bool:
        """Whether references must be drawn from a prior."""
        return bool(self.rafa_weight)

    @property
    def needs_mix(self) -> bool:
        """Whether shares must be drawn for m²-mix."""
        return bool(self.m2_mix_weight)

    def __call__(
        self,
        student: PairFeatures,
        teacher: PairFeatures | None,
        references: Tensor | None,
        *,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        text_references: Tensor | None = None,
        mix: Tensor | None = None,
        centroid_gap: Tensor | None = None,
    ) -> LossTerms:
        """The weighted terms of one batch.

        Args:
            student: Raw features with gradient, (B, d) each.
            teacher: Raw features of the same batch; may be None unless `needs_teacher`.
            references: (B, d), one a pair; may be None unless `needs_references`.
            logit_scale: The model's own multiplier 1/τ (not its logarithm), 0-d.
            logit_bias: The model's own offset of logits, 0-d; may be None unless the contrastive
                term has the sigmoid form.
            text_references: (B, d), the texts' own references; None where both sides share one.
            mix: Shares for m²-mix, 0-d or (B,); may be None unless `needs_mix`.
            centroid_gap: (d,), the teacher's mean text feature less its mean image feature; may be
                None unless `needs_centroid_gap`.

        Returns:
            One entry for every weight that is not 0.

        Raises:
            ValueError: If something needed is None or shapes do not fit.
        """
        terms = self._student_terms(student, logit_scale, logit_bias, mix)
        if self.rafa_weight:
            loss = rafa_loss(
                *student,
                _given("references", references),
                text_references=text_references,
                reduction=self.rafa_reduction,
            )
            terms = {"rafa": self.rafa_weight * loss} | terms
        if self.needs_teacher:
            teacher = _given("teacher", teacher)
            terms |= self._teacher_terms(student, teacher, logit_scale, centroid_gap)
        return LossTerms(**terms)

    def _student_terms(
        self,
        student: PairFeatures,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        mix: Tensor | None,
    ) -> dict[str, Tensor]:
        scale = logit_scale if self.contrastive_scale is None else self.contrastive_scale
        terms: dict[str, Tensor] = {}
        if self.contrastive_weight:
            form: dict[str, Any] = {"logit_scale": scale, "normalize": self.contrastive_normalize}
            if self.contrastive_form == "sigmoid":
                bias = _given("logit_bias", logit_bias)
                loss = sigmoid_contrastive_loss(*student, logit_bias=bias, **form)
            else:
                loss = contrastive_loss(*student, **form)
            terms["contrastive"] = self.contrastive_weight * loss
        if self.alignment_weight:
            loss = alignment_loss(*student)
            terms["alignment"] = self.alignment_weight * loss
        if self.m2_mix_weight:
            loss = m2_mix_loss(*student, logit_scale=scale, mix=_given("mix", mix))
            terms["m2_mix"] = self.m2_mix_weight * loss
        return terms

    def _teacher_terms(
        self,
        student: PairFeatures,
        teacher: PairFeatures,
        logit_scale: Tensor,
        centroid_gap: Tensor | None,
    ) -> dict[str, Tensor]:
        own_temperature = 1 / logit_scale.detach()
        temperature = own_temperature if self.temperature is None else self.temperature
        terms: dict[str, Tensor] = {}
        if self.hycd_weight:
            loss = hycd_loss(
                *student,
                *teacher,
                alpha=self.alpha,
                temperature=temperature,
                normalize=self.normalize,
            )
            terms["hycd"] = self.hycd_weight * loss
        if self.anchor_weight:
            shift = None
            if self.anchor_shift:
                shift = self.anchor_shift / 2 * _given("centroid_gap", centroid_gap)
            loss = feature_distillation_loss(*student, *teacher, shift=shift)
            terms["anchor"] = self.anchor_weight * loss
        if self.logit_distillation_weight:
            loss = logit_distillation_loss(
                *student, *teacher, temperature=temperature, normalize=self.normalize
            )
            terms["logit_distillation"] = self.logit_distillation_weight * loss
        return terms


def _given(name: str, value: Given | None) -> Given:
    """`value`, refused with its name if it is None though a term needs it."""
    if value is None:
        raise ValueError(f"this objective needs {name}, got None")
    return value
