"""A watch over a training: what the model can do, measured on a few images every few steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from clip_refine.config import DataConfig, RefineConfig
from clip_refine.data import ImageCaptions, LabelledImages, Subset, open_pairs, read_class_folders
from clip_refine.evaluation.geometry import effective_rank
from clip_refine.evaluation.scores import Measured, embed_model, measure, paired_differences
from clip_refine.models.embed import Embedder
from clip_refine.results import Interval
from clip_refine.roads.build import check_enough
from clip_refine.support.console import remark

RESAMPLES = 200
_NOISE = 200  # images times points: an interval of mean R@1 seen here at 100 was 1.5 wide each way
COLLAPSED = 0.1  # of the rank, and of the norms, that the model had at first


@dataclass
class Guard:
    """Probes of a model in training, and what they decide."""

    config: RefineConfig
    embedder: Embedder  # of the model that is trained
    pairs: ImageCaptions  # held-out training pairs
    tasks: Sequence[LabelledImages]  # zero-shot tasks, and bystanders with classes
    bystanders: ImageCaptions | None = None  # with captions
    stopped: dict[str, Any] | None = None  # the last step and that of the weights kept
    _start: list[Measured] = field(default_factory=list)
    _steps: int = 0
    _warned: bool = False

    def begin(self, steps: int) -> None:
        """Measure the model as it is before the first of so many steps."""
        self._steps, self._start = steps, self._measure()

    def after(self, step: int, trainer: Any) -> bool:
        """Whether training is to stop behind this step; the weights are then those to keep."""
        guard = self.config.guard
        # the last step's weights are those that are saved, so they are probed in any case
        if guard.every is None or (step % guard.every and step != self._steps):
            return False
        trainer.hand_back()
        now = self._measure()
        self._warn_of_collapse(now)
        found = self._differences(now)
        lost = {name: d for name, d in found.items() if 100 * d.low < -guard.bound}
        if not trainer.agree(len(lost))[0]:
            trainer.keep_best(step, fmean(difference.mean for difference in found.values()))
            return False
        listed = "; ".join(
            f"{name} {100 * d.mean:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
            for name, d in lost.items()
        )
        kept = trainer.go_back() if guard.then == "roll-back" else step
        self.stopped = {"step": step, "kept": kept}
        remark(
            f"The guard stopped training after step {step}: {listed or 'another process'} may be "
            f"lower by more than the bound of {guard.bound:g}, by the interval's lower end, which "
            "more --guard.images bring nearer. The weights are those after step "
            f"{kept} (--guard.then).",
            "yellow",
        )
        return True

    def _measure(self) -> list[Measured]:
        model: Any = self.embedder.model
        modes = [(part, part.training) for part in model.modules()]
        model.eval()
        silent = replace(self.embedder, visible=False)
        found = [measure(embed_model(silent, self.pairs, self.tasks))]
        if self.bystanders is not None:
            found.append(measure(embed_model(silent, self.bystanders, ())))
        for part, training in modes:
            part.training = training
        return found

    def _differences(self, now: Sequence[Measured]) -> dict[str, Interval]:
        found = {}
        for was, side, what in zip(self._start, now, ("", "bystanders "), strict=False):
            every = paired_differences(was, side, seed=self.config.seed, resamples=RESAMPLES)
            found |= {
                f"{what}{name.removeprefix('zero_shot.')}": difference
                for name, difference in every.items()
                if name == "mean_recall@1" or name.endswith(".top1")
            }
        return found

    def _warn_of_collapse(self, now: Sequence[Measured]) -> None:
        shares = [of / was for of, was in zip(*map(_spread, (now, self._start)), strict=True)]
        if min(shares) < COLLAPSED and not self._warned:
            self._warned = True
            remark(
                "Features are collapsing: of their effective rank, image and text norms "
                f"{', '.join(f'{share:.0%}' for share in shares)} are left. Lower the learning "
                "rate, or --loss.rafa-weight.",
                "yellow",
            )


def _spread(found: Sequence[Measured]) -> tuple[float, ...]:
    pairs = found[0].features.pairs
    norms = [float(side.norm(dim=1).mean()) for side in (pairs.image_features, pairs.text_features)]
    return effective_rank(found[0].image_unit, found[0].text_unit), *norms


def build_guard(
    config: RefineConfig,
    embedder: Embedder,
    selection: ImageCaptions | None,
    tasks: Sequence[LabelledImages],
) -> Guard | None:
    """The guard that the settings ask for, if they do."""
    if config.guard.every is None:
        return None
    if config.guard.pairs is not None:
        selection = _watched(config.guard.pairs, config)
    if selection is None:
        return None
    few = Subset(selection, range(min(len(selection), config.guard.images)), "guarded pairs")
    if len(few) * config.guard.bound < _NOISE:
        remark(
            f"The guard looks at {len(few):,} images, of which a few more or less right is beyond "
            f"its bound of {config.guard.bound:g} points: it may stop for noise. Give it more "
            "(--guard.pairs), or a --guard.bound of "
            f"{math.ceil(_NOISE / len(few))}.",
            "yellow",
        )
    guard = Guard(config, embedder, few, tasks)
    if (name := config.guard.bystanders) is None:
        return guard
    place = Path(name)
    if place.is_dir() and all(inside.is_dir() for inside in place.iterdir()):
        own = read_class_folders(
            place, templates=config.evaluation.templates, links=config.data.allow_outside
        )
        guard.tasks = [*tasks, own]
    else:
        pairs = _watched(name, config)
        guard.bystanders = Subset(pairs, range(min(len(pairs), config.guard.images)), name)
    return guard


def _watched(name: str, config: RefineConfig) -> ImageCaptions:
    """Captioned images, enough of them to measure."""
    data = DataConfig(allow_outside=config.data.allow_outside)
    pairs = open_pairs(name, data, training=False)
    check_enough(pairs, "--guard.pairs or --guard.bystanders")
    return pairs
