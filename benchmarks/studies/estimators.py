"""Which estimate of the whole batch's statistics a micro-batch should use: itself, a window, an average, a learned one.

    python -m benchmarks.studies.estimators

Scores are generated, with a mean that rises from below 0 and a spread that grows, as in training. At every step the
gradient of a whole batch, in the log-probs, is compared with that of its micro-batches under each estimator; the table
has the relative error, in norm, averaged over the steps. Prints a table, writes JSON, draws a picture.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from amapo_loss import Estimator, ScoreStatistics, ScoreWindow, amapo_loss
from benchmarks.record import RESULTS, write_json, write_picture

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

BETA = 2.0


def count(scores: Tensor) -> Tensor:
    """Of scores, on their device."""
    return torch.tensor(len(scores), device=scores.device)


class RunningAverage:
    """Exponential averages of the mean and of the mean square; the first batches count fully."""

    def __init__(self, batches: float) -> None:
        self.decay = 1 - 1 / batches
        self.sums = torch.zeros(3)  # of scores, of their squares, of the weights behind both

    def __call__(self, scores: Tensor, _: Any) -> ScoreStatistics:
        """The averages with this batch in them."""
        seen = torch.stack((scores.mean(), scores.square().mean(), scores.new_ones(())))
        self.sums = self.decay * self.sums.to(scores.device) + seen
        mean, square, _ = self.sums / self.sums[2]
        return ScoreStatistics(mean, (square - mean**2).clamp(min=0).sqrt(), count(scores))


class Learned(nn.Module):
    """A recurrent network that predicts the scores of the next micro-batch, and learns from each one that it sees.

    What it predicts is their mean and the logarithm of their standard deviation, as a step away from an average over
    `batches` micro-batches. It descends the negative log-likelihood of the scores, so it never needs the whole batch.
    """

    def __init__(self, batches: float, hidden: int = 16, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.average = RunningAverage(batches)
        self.cell = nn.GRUCell(4, hidden)
        self.head = nn.Linear(hidden, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        self.state: Tensor
        self.register_buffer("state", torch.zeros(1, hidden))
        self.prediction: tuple[Tensor, Tensor] | None = None

    @torch.enable_grad()
    def forward(self, scores: Tensor, _: Any) -> ScoreStatistics:
        """Learn from these scores, then predict with them; scores come without a graph, and so do the statistics."""
        if self.prediction is not None:
            mean, log_std = self.prediction
            loss = (log_std + 0.5 * ((scores - mean) / log_std.exp()).square()).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        mean, std, _ = self.average(scores, None)
        std = std.clamp(min=1e-3)
        features = torch.stack((scores.mean() - mean, (scores - mean).abs().mean() / std, mean, std.log()))
        self.state = self.cell(features[None], self.state.detach())
        step_mean, step_log_std = self.head(self.state)[0]
        self.prediction = (mean + std * step_mean, std.log() + step_log_std)
        mean, log_std = self.prediction
        return ScoreStatistics(mean.detach(), log_std.detach().exp(), count(scores))


def robust(scores: Tensor, _: Any) -> ScoreStatistics:
    """Median and median absolute deviation of the micro-batch; the factor makes it a normal standard deviation."""
    middle = scores.median()
    return ScoreStatistics(middle, 1.4826 * (scores - middle).abs().median(), count(scores))


def estimators(pairs: int, batch: int, device: str | torch.device = "cpu") -> dict[str, Estimator]:
    """For micro-batches of so many pairs out of a batch, without a past."""
    torch.manual_seed(0)
    micro_batches = batch / pairs
    return {
        "itself": ScoreStatistics.of,
        "median, MAD": robust,
        "ScoreWindow": ScoreWindow(batch).to(device),
        "running average": RunningAverage(micro_batches),
        "learned": Learned(micro_batches).to(device),
    }


def generated_batches(steps: int, batch: int, seed: int) -> Tensor:
    """[steps, batch] log-ratio differences: the mean of the scores goes from -0.3 to 2, the spread from 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    progress = torch.linspace(0, 1, steps)[:, None]
    scores = (-0.3 + 2.3 * progress) + (0.5 + progress) * torch.randn(steps, batch, generator=generator)
    return scores / BETA


def gradient(d: Tensor, statistics: ScoreStatistics | Estimator | None) -> Tensor:
    """Of the summed losses of these pairs, [B]."""
    chosen_logps = d.clone().requires_grad_()
    loss, _ = amapo_loss(chosen_logps, torch.zeros_like(d), beta=BETA, statistics=statistics, reduction="sum")
    return torch.autograd.grad(loss, chosen_logps)[0]


def error(batches: Tensor, pairs: int, estimator: Estimator) -> float:
    """Mean relative error over the steps after the first tenth, in which every estimator gathers a past."""
    found = []
    for whole in batches:
        parts = torch.cat([gradient(micro_batch, estimator) for micro_batch in whole.split(pairs)])
        exact = gradient(whole, None)
        found.append((parts - exact).norm() / exact.norm())
    return torch.stack(found)[len(found) // 10 :].mean().item()


def main() -> None:
    """Every estimator with every size of micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2, 4, 8, 32], help="sizes of the micro-batch")
    parser.add_argument("--batch", type=int, default=128, help="pairs in the whole batch")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "estimators.json", help="the picture goes beside it")
    args = parser.parse_args()
    if any(args.batch % pairs for pairs in args.pairs):
        parser.error(f"--pairs must divide --batch, {args.batch}")

    batches = generated_batches(args.steps, args.batch, args.seed)
    names = list(estimators(1, args.batch))
    table = Table(title=f"Relative error of the gradient, batch of {args.batch} pairs", box=SIMPLE)
    for column in ("micro-batch of", *names):
        table.add_column(column, justify="right")
    rows = {pairs: {"pairs": float(pairs)} for pairs in args.pairs}
    for pairs, name in track(list(product(args.pairs, names)), "estimating"):
        rows[pairs][name] = error(batches, pairs, estimators(pairs, args.batch)[name])
    for pairs, row in rows.items():
        table.add_row(f"{pairs} of {args.batch}", *(f"{row[name]:.0%}" for name in names))

    console = Console()
    console.print(table)
    write_json(
        args.out,
        "benchmarks.studies.estimators",
        {"batch": args.batch, "steps": args.steps, "rows": list(rows.values())},
    )
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for name in names:
        axes.plot(list(rows), [row[name] for row in rows.values()], "o-", label=name)
    axes.set(xscale="log", xlabel="pairs a micro-batch", ylabel="relative error of the gradient", ylim=(0, None))
    axes.set_xticks(args.pairs, [str(pairs) for pairs in args.pairs], minor=False)
    axes.legend()
    figure.tight_layout()
    write_picture(args.out.with_suffix(".png"), figure)
    console.print(f"wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
