"""The main job: imitate, then learn a preference from that one checkpoint with DPO, SimPO and AMaPO, and compare.

    python -m benchmarks.demo                                            generated pairs of known difficulty
    python -m benchmarks.demo --data train.jsonl --eval test.jsonl.gz    your own, in TRL's preference format

Prints a table, writes it as JSON, and draws how each loss spends its gradient over the ranking score.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from amapo_loss import AdaptiveMargin, AMaPOOutput, amapo_loss, dpo_loss, sequence_logps, simpo_loss
from benchmarks.byte_lm import ByteLM, tensors
from benchmarks.pairs import SLIP_RATES, Pair, file_corpus, generated_corpus
from benchmarks.record import RESULTS, write_json

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

Figures = dict[str, float]


class Logps(NamedTuple):
    """Summed log-probs and lengths of some pairs under one model, [B] each."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    def ranking(self) -> Tensor:
        """Difference of the average log-probs, nats a byte: which answer the model itself prefers."""
        return (self.chosen / self.chosen_lengths - self.rejected / self.rejected_lengths).detach()


# Policy and reference log-probs in, loss and diagnostics out.
Objective = Callable[[Logps, Logps], AMaPOOutput]


def averaged(loss: Callable[..., AMaPOOutput], **options: Any) -> Objective:
    """A loss without a reference, on log-probs averaged over the answer."""
    return lambda policy, _: loss(
        policy.chosen,
        policy.rejected,
        chosen_lengths=policy.chosen_lengths,
        rejected_lengths=policy.rejected_lengths,
        **options,
    )


# Each with its authors' usual settings.
OBJECTIVES: dict[str, Objective] = {
    "DPO": lambda policy, ref: dpo_loss(policy.chosen, policy.rejected, ref.chosen, ref.rejected, beta=0.1),
    "SimPO": averaged(simpo_loss, beta=2.0, gamma=1.0),
    "AMaPO paper": averaged(amapo_loss, beta=2.0),
    "AMaPO released": averaged(amapo_loss, beta=2.0, margin=AdaptiveMargin(formula="released")),
}


class Texts(NamedTuple):
    """Tokens and labels of some texts, [N, T] each."""

    tokens: Tensor
    labels: Tensor

    def rows(self, rows: Tensor) -> "Texts":
        """Some of them, without the columns that only pad."""
        tokens, labels = self.tokens[rows], self.labels[rows]
        length = int((labels >= 0).any(0).nonzero().max()) + 1
        return Texts(tokens[:, :length], labels[:, :length])


def pair_logps(model: ByteLM, texts: Texts, pairs: Tensor) -> Logps:
    """Of the pairs with these numbers, where `texts` has all chosen answers first, then all rejected ones."""
    tokens, labels = texts.rows(torch.cat([pairs, pairs + len(texts.tokens) // 2]))
    sums = sequence_logps(model(tokens), labels, average=False)
    lengths = (labels >= 0).sum(1)
    return Logps(*sums.chunk(2), *lengths.chunk(2))


@torch.no_grad()
def all_logps(model: ByteLM, texts: Texts, description: str) -> Logps:
    """Of every pair."""
    batches = torch.arange(len(texts.tokens) // 2).split(64)
    parts = [pair_logps(model, texts, batch) for batch in track(batches, description)]
    return Logps(*map(torch.cat, zip(*parts)))


def imitate(model: ByteLM, texts: Texts, steps: int, batch_size: int) -> None:
    """Supervised fine-tuning, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for rows in track(list(shuffled_batches(len(texts.tokens), batch_size, steps)), "imitating"):
        batch = texts.rows(rows)
        loss = -sequence_logps(model(batch.tokens), batch.labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


class Spending(NamedTuple):
    """The gradient weight that a loss put on each pair, and how the model ranked it then; [steps, B] each."""

    ranking: Tensor
    weights: Tensor


def prefer(
    model: ByteLM, objective: Objective, texts: Texts, ref: Logps,
    steps: int, batch_size: int, learning_rate: float, description: str,
) -> Spending:  # fmt: skip
    """Preference training, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    ranking, weights = [], []
    for rows in track(list(shuffled_batches(len(ref.chosen), batch_size, steps)), description):
        policy = pair_logps(model, texts, rows)
        loss, diagnostics = objective(policy, Logps(*(values[rows] for values in ref)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ranking.append(policy.ranking())
        weights.append(diagnostics.gradient_weights)
    return Spending(torch.stack(ranking), torch.stack(weights))


def shuffled_batches(n: int, batch_size: int, steps: int) -> Tensor:
    """[steps, batch_size] numbers below n, epoch after epoch in a new order."""
    needed = steps * batch_size
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.randperm(n, generator=generator) for _ in range(-(-needed // n))]
    return torch.cat(epochs)[:needed].view(steps, batch_size)


def evaluate(objective: Objective, policy: Logps, ref: Logps, pairs: list[Pair]) -> Figures:
    """Share of the pairs that the model ranks right, in all and by difficulty; mean and spread of the loss's scores."""
    ranked_right = (policy.ranking() > 0).float()
    figures = {"ranked right": ranked_right.mean().item()}
    for difficulty in sorted({pair.difficulty for pair in pairs} & set(SLIP_RATES)):
        of_this = torch.tensor([pair.difficulty == difficulty for pair in pairs])
        figures[difficulty] = ranked_right[of_this].mean().item()
    summary = objective(policy, ref).diagnostics.summary()
    return figures | {"score mean": summary["amapo/score_mean"].item(), "score std": summary["amapo/score_std"].item()}


def spent(spending: Spending) -> Figures:
    """Mean gradient weight in training on the pairs that the model ranked wrong at that moment, and right."""
    wrong = spending.ranking <= 0
    return {
        "weight wrong": spending.weights[wrong].mean().item(),
        "weight right": spending.weights[~wrong].mean().item(),
    }


def print_table(console: Console, rows: dict[str, Figures]) -> None:
    """One row a model; shares in percent."""
    columns = max(rows.values(), key=len)
    table = Table(title="Held-out pairs, and the gradient weights in training", box=SIMPLE, collapse_padding=True)
    table.add_column(no_wrap=True)
    for column in columns:
        table.add_column(column.replace(" ", "\n"), justify="right", vertical="bottom", no_wrap=True)
    for name, figures in rows.items():
        shares = [f"{figures[column]:.1%}" for column in columns if " " not in column or column == "ranked right"]
        others = [f"{figures[column]:.2f}" if column in figures else "" for column in columns][len(shares) :]
        table.add_row(name, *shares, *others)
    console.print(table)


def draw(path: Path, spendings: dict[str, Spending]) -> None:
    """Gradient weight against ranking, at the start and at the end of training, one panel a loss."""
    figure, panels = plt.subplots(1, len(spendings), figsize=(3.2 * len(spendings), 3.2), sharex=True, sharey=True)
    for panel, (name, (ranking, weights)) in zip(panels, spendings.items()):
        tenth = -(-len(ranking) // 10)
        for part, label in ((slice(tenth), "first tenth of training"), (slice(-tenth, None), "last tenth")):
            panel.scatter(ranking[part], weights[part], s=2, label=label)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set(title=name, xlabel="ranking: nats a byte, chosen - rejected", ylim=(-0.03, 1.03))
    panels[0].set_ylabel("gradient weight of the pair")
    panels[0].legend(markerscale=4, loc="lower left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def parse_args() -> argparse.Namespace:
    """The defaults run in three minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="training pairs: JSON lines with prompt, chosen, rejected; gzip or not"
    )
    parser.add_argument("--eval", type=Path, help="held-out pairs in the same format")
    parser.add_argument("--imitation-steps", type=int, default=600)
    parser.add_argument(
        "--steps",
        type=int,
        default=24,
        help="of preference training, for each loss; the default stops before all reach 100%%",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="texts, then pairs, a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of preference training")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--max-prompt", type=int, default=96, help="bytes kept of a prompt, its last")
    parser.add_argument("--max-answer", type=int, default=256, help="bytes kept of an answer, its first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="JSON file; the picture goes beside it (default: in benchmarks/results)"
    )
    args = parser.parse_args()
    if (args.data is None) != (args.eval is None):
        parser.error("--data and --eval go together")
    args.out = args.out or RESULTS / f"demo{'_own' if args.data else ''}.json"
    return args


def main() -> None:
    """Load, encode, imitate, train once a loss, report."""
    args = parse_args()
    console, started = Console(), time.perf_counter()
    try:
        if args.data:
            corpus = file_corpus(args.data, args.eval)
        else:
            corpus = generated_corpus(pairs=4096, held_out=1024, demonstrations=8192, seed=args.seed)
    except (OSError, ValueError) as error:
        raise SystemExit(f"demo: {error}") from error

    texts, cut = {}, {}
    for name, these in {
        "demonstrations": corpus.demonstrations,
        "training answers": both_answers(corpus.train),
        "held-out answers": both_answers(corpus.held_out),
    }.items():
        tokens, labels, cut[name] = tensors(these, args.max_prompt, args.max_answer)
        texts[name] = Texts(tokens, labels)
        if cut[name]:
            limits = f"--max-prompt {args.max_prompt} or --max-answer {args.max_answer} bytes"
            console.print(f"{cut[name]} of {len(these)} {name} are longer than {limits} and are cut")

    torch.manual_seed(args.seed)
    checkpoint = ByteLM(args.width, args.layers, 1 + args.max_prompt + args.max_answer)
    imitate(checkpoint, texts["demonstrations"], args.imitation_steps, args.batch_size)
    ref = all_logps(checkpoint, texts["training answers"], "reference")
    held_out_ref = all_logps(checkpoint, texts["held-out answers"], "evaluating")

    rows = {"imitation alone": evaluate(OBJECTIVES["SimPO"], held_out_ref, held_out_ref, corpus.held_out)}
    spendings = {}
    for name, objective in OBJECTIVES.items():
        model = copy.deepcopy(checkpoint)
        spendings[name] = prefer(
            model, objective, texts["training answers"], ref,
            args.steps, args.batch_size, args.learning_rate, f"training with {name}",
        )  # fmt: skip
        policy = all_logps(model, texts["held-out answers"], "evaluating")
        rows[name] = evaluate(objective, policy, held_out_ref, corpus.held_out) | spent(spendings[name])

    print_table(console, rows)
    seconds = round(time.perf_counter() - started)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
    write_json(
        args.out, "benchmarks.demo", {"settings": settings, "texts cut": cut, "seconds": seconds, "models": rows}
    )
    draw(args.out.with_suffix(".png"), spendings)
    console.print(f"{seconds} s; wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


def both_answers(pairs: list[Pair]) -> list[tuple[str, str]]:
    """Prompts with the chosen answers, then prompts with the rejected ones."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]


if __name__ == "__main__":
    main()
