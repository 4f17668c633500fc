"""Train one model from the same checkpoint with each line of `benchmarks.losses`, and compare the results.

    python -m benchmarks.compare                                            generated pairs of known difficulty
    python -m benchmarks.compare --data train.jsonl --eval test.jsonl.gz    your own pairs, in TRL's preference format

Every loss has one of its authors' settings, and all have the same learning rate: nothing is tuned. For generated pairs,
ratings are made up, because all chosen answers are equally good. For pairs from a file, they are the field
"confidence", rounded up to four steps. The script prints a table and writes it as JSON. It also draws the gradient
weight of each training pair over the log-prob difference of its two answers.
"""

import argparse
import copy
import statistics
import time
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from amapo_loss import sequence_logps
from benchmarks.demo import corpus_of, parse_args, print_table, training_parser
from benchmarks.figures.traces import draw
from benchmarks.losses import LOSSES, Batch, Loss, gap
from benchmarks.record import write_json
from benchmarks.studies.data import SLIP_RATES, Pair, both_answers
from benchmarks.studies.harness import EVALUATION_BATCH_SIZE, imitate, shuffled_batches
from benchmarks.studies.models import ByteLM, Texts, tensors

RATING_STEPS = 4  # from "negligibly better" to "significantly better"


class Answers(NamedTuple):
    """What the losses need to know of N answers under one model. Where `Batch` has two tensors, this has one."""

    sums: Tensor  # [N] log-probs
    lengths: Tensor  # [N] tokens
    on_policy: Tensor  # [N] WPO's weight of an answer: exp of the mean of log pi(token) - log sum over tokens pi^2

    def select(self, indices: Tensor) -> "Answers":
        """Return the answers with these indices [M]."""
        return Answers(*(tensor[indices] for tensor in self))


def answers(model: nn.Module, texts: Texts, indices: Tensor) -> Answers:
    """Run the model on the texts with these indices [N]."""
    tokens, labels, _ = texts.select(indices)
    logits = model(tokens)
    sums, counted = sequence_logps(logits, labels, average=False), labels >= 0
    lengths = counted.sum(1)
    with torch.no_grad():
        log_collisions = (2 * logits[:, :-1].log_softmax(-1)).logsumexp(-1)
        on_policy = torch.exp((sums - (log_collisions * counted[:, 1:]).sum(1)) / lengths)
    return Answers(sums, lengths, on_policy)


@torch.no_grad()
def all_answers(model: nn.Module, texts: Texts) -> Answers:
    """Run the model on all texts without gradients."""
    parts = [answers(model, texts, part) for part in torch.arange(len(texts.tokens)).split(EVALUATION_BATCH_SIZE)]
    return Answers(*map(torch.cat, zip(*parts)))


def as_batch(
    policy: Answers,  # of 2B answers, the chosen ones first
    ref: Answers,
    rating_gaps: Tensor,  # [B]
    mean_gap: Tensor,
) -> Batch:
    """Return what the lines may use."""

    def both(tensor: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = tensor.chunk(2)
        return chosen, rejected

    return Batch(
        sums=both(policy.sums),
        means=both(policy.sums / policy.lengths),
        ref_sums=both(ref.sums),
        ref_means=both(ref.sums / ref.lengths),
        lengths=both(policy.lengths),
        ratings=(rating_gaps, torch.zeros_like(rating_gaps)),
        rewards=both(torch.full_like(policy.sums, torch.nan)),  # no line that is compared uses them
        on_policy=both(policy.on_policy),
        mean_gap=mean_gap,
    )


def rating_gaps(pairs: list[Pair], generated: bool) -> Tensor | None:
    """Return how much better the chosen answers are rated [N], from 1 to 4, or None if the file does not say."""
    if generated:
        return torch.randint(1, RATING_STEPS + 1, (len(pairs),), generator=torch.Generator().manual_seed(0)).float()
    confidences = [pair.confidence for pair in pairs if pair.confidence is not None]
    if len(confidences) < len(pairs):
        return None
    return (torch.tensor(confidences) * RATING_STEPS).ceil().clamp(min=1)


def train(
    model: nn.Module,
    loss: Loss,
    texts: Texts,
    ref: Answers,
    ratings: Tensor,
    batches: Tensor,  # [steps, B]
    learning_rate: float,
    description: str,
) -> tuple[Tensor, Tensor]:
    """Train the model in place. Return the rankings and the gradient weights of the pairs of each step [steps, B]."""
    num_pairs = len(texts.tokens) // 2
    optimizer, mean_gap, records = torch.optim.AdamW(model.parameters(), lr=learning_rate), torch.zeros(()), []
    for pairs in track(list(batches), description):
        both = torch.cat([pairs, pairs + num_pairs])
        batch = as_batch(answers(model, texts, both), ref.select(both), ratings[pairs], mean_gap)
        # beta-DPO's running mean starts at 0 and contains the current batch, as in its authors' code.
        mean_gap = 0.9 * mean_gap + 0.1 * gap(batch.sums, batch.ref_sums).mean().detach()
        output = loss(batch._replace(mean_gap=mean_gap))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        records.append(((batch.means[0] - batch.means[1]).detach(), output.diagnostics.gradient_weights))
    rankings, weights = map(torch.stack, zip(*records))
    return rankings, weights


def evaluate(loss: Loss, policy: Answers, ref: Answers, pairs: list[Pair]) -> dict[str, float]:
    """Return the share of pairs that are ranked correctly, by the average log-prob and by the score of the loss."""
    batch = as_batch(policy, ref, torch.ones(len(pairs)), torch.zeros(()))
    correct = (batch.means[0] > batch.means[1]).float()
    metrics = {"ranking accuracy": correct.mean().item()}
    for difficulty in sorted({pair.source for pair in pairs} & set(SLIP_RATES)):
        metrics[f"accuracy on {difficulty} pairs"] = (
            correct[[pair.source == difficulty for pair in pairs]].mean().item()
        )
    return metrics | {"accuracy by own score": (loss(batch).diagnostics.scores > 0).float().mean().item()}


def main() -> None:
    """Run the comparison; exit with a message if a file cannot be read or written."""
    parser = training_parser(__doc__)
    parser.add_argument("--orders", type=int, default=3, help="runs for each loss, with other orders of the pairs")
    args = parse_args(parser, "compare")
    try:
        run(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"compare: {error}") from error


def run(args: argparse.Namespace) -> None:
    """Train the checkpoint, train models from it with each loss, and write the results."""
    console, started, corpus = Console(), time.perf_counter(), corpus_of(args)
    demonstrations, texts, held_out = (
        tensors(prompts_and_answers, args.max_prompt, args.max_answer)[0]
        for prompts_and_answers in (corpus.demonstrations, both_answers(corpus.train), both_answers(corpus.held_out))
    )
    torch.manual_seed(args.seed)
    checkpoint = ByteLM(args.width, args.layers, 1 + args.max_prompt + args.max_answer)
    imitate(checkpoint, demonstrations, args.imitation_steps, args.batch_size, description="imitating")
    ref, held_out_ref = all_answers(checkpoint, texts), all_answers(checkpoint, held_out)
    ratings = rating_gaps(corpus.train, generated=args.data is None)

    not_compared = {loss.name: loss.not_compared for loss in LOSSES if loss.not_compared}
    if ratings is None:
        not_compared |= {loss.name: "the pairs have no confidences" for loss in LOSSES if "ratings" in loss.line}
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    traces: dict[str, tuple[Tensor, Tensor]] = {}
    for loss in (loss for loss in LOSSES if loss.name not in not_compared):
        runs = []
        for order in range(args.orders):
            model = copy.deepcopy(checkpoint)
            batches = shuffled_batches(len(corpus.train), args.batch_size, args.steps, order)
            gaps = torch.ones(len(corpus.train)) if ratings is None else ratings
            description = f"{loss.name}, {order + 1} of {args.orders}"
            rankings, weights = train(model, loss, texts, ref, gaps, batches, args.learning_rate, description)
            misranked = rankings <= 0
            runs.append(
                evaluate(loss, all_answers(model, held_out), held_out_ref, corpus.held_out)
                | {
                    "gradient weight, misranked pairs": weights[misranked].mean().item(),
                    "gradient weight, correctly ranked pairs": weights[~misranked].mean().item(),
                }
            )
            traces.setdefault(loss.name, (rankings, weights))
        rows[loss.name] = {metric: mean_and_std([run[metric] for run in runs]) for metric in runs[0]}

    before = evaluate(LOSSES[-1], held_out_ref, held_out_ref, corpus.held_out)
    del before["accuracy by own score"]  # the checkpoint has no loss
    means = {name: {metric: mean for metric, (mean, _) in row.items()} for name, row in rows.items()}
    print_table(console, "Held-out pairs ranked correctly, and gradient weights in training", means)
    console.print("imitation alone:", ", ".join(f"{metric} {value:.1%}" for metric, value in before.items()))
    for name, reason in not_compared.items():
        console.print(f"not compared: {name}, because {reason}")
    seconds = round(time.perf_counter() - started)
    results = {
        "settings": {name: value for name, value in vars(args).items() if isinstance(value, int | float)},
        "seconds": seconds,
        "imitation alone": before,
        "mean and standard deviation over the orders": rows,
        "not compared": not_compared,
    }
    write_json(args.out, "benchmarks.compare", results)
    draw(args.out.with_suffix(".png"), traces, columns=5, panel_size=(2.1, 1.8))
    console.print(f"{seconds} s; wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Return the mean of the values and their standard deviation, which is 0 for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
