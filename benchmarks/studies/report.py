"""Turn the runs of a study into a table, and draw them: the building blocks that the definitions of the studies share.

Depends on NumPy, torch, matplotlib, rich, and on harness.py and sweep.py.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.studies.harness import Metrics
from benchmarks.studies.sweep import BATCH_ACCURACY, IMITATION, TUNED_ACCURACY, Run, best_entries

# A column of the table maps the metrics of a run to a number, or to None if the run has no such number.
Column = Callable[[Metrics], float | None]
# The mean and the standard deviation over the seeds. The standard deviation is None for a single seed. All is None if
# no run has a number.
Summary = tuple[float, float | None] | None
ERROR_OVER_PROMPTS = "error of this over prompts"  # a column of the table
PERCENT_COLUMNS = (
    "held out",
    "validation",
    "confidence",
    "RM-Bench",
    "over ",
    "share",
    ERROR_OVER_PROMPTS,
)  # beginnings
TUNED_QUANTITIES = {  # keys of an entry of a tuning: the caption of its table and the label of its axis
    TUNED_ACCURACY: (
        "accuracy on the validation pairs by the loss's own score in percent, after one run with each rate",
        "validation pairs ranked correctly\nby the loss's own score",
    ),
    "validation": (  # in files of earlier versions, in place of the other accuracy
        "accuracy on the validation pairs by the average log-prob in percent, after one run with each rate",
        "validation pairs ranked correctly\nby the average log-prob",
    ),
    "validation, change": (  # missing in files of earlier versions
        "accuracy on the validation pairs by the change of the average log-prob in percent, after one run with each "
        "rate",
        "validation pairs ranked correctly\nby the change of the average log-prob",
    ),
    "chosen log-prob": (
        "log-prob of the chosen answers of the validation pairs, nats per token, after these runs",
        "log-prob of their chosen\nanswers, nats per token",
    ),
}
SMALL_FONT = 8.5  # font size of explanations and legends


def metric_at(*path: str) -> Column:
    """Return a column that looks up a metric by its keys in the nested dictionaries, outermost key first."""

    def look_up(metrics: Metrics) -> float | None:
        value: Any = metrics
        for key in path:
            value = None if value is None else value.get(key)
        return None if value is None else float(value)

    return look_up


def seed_values(runs: list[Run], treatment: str, column: Column) -> Tensor:
    """Return the column's number for each seed of a treatment, in the order of the seeds.

    Seeds without such a number are left out, so the result may be empty.
    """
    of_treatment = sorted((run for run in runs if run.treatment == treatment), key=lambda run: run.seed)
    numbers = [column(run.metrics) for run in of_treatment]
    return torch.tensor([number for number in numbers if number is not None], dtype=torch.float64)


def summarize(values: Tensor) -> Summary:
    """Return the mean and the standard deviation of the values [seeds]."""
    if not len(values):
        return None
    return values.mean().item(), values.std().item() if len(values) > 1 else None


def treatment_names(runs: list[Run]) -> list[str]:
    """Return the names of the treatments in the order of their first runs."""
    return list(dict.fromkeys(run.treatment for run in runs))


def tabulate(
    runs: list[Run],
    columns: dict[str, Column],
    baseline: str,
    other_baselines: Mapping[str, str] = MappingProxyType({}),
    compared: str = "held out",
    prompts: Sequence[int] = (),
) -> dict[str, dict[str, Summary]]:
    """Return the table of a study: the summary of every column, by treatment.

    The column "over BASELINE" summarizes the differences in `compared` from the baseline, if that has run. Each
    difference is between two runs with the same seed, that is, from the same checkpoint. The next column has
    `error_over_prompts`, if it is known.

    Args:
        runs: the runs of all treatments.
        columns: the columns, by their headings.
        baseline: the treatment that the others are compared with.
        other_baselines: the treatment that a treatment is compared with instead, for some of them.
        compared: name of the metric that is compared. Runs that do not have it are compared by the held-out accuracy.
        prompts: for each held-out pair, the number of its prompt; empty if the pairs are not the same in all runs.
    """
    rows, names = {}, treatment_names(runs)
    compared = compared if all(compared in run.metrics for run in runs) else "held out"
    heading = f"over {baseline}{', own score' if compared.endswith('own score') else ''}"
    for name in names:
        row = {title: summarize(seed_values(runs, name, column)) for title, column in columns.items()}
        of_name = other_baselines.get(name, baseline)
        if of_name in names and name not in (of_name, IMITATION):
            of_seeds, of_baseline = (seed_values(runs, treatment, metric_at(compared)) for treatment in (name, of_name))
            row[heading] = summarize(of_seeds - of_baseline)
            if (error := error_over_prompts(runs, name, of_name, compared, prompts)) is not None:
                row[ERROR_OVER_PROMPTS] = error, None
        rows[name] = row
    return rows


def error_over_prompts(
    runs: list[Run], treatment: str, baseline: str, compared: str, prompts: Sequence[int]
) -> float | None:
    """Return the standard error of a difference in accuracy that comes from the choice of the held-out prompts.

    The spread over the seeds does not contain it, because all seeds have the same held-out pairs. With d the difference
    in outcome of a pair, averaged over the seeds, it is the square root of

        P / (P - 1) * sum over the P prompts of (sum over the prompt's pairs of (d - mean of d))^2

    divided by the number of pairs. This is the linearized variance of a ratio of means over clusters, here prompts:
    pairs that share a prompt are not independent.

    Args:
        runs: the runs of all treatments.
        treatment: name of a treatment.
        baseline: name of the treatment that it is compared with.
        compared: name of the accuracy.
        prompts: for each held-out pair, the number of its prompt.

    Returns:
        The error, or None if the outcomes or the prompts are not known.
    """
    digits = [
        [run.metrics.get("outcomes", {}).get(compared) for run in runs if run.treatment == name]
        for name in (treatment, baseline)
    ]
    if not len(prompts) or None in (*digits[0], *digits[1]):
        return None
    correct, correct_of_baseline = (
        torch.tensor([[float(digit) for digit in of_run] for of_run in of_runs], dtype=torch.float64).mean(0)
        for of_runs in digits
    )
    difference = correct - correct_of_baseline
    numbers = torch.tensor(prompts)
    num_prompts = len(numbers.unique())
    if num_prompts < 2:
        return None
    sums = torch.zeros(int(numbers.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, numbers, difference - difference.mean())
    return (num_prompts / (num_prompts - 1) * sums.square().sum()).sqrt().item() / len(numbers)


def print_table(console: Console, title: str, rows: dict[str, dict[str, Summary]]) -> None:
    """Print the table of a study with one row per treatment."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    caption = "mean (standard deviation) over the seeds; accuracies and shares in percent"
    table = Table(title=title, caption=caption, box=SIMPLE, collapse_padding=True, padding=(0, 1))
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", vertical="bottom")
    for name, row in rows.items():
        table.add_row(name, *(format_summary(column, row.get(column)) for column in columns))
    console.print(table)


def format_summary(column: str, summary: Summary) -> str:
    """Return the text of a table cell, in percent or with three significant digits, depending on its column."""
    if summary is None:
        return ""
    mean, std = summary
    if column.startswith(PERCENT_COLUMNS):
        sign = "+" if column.startswith("over ") else ""
        text, std_text = f"{100 * mean:{sign}.1f}", "" if std is None else f" ({100 * std:.1f})"
    else:
        text, std_text = f"{mean:.3g}", "" if std is None else f" ({std:.2g})"
    return text + std_text


def print_tuning(console: Console, entries: list[dict[str, Any]]) -> None:
    """Print the accuracies and, if the entries have it, the log-prob on the validation pairs by loss and rate."""
    by_loss = tuning_by_loss(entries)
    for key, (caption, _) in TUNED_QUANTITIES.items():
        if key not in entries[0]:
            continue
        table = Table(title="Tuning of the learning rates", caption=caption, box=SIMPLE, padding=(0, 1))
        table.add_column("")
        for rate in next(iter(by_loss.values())):
            table.add_column(format_rate(rate), justify="right")
        for loss, by_rate in by_loss.items():
            table.add_row(loss, *(format_summary(key, (entry[key], None)) for entry in by_rate.values()))
        console.print(table)


def tuning_by_loss(entries: list[dict[str, Any]]) -> dict[str, dict[float, dict[str, Any]]]:
    """Return the entries of a tuning by loss and learning rate."""
    by_loss: dict[str, dict[float, dict[str, Any]]] = {}
    for entry in entries:
        by_loss.setdefault(entry["loss"], {})[entry["learning rate"]] = entry
    return by_loss


def draw_tuning(figure: Figure, entries: list[dict[str, Any]]) -> None:
    """Draw accuracies and log-prob on the validation pairs over the learning rate, and the accuracy over training.

    The accuracy of a single batch is noisy, so the last panel shows its mean over a sixth of the steps. Entries of
    earlier versions have no log-prob, and no panel for it.
    """
    quantities = {key: label for key, (_, label) in TUNED_QUANTITIES.items() if key in entries[0]}
    *rate_axes, step_axes = figure.subplots(1, len(quantities) + 1)
    best = best_entries(entries)
    for number, (loss, by_rate) in enumerate(tuning_by_loss(entries).items()):
        line_style = ("-", "--", ":", "-.")[number % 4]  # lines of equal values remain visible
        for axes, key in zip(rate_axes, quantities):
            axes.plot(list(by_rate), [entry[key] for entry in by_rate.values()], "o", linestyle=line_style)
        curve, rate = torch.tensor(best[loss][BATCH_ACCURACY]), format_rate(best[loss]["learning rate"])
        width = max(1, len(curve) // 6)
        means = curve.unfold(0, width, 1).mean(1)
        middles = torch.arange(len(means)) + (width - 1) / 2
        step_axes.plot(middles.tolist(), means.tolist(), linestyle=line_style, label=f"{loss}, {rate}")
    rates = {entry["learning rate"]: format_rate(entry["learning rate"]) for entry in entries}
    for axes, label in zip(rate_axes, quantities.values()):
        axes.set(xscale="log", xlabel="learning rate", ylabel=label)
        axes.set_xticks(list(rates), labels=list(rates.values()), rotation=90)
        axes.minorticks_off()
    step_axes.set(xlabel="training step", ylabel="share of the batch ranked correctly,\nbefore the step")
    rate_axes[0].set_title("after one run with each rate", fontsize=SMALL_FONT)
    step_axes.set_title(f"with the best rate of each loss; means over {width} steps", fontsize=SMALL_FONT)
    step_axes.legend(title="loss and its best rate", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def format_rate(rate: float) -> str:
    """Return a learning rate in scientific notation, such as 3e-4."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def plot_seeds(axes: Axes, runs: list[Run], column: Column, label: str, baseline: str) -> None:
    """Draw one row per treatment: a dot for each seed and a bar at their mean.

    A dotted line marks the mean of the baseline, if that has run, and the title explains the marks.

    Args:
        axes: where to draw.
        runs: the runs of all treatments.
        column: the number to draw.
        label: what the number is, for the x axis.
        baseline: name of a treatment.
    """
    values = {name: seed_values(runs, name, column) for name in treatment_names(runs)}
    marks = "dot: one seed, bar: mean"
    for row, of_treatment in enumerate(values.values()):
        axes.plot(of_treatment, [row] * len(of_treatment), "o", color="C0", alpha=0.5, markersize=5)
        if len(of_treatment):
            axes.plot([of_treatment.mean()] * 2, [row - 0.3, row + 0.3], color="C0")
    if len(values.get(baseline, ())):
        axes.axvline(values[baseline].mean().item(), color="grey", linewidth=0.8, linestyle=":")
        marks += f", dotted line: mean of {baseline}"
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()  # the first treatment comes on top, as in the table
    axes.set_xlabel(label)
    axes.set_title(marks, fontsize=SMALL_FONT)


def plot_means(
    axes: Axes, runs: list[Run], points: Mapping[int, str] | Mapping[float, str], column: Column, label: str
) -> None:
    """Draw a line through the means over the seeds, with error bars of one standard deviation.

    The title explains the marks.

    Args:
        axes: where to draw.
        runs: the runs of all treatments.
        points: for each x, the name of its treatment.
        column: the number to draw.
        label: name of the line in the legend.
    """
    summaries = {x: summarize(seed_values(runs, name, column)) for x, name in points.items()}
    drawn = [(x, *summary) for x, summary in summaries.items() if summary is not None]
    if drawn:
        x, mean, std = zip(*drawn)
        axes.errorbar(x, mean, [spread or 0 for spread in std], marker="o", capsize=3, label=label)
    num_seeds = len({run.seed for run in runs})
    marks = "one seed" if num_seeds == 1 else "mean and standard deviation over the seeds"
    axes.set_title(marks, fontsize=SMALL_FONT)


def summed_curve(runs: list[Run], treatment: str, *names: str) -> Tensor:
    """Return the sum of the named training curves over all seeds of a treatment, [steps]."""
    curves_by_seed = [run.metrics["curves"] for run in runs if run.treatment == treatment]
    return torch.tensor([curves[name] for curves in curves_by_seed for name in names]).sum(0)
