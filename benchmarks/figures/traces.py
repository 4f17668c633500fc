"""Draw what a loss does with its gradient during training: one panel for each loss, one point for each pair and step.

Depends on torch and matplotlib.
"""

from pathlib import Path

import matplotlib
from torch import Tensor

from benchmarks.record import write_picture

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt


def draw(
    path: Path,
    traces: dict[str, tuple[Tensor, Tensor]],  # for each loss, rankings [steps, B] and gradient weights [steps, B]
    columns: int,
    panel_size: tuple[float, float],  # width and height in inches
) -> None:
    """Draw gradient weight over ranking at the start and the end of training, with one panel for each loss."""
    rows = -(-len(traces) // columns)
    size = (panel_size[0] * columns, panel_size[1] * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(traces) :]:
        panel.set_axis_off()
    for panel in panels.flat[max(0, len(traces) - columns) : len(traces)]:  # the lowest panel of each column
        panel.tick_params(labelbottom=True)
    for panel, (name, (ranking, weights)) in zip(panels.flat, traces.items()):
        tenth = -(-len(ranking) // 10)
        phases = {"first tenth of training": slice(tenth), "last tenth of training": slice(-tenth, None)}
        for phase, steps in phases.items():
            panel.scatter(ranking[steps], weights[steps], s=2, label=phase)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set_title(name, fontsize="medium")
        panel.set_ylim(-0.03, 1.03)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    if len(traces) < panels.size:
        panels.flat[-1].legend(handles, labels, markerscale=4, loc="center")
    else:
        panels.flat[0].legend(markerscale=4, loc="lower left")
    figure.supxlabel(
        "average log-prob of the chosen answer - that of the rejected one [nats per byte]", fontsize="medium"
    )
    figure.supylabel("gradient weight of the pair", fontsize="medium")
    figure.tight_layout()
    write_picture(path, figure)
