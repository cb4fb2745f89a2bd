"""`tune`: recipe, learning rate and weights that fit a model and its pairs, searched by Optuna.

Successive halving over parts of the training pairs; scores are those of the selection pairs, so
that the held-out ones stay unseen. Every run is one of `compare`, kept in the folder and read when
the search goes on; the sampler is seeded, so that it then asks for the same ones.
"""

import math
from typing import Any

from clip_refine.config import dump_config, override
from clip_refine.config.runs import TuneConfig
from clip_refine.data import LabelledImages
from clip_refine.data.pairs import GivenPairs
from clip_refine.models import DualEncoder
from clip_refine.roads.compare import Runs, open_runs
from clip_refine.roads.plan import Variant, list_variants
from clip_refine.support.errors import ConfigError, TrainingError
from clip_refine.support.folder import alone, write_file

PARTS = (0.25, 0.5, 1.0)  # of the training pairs, one after another for those that do well
SCALED = ("rafa_weight", "anchor_weight")


def tune(
    config: TuneConfig,
    *,
    model: DualEncoder | None = None,
    train_pairs: GivenPairs | None = None,
    held_out: GivenPairs | None = None,
    tasks: list[LabelledImages] | None = None,
) -> dict[str, Any]:
    """Search settings, and write the best as `tuned.yaml` to `config.out` for `refine --config`.

    Returns `recipe`, `learning_rate`, `loss` and `selection`, the mean recall on selection pairs,
    of the best; `untouched`, that of the model as it came; and how many were `tried`.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("tune needs Optuna: pip install 'clip-refine[tune]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    variants = {
        v.name: v for v in list_variants(config.refinement(), recipes=config.recipes, sweeps=())
    }
    with alone(config.out):
        # halving leaves a half of them after each part
        expected = config.trials * sum(part / 2**i for i, part in enumerate(PARTS))
        runs = open_runs(config, model, train_pairs, held_out, tasks, trainings=expected)
        parts = [part for part in PARTS if part * len(runs.training) >= config.train.batch_size]
        # the bar counts all parts of every trial, less what halving leaves out
        runs.bar.expect(config.trials * len(parts) - math.ceil(expected))
        with runs.bar.progress:
            untouched = runs.untouched()[0].row

            def search(trial: Any) -> float:
                variant = _suggest(trial, variants, config)
                rate = trial.suggest_float("learning_rate", *config.rates, log=True)
                value = float("-inf")
                for step, part in enumerate(parts, start=1):
                    value = _value(runs, variant, rate, part, untouched, config)
                    trial.report(value, step)
                    if trial.should_prune():
                        runs.bar.expect(step - len(parts))
                        raise optuna.TrialPruned
                trial.set_user_attr("loss", variant.config.loss.model_dump())
                return value

            study = optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=config.seed),
                pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
            )
            study.optimize(search, n_trials=config.trials)
        runs.restore(config.refinement())
        # trials that were ended early have a value, too: that of a part of the pairs
        complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        whole = [t for t in complete if t.value is not None and t.value > REFUSED]
        if not whole:
            raise TrainingError(
                f"{config.out}: none of {config.trials} trials kept zero-shot within "
                f"{config.guard:g}, or all failed. Pass more --trials, lower --rates or a larger "
                "--guard."
            )
        best = max(whole, key=lambda t: t.value or 0.0)
        recipe, rate = best.params["recipe"], float(f"{best.params['learning_rate']:.3g}")
        loss = best.user_attrs["loss"]
        tuned = override(
            variants[recipe].config, loss=loss, train={"learning_rate": rate}, seed=config.seed
        )
        write_file(config.out / "tuned.yaml", dump_config(tuned))
    return {
        "recipe": recipe,
        "learning_rate": rate,
        "loss": {name: loss[name] for name in SCALED if loss[name]},
        "selection": best.value,
        "untouched": untouched and untouched.selection,
        "tried": len(study.trials),
    }


REFUSED = -1.0  # below every score: a run that failed, or that the guard forbids


def _suggest(trial: Any, variants: dict[str, Variant], config: TuneConfig) -> Variant:
    """A recipe, with its own weights of RaFA and the anchor times a factor."""
    recipe = trial.suggest_categorical("recipe", list(variants))
    variant, changed = variants[recipe], {}
    for name in SCALED:
        own = getattr(variant.config.loss, name)
        if own:
            factor = trial.suggest_float(f"{recipe} {name}", *config.weights, log=True)
            changed[name] = float(f"{own * factor:.3g}")
    label = ",".join(f"{name}={value:g}" for name, value in changed.items())
    return Variant(f"{recipe}[{label}]", recipe, override(variant.config, loss=changed))


def _value(
    runs: Runs, variant: Variant, rate: float, part: float, untouched: Any, config: TuneConfig
) -> float:
    """The selection score of a run; `REFUSED` where zero-shot falls by more than the guard."""
    named = Variant(f"{variant.name} {part:g}", variant.recipe, variant.config, fraction=part)
    row = runs.tried(named, config.seed, float(f"{rate:.3g}"))
    if row is None or row.selection is None:
        return REFUSED
    was, now = (r.headline.get("zero_shot_top1", 0.0) for r in (untouched, row))
    return REFUSED if now < was - config.guard else row.selection
