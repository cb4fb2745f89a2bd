"""Which losses are added, with which weights: one weighted sum for every recipe."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from clip_refine.config import LossConfig
from clip_refine.losses.alignment import (
    alignment_loss,
    centroid_uniformity_loss,
    covariance_loss,
    rafa_loss,
)
from clip_refine.losses.matching import (
    ALL,
    Scalar,
    contrastive_loss,
    feature_distillation_loss,
    hycd_loss,
    logit_distillation_loss,
    m2_mix_loss,
    sigmoid_contrastive_loss,
    unit_pairs,
)
from clip_refine.support.errors import ConfigError, TrainingError

Given = TypeVar("Given")


class PairFeatures(NamedTuple):
    """Raw features of a batch of pairs, (B, d) each; row i of both is pair i."""

    image_features: Tensor
    text_features: Tensor


OwnLoss = Callable[[PairFeatures, PairFeatures, Tensor], Tensor]
"""Raw features of the student and of its teacher, the logit scale (0-d) → a loss (0-d)."""
_BY_ROWS = {"hycd", "contrastive", "centroid_uniformity", "m2_mix", "logit_distillation"}
"""Terms over all combinations of pairs."""


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
    centroid_uniformity: Tensor | None = None
    covariance: Tensor | None = None
    anchor: Tensor | None = None
    m2_mix: Tensor | None = None
    logit_distillation: Tensor | None = None
    own: Tensor | None = None

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

    def as_floats(self, added_up: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """Each term present and `total`, read from the device in one go.

        Of several processes `added_up` adds the parts of all.
        """
        named = self._present() | {"total": self.total}
        values = added_up(torch.stack([value.detach() for value in named.values()])).tolist()
        return dict(zip(named, values, strict=True))

    def _present(self) -> dict[str, Tensor]:
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in every.items() if value is not None}


@dataclass(frozen=True)
class Objective:
    """L = Σ weight · term over the terms whose weight is not 0, as a function of features.

    Attributes:
        loss: The weights, and what the terms are told; `config/settings.py` says what each means.
            A `temperature` of None is 1 / the model's logit scale, as a constant: as it divides the
            teacher's similarities too, lowering it would shrink the loss without learning
            anything.
        own: The function that `own_weight` weighs.
    """

    loss: LossConfig
    own: OwnLoss | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher's features."""
        names = ("hycd_weight", "anchor_weight", "logit_distillation_weight", "own_weight")
        return any(getattr(self.loss, name) for name in names) or self._masks

    @property
    def _masks(self) -> bool:
        """Whether the teacher says which negatives are left out."""
        contrastive = self.loss.contrastive_weight or self.loss.m2_mix_weight
        return self.loss.false_negatives == "masked" and bool(contrastive)

    @property
    def needs_centroid_gap(self) -> bool:
        """Whether the teacher's centroids must be known."""
        return bool(self.loss.anchor_weight and self.loss.anchor_shift)

    @property
    def uses_logit_scale(self) -> bool:
        """Whether any term has a gradient with respect to the model's logit scale."""
        models = self.loss.contrastive_scale is None and self.loss.contrastive_scale_end is None
        of_ours = models and (self.loss.contrastive_weight or self.loss.m2_mix_weight)
        return bool(of_ours or self.loss.own_weight)

    @property
    def uses_logit_bias(self) -> bool:
        """Whether any term looks at the model's logit bias."""
        return bool(self.loss.contrastive_weight) and self.loss.contrastive_form == "sigmoid"

    @property
    def needs_references(self) -> bool:
        """Whether references must be drawn from a prior."""
        return bool(self.loss.rafa_weight)

    @property
    def needs_caption_ids(self) -> bool:
        """Whether pairs with one caption are partners."""
        return self.loss.positives == "same-caption"

    @property
    def needs_wrong_texts(self) -> bool:
        """Whether every pair brings a wrong caption along."""
        return self.loss.negatives == "swapped-words" and bool(self.loss.contrastive_weight)

    @property
    def tells_pairs_apart(self) -> bool:
        """Whether the contrastive term is a choice among the batch's pairs, ln B by chance."""
        loss = self.loss
        softmax = loss.contrastive_form == "softmax" and loss.negatives == "in-batch"
        return softmax and loss.false_negatives == "kept"

    @property
    def needs_mix(self) -> bool:
        """Whether shares must be drawn for m²-mix."""
        return bool(self.loss.m2_mix_weight)

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
        caption_ids: Tensor | None = None,
        wrong_text_features: Tensor | None = None,
        centroid_gap: Tensor | None = None,
        progress: float = 0.0,
        teacher_scale: float | None = None,
        rows: slice = ALL,
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
            caption_ids: (B,), equal where captions are; None where pair i has only partner i.
            wrong_text_features: (N, d), raw, of captions that no image of the batch has; may be
                None unless `needs_wrong_texts`.
            centroid_gap: (d,), the teacher's mean text feature less its mean image feature; may be
                None unless `needs_centroid_gap`.
            teacher_scale: The teacher's own multiplier where the student has another one; then
                HyCD's softmax has it on the teacher's side.
            rows: The pairs whose part of the loss is asked for, of several processes those of this
                one; the parts of all add up to the loss. Terms over all combinations of pairs are
                computed for these rows against all columns, others whole and shared evenly.
            progress: Share of the run that is over, for what changes with it: RaFA's weight and the
                contrastive scale, where they are told to.

        Returns:
            One entry for every weight that is not 0.

        Raises:
            ValueError: If something needed is None or shapes do not fit.
        """
        scale = self._contrastive_scale(logit_scale, progress)
        teacher = _given("teacher", teacher) if self.needs_teacher else None
        shared: dict[str, Any] = {"logit_scale": scale, "caption_ids": caption_ids, "rows": rows}
        if teacher is not None and self._masks:
            shared["teacher_unit"] = unit_pairs(*teacher)
        terms = self._student_terms(student, shared, logit_bias, mix, wrong_text_features)
        if self.loss.rafa_weight:
            terms["rafa"] = rafa_loss(
                *student,
                _given("references", references),
                text_references=text_references,
                reduction=self.loss.rafa_reduction,
            )
        if teacher is not None:
            terms |= self._teacher_terms(
                student, teacher, shared, logit_scale, centroid_gap, teacher_scale
            )
        share = len(student.image_features[rows]) / len(student.image_features)
        weighted: dict[str, Tensor] = {}
        for name, term in terms.items():
            weight = getattr(self.loss, f"{name}_weight")
            if name == "rafa" and self.loss.rafa_decay == "linear":
                weight *= 1 - progress
            part = weight * term
            weighted[name] = part if name in _BY_ROWS else share * part
        return LossTerms(**weighted)

    def _contrastive_scale(self, logit_scale: Tensor, progress: float) -> Scalar:
        """1/τ, where asked for with τ on the line from the first to the last one.

        Source: Yaras et al., "Explaining and Mitigating the Modality Gap in Contrastive Multimodal
        Learning", CPAL 2025, arXiv 2412.07909, who let the temperature rise over training.
        """
        end = self.loss.contrastive_scale_end
        if end is None:
            return self.loss.contrastive_scale or logit_scale
        begin = self.loss.contrastive_scale or logit_scale.detach()
        return 1 / ((1 - progress) / begin + progress / end)

    def _student_terms(
        self,
        student: PairFeatures,
        shared: dict[str, Any],
        logit_bias: Tensor | None,
        mix: Tensor | None,
        wrong_text_features: Tensor | None,
    ) -> dict[str, Tensor]:
        """Those of the student's features alone, not yet weighted."""
        terms: dict[str, Tensor] = {}
        if self.loss.contrastive_weight:
            form = {"normalize": self.loss.contrastive_normalize, **shared}
            if self.loss.contrastive_form == "sigmoid":
                bias = _given("logit_bias", logit_bias)
                terms["contrastive"] = sigmoid_contrastive_loss(*student, logit_bias=bias, **form)
            else:
                if self.needs_wrong_texts:
                    wrong = _given("wrong_text_features", wrong_text_features)
                    form["wrong_text_features"] = wrong
                terms["contrastive"] = contrastive_loss(*student, **form)
        if self.loss.alignment_weight:
            terms["alignment"] = alignment_loss(*student, normalize=self.loss.alignment_normalize)
        if self.loss.centroid_uniformity_weight:
            terms["centroid_uniformity"] = centroid_uniformity_loss(*student, rows=shared["rows"])
        if self.loss.covariance_weight:
            terms["covariance"] = covariance_loss(*student)
        if self.loss.m2_mix_weight:
            terms["m2_mix"] = m2_mix_loss(*student, mix=_given("mix", mix), **shared)
        return terms

    def _teacher_terms(
        self,
        student: PairFeatures,
        teacher: PairFeatures,
        shared: dict[str, Any],
        logit_scale: Tensor,
        centroid_gap: Tensor | None,
        teacher_scale: float | None,
    ) -> dict[str, Tensor]:
        """Those that look at the teacher's features, too, not yet weighted."""
        own_temperature = 1 / logit_scale.detach()
        temperature = own_temperature if self.loss.temperature is None else self.loss.temperature
        terms: dict[str, Tensor] = {}
        if self.loss.hycd_weight:
            terms["hycd"] = hycd_loss(
                *student,
                *teacher,
                alpha=self.loss.alpha,
                temperature=temperature,
                teacher_temperature=None if teacher_scale is None else 1 / teacher_scale,
                normalize=self.loss.normalize,
                caption_ids=shared["caption_ids"],
                rows=shared["rows"],
            )
        if self.loss.anchor_weight:
            shift = None
            if self.loss.anchor_shift:
                shift = self.loss.anchor_shift / 2 * _given("centroid_gap", centroid_gap)
            terms["anchor"] = feature_distillation_loss(*student, *teacher, shift=shift)
        if self.loss.logit_distillation_weight:
            terms["logit_distillation"] = logit_distillation_loss(
                *student,
                *teacher,
                temperature=temperature,
                normalize=self.loss.normalize,
                rows=shared["rows"],
            )
        if self.loss.own_weight:
            loss = _given("own", self.own)(student, teacher, logit_scale)
            if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
                raise TrainingError(
                    "objective: expected a 0-d tensor that has a gradient with respect to the "
                    f"student's features, got {_kind(loss)}. Return a mean or a sum, undetached."
                )
            terms["own"] = loss
        return terms


def check_objective(loss: LossConfig, objective: OwnLoss | None) -> None:
    """Refuse a weight without its function, and a function without its weight."""
    if loss.own_weight and objective is None:
        raise ConfigError(
            "recipe own, loss.own_weight: the function that it weighs is given in Python: "
            "refine(..., objective=...). The command line takes another --recipe."
        )
    if objective is not None and not loss.own_weight:
        raise ConfigError(
            "objective: its weight is 0. Take RefineConfig(recipe='own', ...) for it alone, or set "
            "loss.own_weight to add it to a recipe."
        )


def _kind(value: Any) -> str:
    """What a function returned, in words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    gradient = "" if value.requires_grad else " without a gradient"
    return f"a tensor of shape {tuple(value.shape)}{gradient}"


def _given(name: str, value: Given | None) -> Given:
    """`value`, refused with its name if it is None though a term needs it."""
    if value is None:
        raise ValueError(f"this objective needs {name}, got None")
    return value
