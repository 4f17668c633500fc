"""Show how the loss and the diagnostics look in a healthy training run and in five runs with a mistake.

    python -m benchmarks.figures.runs

All runs train the demo's model on the demo's pairs with the paper's formula. One run passes summed log-probs, although
beta is meant for averages. One has a beta that is meant for sums. One has a window that is 16 times as large as a step.
One swaps the chosen and the rejected answers. One has a learning rate that is 100 times too large. The script prints a
table of the last step, writes JSON, and draws a picture of all steps.
"""

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from amapo_loss import AMaPOOutput, ScoreWindow, amapo_loss
from benchmarks.record import RESULTS, write_json, write_picture
from benchmarks.studies.data import both_answers, generated_corpus
from benchmarks.studies.harness import Logps, Objective, averaged, imitate, pair_logps, shuffled_batches
from benchmarks.studies.models import ByteLM, Texts, tensors

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt

# What to show, the loss or a metric of `Diagnostics.summary()`, and the scale of the y-axis of each.
METRICS = {
    "loss": "log",
    "amapo/score_mean": "symlog",
    "amapo/margin_mean": "log",
    "amapo/margin_active": "linear",
    "rewards/accuracies": "linear",
    "logps/chosen": "symlog",
}
MAX_PROMPT, MAX_ANSWER = 96, 256  # bytes


class Run(NamedTuple):
    """A loss and a learning rate to train with."""

    objective: Objective
    learning_rate: float = 3e-4


def loss_of_swapped_answers(policy: Logps, reference: Logps) -> AMaPOOutput:
    """Return the loss of a batch in which the chosen and the rejected answer of every pair are swapped."""
    swapped = Logps(policy.rejected, policy.chosen, policy.rejected_lengths, policy.chosen_lengths)
    return averaged(amapo_loss)(swapped, reference)


def runs(batch_size: int) -> dict[str, Run]:
    """Return the healthy run and those with a mistake, with windows that are empty."""
    return {
        "healthy": Run(averaged(amapo_loss)),
        "summed log-probs": Run(lambda policy, _: amapo_loss(policy.chosen, policy.rejected)),
        "beta 0.1": Run(averaged(amapo_loss, beta=0.1)),
        "window of 16 steps": Run(averaged(amapo_loss, statistics=ScoreWindow(16 * batch_size))),
        "swapped answers": Run(loss_of_swapped_answers),
        "learning rate x 100": Run(averaged(amapo_loss), learning_rate=3e-2),
    }


def train(model: ByteLM, run: Run, texts: Texts, steps: int, batch_size: int, description: str) -> list[list[float]]:
    """Train the model in place; return the values of `METRICS` at each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate)
    history = []
    for pairs in track(list(shuffled_batches(len(texts.tokens) // 2, batch_size, steps)), description):
        policy = pair_logps(model, texts, pairs)
        loss, diagnostics = run.objective(policy, policy)  # these losses have no reference
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        summary = {"loss": loss} | diagnostics.summary()
        history.append([summary[metric].item() for metric in METRICS])
    return history


def draw(path: Path, histories: dict[str, list[list[float]]]) -> None:
    """Draw the metrics over the steps, with a panel for each metric and a line for each run."""
    figure, panels = plt.subplots(2, 3, figsize=(12, 6))
    for column, (panel, (metric, scale)) in enumerate(zip(panels.flat, METRICS.items())):
        for run, history in histories.items():
            panel.plot([values[column] for values in history], label=run, linewidth=2.5 if run == "healthy" else 1.2)
        if scale == "symlog":
            panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(
            title=metric if scale == "linear" else f"{metric} ({scale} axis)", xlabel="training step", yscale=scale
        )
        if scale == "log":
            panel.set_ylim(top=100)  # the run on sums leaves the picture, and the others can be told apart
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(histories), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    write_picture(path, figure)


def main() -> None:
    """Train one checkpoint by imitation, then each run from there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imitation-steps", type=int, default=600, help="steps of supervised fine-tuning")
    parser.add_argument("--steps", type=int, default=40, help="steps of preference training in each run")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="texts in a step of fine-tuning, pairs in a step of preference training",
    )
    parser.add_argument("--pairs", type=int, default=4096, help="generated pairs to train on")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "runs.json",
        help="JSON file to write; the picture is written beside it",
    )
    args = parser.parse_args()

    corpus = generated_corpus(pairs=args.pairs, held_out=8, demonstrations=2 * args.pairs, seed=0)
    demonstrations, _ = tensors(corpus.demonstrations, MAX_PROMPT, MAX_ANSWER)
    answers, _ = tensors(both_answers(corpus.train), MAX_PROMPT, MAX_ANSWER)
    torch.manual_seed(0)
    checkpoint = ByteLM(64, 2, 1 + MAX_PROMPT + MAX_ANSWER)
    imitate(checkpoint, demonstrations, args.imitation_steps, args.batch_size, description="imitating")
    histories = {
        name: train(copy.deepcopy(checkpoint), run, answers, args.steps, args.batch_size, name)
        for name, run in runs(args.batch_size).items()
    }

    table = Table(title="Diagnostics at the last training step", box=SIMPLE)
    table.add_column("run", vertical="bottom", no_wrap=True)
    for metric in METRICS:
        table.add_column(metric.replace("/", "/\n"), justify="right", no_wrap=True)
    for name, history in histories.items():
        table.add_row(name, *(f"{value:,.2f}" for value in history[-1]))
    console = Console()
    console.print(table)
    write_json(args.out, "benchmarks.figures.runs", {"metrics": list(METRICS), "runs": histories})
    draw(args.out.with_suffix(".png"), histories)
    console.print(f"wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
