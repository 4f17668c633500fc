"""Definitions of the ten studies: for each one its question, its treatments, its table and its picture.

Depends on torch, matplotlib, amapo_loss, and on evaluation.py, harness.py, report.py and sweep.py.

To add a study, define a `Study` here and add it to `STUDIES` at the end of this file. The command
`python -m benchmarks.studies` then offers it. The building blocks of tables and pictures are in report.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from amapo_loss import AdaptiveMargin
from benchmarks.studies.arithmetic import MAX_PROMPT, MAX_SOLUTION
from benchmarks.studies.evaluation import BANDS
from benchmarks.studies.harness import Metrics, Treatment
from benchmarks.studies.report import (
    SMALL_FONT,
    Column,
    metric_at,
    plot_means,
    plot_seeds,
    seed_values,
    summed_curve,
    treatment_names,
)
from benchmarks.studies.sweep import IMITATION, Run


@dataclass(frozen=True)
class Study:
    """A question, the treatments that answer it, and how the answer is presented."""

    question: str
    treatments: dict[str, Treatment]
    baseline: str  # the treatment that all others are compared with, seed by seed
    columns: dict[str, Column]  # the columns of the table, by their headings
    draw: Callable[[Figure, list[Run]], None]  # draws the runs into an empty figure
    remark: Callable[[list[Run]], str] = lambda runs: ""  # returns a text to print below the table
    generated_settings: dict[str, Any] = field(default_factory=dict)  # what generated pairs of this study need
    generated_defaults: dict[str, Any] = field(default_factory=dict)  # for them, in place of those of the scale
    other_baselines: dict[str, str] = field(default_factory=dict)  # for treatments that are compared with another one
    compared: str = "held out"  # the metric that is compared with the baseline, if the runs have it
    needs_curves: bool = False  # whether `draw` or `columns` use the training curves, which make the JSON far larger
    picture_height: float = 4.2  # inches
    legend_share: float = 0.0  # share of the picture's height that is kept free for a legend at the bottom


def mean_style_accuracy(*keys: str) -> Column:
    """Return a column with the accuracy of RM-Bench at these keys, averaged over the RM-Bench files."""

    def average(metrics: Metrics) -> float | None:
        accuracies = [metric_at(*keys)(of_file) for of_file in metrics["styles"].values()]
        found = [accuracy for accuracy in accuracies if accuracy is not None]
        return sum(found) / len(found) if found else None

    return average


# Columns that several studies share.
DIFFICULTIES = ("easy", "normal", "hard")
VALIDATION: dict[str, Column] = {"validation": metric_at("validation")}
HELD_OUT: dict[str, Column] = {"held out": metric_at("held out")}
CHOSEN_LOGP = metric_at("chosen log-prob")
BY_CONFIDENCE: dict[str, Column] = {f"confidence {band}": metric_at("bands", band) for band in BANDS}
RM_BENCH: dict[str, Column] = {f"RM-Bench {name}": mean_style_accuracy(name) for name in DIFFICULTIES}
WEIGHTS: dict[str, Column] = {f"weight {ranked}": metric_at(f"weight {ranked}") for ranked in ("correct", "misranked")}

# Axis labels that several pictures share.
ACCURACY = "share of held-out pairs ranked correctly"
WEIGHT = "mean gradient weight during training"
WEIGHT_ERROR = "relative error of the gradient weights"

# Treatments that several studies share.
SIMPO, AMAPO, AMAPO_RELEASED = "SimPO, gamma 0", "AMaPO, paper", "AMaPO, released"
GAMMAS = {f"SimPO, gamma {gamma:g}": gamma for gamma in (0.5, 1.0, 2.0)}
LOSSES = {
    "DPO": Treatment("dpo", beta=0.1),
    SIMPO: Treatment("simpo"),
    **{name: Treatment("simpo", gamma=gamma) for name, gamma in GAMMAS.items()},
    AMAPO: Treatment(),
    AMAPO_RELEASED: Treatment(margin=AdaptiveMargin(formula="released")),
}


def draw_accuracy(figure: Figure, runs: list[Run], baseline: str) -> None:
    """Draw the accuracy by the loss's own score, for any treatments; `Study.draw` needs all of a study's."""
    plot_seeds(
        figure.subplots(), runs, metric_at("held out, own score"), f"{ACCURACY} by the loss's own score", baseline
    )


# 1. Ranking accuracy. All losses have the same learning rate.


def best_simpo(runs: list[Run]) -> str:
    """Return the SimPO treatment with gamma above 0 that has the highest accuracy on the validation pairs."""
    return max(GAMMAS, key=lambda name: seed_values(runs, name, metric_at("validation")).mean().item())


def draw_ranking(figure: Figure, runs: list[Run]) -> None:
    """Draw accuracy and log-prob of the held-out pairs, and the accuracy on RM-Bench's three difficulties.

    The accuracies are by the loss's own score, which for all losses but DPO ranks as the average log-prob does.
    """
    accuracy_axes, logp_axes, style_axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    own_score = metric_at("held out, own score")
    plot_seeds(accuracy_axes, runs, own_score, "held-out pairs ranked correctly\nby the loss's own score", SIMPO)
    plot_seeds(logp_axes, runs, CHOSEN_LOGP, "log-prob of their chosen\nanswers, nats per token", SIMPO)
    logp_axes.set_yticks([])
    logp_axes.locator_params(axis="x", nbins=4)
    accuracy_axes.set_title(accuracy_axes.get_title(), loc="left", fontsize=SMALL_FONT)  # it spans both panels
    for axes in (accuracy_axes, logp_axes):
        axes.set_title("")
    for name in (IMITATION, "DPO", SIMPO, best_simpo(runs), AMAPO, AMAPO_RELEASED):
        columns = [mean_style_accuracy("own score", difficulty) for difficulty in DIFFICULTIES]
        accuracies = [seed_values(runs, name, column) for column in columns]
        if all(len(by_seed) for by_seed in accuracies):
            style_axes.plot([by_seed.mean().item() for by_seed in accuracies], "o-", label=name)
    style_axes.set_xticks(
        range(len(DIFFICULTIES)), ["easy:\nchosen is richer", "normal:\nsame style", "hard:\nrejected is richer"]
    )
    style_axes.set(xlabel="style of the answers (RM-Bench)", ylabel="share of prompts where\nchosen outscores rejected")
    style_axes.set_title("by the loss's own score, mean over the seeds", fontsize=SMALL_FONT)
    if style_axes.lines:
        style_axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=SMALL_FONT)


RANKING = Study(
    question="Does AMaPO rank better than DPO and SimPO?",
    treatments=LOSSES,
    baseline=SIMPO,
    columns={
        **VALIDATION,
        **HELD_OUT,
        "held out, own score": metric_at("held out, own score"),
        "held out, change": metric_at("held out, change"),
        **BY_CONFIDENCE,
        **RM_BENCH,
        "chosen log-prob": CHOSEN_LOGP,
    },
    compared="held out, own score",
    draw=draw_ranking,
    remark=lambda runs: f"best SimPO margin on the validation pairs: {best_simpo(runs)}",
)


# 2. Ablation of the parts of AMaPO's margin.

ABLATIONS = {
    AMAPO: LOSSES[AMAPO],
    "no Z-normalization": Treatment(margin=AdaptiveMargin(normalize=False)),
    "no exponential scaling": Treatment(margin=AdaptiveMargin(scaling="linear")),
    "no zero-clipping": Treatment(margin=AdaptiveMargin(clip=False)),
    "no normalization, no exponential": Treatment(margin=AdaptiveMargin(normalize=False, scaling="linear")),
    SIMPO: LOSSES[SIMPO],  # has no margin at all
}


def draw_ablation(figure: Figure, runs: list[Run]) -> None:
    """Draw the accuracy on the held-out pairs, and the gradient weights of correct and misranked pairs."""
    accuracy_axes, weight_axes = figure.subplots(1, 2, sharey=True)
    plot_seeds(accuracy_axes, runs, metric_at("held out"), ACCURACY, AMAPO)
    for ranked, color in (("correct", "C2"), ("misranked", "C3")):
        for row, name in enumerate(treatment_names(runs)):
            weights = seed_values(runs, name, metric_at(f"weight {ranked}"))
            label = f"{ranked} pairs" if name == AMAPO else None  # one legend entry per color
            weight_axes.plot(weights, [row] * len(weights), "o", color=color, alpha=0.6, label=label)
    weight_axes.set_xlabel(WEIGHT)
    weight_axes.set_title("dot: one seed", fontsize=SMALL_FONT)
    weight_axes.legend(fontsize=SMALL_FONT)


ABLATION = Study(
    question="What does each part of the margin do?",
    treatments=ABLATIONS,
    baseline=AMAPO,
    columns=HELD_OUT | BY_CONFIDENCE | WEIGHTS,
    draw=draw_ablation,
)


# 3. Batch size. All treatments have the same optimizer batch. They differ in the pairs that the statistics come from.

BATCH_PAIRS = 128
WHOLE_BATCH = f"{BATCH_PAIRS} pairs, exact"
MICRO_BATCHES = {pairs: f"{pairs} pairs" for pairs in (2, 4, 8, 16, 32, 64)}
WINDOWS = {pairs: f"{pairs} pairs, window" for pairs in (2, 8, 32)}
BATCH_SIZES = {
    WHOLE_BATCH: Treatment(batch_size=BATCH_PAIRS),
    **{name: Treatment(batch_size=BATCH_PAIRS, micro_batch=pairs) for pairs, name in MICRO_BATCHES.items()},
    **{
        name: Treatment(batch_size=BATCH_PAIRS, micro_batch=pairs, estimator="ScoreWindow")
        for pairs, name in WINDOWS.items()
    },
}


def draw_batch_size(figure: Figure, runs: list[Run]) -> None:
    """Draw the accuracy and the error of the gradient weights over the size of the micro-batch."""
    accuracy_axes, error_axes = figure.subplots(1, 2)
    points = MICRO_BATCHES | {BATCH_PAIRS: WHOLE_BATCH}
    for axes, metric, label in (
        (accuracy_axes, "held out", ACCURACY),
        (error_axes, "gradient error", WEIGHT_ERROR),
    ):
        plot_means(axes, runs, points, metric_at(metric), "the micro-batch itself")
        plot_means(axes, runs, WINDOWS, metric_at(metric), f"the last {BATCH_PAIRS} pairs (ScoreWindow)")
        axes.set(xscale="log", xlabel="pairs per micro-batch", ylabel=label)
        axes.set_xticks(list(points), [str(pairs) for pairs in points], minor=False)
        axes.minorticks_off()
    # One legend is enough for both, and on the left it would hide error bars.
    error_axes.legend(title="statistics are taken over", fontsize=SMALL_FONT, title_fontsize=SMALL_FONT)


BATCH_SIZE = Study(
    question="How many pairs do the statistics need?",
    treatments=BATCH_SIZES,
    baseline=WHOLE_BATCH,
    columns=HELD_OUT | {"gradient error": metric_at("gradient error")} | WEIGHTS,
    draw=draw_batch_size,
)


# 4. Gradient flow. The four cases of the paper's Table 1 say which pairs the gradient comes from.

FLOW_TREATMENTS = {name: LOSSES[name] for name in ("DPO", SIMPO, "SimPO, gamma 1", AMAPO, AMAPO_RELEASED)}
# The labels say what the margin does to the pairs of a case, in our reading of that table.
CASES = {
    "misranked, margin": "misranked, margin > 0: amplified",
    "misranked, no margin": "misranked, margin <= 0: underfitted",
    "correct, margin": "correct, margin > 0: overfitted",
    "correct, no margin": "correct, margin <= 0: not amplified",
}


def gradient_norm(ranked: str, only_at: int | None = None) -> Column:
    """Return a column with the gradient norm that the pairs of one kind contribute.

    Args:
        ranked: "correct" or "misranked".
        only_at: the step to take the norm of; the default averages over all steps that were measured.
    """

    def average(metrics: Metrics) -> float | None:
        norms = [
            correct if ranked == "correct" else misranked
            for step, correct, misranked, _ in metrics.get("probes", [])
            if only_at in (None, step)
        ]
        return sum(norms) / len(norms) if norms else None

    return average


def case_share(case: str, quantity: str) -> Column:
    """Return a column with the share that one of the four `CASES` has in all of training.

    Args:
        case: a key of `CASES`.
        quantity: "share" for its share of the pairs, "spent" for its share of the gradient weight.
    """

    def share(metrics: Metrics) -> float | None:
        if "curves" not in metrics:
            return None
        sums = {name: float(sum(metrics["curves"][f"{quantity}, {name}"])) for name in CASES}
        return sums[case] / sum(sums.values())

    return share


def mean_weight_curve(runs: list[Run], treatment: str, ranked: str) -> Tensor:
    """Return the mean gradient weight of the correct or of the misranked pairs over training, [steps].

    It is NaN where no seed has such a pair.
    """
    cases = [case for case in CASES if case.startswith(ranked)]
    weight_sum = summed_curve(runs, treatment, *(f"spent, {case}" for case in cases))
    return weight_sum / summed_curve(runs, treatment, *(f"share, {case}" for case in cases))


def draw_gradient_flow(figure: Figure, runs: list[Run]) -> None:
    """Draw gradient weights and norms over training in the upper row, and the four cases in the lower row."""
    (weight_axes, norm_axes), (pair_share_axes, weight_share_axes) = figure.subplots(2, 2)
    steps = sorted({step for run in runs for step, *_ in run.metrics.get("probes", [])})
    line_styles = (("misranked", "-"), ("correct", "--"))
    for (number, name), (ranked, line_style) in product(enumerate(FLOW_TREATMENTS), line_styles):
        label = name if ranked == "misranked" else None  # one legend entry per color
        weight_axes.plot(mean_weight_curve(runs, name, ranked), line_style, color=f"C{number}")
        norms = [seed_values(runs, name, gradient_norm(ranked, only_at=step)).mean().item() for step in steps]
        norm_axes.plot(steps, norms, line_style, color=f"C{number}", label=label)
    solid_and_dashed = "solid: misranked pairs, dashed: correct pairs"
    weight_axes.set(xlabel="training step", ylabel="mean gradient weight", title=solid_and_dashed)
    norm_axes.set(xlabel="training step", ylabel="gradient norm from these pairs", title=solid_and_dashed)
    weight_axes.set_ylim(0, 1.02)

    for axes, quantity, title in (
        (pair_share_axes, "share", "share of the training pairs in each case"),
        (weight_share_axes, "spent", "share of the total gradient weight in each case"),
    ):
        left = torch.zeros(len(FLOW_TREATMENTS), dtype=torch.float64)
        for (case, label), color in zip(CASES.items(), ("C2", "C1", "C3", "C7")):
            column = case_share(case, quantity)
            width = torch.stack([seed_values(runs, name, column).mean() for name in FLOW_TREATMENTS])
            axes.barh(list(FLOW_TREATMENTS), width.tolist(), left=left.tolist(), color=color, label=label)
            left = left + width
        axes.invert_yaxis()  # the first treatment comes on top, as in the table
        axes.set(title=title, xlim=(0, 1))
    for row, axes in enumerate((weight_share_axes, norm_axes)):  # inside the panels, the legends would hide lines
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="lower center",
            bbox_to_anchor=(0.5, 0.03 * row),
            ncol=len(labels),
            fontsize=SMALL_FONT,
            frameon=False,
        )


GRADIENT_FLOW = Study(
    question="Does AMaPO pull misranked pairs harder and leave correct ones alone?",
    treatments=FLOW_TREATMENTS,
    baseline=SIMPO,
    columns={
        **WEIGHTS,
        "first step: norm correct": gradient_norm("correct", only_at=0),
        "first step: norm misranked": gradient_norm("misranked", only_at=0),
        "norm correct": gradient_norm("correct"),
        "norm misranked": gradient_norm("misranked"),
        **{f"share of weight: {case}": case_share(case, "spent") for case in CASES},
    },
    draw=draw_gradient_flow,
    needs_curves=True,
    picture_height=6.8,
    legend_share=0.07,
)


# 5. Batch composition.

MISRANKED_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
COMPOSED_LOSSES = {"SimPO": LOSSES[SIMPO], "AMaPO": LOSSES[AMAPO]}
COMPOSITIONS = {
    f"{name}, {share:.0%} misranked": replace(treatment, misranked=share)
    for name, treatment in COMPOSED_LOSSES.items()
    for share in MISRANKED_SHARES
}


def draw_composition(figure: Figure, runs: list[Run]) -> None:
    """Draw accuracy, margin and gradient weights over the share of misranked pairs."""
    accuracy_axes, margin_axes, weight_axes = figure.subplots(1, 3)
    for name in COMPOSED_LOSSES:
        points = {share: f"{name}, {share:.0%} misranked" for share in MISRANKED_SHARES}
        plot_means(accuracy_axes, runs, points, metric_at("held out"), name)
        plot_means(margin_axes, runs, points, metric_at("margin"), name)
        for ranked in ("correct", "misranked"):
            plot_means(weight_axes, runs, points, metric_at(f"weight {ranked}"), f"{name}, {ranked} pairs")
    for axes, label in (
        (accuracy_axes, ACCURACY),
        (margin_axes, "mean margin during training"),
        (weight_axes, WEIGHT),
    ):
        axes.set(xlabel="share of pairs in each batch\nthat the checkpoint misranks", ylabel=label)
        axes.legend(fontsize=SMALL_FONT, framealpha=0.4)
    weight_axes.set_ylim(0, 1.02)


COMPOSITION = Study(
    question="What if batches are mostly easy, or mostly hard?",
    treatments=COMPOSITIONS,
    baseline="SimPO, 50% misranked",
    columns=HELD_OUT | {"margin": metric_at("margin")} | WEIGHTS,
    draw=draw_composition,
)


# 6. Perplexity. The picture groups the pairs by source, because perplexity agrees with the judge on some sources only.

AMAPO_LINEAR = "AMaPO, linear"


def gains_by_source(runs: list[Run]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return two values [seeds] for each source of prompts that has a correlation.

    The first is the checkpoint's correlation of the perplexity gap with the judge's confidence. The second is the
    accuracy with exponential scaling minus the accuracy with linear scaling.
    """
    gains = {}
    for source in runs[0].metrics["sources"]:
        correlation = seed_values(runs, IMITATION, metric_at("correlations", source, "perplexity"))
        accuracy = metric_at("sources", source)
        gain = seed_values(runs, AMAPO, accuracy) - seed_values(runs, AMAPO_LINEAR, accuracy)
        if len(correlation):
            gains[source] = correlation, gain
    return gains


def draw_perplexity(figure: Figure, runs: list[Run]) -> None:
    """Draw the gain from exponential scaling over how well perplexity agrees with the judge."""
    axes = figure.subplots()
    for source, (correlation, gain) in gains_by_source(runs).items():
        axes.plot(correlation, 100 * gain, "o", label=source)
    axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="rank correlation of the checkpoint's perplexity gap with the judge's confidence (Spearman)",
        ylabel="accuracy gain of exponential over\nlinear scaling (percentage points)",
    )
    axes.set_title("dot: one source and one seed", fontsize=SMALL_FONT)
    # The dots can be anywhere, so the legend stands beside them.
    axes.legend(
        title="source of the prompts",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        fontsize=SMALL_FONT,
        title_fontsize=SMALL_FONT,
    )


def describe_sources(runs: list[Run]) -> str:
    """Return the means over the seeds of what `draw_perplexity` draws, as text."""
    return "; ".join(
        f"{source}: correlation {correlation.mean():+.2f}, gain of exponential scaling {100 * gain.mean():+.1f} points"
        for source, (correlation, gain) in gains_by_source(runs).items()
    )


PERPLEXITY = Study(
    question="Does exponential scaling help where perplexity agrees with the judge?",
    treatments={AMAPO: LOSSES[AMAPO], AMAPO_LINEAR: Treatment(margin=AdaptiveMargin(scaling="linear"))},
    baseline=AMAPO_LINEAR,
    columns={
        "correlation: perplexity gap": metric_at("correlations", "all", "perplexity"),
        "correlation: log-prob gap": metric_at("correlations", "all", "log-prob"),
        **HELD_OUT,
        **BY_CONFIDENCE,
    },
    draw=draw_perplexity,
    remark=describe_sources,
)


# 7. Estimators. The oracle uses the statistics of the whole batch. The estimators see 8 pairs at a time.

MICRO_BATCH_PAIRS = 8
ORACLE = "oracle"
ESTIMATORS = {
    ORACLE: Treatment(),
    "micro-batch itself": Treatment(micro_batch=MICRO_BATCH_PAIRS),
    **{
        name: Treatment(micro_batch=MICRO_BATCH_PAIRS, estimator=name)
        for name in ("ScoreWindow", "running average", "median, MAD", "learned")
    },
    SIMPO: LOSSES[SIMPO],
}
FLIPPED_SHARE = 0.2
ESTIMATORS_WITH_NOISE = {
    f"{name}; {FLIPPED_SHARE:.0%} flipped": replace(treatment, flipped=FLIPPED_SHARE)
    for name, treatment in ESTIMATORS.items()
}


def estimation_error(metrics: Metrics) -> float | None:
    """Return the relative error of the gradient weights, or None if it is 0.

    It is exactly 0 if nothing is estimated, which is the case for the oracle and for SimPO.
    """
    return metric_at("gradient error")(metrics) or None


def draw_oracle(figure: Figure, runs: list[Run]) -> None:
    """Draw the accuracy on the held-out pairs and the error of the gradient weights."""
    accuracy_axes, error_axes = figure.subplots(1, 2, sharey=True)
    trained = [run for run in runs if run.treatment != IMITATION]
    plot_seeds(accuracy_axes, trained, metric_at("held out"), ACCURACY, ORACLE)
    plot_seeds(error_axes, trained, estimation_error, WEIGHT_ERROR, ORACLE)
    accuracy_axes.set_ylabel("estimator; share of training labels flipped", fontsize=SMALL_FONT)
    error_axes.invert_yaxis()  # the axes share one y axis, and the second `plot_seeds` has turned it upside down again


ORACLE_MARGIN = Study(
    question="Which estimate from small batches comes nearest to the oracle margin?",
    treatments=ESTIMATORS | ESTIMATORS_WITH_NOISE,
    baseline=ORACLE,
    columns=HELD_OUT | {"gradient error": estimation_error} | WEIGHTS,
    draw=draw_oracle,
)


# 8. Beta.

BETAS = {beta: f"beta {beta:g}" for beta in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)}


def draw_beta(figure: Figure, runs: list[Run]) -> None:
    """Draw the accuracy on the held-out and on the validation pairs over beta."""
    axes = figure.subplots()
    plot_means(axes, runs, BETAS, metric_at("held out"), "held-out pairs")
    plot_means(axes, runs, BETAS, metric_at("validation"), "validation pairs")
    axes.set(xscale="log", xlabel="beta, the scale of AMaPO's ranking score", ylabel="share of pairs ranked correctly")
    axes.set_xticks(list(BETAS), [f"{beta:g}" for beta in BETAS], minor=False)
    axes.minorticks_off()
    axes.legend(fontsize=SMALL_FONT)


BETA = Study(
    question="Is there a best beta?",
    treatments={name: Treatment(beta=beta) for beta, name in BETAS.items()},
    baseline=BETAS[2.0],
    columns={**VALIDATION, **HELD_OUT, "margin": metric_at("margin"), **WEIGHTS},
    draw=draw_beta,
)


# 9. Reasoning: a margin for the pairs that have none in the paper. Generated pairs are arithmetic, where the solutions
# that the model generates can be scored exactly.

FLOORS = {floor: f"AMaPO, floor {floor:g}" for floor in (0.5, 1.0, 2.0)}
REASONING_TREATMENTS = {
    "DPO": LOSSES["DPO"],
    SIMPO: LOSSES[SIMPO],
    "SimPO, gamma 1": LOSSES["SimPO, gamma 1"],
    AMAPO: LOSSES[AMAPO],  # its floor is 0
    **{name: Treatment(margin=AdaptiveMargin(floor=floor)) for floor, name in FLOORS.items()},
    "AMaPO, no zero-clipping": ABLATIONS["no zero-clipping"],
    # With so small a beta, the gradient of the preference loss is negligible. Its gradient weights mean nothing here.
    "SFT alone": Treatment("simpo", beta=1e-6, sft=1.0),
    f"{SIMPO}, with SFT": replace(LOSSES[SIMPO], sft=1.0),
    "AMaPO, paper, with SFT": Treatment(sft=1.0),
    "AMaPO, floor 1, with SFT": Treatment(margin=AdaptiveMargin(floor=1.0), sft=1.0),
}


def draw_reasoning(figure: Figure, runs: list[Run]) -> None:
    """Draw the share of solved problems if solutions were generated, the ranking accuracy and the log-prob."""
    panels = {"share of held-out problems solved": metric_at("solved")} if "solved" in runs[0].metrics else {}
    panels |= {ACCURACY: metric_at("held out"), "log-prob of correct solutions, nats per token": CHOSEN_LOGP}
    for axes, (label, column) in zip(figure.subplots(1, len(panels), sharey=True), panels.items()):
        plot_seeds(axes, runs, column, label, AMAPO)
    explanation = figure.axes[0].get_title()
    for axes in figure.axes:
        axes.set_title("")  # the panels are too narrow for one explanation each
    figure.axes[0].set_title(explanation, loc="left", fontsize=SMALL_FONT)
    figure.axes[0].set_ylim(len(treatment_names(runs)) - 0.5, -0.5)  # each call has turned the shared axis upside down


REASONING = Study(
    question="Does a margin for pairs above the batch mean help reasoning?",
    treatments=REASONING_TREATMENTS,
    baseline=AMAPO,
    columns={
        "share solved": metric_at("solved"),
        **HELD_OUT,
        "chosen log-prob": CHOSEN_LOGP,
        "margin": metric_at("margin"),
        **WEIGHTS,
    },
    draw=draw_reasoning,
    generated_settings={"task": "arithmetic", "max_prompt": MAX_PROMPT, "max_answer": MAX_SOLUTION},
    generated_defaults={"steps": 64, "learning_rate": 1e-4},
    compared="solved",
)


# 10. A negative batch mean, which a checkpoint has that misranks most pairs.

FORMULAS = (SIMPO, AMAPO, AMAPO_RELEASED)
MOSTLY_MISRANKED = 0.9
NEGATIVE_MEANS = {name: LOSSES[name] for name in FORMULAS} | {
    f"{name}; {MOSTLY_MISRANKED:.0%} misranked": replace(LOSSES[name], misranked=MOSTLY_MISRANKED) for name in FORMULAS
}


def curve_at(name: str, step: int) -> Column:
    """Return a column with the value of a training curve at a step; -1 is the last one."""
    return lambda metrics: metrics["curves"][name][step] if "curves" in metrics else None


def draw_negative_mean(figure: Figure, runs: list[Run]) -> None:
    """Draw the batch mean and the gradient weights over training, and the accuracy after it."""
    axes = figure.subplot_mosaic([["mean", "weights"], ["accuracy", "accuracy"]])
    for number, name in enumerate(NEGATIVE_MEANS):
        line_style, color = "-" if name in FORMULAS else "--", f"C{number % len(FORMULAS)}"
        seeds = sum(run.treatment == name for run in runs)
        axes["mean"].plot(summed_curve(runs, name, "ranking") / seeds, line_style, color=color, label=name)
        ratio = mean_weight_curve(runs, name, "misranked") / mean_weight_curve(runs, name, "correct")
        axes["weights"].plot(ratio, line_style, color=color)
    axes["mean"].axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axes["weights"].axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes["mean"].set(xlabel="training step", ylabel="batch mean of the ranking,\nnats per token")
    axes["weights"].set(xlabel="training step", ylabel="gradient weight of misranked\nover that of correct pairs")
    handles, labels = axes["mean"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=SMALL_FONT, frameon=False)
    plot_seeds(axes["accuracy"], runs, metric_at("held out"), ACCURACY, SIMPO)


NEGATIVE_MEAN = Study(
    question="Which formula is better where the batch mean is negative?",
    treatments=NEGATIVE_MEANS,
    baseline=SIMPO,
    columns={
        "mean, first step": curve_at("ranking", 0),
        "mean, last step": curve_at("ranking", -1),
        **WEIGHTS,
        **HELD_OUT,
        **BY_CONFIDENCE,
        "chosen log-prob": CHOSEN_LOGP,
    },
    other_baselines={name: f"{SIMPO}; {MOSTLY_MISRANKED:.0%} misranked" for name in NEGATIVE_MEANS if ";" in name},
    draw=draw_negative_mean,
    needs_curves=True,
    picture_height=6.5,
    legend_share=0.07,
)


STUDIES = {
    "ranking": RANKING,
    "ablation": ABLATION,
    "batch-size": BATCH_SIZE,
    "gradient-flow": GRADIENT_FLOW,
    "composition": COMPOSITION,
    "perplexity": PERPLEXITY,
    "oracle": ORACLE_MARGIN,
    "beta": BETA,
    "reasoning": REASONING,
    "negative-mean": NEGATIVE_MEAN,
}
