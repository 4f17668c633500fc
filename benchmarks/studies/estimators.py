"""Compare estimators of the whole batch's score statistics that see only one micro-batch at a time.

    python -m benchmarks.studies.estimators

The estimators are the micro-batch itself, a window of recent scores, a running average, the median with the median
absolute deviation (MAD), and a small recurrent network. The scores are generated: as in training, their mean rises from
below 0 and their standard deviation grows.

At every step, the gradient with respect to the log-probs is computed twice: from micro-batches with an estimator, and
from the whole batch with its exact statistics. The relative error is the norm of the difference divided by the norm of
the exact gradient. The command prints a table of this error averaged over the steps, writes JSON and draws a picture.
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

matplotlib.use("Agg")  # draws without a display, which servers do not have
import matplotlib.pyplot as plt

BETA = 2.0
MAD_TO_STD = 1.4826  # the standard deviation of a normal distribution, in units of its median absolute deviation


def pair_count(scores: Tensor) -> Tensor:
    """Return the number of scores as a 0-dim tensor on their device."""
    return torch.tensor(len(scores), device=scores.device)


class RunningAverage:
    """Exponential moving averages of the scores and of their squares.

    Both averages are divided by the sum of their weights, so they are not biased towards 0 in the first micro-batches.

    Args:
        micro_batches: horizon of the averages. The weight of a micro-batch shrinks by 1 - 1 / `micro_batches` with each
            new one.
    """

    def __init__(self, micro_batches: float) -> None:
        self.decay = 1 - 1 / micro_batches
        self.weighted_sums = torch.zeros(3)  # of the mean scores, of the mean squares, and of the weights themselves

    def __call__(self, scores: Tensor, _: Any) -> ScoreStatistics:
        """Add the scores [B] to the averages and return the statistics that the averages give."""
        new = torch.stack((scores.mean(), scores.square().mean(), scores.new_ones(())))
        self.weighted_sums = self.decay * self.weighted_sums.to(scores.device) + new
        mean, mean_square, _ = self.weighted_sums / self.weighted_sums[2]
        return ScoreStatistics(mean, (mean_square - mean**2).clamp(min=0).sqrt(), pair_count(scores))


class LearnedEstimator(nn.Module):
    """A recurrent network that predicts the statistics and learns from every micro-batch that it sees.

    The network predicts the mean and the logarithm of the standard deviation of the next micro-batch, as offsets from a
    running average. It is trained with the negative log-likelihood of the scores, so it never needs the whole batch.

    Args:
        micro_batches: horizon of the running average.
        hidden_size: number of hidden units.
        learning_rate: learning rate of the network.
    """

    def __init__(self, micro_batches: float, hidden_size: int = 16, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.average = RunningAverage(micro_batches)
        self.gru = nn.GRUCell(4, hidden_size)
        self.head = nn.Linear(hidden_size, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        self.state: Tensor
        self.register_buffer("state", torch.zeros(1, hidden_size))
        self.prediction: tuple[Tensor, Tensor] | None = None  # mean and log standard deviation, with their graph

    @torch.enable_grad()  # the loss calls estimators under no_grad
    def forward(self, scores: Tensor, _: Any) -> ScoreStatistics:
        """Learn from the scores [B], then return the predicted statistics, detached."""
        scores = scores.detach()
        if self.prediction is not None:
            mean, log_std = self.prediction
            loss = (log_std + 0.5 * ((scores - mean) / log_std.exp()).square()).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        mean, std, _ = self.average(scores, None)
        std = std.clamp(min=1e-3)
        features = torch.stack((scores.mean() - mean, (scores - mean).abs().mean() / std, mean, std.log()))
        self.state = self.gru(features[None], self.state.detach())
        mean_offset, log_std_offset = self.head(self.state)[0]
        self.prediction = (mean + std * mean_offset, std.log() + log_std_offset)
        mean, log_std = self.prediction
        return ScoreStatistics(mean.detach(), log_std.detach().exp(), pair_count(scores))


def median_and_mad(scores: Tensor, _: Any) -> ScoreStatistics:
    """Return the median of the scores [B] as the mean, and their scaled median absolute deviation as the std."""
    median = scores.median()
    return ScoreStatistics(median, MAD_TO_STD * (scores - median).abs().median(), pair_count(scores))


def estimators(pairs: int, batch: int, device: str | torch.device = "cpu") -> dict[str, Estimator]:
    """Return new estimators, which have not seen any score.

    Args:
        pairs: number of pairs in a micro-batch.
        batch: number of pairs in the whole batch. The window and the running averages cover this many pairs.
        device: device of the scores.
    """
    torch.manual_seed(0)
    micro_batches = batch / pairs
    return {
        "itself": ScoreStatistics.of,
        "median, MAD": median_and_mad,
        "ScoreWindow": ScoreWindow(batch).to(device),
        "running average": RunningAverage(micro_batches),
        "learned": LearnedEstimator(micro_batches).to(device),
    }


def generated_batches(steps: int, batch: int, seed: int) -> Tensor:
    """Return log-ratio differences, [steps, batch].

    From the first step to the last, the mean of their scores rises from -0.3 to 2 and the standard deviation from 0.5
    to 1.5.
    """
    generator = torch.Generator().manual_seed(seed)
    progress = torch.linspace(0, 1, steps)[:, None]
    scores = (-0.3 + 2.3 * progress) + (0.5 + progress) * torch.randn(steps, batch, generator=generator)
    return scores / BETA


def gradient(log_ratio_differences: Tensor, statistics: ScoreStatistics | Estimator | None) -> Tensor:
    """Return the gradient [B] of the summed loss with respect to the log-ratio differences [B]."""
    chosen_logps = log_ratio_differences.clone().requires_grad_()
    rejected_logps = torch.zeros_like(log_ratio_differences)
    loss, _ = amapo_loss(chosen_logps, rejected_logps, beta=BETA, statistics=statistics, reduction="sum")
    return torch.autograd.grad(loss, chosen_logps)[0]


def mean_relative_error(batches: Tensor, pairs: int, estimator: Estimator) -> float:
    """Return the relative error of the gradient from micro-batches, averaged over the steps.

    The first tenth of the steps is left out, because estimators with a memory start without one.

    Args:
        batches: [steps, batch] log-ratio differences.
        pairs: number of pairs in a micro-batch.
        estimator: gives the statistics of each micro-batch.
    """
    errors = []
    for batch in batches:
        estimated = torch.cat([gradient(micro_batch, estimator) for micro_batch in batch.split(pairs)])
        exact = gradient(batch, None)
        errors.append((estimated - exact).norm() / exact.norm())
    return torch.stack(errors)[len(errors) // 10 :].mean().item()


def draw(path: Path, batch: int, rows: list[dict[str, float]]) -> None:
    """Draw the error of each estimator over the size of the micro-batch."""
    sizes = [int(row["pairs"]) for row in rows]
    figure, axes = plt.subplots(figsize=(8, 3.5))
    for name in estimators(1, batch):
        label = "micro-batch itself" if name == "itself" else name
        axes.plot(sizes, [row[name] for row in rows], "o-", label=label)
    axes.set(
        title=f"Gradient from micro-batches of a batch of {batch} pairs",
        xscale="log",
        xlabel="pairs per micro-batch",
        ylabel="mean relative error of the gradient",
        ylim=(0, None),
    )
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.legend(title="estimator of the statistics", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    write_picture(path, figure)


def main() -> None:
    """Measure every estimator with every size of the micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 32],
        help="sizes of the micro-batch, in pairs; each must divide --batch",
    )
    parser.add_argument("--batch", type=int, default=128, help="number of pairs in the whole batch")
    parser.add_argument("--steps", type=int, default=100, help="number of batches")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated scores")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "estimators.json",
        help="JSON file to write; the picture is written next to it",
    )
    args = parser.parse_args()
    if any(args.batch % pairs for pairs in args.pairs):
        parser.error(f"--pairs must divide --batch, which is {args.batch}")

    batches = generated_batches(args.steps, args.batch, args.seed)
    names = list(estimators(1, args.batch))
    table = Table(title=f"Relative error of the gradient, batch of {args.batch} pairs", box=SIMPLE)
    for column in ("pairs per micro-batch", *names):
        table.add_column(column, justify="right")
    rows = {pairs: {"pairs": float(pairs)} for pairs in args.pairs}
    for pairs, name in track(list(product(args.pairs, names)), "measuring the estimators"):
        rows[pairs][name] = mean_relative_error(batches, pairs, estimators(pairs, args.batch)[name])
    for pairs, row in rows.items():
        table.add_row(f"{pairs} of {args.batch}", *(f"{row[name]:.0%}" for name in names))

    console = Console()
    console.print(table)
    record = {"batch": args.batch, "steps": args.steps, "rows": list(rows.values())}
    write_json(args.out, "benchmarks.studies.estimators", record)
    draw(args.out.with_suffix(".png"), args.batch, list(rows.values()))
    console.print(f"wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
