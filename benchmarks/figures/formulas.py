"""Draw the margins of both formulas over the ranking score, for a positive and a negative batch mean.

    python -m benchmarks.figures.formulas

The picture helps to choose between the formulas. All values come from `amapo_loss`.
"""

import argparse
from pathlib import Path
from typing import get_args

import matplotlib
import torch
from torch import Tensor

from amapo_loss import AdaptiveMargin, ScoreStatistics, amapo_loss
from amapo_loss._checks import Formula
from benchmarks.record import RESULTS, write_picture

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt

BETA = 2.0


def compute_margins(
    scores: Tensor,  # [B]
    mean: float,
    formula: Formula,
) -> Tensor:
    """Return the margins [B] in a batch whose scores have the given mean and a standard deviation of 1."""
    statistics = ScoreStatistics(torch.tensor(mean), torch.tensor(1.0), torch.tensor(len(scores)))
    margin = AdaptiveMargin(formula=formula)
    chosen_logps, rejected_logps = scores / BETA, torch.zeros_like(scores)
    return amapo_loss(chosen_logps, rejected_logps, beta=BETA, margin=margin, statistics=statistics).diagnostics.margins


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "formulas.png", help="PNG file to write")
    args = parser.parse_args()

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True, sharey=True)
    for panel, mean in zip(panels, (1.0, -1.0)):
        scores = torch.linspace(-3, 3, 601)
        panel.set(ylim=(-0.8, 16))  # the exponential leaves the picture
        for formula, style in zip(get_args(Formula), ("-", "--")):
            panel.plot(scores, compute_margins(scores, mean, formula), style, label=f'formula="{formula}"')
        panel.axvline(mean, color="grey", linewidth=0.8, linestyle=":")
        panel.annotate("batch mean", (mean, 13), xytext=(4, 0), textcoords="offset points", color="grey")
        panel.set(title=f"batch mean {mean:+.0f}, standard deviation 1", xlabel="ranking score of the pair")
    panels[0].set_ylabel(f"margin of the pair (beta = {BETA:g})")
    panels[0].legend(loc="center right")
    figure.tight_layout()
    write_picture(args.out, figure)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
