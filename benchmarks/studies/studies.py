"""The paper's experiments, each one command, on generated pairs or your own.

    python -m benchmarks.studies ranking
    python -m benchmarks.studies ranking --data train.jsonl.gz --eval test.jsonl.gz --rm-bench rm_bench_chat.json.gz
    python -m benchmarks.studies all --scale gpu --data train.jsonl.gz --eval test.jsonl.gz

Prints a table, writes it as JSON with every run behind it, draws a picture. Interrupted, the same command goes on where
it was. `--redraw` makes table and picture anew from the JSON.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from amapo_loss import AdaptiveMargin
from benchmarks.record import RESULTS, write_json, write_picture, write_record
from benchmarks.studies.harness import Figures, Treatment
from benchmarks.studies.report import Column, curve, dots, line, of, print_table, tabulate, treatments, values
from benchmarks.studies.sweep import BANDS, IMITATION, Run, Settings, cores, in_band, load, sweep

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

PLAIN, PAPER, RELEASED = "SimPO, gamma 0", "AMaPO, paper", "AMaPO, released"


class Study(NamedTuple):
    """A question, the treatments that answer it, and how the answer is shown."""

    asks: str
    treatments: dict[str, Treatment]
    baseline: str  # which the others are compared with, seed by seed
    columns: dict[str, Column]
    draw: Callable[[Figure, list[Run]], None]
    remark: Callable[[list[Run]], str] = lambda runs: ""  # what the table does not say
    keeps_curves: bool = False  # in its JSON, where the picture needs them


def over_styles(difficulty: str) -> Column:
    """RM-Bench's accuracy, averaged over its files."""

    def average(figures: Figures) -> float | None:
        found = [entry[difficulty] for entry in figures["styles"].values()]
        return sum(found) / len(found) if found else None

    return average


HELD_OUT: dict[str, Column] = {"held out": of("held out")}
BY_BAND: dict[str, Column] = {f"confidence {name}": of("bands", name) for name in BANDS}
RM_BENCH: dict[str, Column] = {f"RM-Bench {name}": over_styles(name) for name in ("easy", "normal", "hard")}
WEIGHTS: dict[str, Column] = {f"weight {name}": of(f"weight {name}") for name in ("correct", "misranked")}


# 1. Ranking accuracy. The learning rate is the same for all.

GAMMAS = {f"SimPO, gamma {gamma:g}": gamma for gamma in (0.5, 1.0, 2.0)}
LOSSES = {
    "DPO": Treatment("dpo", beta=0.1),
    PLAIN: Treatment("simpo"),
    **{name: Treatment("simpo", gamma=gamma) for name, gamma in GAMMAS.items()},
    PAPER: Treatment(),
    RELEASED: Treatment(margin=AdaptiveMargin(formula="released")),
}


def tuned(runs: list[Run]) -> str:
    """SimPO with the gamma that validates best."""
    return max(GAMMAS, key=lambda name: values(runs, name, of("validation")).mean().item())


def draw_ranking(figure: Figure, runs: list[Run]) -> None:
    """Held-out pairs, and RM-Bench's three difficulties."""
    pairs, styles = figure.subplots(1, 2)
    dots(pairs, runs, of("held out"), "held-out pairs ranked right", PLAIN)
    for name in (IMITATION, "DPO", PLAIN, tuned(runs), PAPER, RELEASED):
        found = [values(runs, name, column) for column in RM_BENCH.values()]
        if all(map(len, found)):
            styles.plot([of_seeds.mean().item() for of_seeds in found], "o-", label=name)
    styles.set_xticks(range(len(RM_BENCH)), ["easy", "normal", "hard"])
    styles.set(title="RM-Bench: style of the chosen against the rejected", ylabel="chosen outscores rejected")
    if styles.lines:
        styles.legend(fontsize=8)


# 2. Ablation.

BOTH = AdaptiveMargin(normalize=False, scaling="linear")
ABLATIONS = {
    PAPER: LOSSES[PAPER],
    "no Z-normalization": Treatment(margin=AdaptiveMargin(normalize=False)),
    "no exponential scaling": Treatment(margin=AdaptiveMargin(scaling="linear")),
    "no zero-clipping": Treatment(margin=AdaptiveMargin(clip=False)),
    "no normalization, no exponential": Treatment(margin=BOTH),
    PLAIN: LOSSES[PLAIN],  # no margin at all
}


def draw_ablation(figure: Figure, runs: list[Run]) -> None:
    """Held-out pairs, and the weight on misranked ones."""
    pairs, weights = figure.subplots(1, 2, sharey=True)
    dots(pairs, runs, of("held out"), "held-out pairs ranked right", PAPER)
    for ranked, color in (("correct", "C2"), ("misranked", "C3")):
        for row, name in enumerate(treatments(runs)):
            found = values(runs, name, of(f"weight {ranked}"))
            label = ranked if name == PAPER else None
            weights.plot(found, [row] * len(found), "o", color=color, alpha=0.6, label=label)
    weights.set_xlabel("mean gradient weight in training")
    weights.legend(fontsize=8)


# 3. Batch size. The optimizer's batch is the same for all; statistics are taken over a part of it.

BATCH = 128
PARTS = {pairs: f"{pairs} pairs" for pairs in (2, 4, 8, 16, 32, 64)}
WINDOWS = {pairs: f"{pairs} pairs, window" for pairs in (2, 8, 32)}
WHOLE = f"{BATCH} pairs, exact"
BATCH_SIZES = {
    WHOLE: Treatment(batch_size=BATCH),
    **{name: Treatment(batch_size=BATCH, micro_batch=pairs) for pairs, name in PARTS.items()},
    **{
        name: Treatment(batch_size=BATCH, micro_batch=pairs, estimator="ScoreWindow") for pairs, name in WINDOWS.items()
    },
}


def draw_batch_size(figure: Figure, runs: list[Run]) -> None:
    """Accuracy, and the error of the gradient weights, over the pairs that statistics are taken over."""
    for axes, column, label in zip(
        figure.subplots(1, 2),
        (of("held out"), of("gradient error")),
        ("held-out pairs ranked right", "error of the gradient weights, relative"),
    ):
        line(axes, runs, {**PARTS, BATCH: WHOLE}, column, "micro-batch alone")
        line(axes, runs, WINDOWS, column, f"with a window of {BATCH}")
        axes.set(xscale="log", xlabel="pairs in a micro-batch", ylabel=label)
        axes.set_xticks([*PARTS, BATCH], [str(pairs) for pairs in (*PARTS, BATCH)], minor=False)
        axes.minorticks_off()
        axes.legend(fontsize=8)


# 4. Gradient flow.

FLOW = {name: LOSSES[name] for name in ("DPO", PLAIN, "SimPO, gamma 1", PAPER, RELEASED)}
CASES = {  # by how it ranks and whether it has a margin above 0: what the margin does to the pair's gradient
    "misranked, margin": "amplified",
    "misranked, no margin": "underfitted",
    "correct, margin": "overfitted",
    "correct, no margin": "left alone",
}


def norm(ranked: str, only_at: int | None = None) -> Column:
    """Mean over the probes, or that of one step, of the gradient norm of the correct pairs or the misranked."""

    def average(figures: Figures) -> float | None:
        found = [
            correct if ranked == "correct" else misranked
            for step, correct, misranked, _ in figures.get("probes", [])
            if only_at in (None, step)
        ]
        return sum(found) / len(found) if found else None

    return average


def case_share(case: str, of_what: str) -> Column:
    """Of all pairs, or of the gradient weight spent, over training."""

    def average(figures: Figures) -> float | None:
        if "curves" not in figures:
            return None
        sums = {name: float(sum(figures["curves"][f"{of_what}, {name}"])) for name in CASES}
        return sums[case] / sum(sums.values())

    return average


FLOW_COLUMNS: dict[str, Column] = {
    **WEIGHTS,
    "first step: norm correct": norm("correct", only_at=0),
    "first step: norm misranked": norm("misranked", only_at=0),
    "norm correct": norm("correct"),
    "norm misranked": norm("misranked"),
    **{f"share of weight: {case}": case_share(case, "spent") for case in CASES},
}


def draw_gradient_flow(figure: Figure, runs: list[Run]) -> None:
    """Above: weights over training, gradient norms. Below: the four cases, of the pairs and of the weight."""
    (weights, norms), (pairs, spent) = figure.subplots(2, 2)
    steps = sorted({step for run in runs for step, *_ in run.figures.get("probes", [])})
    for (number, name), (ranked, style) in product(enumerate(FLOW), (("misranked", "-"), ("correct", "--"))):
        label = name if ranked == "misranked" else None
        cases = [case for case in CASES if case.startswith(ranked)]
        spent_by, pairs_of = (curve(runs, name, *(f"{what}, {case}" for case in cases)) for what in ("spent", "share"))
        weights.plot(spent_by / pairs_of, style, color=f"C{number}", label=label)  # a gap where no seed has such a pair
        found = [values(runs, name, norm(ranked, only_at=step)).mean().item() for step in steps]
        norms.plot(steps, found, style, color=f"C{number}")
    weights.set(xlabel="step", ylabel="mean gradient weight", title="misranked (solid), correct (dashed)")
    norms.set(xlabel="step", ylabel="norm of the parameters' gradient", title="what these pairs contribute")
    weights.set_ylim(0, 1.02)
    weights.legend(fontsize=8, loc="lower left", ncol=2)
    for axes, of_what, title in ((pairs, "share", "pairs in training"), (spent, "spent", "gradient weight spent")):
        left = torch.zeros(len(FLOW), dtype=torch.float64)
        for (case, effect), color in zip(CASES.items(), ("C2", "C1", "C3", "C7")):
            width = torch.stack([values(runs, name, case_share(case, of_what)).mean() for name in FLOW])
            axes.barh(list(FLOW), width.tolist(), left=left.tolist(), color=color, label=f"{case}: {effect}")
            left = left + width
        axes.invert_yaxis()
        axes.set(title=title, xlim=(0, 1))
    handles, labels = spent.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8, frameon=False)


# 5. Batch composition.

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
COMPOSED = {"SimPO": LOSSES[PLAIN], "AMaPO": LOSSES[PAPER]}
COMPOSITIONS = {
    f"{name}, {share:.0%} misranked": replace(treatment, misranked=share)
    for name, treatment in COMPOSED.items()
    for share in SHARES
}


def draw_composition(figure: Figure, runs: list[Run]) -> None:
    """Accuracy, margins and weights over the share of misranked pairs."""
    accuracy, margin, weights = figure.subplots(1, 3)
    for name in COMPOSED:
        points = {share: f"{name}, {share:.0%} misranked" for share in SHARES}
        line(accuracy, runs, points, of("held out"), name)
        line(margin, runs, points, of("margin"), name)
        for ranked in ("correct", "misranked"):
            line(weights, runs, points, of(f"weight {ranked}"), f"{name}, {ranked}")
    for axes, label in (
        (accuracy, "held-out pairs ranked right"),
        (margin, "mean margin"),
        (weights, "mean gradient weight"),
    ):
        axes.set(xlabel="misranked by the checkpoint, of every batch", ylabel=label)
        axes.legend(fontsize=8, framealpha=0.4)
    weights.set_ylim(0, 1.02)


# 6. Perplexity.

LINEAR = "AMaPO, linear"
PERPLEXITY = {PAPER: LOSSES[PAPER], LINEAR: Treatment(margin=AdaptiveMargin(scaling="linear"))}
PERPLEXITY_COLUMNS: dict[str, Column] = {
    "correlation: perplexity gap": of("correlations", "all", "perplexity"),
    "correlation: log-prob gap": of("correlations", "all", "log-prob"),
    **HELD_OUT,
    **BY_BAND,
}


def by_source(runs: list[Run]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every source, a value a seed: the checkpoint's correlation, and the gain of exponential over linear."""
    found = {}
    for source in runs[0].figures["sources"]:
        correlation = values(runs, IMITATION, of("correlations", source, "perplexity"))
        gain = values(runs, PAPER, of("sources", source)) - values(runs, LINEAR, of("sources", source))
        if len(correlation):
            found[source] = correlation, gain
    return found


def draw_perplexity(figure: Figure, runs: list[Run]) -> None:
    """The gain by exponential scaling over how well perplexity agrees with the judge, a point a source and seed."""
    axes = figure.subplots()
    for source, (correlation, gain) in by_source(runs).items():
        axes.plot(correlation, 100 * gain, "o", label=source)
    axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="checkpoint: Spearman correlation of perplexity gap and judge's confidence",
        ylabel="exponential over linear, points of accuracy",
    )
    axes.legend(fontsize=8)


def sources_in_words(runs: list[Run]) -> str:
    """The picture as text."""
    return "; ".join(
        f"{source}: correlation {correlation.mean():+.2f}, exponential over linear {100 * gain.mean():+.1f} points"
        for source, (correlation, gain) in by_source(runs).items()
    )


# 7. Estimators of the oracle margin, from micro-batches of 8 pairs; the oracle takes the whole batch's statistics.

MICRO_BATCH = 8
ORACLE = "oracle"
ESTIMATES = {
    ORACLE: Treatment(),
    "micro-batch itself": Treatment(micro_batch=MICRO_BATCH),
    **{
        name: Treatment(micro_batch=MICRO_BATCH, estimator=name)
        for name in ("ScoreWindow", "running average", "median, MAD", "learned")
    },
    PLAIN: LOSSES[PLAIN],
}
FLIPPED = 0.2
ESTIMATIONS = ESTIMATES | {
    f"{name}; {FLIPPED:.0%} flipped": replace(treatment, flipped=FLIPPED) for name, treatment in ESTIMATES.items()
}


def estimation_error(figures: Figures) -> float | None:
    """Of the gradient weights; None where nothing was estimated: the oracle, and a loss without statistics."""
    return of("gradient error")(figures) or None


def draw_estimators(figure: Figure, runs: list[Run]) -> None:
    """Accuracy and error of the gradient weights."""
    accuracy, error = figure.subplots(1, 2, sharey=True)
    trained = [run for run in runs if run.treatment != IMITATION]
    dots(accuracy, trained, of("held out"), "held-out pairs ranked right", ORACLE)
    dots(error, trained, estimation_error, "error of the gradient weights, relative", ORACLE)
    error.invert_yaxis()  # shared, and turned once already


# 8. Beta.

BETAS = {beta: f"beta {beta:g}" for beta in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)}


def draw_beta(figure: Figure, runs: list[Run]) -> None:
    """Held-out and validation accuracy over beta."""
    axes = figure.subplots()
    for column in ("held out", "validation"):
        line(axes, runs, BETAS, of(column), column)
    axes.set(xscale="log", xlabel="beta", ylabel="pairs ranked right")
    axes.set_xticks(list(BETAS), [f"{beta:g}" for beta in BETAS], minor=False)
    axes.minorticks_off()
    axes.legend(fontsize=8)


STUDIES = {
    "ranking": Study(
        "Does AMaPO rank better than DPO and SimPO?",
        LOSSES,
        PLAIN,
        {
            "validation": of("validation"),
            **HELD_OUT,
            "held out, own score": of("held out, own score"),
            **BY_BAND,
            **RM_BENCH,
        },
        draw_ranking,
        lambda runs: f"gamma by validation: {tuned(runs)}",
    ),
    "ablation": Study(
        "What does each part of the margin do?", ABLATIONS, PAPER, HELD_OUT | BY_BAND | WEIGHTS, draw_ablation
    ),
    "batch-size": Study(
        "How many pairs do the statistics need?",
        BATCH_SIZES,
        WHOLE,
        HELD_OUT | {"gradient error": of("gradient error")} | WEIGHTS,
        draw_batch_size,
    ),
    "gradient-flow": Study(
        "Does AMaPO pull misranked pairs harder and leave correct ones alone?",
        FLOW,
        PLAIN,
        FLOW_COLUMNS,
        draw_gradient_flow,
        keeps_curves=True,
    ),
    "composition": Study(
        "What if batches are mostly easy, or mostly hard?",
        COMPOSITIONS,
        f"SimPO, {SHARES[2]:.0%} misranked",
        HELD_OUT | {"margin": of("margin")} | WEIGHTS,
        draw_composition,
    ),
    "perplexity": Study(
        "Does exponential scaling help where perplexity agrees with the judge?",
        PERPLEXITY,
        LINEAR,
        PERPLEXITY_COLUMNS,
        draw_perplexity,
        sources_in_words,
    ),
    "oracle": Study(
        "Which estimate from small batches comes nearest to the oracle margin?",
        ESTIMATIONS,
        ORACLE,
        HELD_OUT | {"gradient error": estimation_error} | WEIGHTS,
        draw_estimators,
    ),
    "beta": Study(
        "Is there a best beta?",
        {name: Treatment(beta=beta) for beta, name in BETAS.items()},
        BETAS[2.0],
        {"validation": of("validation"), **HELD_OUT, "margin": of("margin"), **WEIGHTS},
        draw_beta,
    ),
}


# The command.

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {  # seconds: does it run on these files, with this model?
        "width": 16, "layers": 1, "max_prompt": 32, "max_answer": 24, "imitation_steps": 8, "steps": 4,
        "batch_size": 16, "probe_every": 2, "generated": 512, "seeds": 2,
    },
    "small": {  # minutes on two cores, for generated pairs
        "width": 64, "layers": 2, "max_prompt": 32, "max_answer": 32, "imitation_steps": 600, "steps": 24,
        "batch_size": 64, "probe_every": 4, "generated": 4096, "seeds": 5,
    },
    "medium": {  # an hour on two cores, for real pairs
        "width": 64, "layers": 2, "max_prompt": 32, "max_answer": 128, "imitation_steps": 300, "steps": 64,
        "batch_size": 64, "learning_rate": 1e-3, "probe_every": 8, "generated": 4096, "seeds": 3,
    },
    "gpu": {  # 17 million parameters from scratch, and the paper's batch
        "width": 512, "layers": 8, "max_prompt": 256, "max_answer": 1024, "imitation_steps": 2000, "steps": 250,
        "batch_size": 128, "learning_rate": 1e-4, "imitation_learning_rate": 5e-4, "probe_every": 25,
        "generated": 4096, "seeds": 5,
    },
}  # fmt: skip
LEARNING_RATES = {"learning_rate": 3e-4, "imitation_learning_rate": 2e-3}  # where the scale does not say
OVERRIDES = {
    "steps": (int, "of preference training"),
    "batch_size": (int, "pairs a step; texts a step when imitating"),
    "learning_rate": (float, "of preference training"),
    "imitation_steps": (int, "of supervised fine-tuning on the chosen answers before"),
    "imitation_learning_rate": (float, "of these"),
    "max_prompt": (int, "tokens kept of a prompt, its last; bytes for the built-in model"),
    "max_answer": (int, "tokens kept of an answer, its first"),
    "width": (int, "of the built-in model"),
    "layers": (int, "of the built-in model"),
    "seeds": (int, "number of them; each has a checkpoint and an order of the pairs of its own"),
}


def parse_args(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Settings, int]:
    """Arguments, settings, and the number of seeds."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=[*STUDIES, "all"])
    parser.add_argument(
        "--data", type=Path, help="training pairs: JSON lines with prompt, chosen, rejected; gzip or not"
    )
    parser.add_argument("--eval", type=Path, help="held-out pairs in the same format")
    parser.add_argument("--rm-bench", type=Path, nargs="+", default=[], help="files of RM-Bench")
    parser.add_argument(
        "--model", type=Path,
        help="directory of a Hugging Face causal language model, which is the checkpoint itself unless you give "
        "--imitation-steps; needs --learning-rate",
    )  # fmt: skip
    parser.add_argument("--scale", choices=SCALES, help="default: small, and medium with --data")
    for name, (kind, what) in OVERRIDES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{what} (default: the scale's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core, one on a GPU)")
    parser.add_argument("--store", type=Path, default=Path("build/studies"), help="where finished runs are kept")
    parser.add_argument("--out", type=Path, help="folder for JSON and pictures (default: in benchmarks/results)")
    parser.add_argument("--redraw", action="store_true", help="only make table and picture anew from the JSON")
    args = parser.parse_args(arguments)
    if (args.data is None) != (args.eval is None):
        parser.error("--data and --eval go together")
    if args.rm_bench and not args.data:
        parser.error("--rm-bench needs --data and --eval: a model of generated pairs has learned no language")
    if args.model and args.learning_rate is None:
        parser.error("--model needs --learning-rate: that of the built-in model is far too large for others")
    if args.model and (args.width or args.layers):
        parser.error("--width and --layers are of the built-in model, and --model takes another")
    scale = SCALES[args.scale or ("medium" if args.data else "small")]
    chosen = LEARNING_RATES | scale | ({"imitation_steps": 0} if args.model else {})
    chosen |= {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    for name in ("steps", "batch_size", "max_prompt", "max_answer", "width", "layers", "seeds"):
        if chosen[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {chosen[name]}")
    seeds = chosen.pop("seeds")
    settings = Settings(args.data, args.eval, tuple(args.rm_bench), args.model, **chosen)
    args.out = args.out or RESULTS / ("studies_own" if args.data else "studies")
    args.jobs = args.jobs or (1 if args.device.startswith("cuda") else cores())
    return args, settings, seeds


def main() -> None:
    """One study, or all."""
    args, settings, seeds = parse_args()
    console = Console()
    try:
        for name in STUDIES if args.study == "all" else [args.study]:
            path = args.out / f"{name}.json"
            if not args.redraw:
                run(console, name, settings, seeds, args, path)
            report(console, name, path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"studies: {error}") from error
    except BrokenProcessPool as error:
        raise SystemExit("studies: a process died, most likely for lack of memory; --jobs takes fewer") from error
    except KeyboardInterrupt as error:
        raise SystemExit(
            f"studies: interrupted; finished runs are in {args.store}, the same command goes on"
        ) from error


def run(console: Console, name: str, settings: Settings, seeds: int, args: argparse.Namespace, path: Path) -> None:
    """All runs of a study, into its JSON."""
    study = STUDIES[name]
    console.print(f"{name}: {study.asks} {len(study.treatments)} treatments, {seeds} seeds")
    data = load(settings)
    for texts, cut in data.cut.items():
        if cut:
            limits = f"--max-prompt {settings.max_prompt} or --max-answer {settings.max_answer}"
            console.print(
                f"{cut} of {len(data.texts[texts].tokens)} texts ({texts}) are longer than {limits}, and are cut"
            )
    runs = sweep(settings, study.treatments, seeds, args.jobs, args.store, args.device)
    if not study.keeps_curves:
        runs = [each._replace(figures={k: v for k, v in each.figures.items() if k != "curves"}) for each in runs]
    record = {
        "asks": study.asks,
        "settings": {k: v if isinstance(v, int | float) else str(v) for k, v in asdict(settings).items() if v},
        "pairs": {texts: len(data.texts[texts].tokens) // 2 for texts in ("train", "validation", "held out")},
        "held-out pairs by confidence": {
            band: len(in_band(data.corpus.held_out, ends)) for band, ends in BANDS.items()
        },
        "texts cut": data.cut,
        "treatments": {each: asdict(treatment) for each, treatment in study.treatments.items()},
        "runs": [each._asdict() for each in runs],
    }
    write_json(path, "benchmarks.studies", record)


def report(console: Console, name: str, path: Path) -> None:
    """The table of a study's JSON, also into it, and the picture."""
    study, record = STUDIES[name], json.loads(path.read_text())
    runs = [Run(**each) for each in record.pop("runs")]
    table = tabulate(runs, study.columns, study.baseline)
    print_table(console, study.asks, table)
    entries = {"table, mean and standard deviation over the seeds": table, "runs": [each._asdict() for each in runs]}
    write_record(path, record | entries)
    if remark := study.remark(runs):
        console.print(remark)
    figure = plt.figure(figsize=(11, 6.5 if study.keeps_curves else 4.2))
    study.draw(figure, runs)
    figure.suptitle(study.asks, fontsize=11)
    figure.tight_layout(rect=(0, 0.04 * study.keeps_curves, 1, 1))
    write_picture(path.with_suffix(".png"), figure)
    plt.close(figure)
    console.print(f"wrote {path.name} and {path.stem}.png in {path.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
