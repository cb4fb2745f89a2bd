"""The settings of `clip-refine compare`: those of a refinement, and what is to be compared."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from clip_refine.config import (
    Count,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    Positive,
    PriorConfig,
    RefineConfig,
    SettingsGroup,
    TrainConfig,
)

GRID = (0.3, 1.0, 3.0)
"""The learning rates tried by default, as multiples of `train.learning_rate`."""


class CompareConfig(SettingsGroup):
    """Everything one run of `clip-refine compare` depends on."""

    recipes: tuple[str, ...] = ("clip-refine", "contrastive", "contrastive+anchor")
    """Recipes to train, as for `refine --recipe`; the untouched model always stands beside."""
    seeds: Count = 3
    """Runs of each recipe, with `seed`, `seed` + 1, ... for order, captions and references."""
    peers: tuple[str, ...] = (
        "mean-centring",
        "distribution-normalisation",
        "nnn",
        "modality-shift",
    )
    """Training-free peers on the untouched model; several in order as in mean-centring+nnn."""
    combine: tuple[str, ...] = ()
    """Peers on a recipe's result, as in clip-refine+mean-centring."""
    sweep: tuple[str, ...] = ()
    """Ablations: every recipe once for each value, as in "loss.alpha=0,0.25,0.5". Any setting of
    train, loss and prior, and data.fraction for a part of the pairs; several one at a time."""
    learning_rates: tuple[Positive, ...] = ()
    """Tried for every recipe with the first seed, the best on held-out training pairs is taken.
    Without it: 0.3, 1 and 3 times train.learning-rate. One value: no choice."""
    selection_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the training images (at least 100) that no recipe is trained on: peers are fitted
    and learning rates chosen there."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    prior: PriorConfig = PriorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resamples: Count = 1000
    """Bootstrap resamples of the held-out images."""
    out: Path = Path("runs/compare")
    """Folder for the results; a comparison that stopped there goes on."""
    cache: Path | None = None
    """Folder for the teacher's features, and for pixels where data.cache-folder names none.
    Without it: $XDG_CACHE_HOME/clip-refine."""
    save_models: bool = False
    """Keep every refined model in `out`/models."""
    report: bool = True
    """Write report.html; `clip-refine report` makes it again."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 42
    """First seed; also of the held-out and the selection split and of the bootstrap."""
    overwrite: bool = False
    """Start again where `out` exists."""

    @property
    def grid(self) -> tuple[float, ...]:
        """The learning rates that every recipe tries, rising."""
        default = tuple(float(f"{factor * self.train.learning_rate:.6g}") for factor in GRID)
        return tuple(sorted(set(self.learning_rates or default)))

    @property
    def run_seeds(self) -> range:
        """One seed a run."""
        return range(self.seed, self.seed + self.seeds)

    def refinement(self) -> RefineConfig:
        """The settings that all runs share, as those of a refinement."""
        groups = ("model", "data", "train", "loss", "prior", "evaluation", "seed", "out")
        return RefineConfig(**{name: getattr(self, name) for name in groups})


RUNS = frozenset(
    {"recipes", "seeds", "peers", "combine", "sweep", "learning_rates", "out", "cache"}
    | {"save_models", "report", "overwrite"}
)
"""Settings that say which runs there are or where they go; they do not change a run's numbers."""
