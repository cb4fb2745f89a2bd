"""One run after another on a workbench; those that are finished already are read instead."""

import re
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.markup import escape

from clip_refine import build
from clip_refine.compare_config import CompareConfig
from clip_refine.config import RefineConfig, dump_config
from clip_refine.console import console
from clip_refine.errors import TrainingError
from clip_refine.evaluation.selection import selection_score
from clip_refine.results import LearningRateChoice
from clip_refine.row_store import RowStore, StoredRow, digest
from clip_refine.saving import refinement, save_model
from clip_refine.variants import Variant
from clip_refine.workbench import Training, Workbench

UNTOUCHED = "pre-trained"


class Runs:
    """All runs of a comparison.

    Attributes:
        config: Every setting.
        bench: What the runs share.
        store: Where finished rows are.
        content: Fingerprint of model and data.
        combined: Recipe → the peers that its results are also scored behind.
    """

    def __init__(
        self,
        config: CompareConfig,
        bench: Workbench,
        store: RowStore,
        *,
        content: str,
        combined: dict[str, list[str]],
    ) -> None:
        """Nothing is run yet."""
        self.config = config
        self.bench = bench
        self.store = store
        self.content = content
        self.combined = combined
        self._trained = ""  # what the model's weights are at the moment

    def untouched(self) -> list[StoredRow]:
        """The model as it came, alone and behind every peer."""
        names = {UNTOUCHED: None, **{peer: peer for peer in self.config.peers}}
        base = self.config.refinement()

        def train() -> Training:
            self.bench.restore(base)
            self._trained = UNTOUCHED
            return Training(seed=self.config.seed)

        return self._run(names, f"{self.config.seed}", {}, train)

    def choose_learning_rate(self, variant: Variant) -> LearningRateChoice:
        """Train with the first seed at every learning rate of the grid, and take the best.

        Raises:
            TrainingError: Training failed at all of them.
        """
        grid = self.config.grid if variant.fixed_rate is None else (variant.fixed_rate,)
        tried: dict[str, float | None] = {}
        best: tuple[float, float] | None = None
        for rate in grid:
            row = self._train_variant(variant, self.config.seed, rate)[0].row
            score = row.selection if row else None
            tried[f"{rate:g}"] = score
            if score is not None and (best is None or score > best[1]):
                best = rate, score
        if best is None:
            raise TrainingError(
                f"{variant.name}: training failed at every learning rate tried "
                f"({', '.join(tried)}). Pass lower --learning-rates."
            )
        at_edge = len(grid) > 1 and best[0] in (grid[0], grid[-1])
        choice = LearningRateChoice(
            recipe=variant.name, chosen=best[0], tried=tried, at_edge=at_edge
        )
        if len(grid) > 1:
            edge = ", at the edge of the grid" if at_edge else ""
            _say(f"{variant.name}: learning rate {best[0]:g} of {', '.join(tried)}{edge}")
        return choice

    def chosen(self, variant: Variant, seed: int, learning_rate: float) -> list[StoredRow]:
        """The rows of a recipe with one seed at its learning rate; saves the model if asked to.

        Raises:
            TrainingError: Training failed.
        """
        stored = self._train_variant(variant, seed, learning_rate)
        if stored[0].row is None:
            raise TrainingError(
                f"{variant.name}: training failed with seed {seed} at learning rate "
                f"{learning_rate:g}. Pass lower --learning-rates."
            )
        if self.config.save_models:
            self._save_model(variant, seed, learning_rate)
        return stored

    def _train_variant(self, variant: Variant, seed: int, rate: float) -> list[StoredRow]:
        names: dict[str, str | None] = {variant.name: None}
        names |= {f"{variant.name}+{peer}": peer for peer in self.combined.get(variant.recipe, [])}
        settings = _plain(variant.at(seed=seed, learning_rate=rate)) | {
            "fraction": variant.fraction
        }
        return self._run(
            names, f"{seed}-{rate!r}", settings, partial(self._train, variant, seed, rate)
        )

    def _train(self, variant: Variant, seed: int, rate: float) -> Training:
        self._trained = ""  # until it has ended well
        config = variant.at(seed=seed, learning_rate=rate)
        training = self.bench.train(config, fraction=variant.fraction)
        self._trained = f"{variant.name}-{seed}-{rate!r}"
        return training

    def _run(
        self,
        names: dict[str, str | None],
        label: str,
        settings: dict[str, Any],
        train: Callable[[], Training],
    ) -> list[StoredRow]:
        """The rows of one training: read where all are there, else made and written."""
        depends_on = {
            name: digest({"content": self.content, "settings": settings, "peer": peer})
            for name, peer in names.items()
        }
        read = [self.store.read(f"{name}-{label}", key) for name, key in depends_on.items()]
        found = [stored for stored in read if stored]
        if len(found) == len(names):
            return found
        made = self._make(names, depends_on, train)
        for name, stored in made.items():
            self.store.write(f"{name}-{label}", stored)
            _say(_describe(name, label, stored))
        return list(made.values())

    def _make(
        self,
        names: dict[str, str | None],
        depends_on: dict[str, str],
        train: Callable[[], Training],
    ) -> dict[str, StoredRow]:
        try:
            training = train()
        except TrainingError:
            # a learning rate that is too high is a result, too
            return {
                name: StoredRow(depends_on=key, row=None, resampled={})
                for name, key in depends_on.items()
            }
        features, selection = self.bench.embed()
        made = {}
        for name, peer in names.items():
            scored, at = features, training
            if peer:
                at, scored = self.bench.apply_peer(peer, training, features, selection)
            score = None if peer else selection_score(selection)
            row, resampled = self.bench.score(name, at, scored, selection=score)
            made[name] = StoredRow.model_validate(
                {"depends_on": depends_on[name], "row": row, "resampled": resampled}
            )
        return made

    def _save_model(self, variant: Variant, seed: int, rate: float) -> None:
        """Save the model once more only if it is not there with these settings."""
        name = re.sub(r"[^\w.=+-]+", "_", variant.name)
        folder = self.store.folder / "models" / f"{name}-{seed}"
        config = variant.at(seed=seed, learning_rate=rate)
        settings = dump_config(config)
        note = folder / "config.yaml"
        if note.is_file() and note.read_text(encoding="utf-8") == settings:
            return
        if self._trained != f"{variant.name}-{seed}-{rate!r}":
            self._train(variant, seed, rate)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        pairs = self.bench.part(variant.fraction)
        steps = build.count_steps(config.train, pairs, 1)
        made = refinement(config, pairs, self.bench.held_out, steps=steps)
        save_model(self.bench.encoder, folder, made)
        note.write_text(settings, encoding="utf-8")


def _plain(config: RefineConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"out", "log", "report", "overwrite"})


def _describe(name: str, label: str, stored: StoredRow) -> str:
    if stored.row is None:
        return f"{name} ({label}): training failed, the loss or its gradient was not finite"
    row, numbers = stored.row, stored.row.headline
    rate = "" if row.learning_rate is None else f", learning rate {row.learning_rate:g}"
    zero_shot = f", zero-shot {numbers['zero_shot_top1']:.3f}" if row.zero_shot else ""
    return (
        f"{name}, seed {row.seed}{rate}: gap {numbers['gap']:.3f}, mean R@1 "
        f"{numbers['mean_recall@1']:.3f}{zero_shot}, {row.seconds:.1f} s"
    )


def _say(text: str) -> None:
    console.print(escape(text), soft_wrap=True)
