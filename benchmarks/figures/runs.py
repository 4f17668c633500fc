"""What the diagnostics look like in a run that goes well, and in three that do not.

    python -m benchmarks.figures.runs

The demo's model and pairs, AMaPO's paper formula, one mistake a run: sums of log-probs under a beta that is meant for
averages; chosen and rejected answers swapped; a learning rate a hundred times too large. Prints a table of the last
steps, writes JSON, draws the picture of all steps.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from amapo_loss import AMaPOOutput, amapo_loss
from benchmarks.record import RESULTS, write_json, write_picture
from benchmarks.studies.data import both_answers, generated_corpus
from benchmarks.studies.harness import Logps, averaged, imitate, pair_logps, shuffled_batches
from benchmarks.studies.models import ByteLM, Texts, tensors

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

SHOWN = (  # entries of the summary, and how each is drawn
    ("amapo/score_mean", "symlog"),
    ("amapo/margin_mean", "log"),
    ("rewards/accuracies", "linear"),
    ("logps/chosen", "symlog"),
)
MAX_PROMPT, MAX_ANSWER = 96, 256


class Run(NamedTuple):
    """A way to train."""

    objective: Callable[[Logps], AMaPOOutput]
    learning_rate: float = 3e-4


def swapped(policy: Logps) -> AMaPOOutput:
    """With the labels the wrong way round."""
    return averaged(amapo_loss)(
        Logps(policy.rejected, policy.chosen, policy.rejected_lengths, policy.chosen_lengths), policy
    )


RUNS = {
    "healthy": Run(lambda policy: averaged(amapo_loss)(policy, policy)),
    "sums, not averages": Run(lambda policy: amapo_loss(policy.chosen, policy.rejected)),
    "answers swapped": Run(swapped),
    "learning rate x 100": Run(lambda policy: averaged(amapo_loss)(policy, policy), learning_rate=3e-2),
}


def summaries(model: ByteLM, run: Run, texts: Texts, steps: int, batch_size: int, description: str) -> Any:
    """[steps, entries] of preference training, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate)
    found = []
    for rows in track(list(shuffled_batches(len(texts.tokens) // 2, batch_size, steps)), description):
        loss, diagnostics = run.objective(pair_logps(model, texts, rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        summary = diagnostics.summary()
        found.append([summary[name].item() for name, _ in SHOWN])
    return found


def draw(path: Path, found: dict[str, list[list[float]]]) -> None:
    """A panel for each entry, a line for each run."""
    figure, panels = plt.subplots(1, len(SHOWN), figsize=(3.4 * len(SHOWN), 3.2))
    for column, (panel, (name, scale)) in enumerate(zip(panels, SHOWN)):
        for run, steps in found.items():
            panel.plot([entries[column] for entries in steps], label=run, linewidth=2.5 if run == "healthy" else 1.2)
        panel.set(title=name, xlabel="step", yscale=scale)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(found), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    write_picture(path, figure)


def main() -> None:
    """Imitate once, then train each way from there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imitation-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULTS / "runs.json", help="the picture goes beside it")
    args = parser.parse_args()

    corpus = generated_corpus(pairs=args.pairs, held_out=8, demonstrations=2 * args.pairs, seed=0)
    demonstrations, answers = (
        tensors(texts, MAX_PROMPT, MAX_ANSWER)[0] for texts in (corpus.demonstrations, both_answers(corpus.train))
    )
    torch.manual_seed(0)
    checkpoint = ByteLM(64, 2, 1 + MAX_PROMPT + MAX_ANSWER)
    imitate(checkpoint, demonstrations, args.imitation_steps, args.batch_size, description="imitating")
    found = {
        name: summaries(copy.deepcopy(checkpoint), run, answers, args.steps, args.batch_size, name)
        for name, run in RUNS.items()
    }

    table = Table(title="The last step", box=SIMPLE)
    table.add_column("", no_wrap=True)
    for name, _ in SHOWN:
        table.add_column(name, justify="right")
    for run, steps in found.items():
        table.add_row(run, *(f"{value:,.2f}" for value in steps[-1]))
    console = Console()
    console.print(table)
    write_json(args.out, "benchmarks.figures.runs", {"entries": [name for name, _ in SHOWN], "runs": found})
    draw(args.out.with_suffix(".png"), found)
    console.print(f"wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
