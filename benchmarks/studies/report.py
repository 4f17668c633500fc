"""How the runs of a study become a table and a picture. Knows no study."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.studies.harness import Figures
from benchmarks.studies.sweep import IMITATION, Run

Column = Callable[[Figures], float | None]  # what a run shows in a column of the table
# Mean and standard deviation over the seeds, None where there is one seed only; None where no run has a value.
Cell = tuple[float, float | None] | None
IN_PERCENT = ("held out", "validation", "confidence", "RM-Bench", "over ", "share")  # how these columns begin


def of(*path: str) -> Column:
    """A figure of a run, by its way through the dictionaries; None where the run has no such figure."""

    def look_up(figures: Figures) -> float | None:
        found: Any = figures
        for name in path:
            found = None if found is None else found.get(name)
        return None if found is None else float(found)

    return look_up


def values(runs: list[Run], treatment: str, column: Column) -> Tensor:
    """Of the seeds, in their order; those that have one."""
    found = [column(run.figures) for run in sorted(runs, key=lambda run: run.seed) if run.treatment == treatment]
    return torch.tensor([value for value in found if value is not None], dtype=torch.float64)


def cell(found: Tensor) -> Cell:
    """Mean and spread."""
    if not len(found):
        return None
    return found.mean().item(), found.std().item() if len(found) > 1 else None


def treatments(runs: list[Run]) -> list[str]:
    """Their names, in their order."""
    return list(dict.fromkeys(run.treatment for run in runs))


def tabulate(runs: list[Run], columns: dict[str, Column], baseline: str) -> dict[str, dict[str, Cell]]:
    """Every column by treatment, and the held-out accuracy over that of the baseline with the same seed."""
    rows = {}
    for name in treatments(runs):
        row = {title: cell(values(runs, name, column)) for title, column in columns.items()}
        if name not in (baseline, IMITATION):
            mine, theirs = (values(runs, each, of("held out")) for each in (name, baseline))
            row[f"over {baseline}"] = cell(mine - theirs)
        rows[name] = row
    return rows


def print_table(console: Console, title: str, rows: dict[str, dict[str, Cell]]) -> None:
    """A row a treatment: mean and, in brackets, standard deviation over the seeds."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table(title=title, box=SIMPLE, collapse_padding=True, padding=(0, 1))
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", vertical="bottom")
    for name, row in rows.items():
        table.add_row(name, *(shown(column, row.get(column)) for column in columns))
    console.print(table)


def shown(column: str, found: Cell) -> str:
    """The text of a cell."""
    if found is None:
        return ""
    mean, std = found
    share = column.startswith(IN_PERCENT)
    text = f"{100 * mean:{'+' * column.startswith('over ')}.1f}" if share else f"{mean:.3g}"
    return text if std is None else f"{text} ({100 * std:.1f})" if share else f"{text} ({std:.2g})"


def dots(axes: Axes, runs: list[Run], column: Column, label: str, baseline: str) -> None:
    """A row a treatment: a dot a seed, a bar at their mean; and a line through the baseline's mean."""
    found = {name: values(runs, name, column) for name in treatments(runs)}
    for row, of_seeds in enumerate(found.values()):
        axes.plot(of_seeds, [row] * len(of_seeds), "o", color="C0", alpha=0.5, markersize=5)
        if len(of_seeds):
            axes.plot([of_seeds.mean()] * 2, [row - 0.3, row + 0.3], color="C0")
    if len(found[baseline]):
        axes.axvline(found[baseline].mean().item(), color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel(label)


def line(
    axes: Axes, runs: list[Run], points: Mapping[int, str] | Mapping[float, str], column: Column, label: str
) -> None:
    """Mean over the seeds and its spread, at the x of every treatment."""
    found = {x: cell(values(runs, name, column)) for x, name in points.items()}
    drawn = [(x, *value) for x, value in found.items() if value is not None]
    if drawn:
        x, mean, std = zip(*drawn)
        axes.errorbar(x, mean, [spread or 0 for spread in std], marker="o", capsize=3, label=label)


def curve(runs: list[Run], treatment: str, *names: str) -> Tensor:
    """The sum of these curves over all seeds, a value a step."""
    of_seeds = [run.figures["curves"] for run in runs if run.treatment == treatment]
    return torch.tensor([curves[name] for curves in of_seeds for name in names]).sum(0)
