"""What a comparison says to do, on tables made for it."""

import shlex

import pytest

from clip_refine.report.comparison import RULE, comparison_markdown, decide
from clip_refine.report.tables import power
from clip_refine.results import Comparison, Interval, LearningRateChoice, RecipeSummary, Spread
from tests.report.test_comparison import COMPARISON

ROWS = (COMPARISON.rows[0].model_copy(update={"steps": 23}),)
BASE = {"gap": 0.8, "mean_recall@1": 0.5, "zero_shot_top1": 0.6, "linear_probe": 0.7}


def line(
    recipe: str,
    *,
    rate: float | None = None,
    runs: int = 3,
    deviation: float = 0.001,
    width: float = 0.01,
    **changes: float,
) -> RecipeSummary:
    """A row that differs from `BASE` by so much, give or take `width`; r1 is mean R@1."""
    named = {"gap": "gap", "r1": "mean_recall@1", "zero": "zero_shot_top1", "probe": "linear_probe"}
    by_name = {named[name]: change for name, change in changes.items()}
    seeds = deviation if rate is not None and runs > 1 else None
    scores = {
        name: Spread(mean=value + by_name.get(name, 0.0), deviation=seeds)
        for name, value in BASE.items()
    }
    scores |= {
        name: Spread(mean=0.5, deviation=None)
        for name in ("image_to_text_recall@1", "text_to_image_recall@1", "mean_recall@10")
    }
    difference = {
        name: Interval(mean=change, low=change - width, high=change + width)
        for name in BASE
        for change in (by_name.get(name, 0.0),)
    }
    return RecipeSummary(
        recipe=recipe,
        runs=runs if rate is not None else 1,
        learning_rate=rate,
        scores=scores,
        seconds=Spread(mean=20.0, deviation=None),
        peak_memory=Spread(mean=1.0, deviation=None),
        difference=difference if recipe != "pre-trained" else {},
        pareto_best=True,
    )


def comparison(*lines: RecipeSummary) -> Comparison:
    rates = tuple(
        LearningRateChoice(
            recipe=line.recipe, chosen=line.learning_rate, tried={"1e-05": 0.5}, at_edge=False
        )
        for line in lines
        if line.learning_rate is not None
    )
    return Comparison(rows=(), summary=(line("pre-trained"), *lines), learning_rates=rates)


def test_the_smallest_gap_is_not_taken_at_any_price():
    found = decide(comparison(line("clip-refine", rate=1e-5, gap=-0.5, r1=-0.114)), "runs/x")
    assert found.taken == "pre-trained"
    assert found.answer == "Keep pre-trained: nothing compared beats it."
    assert found.price == (
        "clip-refine comes nearest: better in gap 0.300 against 0.800 (−0.500 [−0.510, −0.490]); "
        "the price is mean R@1 0.386 against 0.500 (−0.114 [−0.124, −0.104])."
    )
    assert found.command == (
        "clip-refine compare --config runs/x/config.yaml --recipes clip-refine --seeds 3 "
        "--learning-rates 3.33e-06 --save-models --out runs/x-milder"
    )


def test_what_is_better_in_something_and_worse_in_nothing_is_taken():
    found = decide(comparison(line("hycd", rate=2e-5, gap=-0.2, r1=0.03)), "runs/x")
    assert found.taken == "hycd"
    assert found.answer.startswith("Take hycd: it is better in mean R@1 0.530 against 0.500")
    assert "and gap 0.600 against 0.800" in found.answer
    assert found.price == "No other number is clearly worse; training took 20 s a seed."
    assert found.command.endswith(
        "--recipes hycd --seeds 3 --learning-rates 2e-05 --save-models --out runs/x-models"
    )


def test_a_peer_that_needs_no_training_competes():
    trained, free = line("hycd", rate=1e-5, gap=-0.2), line("mean-centring", gap=-0.7)
    found = decide(comparison(free, trained))
    assert found.taken == "mean-centring"
    assert "it needs no training" in found.price
    assert "Only the gap is better" in found.price
    assert found.command.startswith("clip-refine posthoc fit mean-centring FEATURES.safetensors")
    # but training that finds more is taken before a gap alone
    assert decide(comparison(free, line("hycd", rate=1e-5, r1=0.02))).taken == "hycd"
    # and a peer with a price is not
    costly = decide(comparison(line("nnn", r1=0.05, zero=-0.05)))
    assert costly.taken == "pre-trained"
    assert costly.command == "clip-refine posthoc fit nnn FEATURES.safetensors --out nnn"
    assert "better matters more than what is worse. Fit it on features" in costly.advice
    assert "the price is zero-shot 0.550 against 0.600" in costly.price


def test_another_model_competes_with_refining_this_one():
    models = {"models": {"large": "ViT-L-14@openai"}}
    refined, larger = line("hycd", rate=1e-5, r1=0.02), line("large: pre-trained", r1=0.1)
    found = decide(comparison(refined, larger).model_copy(update=models))
    assert found.taken == "large: pre-trained"
    assert found.advice.startswith("Start from ViT-L-14@openai instead, and search")
    assert found.command == (
        "clip-refine tune --config runs/compare/config.yaml --model.name ViT-L-14 "
        "--model.pretrained openai --out runs/compare-tuned"
    )
    better = line("large: hycd", rate=1e-5, r1=0.1, zero=0.1)
    found = decide(comparison(refined, larger, better).model_copy(update=models), "x")
    assert found.taken == "large: hycd"
    assert found.command == (
        "clip-refine compare --config x/config.yaml --recipes hycd --model.name ViT-L-14 "
        "--model.pretrained openai --seeds 3 --learning-rates 1e-05 --save-models --out x-models"
    )
    for model, words in (
        ("runs/mine", "--model.name runs/mine --model.pretrained None"),
        ("factory:mine:make", "--model.factory mine:make --model.pretrained None"),
        ("factory:mine:make@runs/a", "--model.factory mine:make --model.pretrained runs/a"),
    ):
        named = comparison(better).model_copy(update={"models": {"large": model}})
        assert words in decide(named, "x").command
    found = decide(comparison(line("large: nnn", r1=0.1)).model_copy(update=models))
    assert found.advice.startswith("Fit it on features of your own pairs with ViT-L-14@openai,")
    folder = {"models": {"a+fold+b": "runs/a+fold+b"}}
    found = decide(comparison(line("a+fold+b: hycd", rate=1e-5, r1=0.1)).model_copy(update=folder))
    assert "--recipes hycd --model.name runs/a+fold+b" in found.command
    noise = comparison(line("hycd", rate=1e-5), line("large: hycd", rate=1e-5))
    found = decide(noise.model_copy(update=models), "x")
    assert "--recipes hycd --models ViT-L-14@openai --seeds 3" in found.command


def test_noise_is_called_so():
    found = decide(comparison(line("hycd", rate=1e-5, r1=0.009), line("rafa", rate=1e-5)), "x")
    assert found.taken == "pre-trained"
    assert found.doubt == (
        "What else differs is within the noise of the evaluation images and seeds."
    )
    assert found.command == (
        "clip-refine compare --config x/config.yaml --recipes hycd rafa --seeds 3 "
        "--learning-rates auto --out x-further"
    )
    assert "more training pairs or steps, or another learning rate would be needed" in found.advice
    made = comparison(line("hycd", rate=1e-5, r1=0.009)).model_copy(update={"rows": ROWS})
    assert "--learning-rates auto --train.steps 46 --out x-further" in decide(made, "x").command
    # clear on these images, but seeds differ more: 0.02 < 2 · 0.03 / √3
    assert decide(comparison(line("hycd", rate=1e-5, r1=0.02, deviation=0.03))).taken != "hycd"
    # which a loss does not excuse
    lost = decide(comparison(line("hycd", rate=1e-5, r1=-0.02, deviation=0.03)))
    assert lost.price == "Clearly worse in something: hycd."


def test_what_it_would_take_to_see_more_is_computed():
    noise = comparison(line("hycd", rate=1e-5, r1=0.009, width=0.02), line("rafa", rate=1e-5))
    found = decide(noise.model_copy(update={"held_out": 150}))
    # the narrowest interval, ± .01: 1.43 · .01 for four cases in five, and (1.43)² · 150 images
    assert found.doubt.endswith(
        "On 150 images a mean R@1 that changes by less than 0.014 passes for noise more than one "
        "time in five; to see +0.01, about 310 are needed."
    )
    [choice, _] = noise.learning_rates
    edge = choice.model_copy(update={"at_edge": True})
    found = decide(noise.model_copy(update={"learning_rates": (edge,)}), "x")
    assert found.advice == (
        "The best learning rate of hycd is the last one tried: --learning-rates auto looks further:"
    )
    assert found.command.endswith("--learning-rates auto --out x-further")


def test_images_that_show_it_already_are_not_asked_for():
    interval = Interval(mean=0.0, low=-0.006, high=0.006)  # 1.43 · .006 is below .01
    assert power(interval, 9000) == ""
    assert power(interval, 9000, wished=0.005)


def test_one_seed_is_doubted():
    found = decide(comparison(line("hycd", rate=1e-5, r1=0.02, runs=1)))
    assert found.taken == "hycd"
    assert found.doubt.startswith("That is one training seed")
    assert "--seeds 3" in found.command


def test_the_linear_probe_counts_where_it_is_clear():
    for probe, taken in ((-0.009, "hycd"), (-0.011, "pre-trained")):  # give or take .01
        made = comparison(line("hycd", rate=1e-5, r1=0.02, probe=probe))
        assert decide(made).taken == taken


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hycd+align[loss.alpha=0]", "--recipes hycd+align --sweep loss.alpha=0 --seeds"),
        ("hycd+mean-centring+nnn", "--recipes hycd --combine hycd+mean-centring+nnn --seeds"),
        ("hycd+align+nnn", "--recipes hycd+align --combine hycd+align+nnn --seeds"),
    ],
)
def test_the_command_names_what_the_row_was(name: str, words: str):
    assert words in decide(comparison(line(name, rate=1e-5, r1=0.02))).command


def test_maps_of_stored_vectors_are_learnt_again():
    better, mixed = line("centred", rate=3e-4, r1=0.02), line("hycd", rate=3e-4, r1=0.02, gap=0.1)
    made = comparison(better).model_copy(update={"vectors": "P.npz"})
    assert decide(made, "x").command == (
        "clip-refine vectors refine P.npz --recipe centred --learning-rate 0.0003 --out x-models"
    )
    made = comparison(mixed).model_copy(update={"vectors": "P.npz"})
    assert "--recipe hycd --learning-rate 0.0001 --out x-milder" in decide(made, "x").command
    noise = line("hycd", rate=3e-4), line("rafa", rate=3e-4), line("fold")
    made = comparison(*noise).model_copy(update={"vectors": "P.npz"})
    assert decide(made, "x").command == (
        "clip-refine vectors compare P.npz --recipes hycd rafa --learning-rate 0.0003 --seeds 3 "
        "--out x-further"
    )
    assert "held-out images (--held-out)" in decide(made, "x").advice
    longer = made.model_copy(update={"rows": ROWS, "vectors_settings": {"steps": 23, "rank": 4}})
    assert "--learning-rate 0.0003 --steps 46 --rank 4 --seeds 3" in decide(longer, "x").command
    made = comparison(line("fold")).model_copy(update={"vectors": "P.npz"})
    assert decide(made, "x").command == "clip-refine vectors compare P.npz --out x-further"


def test_maps_are_learnt_again_with_what_was_set():
    settings = {"owner": "url", "batch_size": 8, "learning_rate": 0.1, "seed": 7}
    vectors = {"vectors": "P.parquet", "vectors_settings": settings}
    made = comparison(line("centred", rate=3e-4, r1=0.02)).model_copy(update=vectors)
    assert decide(made, "x").command == (
        "clip-refine vectors refine P.parquet --recipe centred --learning-rate 0.0003 "
        "--owner url --batch-size 8 --seed 7 --out x-models"
    )
    assert not decide(made.model_copy(update={"vectors": "python"}), "x").command


def test_names_from_data_are_quoted_and_stay_text():
    harm = "hycd[loss.alpha=0; rm <b>*_`|\n\n# no]"
    made = comparison(line(harm, rate=1e-5, r1=0.02))
    words = shlex.split(decide(made, "my runs/x").command)
    assert words[words.index("--sweep") + 1] == "loss.alpha=0; rm <b>*_`|\n\n# no"
    assert words[-1] == "my runs/x-models"
    first, *_ = comparison_markdown(made, "x").split("\n\n")
    assert "\\<b>\\*\\_\\`\\|" in first
    assert "\n# no" not in comparison_markdown(made, "x")


def test_markdown_begins_with_the_decision():
    text = comparison_markdown(comparison(line("hycd", rate=1e-5, r1=0.02)), "runs/x")
    assert text.startswith("Take hycd: it is better in mean R@1 0.520 against 0.500 (+0.020")
    assert text.split("\n\n")[1].startswith("    clip-refine compare --config runs/x/config.yaml")
    assert text.split("\n\n")[2] == RULE


@pytest.mark.parametrize("lines", [(), (line("nnn"),)])
def test_nothing_was_trained(lines: tuple[RecipeSummary, ...]):
    found = decide(comparison(*lines), "x")
    assert (found.taken, found.advice) == (
        "pre-trained",
        "Nothing was trained here; that may do more:",
    )
    assert found.command == "clip-refine compare --config x/config.yaml --out x-further"
