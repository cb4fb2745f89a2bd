"""`tune`: recipe, learning rate and weights that fit a model and its pairs, searched by Optuna.

Successive halving over parts of the training pairs; scores are those of the selection pairs, so
that the held-out ones stay unseen. Every run is one of `compare`, kept in the folder and read when
the search goes on; the sampler is seeded, so that it then asks for the same ones.
"""

import math
from collections.abc import Sequence
from typing import Any

from clip_refine.config import dump_config, override
from clip_refine.config.runs import TuneConfig
from clip_refine.data import LabelledImages
from clip_refine.data.pairs import GivenPairs
from clip_refine.models import DualEncoder
from clip_refine.results import Trial, Tuned
from clip_refine.roads.compare import FinishedRun, Runs, open_runs
from clip_refine.roads.plan import Variant, list_variants
from clip_refine.support.console import remark
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
) -> Tuned:
    """Search settings, and write the best as `tuned.yaml` to `config.out` for `refine --config`.

    Args:
        config: Every setting.
        model: Used instead of loading `config.model`; has its own weights back in the end.
        train_pairs: In place of `config.data.train`, which is then left out.
        held_out: In place of `config.data.val`, or of a part of the training pairs.
        tasks: Used instead of opening `config.evaluation.zero_shot`.

    Returns:
        The best settings, and all that were tried.

    Raises:
        ClipRefineError: Bad settings, data or model, an output folder that holds something else,
            no Optuna, or nothing that could be trained within the guard.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("tune needs Optuna: pip install 'clip-refine[tune]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    variants = {
        v.name: v for v in list_variants(config.refinement(), recipes=config.recipes, sweeps=())
    }
    _say_the_guard(config, tasks)
    with alone(config.out):
        # halving leaves a half of them after each part
        expected = config.trials * sum(part / 2**i for i, part in enumerate(PARTS))
        given = (model, train_pairs, held_out, tasks)
        runs = open_runs(config, *given, trainings=expected, bystanders=config.bystanders)
        parts = [part for part in PARTS if part * len(runs.training) >= config.train.batch_size]
        # the bar counts all parts of every trial, less what halving leaves out
        runs.bar.expect(config.trials * len(parts) - math.ceil(expected))
        with runs.bar.progress:
            untouched: Any = runs.untouched()[0]  # which has a row

            def search(trial: Any) -> float:
                variant, weights = _suggest(trial, variants, config)
                trial.set_user_attr("weights", weights)
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
                f"{config.out}: none of {config.trials} trials kept what is guarded within "
                f"{config.guard:g}, or all failed. Pass more --trials, lower --rates or a larger "
                "--guard."
            )
        best: Any = max(whole, key=lambda t: t.value or 0.0)
        recipe, rate = best.params["recipe"], float(f"{best.params['learning_rate']:.3g}")
        loss = best.user_attrs["loss"]
        tuned = override(
            variants[recipe].config, loss=loss, train={"learning_rate": rate}, seed=config.seed
        )
        write_file(config.out / "tuned.yaml", dump_config(tuned))
        runs.store.complete()
    return Tuned(
        recipe=recipe,
        learning_rate=rate,
        loss={name: loss[name] for name in SCALED if loss[name]},
        selection=best.value,
        untouched=untouched.row.selection,
        trials=tuple(_tried(trial, parts) for trial in study.trials),
    )


REFUSED = -1.0  # below every score: a run that failed, or that the guard forbids


def _say_the_guard(config: TuneConfig, tasks: list[LabelledImages] | None) -> None:
    """What a setting may not lose, or that nothing is watched."""
    named = config.evaluation.zero_shot if tasks is None else [task.name for task in tasks]
    if watched := [*named, *filter(None, [config.bystanders])]:
        remark(
            f"Guarded by {', '.join(watched)}: what loses more than {config.guard:g} of zero-shot "
            "top-1, or of mean R@1 on bystanders with captions, is refused."
        )
    else:
        remark(
            "Nothing guards this search: what the model forgets is not seen. Give --bystanders, "
            "images that it shall not forget, or --evaluation.zero-shot.",
            "yellow",
        )


def _tried(trial: Any, parts: Sequence[float]) -> Trial:
    """What became of one, with the last of the parts that it came to."""
    step, value = max(trial.intermediate_values.items())
    return Trial(
        recipe=trial.params["recipe"],
        learning_rate=float(f"{trial.params['learning_rate']:.3g}"),
        loss=trial.user_attrs["weights"],
        part=parts[step - 1],
        selection=value if value > REFUSED else None,
    )


def _suggest(
    trial: Any, variants: dict[str, Variant], config: TuneConfig
) -> tuple[Variant, dict[str, float]]:
    """A recipe, with its own weights of RaFA and the anchor times a factor; and these weights."""
    recipe = trial.suggest_categorical("recipe", list(variants))
    variant, changed = variants[recipe], {}
    for name in SCALED:
        own = getattr(variant.config.loss, name)
        if own:
            factor = trial.suggest_float(f"{recipe} {name}", *config.weights, log=True)
            changed[name] = float(f"{own * factor:.3g}")
    label = ",".join(f"{name}={value:g}" for name, value in changed.items())
    named = Variant(f"{recipe}[{label}]", recipe, override(variant.config, loss=changed))
    return named, changed


def _value(
    runs: Runs,
    variant: Variant,
    rate: float,
    part: float,
    untouched: FinishedRun,
    config: TuneConfig,
) -> float:
    """The selection score of a run; `REFUSED` where it failed or lost more than the guard."""
    named = Variant(f"{variant.name} {part:g}", variant.recipe, variant.config, fraction=part)
    run = runs.tried(named, config.seed, float(f"{rate:.3g}"))
    if run.row is None or run.row.selection is None:
        return REFUSED
    was, now = _guarded(untouched), _guarded(run)
    lost = any(now[name] < before - config.guard for name, before in was.items())
    return REFUSED if lost else run.row.selection


def _guarded(run: FinishedRun) -> dict[str, float]:
    """Top-1 of every zero-shot task, and mean R@1 of the bystanders."""
    found = {name: task["top1"] for name, task in run.row.zero_shot.items()} if run.row else {}
    return found if run.bystanders is None else {**found, "": run.bystanders}
