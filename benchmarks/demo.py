"""The main job: imitate, then learn a preference from that one checkpoint with DPO, SimPO and AMaPO, and compare.

    python -m benchmarks.demo                                            generated pairs of known difficulty
    python -m benchmarks.demo --data train.jsonl --eval test.jsonl.gz    your own, in TRL's preference format

Prints a table, writes it as JSON, and draws how each loss spends its gradient over the ranking score.
"""

import argparse
import copy
import time
from pathlib import Path

import matplotlib
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from amapo_loss import AdaptiveMargin
from benchmarks.record import RESULTS, write_json, write_picture
from benchmarks.studies.data import SLIP_RATES, Pair, both_answers, file_corpus, generated_corpus
from benchmarks.studies.harness import Logps, Optimization, Trace, Treatment, all_logps, as_pairs, imitate, prefer
from benchmarks.studies.models import ByteLM, tensors

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

Figures = dict[str, float]

# Each with its authors' usual settings.
TREATMENTS = {
    "DPO": Treatment("dpo", beta=0.1),
    "SimPO": Treatment("simpo", gamma=1.0),
    "AMaPO paper": Treatment(),
    "AMaPO released": Treatment(margin=AdaptiveMargin(formula="released")),
}


def evaluate(treatment: Treatment, policy: Logps, ref: Logps, pairs: list[Pair]) -> Figures:
    """Share of the pairs that the model ranks right, in all and by difficulty; mean and spread of the loss's scores."""
    ranked_right = (policy.ranking() > 0).float()
    figures = {"ranked right": ranked_right.mean().item()}
    for difficulty in sorted({pair.source for pair in pairs} & set(SLIP_RATES)):
        of_this = torch.tensor([pair.source == difficulty for pair in pairs])
        figures[difficulty] = ranked_right[of_this].mean().item()
    summary = treatment.objective(len(pairs))(policy, ref).diagnostics.summary()
    return figures | {"score mean": summary["amapo/score_mean"].item(), "score std": summary["amapo/score_std"].item()}


def spent(trace: Trace) -> Figures:
    """Mean gradient weight in training on the pairs that the model ranked wrong at that moment, and right."""
    wrong = trace.ranking <= 0
    return {"weight wrong": trace.weights[wrong].mean().item(), "weight right": trace.weights[~wrong].mean().item()}


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


def draw(path: Path, traces: dict[str, Trace]) -> None:
    """Gradient weight against ranking, at the start and at the end of training, one panel a loss."""
    figure, panels = plt.subplots(1, len(traces), figsize=(3.2 * len(traces), 3.2), sharex=True, sharey=True)
    for panel, (name, trace) in zip(panels, traces.items()):
        tenth = -(-len(trace.ranking) // 10)
        for part, label in ((slice(tenth), "first tenth of training"), (slice(-tenth, None), "last tenth")):
            panel.scatter(trace.ranking[part], trace.weights[part], s=2, label=label)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set(title=name, xlabel="ranking: nats a byte, chosen - rejected", ylim=(-0.03, 1.03))
    panels[0].set_ylabel("gradient weight of the pair")
    panels[0].legend(markerscale=4, loc="lower left")
    figure.tight_layout()
    write_picture(path, figure)


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
    try:
        run(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"demo: {error}") from error


def run(args: argparse.Namespace) -> None:
    """The whole of it."""
    console, started = Console(), time.perf_counter()
    if args.data:
        corpus = file_corpus(args.data, args.eval)
    else:
        corpus = generated_corpus(pairs=4096, held_out=1024, demonstrations=8192, seed=args.seed)

    texts, cut = {}, {}
    for name, these in {
        "demonstrations": corpus.demonstrations,
        "training answers": both_answers(corpus.train),
        "held-out answers": both_answers(corpus.held_out),
    }.items():
        texts[name], cut[name] = tensors(these, args.max_prompt, args.max_answer)
        if cut[name]:
            limits = f"--max-prompt {args.max_prompt} or --max-answer {args.max_answer} bytes"
            console.print(f"{cut[name]} of {len(these)} {name} are longer than {limits} and are cut")

    torch.manual_seed(args.seed)
    checkpoint = ByteLM(args.width, args.layers, 1 + args.max_prompt + args.max_answer)
    imitate(checkpoint, texts["demonstrations"], args.imitation_steps, args.batch_size, description="imitating")
    ref = all_logps(checkpoint, texts["training answers"], "reference")
    held_out_ref = as_pairs(*all_logps(checkpoint, texts["held-out answers"], "evaluating"))

    rows = {"imitation alone": evaluate(TREATMENTS["SimPO"], held_out_ref, held_out_ref, corpus.held_out)}
    traces = {}
    optimization = Optimization(args.steps, args.batch_size, args.learning_rate)
    for name, treatment in TREATMENTS.items():
        model = copy.deepcopy(checkpoint)
        description = f"training with {name}"
        traces[name] = prefer(model, treatment, texts["training answers"], ref, optimization, description=description)
        policy = as_pairs(*all_logps(model, texts["held-out answers"], "evaluating"))
        rows[name] = evaluate(treatment, policy, held_out_ref, corpus.held_out) | spent(traces[name])

    print_table(console, rows)
    seconds = round(time.perf_counter() - started)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
    write_json(
        args.out, "benchmarks.demo", {"settings": settings, "texts cut": cut, "seconds": seconds, "models": rows}
    )
    draw(args.out.with_suffix(".png"), traces)
    console.print(f"{seconds} s; wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
