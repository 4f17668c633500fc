"""Draw where the gradient goes in models of different sizes, from the results of `make sizes`.

    python -m benchmarks.figures.sizes

Each folder of build/results/sizes has the results of the study gradient-flow for one model. The command prints a
table, writes JSON and draws a picture.

Depends on torch, matplotlib, rich, benchmarks.record, and on benchmarks.studies.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from rich.console import Console

from benchmarks.record import RESULTS, write_json, write_picture
from benchmarks.studies.harness import Metrics
from benchmarks.studies.report import SMALL_FONT, Column, print_table, seed_values, summarize
from benchmarks.studies.studies import AMAPO, AMAPO_RELEASED, CASES, SIMPO, case_share, gradient_norm
from benchmarks.studies.sweep import Run

matplotlib.use("Agg")  # draws without a display, which servers do not have
import matplotlib.pyplot as plt

TREATMENTS = ("DPO", SIMPO, AMAPO, AMAPO_RELEASED)


def of_misranked(metrics: Metrics, quantity: str) -> float | None:
    """Return the misranked pairs' share of all pairs ("share") or of the gradient weight ("spent")."""
    shares = [case_share(case, quantity)(metrics) for case in CASES if case.startswith("misranked")]
    known = [share for share in shares if share is not None]
    return sum(known) if len(known) == len(shares) else None


def norm_share(metrics: Metrics) -> float | None:
    """Return the misranked pairs' gradient norm divided by the sum of the norms of both kinds of pairs."""
    correct, misranked = gradient_norm("correct")(metrics), gradient_norm("misranked")(metrics)
    return None if correct is None or misranked is None else misranked / (correct + misranked)


def weight_ratio(metrics: Metrics) -> float:
    """Return the mean gradient weight of the misranked pairs divided by that of the correct pairs."""
    ratio: float = metrics["weight misranked"] / metrics["weight correct"]
    return ratio


SHARES: dict[str, Column] = {
    "share of all pairs": lambda metrics: of_misranked(metrics, "share"),
    "share of the gradient weight": lambda metrics: of_misranked(metrics, "spent"),
    "share of the gradient norm": norm_share,
}
QUANTITIES: dict[str, Column] = SHARES | {"mean weight over that of correct pairs": weight_ratio}


def main() -> None:
    """Read the results of all sizes and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS / "sizes", help="folder of the sizes")
    args = parser.parse_args()
    records = {path.parent.name: json.loads(path.read_text()) for path in args.folder.glob("*/gradient-flow.json")}
    if not records:
        parser.error(f"{args.folder} has no results; `make sizes` writes them")
    sizes = sorted(records, key=lambda name: records[name]["parameters"])
    parameters = {name: records[name]["parameters"] for name in sizes}
    runs = {name: [Run.from_json(entry) for entry in records[name]["runs"]] for name in sizes}
    console, tables = Console(), {}
    figure, all_axes = plt.subplots(1, len(QUANTITIES), figsize=(13, 3.6))
    for axes, (title, column) in zip(all_axes, QUANTITIES.items()):
        kind = "share" if title in SHARES else "ratio"
        table = {
            treatment: {f"{kind}, {name}": summarize(seed_values(runs[name], treatment, column)) for name in sizes}
            for treatment in TREATMENTS
        }
        print_table(console, f"misranked pairs: {title}", table)
        tables[title] = table
        for treatment, row in table.items():
            drawn = [(x, *summary) for x, summary in zip(parameters.values(), row.values()) if summary is not None]
            x, mean, std = zip(*drawn)
            axes.errorbar(x, mean, [spread or 0 for spread in std], marker="o", capsize=3, label=treatment)
        axes.set(xscale="log", xlabel="parameters", ylim=(0, 1 if title in SHARES else None))
        axes.set_title(title, fontsize=10)
    all_axes[-1].axhline(1, color="grey", linewidth=0.8, linestyle=":")  # equal weights
    all_axes[0].legend(fontsize=SMALL_FONT)
    figure.suptitle("The misranked pairs of a training batch, by the size of the model", fontsize=11)
    figure.tight_layout()
    path = args.folder / "sizes.json"
    write_json(path, "benchmarks.figures.sizes", {"parameters": parameters, "misranked pairs": tables})
    write_picture(path.with_suffix(".png"), figure)
    console.print(f"wrote {path.name} and {path.stem}.png in {path.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
