"""Train a small language model with DPO, SimPO and AMaPO from the same checkpoint, and compare the results.

    python -m benchmarks.demo                                            generated pairs of known difficulty
    python -m benchmarks.demo --data train.jsonl --eval test.jsonl.gz    your own pairs, in TRL's preference format

The checkpoint is trained by supervised fine-tuning on demonstrations. The script prints two tables and writes them as
JSON. It also draws the gradient weight of each training pair over the log-prob difference of its two answers.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from amapo_loss import AdaptiveMargin
from benchmarks.figures.traces import draw
from benchmarks.record import RESULTS, write_json
from benchmarks.studies.data import SLIP_RATES, Corpus, Pair, both_answers, file_corpus, generated_corpus
from benchmarks.studies.harness import Logps, Optimization, Trace, Treatment, all_logps, as_pairs, imitate, prefer
from benchmarks.studies.models import ByteLM, tensors

Metrics = dict[str, float]

# Each loss has its authors' usual settings.
TREATMENTS = {
    "DPO": Treatment("dpo", beta=0.1),
    "SimPO": Treatment("simpo", gamma=1.0),
    "AMaPO, paper formula": Treatment(),
    "AMaPO, released formula": Treatment(margin=AdaptiveMargin(formula="released")),
}


def evaluate(treatment: Treatment, policy: Logps, ref: Logps, pairs: list[Pair]) -> Metrics:
    """Return the share of pairs that the model ranks correctly, and the mean and standard deviation of the scores.

    The share of generated pairs is also given for each difficulty. The scores are those of the treatment's loss.
    """
    is_correct = (policy.ranking() > 0).float()
    metrics = {"ranking accuracy": is_correct.mean().item()}
    for difficulty in sorted({pair.source for pair in pairs} & set(SLIP_RATES)):
        has_difficulty = torch.tensor([pair.source == difficulty for pair in pairs])
        metrics[f"accuracy on {difficulty} pairs"] = is_correct[has_difficulty].mean().item()
    summary = treatment.objective(len(pairs))(policy, ref).diagnostics.summary()
    return metrics | {"score mean": summary["amapo/score_mean"].item(), "score std": summary["amapo/score_std"].item()}


def mean_weights(trace: Trace) -> Metrics:
    """Return the mean gradient weight of misranked pairs and that of correctly ranked pairs, over all of training.

    Whether a pair is misranked is decided by the model at the step that trains on the pair.
    """
    misranked = trace.ranking <= 0
    return {
        "gradient weight, misranked pairs": trace.weights[misranked].mean().item(),
        "gradient weight, correctly ranked pairs": trace.weights[~misranked].mean().item(),
    }


def print_table(console: Console, title: str, rows: dict[str, Metrics]) -> None:
    """Print one row of metrics for each model, with accuracies in percent."""
    table = Table(title=title, box=SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column("model", vertical="bottom", no_wrap=True)
    for metric in next(iter(rows.values())):
        table.add_column(metric.replace(" ", "\n"), justify="right", vertical="bottom", no_wrap=True)
    for model, metrics in rows.items():
        cells = (f"{value:.1%}" if "accuracy" in metric else f"{value:.2f}" for metric, value in metrics.items())
        table.add_row(model, *cells)
    console.print(table)


def training_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of the pairs, the model and its training."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="training pairs: JSON lines with prompt, chosen and rejected, gzipped or not"
    )
    parser.add_argument("--eval", type=Path, help="held-out pairs, in the format of --data")
    parser.add_argument("--imitation-steps", type=int, default=600, help="steps of supervised fine-tuning")
    parser.add_argument(
        "--steps",
        type=int,
        default=24,
        help="steps of preference training; the default stops before every loss reaches an accuracy of 100%%",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="texts in a step of fine-tuning, pairs in a step of preference training",
    )
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="learning rate of preference training")
    parser.add_argument("--width", type=int, default=64, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=2, help="number of layers of the model")
    parser.add_argument("--max-prompt", type=int, default=96, help="bytes kept from the end of a prompt")
    parser.add_argument("--max-answer", type=int, default=256, help="bytes kept from the start of an answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated pairs and of the model's weights")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file to write; the picture is written beside it (default: a file in build/results)",
    )
    return parser


def parse_args(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Parse the command line of a benchmark. Its results have this name unless the command line says otherwise."""
    args = parser.parse_args()
    if (args.data is None) != (args.eval is None):
        parser.error("--data and --eval must be given together")
    args.out = args.out or RESULTS / f"{name}{'_own' if args.data else ''}.json"
    return args


def corpus_of(args: argparse.Namespace) -> Corpus:
    """Return the pairs of the command line's files, or generated ones."""
    if args.data:
        return file_corpus(args.data, args.eval)
    return generated_corpus(pairs=4096, held_out=1024, demonstrations=8192, seed=args.seed)


def main() -> None:
    """Run the demo; exit with a message if a file cannot be read or written."""
    args = parse_args(training_parser(__doc__), "demo")
    try:
        run(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"demo: {error}") from error


def run(args: argparse.Namespace) -> None:
    """Train the checkpoint, train one model from it with each loss, and write the results."""
    console, started, corpus = Console(), time.perf_counter(), corpus_of(args)

    texts, num_truncated = {}, {}
    for name, prompts_and_answers in {
        "demonstrations": corpus.demonstrations,
        "training answers": both_answers(corpus.train),
        "held-out answers": both_answers(corpus.held_out),
    }.items():
        texts[name], num_truncated[name] = tensors(prompts_and_answers, args.max_prompt, args.max_answer)
        if num_truncated[name]:
            console.print(
                f"{num_truncated[name]} of {len(prompts_and_answers)} {name} are truncated to "
                f"--max-prompt {args.max_prompt} and --max-answer {args.max_answer} bytes"
            )

    torch.manual_seed(args.seed)
    checkpoint = ByteLM(args.width, args.layers, 1 + args.max_prompt + args.max_answer)
    imitate(checkpoint, texts["demonstrations"], args.imitation_steps, args.batch_size, description="imitating")
    ref = all_logps(checkpoint, texts["training answers"], "computing reference log-probs")
    held_out_ref = as_pairs(*all_logps(checkpoint, texts["held-out answers"], "evaluating"))

    held_out_metrics = {"imitation alone": evaluate(TREATMENTS["SimPO"], held_out_ref, held_out_ref, corpus.held_out)}
    weights, traces = {}, {}
    optimization = Optimization(args.steps, args.batch_size, args.learning_rate)
    for name, treatment in TREATMENTS.items():
        model = copy.deepcopy(checkpoint)
        description = f"training with {name}"
        traces[name] = prefer(model, treatment, texts["training answers"], ref, optimization, description=description)
        policy = as_pairs(*all_logps(model, texts["held-out answers"], "evaluating"))
        held_out_metrics[name] = evaluate(treatment, policy, held_out_ref, corpus.held_out)
        weights[name] = mean_weights(traces[name])

    print_table(console, "Ranking accuracy and scores on held-out pairs", held_out_metrics)
    print_table(console, "Mean gradient weight in training", weights)
    seconds = round(time.perf_counter() - started)
    results = {
        "settings": {name: value for name, value in vars(args).items() if isinstance(value, int | float)},
        "truncated texts": num_truncated,
        "seconds": seconds,
        "models": {name: metrics | weights.get(name, {}) for name, metrics in held_out_metrics.items()},
    }
    write_json(args.out, "benchmarks.demo", results)
    points = {name: (trace.ranking, trace.weights) for name, trace in traces.items()}
    draw(args.out.with_suffix(".png"), points, columns=len(points), panel_size=(3.2, 3.2))
    console.print(f"{seconds} s; wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
