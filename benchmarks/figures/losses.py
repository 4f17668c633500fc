"""Draw the margin and the gradient weight over the score, for each line of `benchmarks.losses`.

    python -m benchmarks.figures.losses

All losses get the same made-up batch. Each point is one of its pairs.
"""

import argparse
from pathlib import Path

import matplotlib
import torch

from benchmarks.losses import LOSSES, made_up_batch
from benchmarks.record import RESULTS, write_picture

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt

COLUMNS = 4


def main() -> None:
    """Draw the two pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for losses_margin.png and losses_weight.png")
    args = parser.parse_args()
    batch = made_up_batch()
    diagnostics = {loss.name: loss(batch).diagnostics for loss in LOSSES}
    with_margin = [name for name, x in diagnostics.items() if x.margins.any()]
    for quantity, names, values in (
        ("margin", with_margin, {name: diagnostics[name].margins for name in with_margin}),
        ("gradient weight", list(diagnostics), {name: x.gradient_weights for name, x in diagnostics.items()}),
    ):
        rows = -(-len(names) // COLUMNS)
        figure, panels = plt.subplots(rows, COLUMNS, figsize=(10, 2.1 * rows), squeeze=False)
        for panel in panels.flat[len(names) :]:
            panel.set_axis_off()
        for panel, name in zip(panels.flat, names):
            panel.scatter(diagnostics[name].scores, values[name], s=3)
            panel.axvline(0, color="grey", linewidth=0.8)
            panel.set_title(name, fontsize=9)
            panel.tick_params(labelsize=7)
            if quantity == "margin":
                top = torch.quantile(values[name], 0.99).item()  # the exponential leaves the picture
                panel.set_ylim(min(values[name].min().item(), 0) - 0.1 * top, 1.2 * top)
            else:
                panel.set_ylim(-0.12, 1.03)
        figure.supxlabel("ranking score of the pair", fontsize=9)
        figure.supylabel(f"{quantity} of the pair", fontsize=9)
        figure.tight_layout()
        out = args.out / f"losses_{quantity.split()[-1]}.png"
        write_picture(out, figure)
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
