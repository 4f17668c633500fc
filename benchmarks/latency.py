"""How long the loss takes, forward and backward, on one CPU thread, against the released trainer's arithmetic.

    python -m benchmarks.latency

The variants take turns, so that whatever else the machine does meets all of them; a ratio is taken within a round, and
its median over the rounds is reported. Prints a table, writes JSON, draws a picture.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from amapo_loss import amapo_loss
from benchmarks.record import RESULTS, write_json

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

Step = Callable[[Tensor, Tensor], Tensor]
BASELINE = "released arithmetic"


def released_arithmetic(chosen_logps: Tensor, rejected_logps: Tensor, beta: float = 2.0, eps: float = 0.0) -> Tensor:
    """What the authors' published trainer computes: no guard, no diagnostics, the statistics of this batch."""
    d = chosen_logps - rejected_logps
    q = d.detach()
    mean, std = q.mean(), q.std()
    z = (mean - q) / std
    h = beta * torch.where(z > 0, torch.exp(z * mean), 0)
    r = beta * d
    losses = -F.logsigmoid(r - h) * (1 - eps) - F.logsigmoid(h - r) * eps
    return losses.mean()


def with_diagnostics(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """The loss; its diagnostics are computed with it."""
    return amapo_loss(chosen_logps, rejected_logps).loss


def with_summary(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """The loss, and the 15 scalars that a trainer logs."""
    loss, diagnostics = amapo_loss(chosen_logps, rejected_logps)
    diagnostics.summary()
    return loss


VARIANTS: dict[str, Step] = {
    BASELINE: released_arithmetic,
    "amapo_loss": with_diagnostics,
    "amapo_loss + summary()": with_summary,
    "torch.compile: released": torch.compile(released_arithmetic, fullgraph=True, dynamic=False),
    "torch.compile: amapo_loss": torch.compile(with_diagnostics, fullgraph=True, dynamic=False),
}


def forward_backward(step: Step, inputs: tuple[Tensor, Tensor]) -> None:
    """One training step's share of the loss; gradients start from None, as after `zero_grad()`."""
    for x in inputs:
        x.grad = None
    step(*inputs).backward()


def measure(pairs: int, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds a forward and backward, for every variant and round."""
    generator = torch.Generator().manual_seed(0)
    logps = [torch.randn(pairs, generator=generator) - mean for mean in (1.0, 1.4)]
    inputs = (logps[0].requires_grad_(), logps[1].requires_grad_())
    timers = {
        name: Timer("run(step, inputs)", globals={"run": forward_backward, "step": step, "inputs": inputs})
        for name, step in VARIANTS.items()
    }
    for timer in timers.values():
        timer.timeit(repeats)  # compiles, warms up
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in track(range(rounds), f"{pairs:,} pairs"):
        for name, timer in timers.items():
            taken[name].append(timer.timeit(repeats).median * 1e6)
    return taken


def main() -> None:
    """Measure every size, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[32, 1024], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=20, help="steps a round")
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.json", help="the picture goes beside it")
    args = parser.parse_args()

    torch.set_num_threads(1)
    table = Table(title="Forward + backward, one CPU thread, microseconds", box=SIMPLE, pad_edge=False)
    for column in ("pairs", "", "minimum", "median", "median ratio"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    rows: list[dict[str, str | int | float]] = []
    for pairs in args.pairs:
        taken = measure(pairs, args.rounds, args.repeats)
        for name, times in taken.items():
            ratio = statistics.median(t / base for t, base in zip(times, taken[BASELINE]))
            rows.append(
                {
                    "pairs": pairs,
                    "variant": name,
                    "min_us": min(times),
                    "median_us": statistics.median(times),
                    "ratio": ratio,
                }
            )
            table.add_row(f"{pairs:,}", name, f"{min(times):.0f}", f"{statistics.median(times):.0f}", f"{ratio:.2f}")

    console = Console()
    console.print(table)
    write_json(args.out, "benchmarks.latency", {"rounds": args.rounds, "repeats": args.repeats, "rows": rows})
    figure, axes = plt.subplots(figsize=(7, 3))
    for k, pairs in enumerate(args.pairs):
        ratios = [row["ratio"] for row in rows if row["pairs"] == pairs]
        axes.barh([i + 0.4 * k for i in range(len(ratios))], ratios, height=0.38, label=f"{pairs:,} pairs")
    axes.set_yticks([i + 0.2 * (len(args.pairs) - 1) for i in range(len(VARIANTS))], list(VARIANTS))
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time of forward + backward over that of the released arithmetic")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.out.with_suffix(".png"), dpi=130)
    console.print(f"wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
