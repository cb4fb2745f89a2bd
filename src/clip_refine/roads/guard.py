"""A watch over a training: what the model can do, measured on a few images every few steps."""

import math
from collections.abc import Mapping, Sequence
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
from clip_refine.results.metrics import metric
from clip_refine.roads import build
from clip_refine.support.console import remark
from clip_refine.support.errors import TrainingError
from clip_refine.train.loop import EXPLODED

RESAMPLES = 200
_NOISE = 200  # images times points: an interval of mean R@1 seen here at 100 was 1.5 wide each way
COLLAPSED = 0.1  # of the rank above 1, and of the norms, that the model had at first


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
    _collapsed: bool = False  # which is said once

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
        self._collapsed = self._collapsed or warn_of_collapse(spread_left(self._start[0], now[0]))
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
        for was, side, what in zip(self._start, now, ("", "bystanders' "), strict=False):
            every = paired_differences(was, side, seed=self.config.seed, resamples=RESAMPLES)
            found |= {
                f"{what}{_called(name)}": difference
                for name, difference in every.items()
                if name == "mean_recall@1" or name.endswith(".top1")
            }
        return found


def _called(name: str) -> str:
    """What a watched score is called in tables."""
    task = name.removeprefix("zero_shot.").removesuffix(".top1")
    return metric(name).heading if task == name else f"zero-shot top-1 of {task}"


def check_trained(was: Measured, now: Measured) -> None:
    """Say where a trained model's features collapsed, and stop before what exploded is saved.

    Training looks at norms before each step, so what the last one did is seen here.

    Raises:
        TrainingError: A norm is more than `EXPLODED` times what it was.
    """
    shares = spread_left(was, now)
    norms = [shares["image norm"], shares["text norm"]]
    if not max(norms) <= EXPLODED:
        grown = " and ".join(f"{share:.3g}" for share in norms)
        raise TrainingError(
            f"the norms of images and captions are {grown} times what they were: training "
            "destroyed the model, which is not saved. Try a lower --train.learning-rate."
        )
    warn_of_collapse(shares)


def warn_of_collapse(shares: Mapping[str, float]) -> bool:
    """Whether there is something to say, which is said."""
    left = [f"{share:.0%} of the {name}" for name, share in shares.items() if share < COLLAPSED]
    if left:
        remark(
            f"Features are collapsing: {', '.join(left)} is left. Lower the learning rate, "
            "or --loss.rafa-weight.",
            "yellow",
        )
    return bool(left)


def spread_left(was: Measured, now: Measured) -> dict[str, float]:
    """What is left of what features lose when they collapse, as shares.

    The effective rank, above the 1 of a single point, falls where they flatten; their variance
    about each modality's mean where they draw together, which leaves the rank as it was.
    """
    before, after = _spread(was), _spread(now)
    return {name: after[name] / max(of, 1e-12) for name, of in before.items()}


def _spread(found: Measured) -> dict[str, float]:
    pairs = found.features.pairs
    spread = {"effective rank": effective_rank(found.image_unit, found.text_unit) - 1}
    for name, unit in (("image", found.image_unit), ("text", found.text_unit)):
        spread[f"{name} variance"] = 1 - float(unit.mean(dim=0).square().sum())
    for name, side in (("image", pairs.image_features), ("text", pairs.text_features)):
        spread[f"{name} norm"] = float(side.norm(dim=1).mean())
    return spread


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
    own, bystanders = open_bystanders(config.guard.bystanders, config)
    tasks = [*tasks, *own]
    build.check_names(tasks)
    return Guard(config, embedder, few, tasks, bystanders)


def open_bystanders(
    name: str | None, config: RefineConfig
) -> tuple[list[LabelledImages], ImageCaptions | None]:
    """Images that a model shall not forget: a zero-shot task of classes, or with captions."""
    if name is None:
        return [], None
    place = Path(name)
    if place.is_dir() and all(inside.is_dir() for inside in place.iterdir()):
        of_classes = {"templates": config.evaluation.templates, "links": config.data.allow_outside}
        return [read_class_folders(place, **of_classes)], None
    pairs = _watched(name, config)
    return [], Subset(pairs, range(min(len(pairs), config.guard.images)), name)


def _watched(name: str, config: RefineConfig) -> ImageCaptions:
    """Captioned images, enough of them to measure."""
    data = DataConfig(allow_outside=config.data.allow_outside)
    pairs = open_pairs(name, data, training=False)
    build.check_enough(pairs, "--guard.pairs or --guard.bystanders (tune: --bystanders)")
    return pairs
