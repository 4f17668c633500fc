"""Write the tables of README.md and docs/ from the JSON files in benchmarks/results.

    python -m benchmarks.tables

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is a key of `TABLES`. The table of
the published losses is made from `benchmarks.losses`, all others from JSON.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.losses import LOSSES
from benchmarks.studies.report import (
    ERROR_OVER_PROMPTS,
    format_rate,
    format_summary,
    metric_at,
    seed_values,
    tabulate,
    treatment_names,
)
from benchmarks.studies.studies import SIMPO, gradient_norm
from benchmarks.studies.sweep import TUNED_ACCURACY, Run, tuned_accuracy

ROOT = Path(__file__).parents[1]
COMMITTED_RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


def main() -> None:
    """Rewrite all marked tables."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


def with_tables(text: str) -> str:
    """Return the text of a page with its marked tables made anew from the committed results."""
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def load(name: str) -> dict[str, Any]:
    """Return the content of a JSON file in the results folder."""
    result: dict[str, Any] = json.loads((COMMITTED_RESULTS / f"{name}.json").read_text())
    return result


def merge(*names: str) -> dict[str, Any]:
    """Return the content of the first JSON file, with the treatments and their runs replaced by those of later files.

    The checkpoints, which have no treatment, stay those of the first file.
    """
    merged, *others = map(load, names)
    for other in others:
        kept = [run for run in merged["runs"] if run["treatment"] not in other["treatments"]]
        merged["runs"] = kept + [run for run in other["runs"] if run["treatment"] in other["treatments"]]
        merged["treatments"] |= other["treatments"]
    order = [*merged["treatments"]]
    merged["runs"].sort(key=lambda run: order.index(run["treatment"]) if run["treatment"] in order else -1)
    return merged


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], numbers_from: int = 1) -> str:
    """Return a Markdown table whose columns from `numbers_from` on are right-aligned."""
    names = list(header)
    rule = ["---" if column < numbers_from else "---:" for column in range(len(names))]
    return "".join(f"| {' | '.join(cells)} |\n".replace("  |", " |") for cells in (names, rule, *rows))


def rows_by(rows: list[dict[str, Any]], *keys: str) -> dict[Any, dict[str, Any]]:
    """Return the rows of a result by the values of one or several keys."""
    return {tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]: row for row in rows}


def cost_table() -> str:
    """Return the README's table: some rows for the loss, the head and the trainer each."""
    on_cpu, on_gpu = (
        rows_by(load(f"latency_{name}")["rows"], "pairs", "variant", "outputs") for name in ("cpu", "gpu")
    )
    rows: list[tuple[str, ...]] = []
    for title, loss, ours, theirs, baseline in (
        ("`amapo_loss`, 32 pairs, CPU", on_cpu, "eager", "eager", "the authors' loss"),
        ("`amapo_loss` (Triton), 32 pairs", on_gpu, "Triton kernel", "eager", "the authors' loss"),
        ("`amapo_loss` (Triton), 32 pairs", on_gpu, "Triton kernel", "torch.compile", "the authors' loss, compiled"),
    ):
        variants = f"amapo_loss, {ours}", f"released loss, {theirs}"
        costs = (f"{loss[32, variant, 'loss only']['median_us']:.0f} µs" for variant in variants)
        rows.append((title, *costs, baseline, "`make bench`"))
    head = rows_by(load("head_gpu")["rows"], "case", "head", "variant")
    for kind in ("frozen", "trainable"):
        for variant, baseline in (
            ("full logits, counted tokens only", "logits of the response tokens"),
            ("TRL ChunkedLogProbFunction", "TRL's fused head"),
        ):
            costs = (
                f"{row['ms']:.0f} ms, {row['workspace_mb']:,.0f} MB"
                for row in (head["Llama-3-8B", kind, name] for name in ("linear_sequence_logps", variant))
            )
            rows.append((f"`linear_sequence_logps`, {kind} head", *costs, baseline, "`make head`"))
    trainer = rows_by(load("trainer_gpu")["rows"], "trainer")
    names = "AMaPOTrainer, window of 128 scores", "DPOTrainer, precomputed reference"
    costs = (f"{trainer[name]['ms']:,.0f} ms, {trainer[name]['peak_mb']:.0f} MB" for name in names)
    rows.append(
        ("a step of `AMaPOTrainer` with a window", *costs, "`DPOTrainer`, precomputed reference", "`make trainer`")
    )
    lines = markdown(("", "this library", "baseline", "the baseline is", "command"), rows).splitlines()
    return "\n".join([lines[0], "|---|---:|---:|---|---|", *lines[2:]]) + "\n"


def head_table() -> str:
    """Return time, memory and error of the head, frozen and trainable side by side."""
    rows = load("head_cpu")["rows"]
    by_head = rows_by(rows, "head", "variant")
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = [variant]
        for head in ("frozen", "trainable"):
            row = by_head.get((head, variant))
            if row is None or row["ms"] is None:
                cells += ["", "", ""]
            else:
                cells += [
                    f"{row['ms']:,.0f} ({row['ratio']:.2f})",
                    f"{row['workspace_mb']:,.0f}",
                    f"{row['errors'][0]:.1e}",
                ]
        table.append(cells)
    return markdown(("", "frozen: ms", "MB", "error", "trainable: ms", "MB", "error"), table)


def head_gpu_table(head: str) -> str:
    """Return time, memory and error of a head on a GPU, for two models side by side; `head` is frozen or trainable."""
    results = load("head_gpu")
    by_case = rows_by([row for row in results["rows"] if row["head"] == head], "case", "variant")
    table = []
    for variant in dict.fromkeys(variant for _, variant in by_case):
        cells = [variant]
        for case in results["cases"]:
            row = by_case[case, variant]
            cells += [f"{row['ms']:.0f} ({row['ratio']:.2f})", f"{row['workspace_mb']:,.0f}", f"{row['errors'][0]:.1e}"]
        table.append(cells)
    headings = (heading for case in results["cases"] for heading in (f"{case}: ms", "MB", "error"))
    return markdown(("", *headings), table)


def precision_table(name: str = "head_cpu") -> str:
    """Return the errors of the head in bfloat16."""
    columns = {
        "logp_error": "log-prob",
        "grad_hidden_error": "grad of hidden states",
        "grad_hidden_error_confident": "the same, p > 0.99",
        "grad_weight_error": "grad of weight",
        "grad_hidden_changed": "changed: hidden states",
        "grad_weight_changed": "changed: weight",
    }
    rows = []
    for variant, errors in load(name)["precision"].items():
        cells = [variant]
        for key in columns:
            value = errors[key]
            cells.append("" if value is None else f"{value:.2%}" if key.endswith("changed") else f"{value:.1e}")
        rows.append(cells)
    return markdown(("bfloat16", *columns.values()), rows)


def demo_table() -> str:
    """Return what each loss learned in the demo."""
    models = load("demo")["models"]
    columns = {
        "ranking accuracy": "accuracy",
        "accuracy on easy pairs": "easy pairs",
        "accuracy on even pairs": "even pairs",
        "accuracy on hard pairs": "hard pairs",
        "score mean": "score mean",
        "score std": "score std",
        "gradient weight, misranked pairs": "weight, misranked",
        "gradient weight, correctly ranked pairs": "weight, correct",
    }
    rows = []
    for name, metrics in models.items():
        cells = [name]
        for key in columns:
            value = metrics.get(key)
            cells.append("" if value is None else f"{value:.1%}" if "accuracy" in key else f"{value:.2f}")
        rows.append(cells)
    return markdown(("", *columns.values()), rows)


def losses_table() -> str:
    """Return the published losses, each with its line of code."""
    address = {loss: loss.paper if "/" in loss.paper else f"https://arxiv.org/abs/{loss.paper}" for loss in LOSSES}
    rows = [
        (
            f"[{loss.name}]({address[loss]})",
            f"${loss.score}$",
            f"${loss.margin}$",
            f"`{loss.line}`",
            loss.good_for,
        )
        for loss in LOSSES
    ]
    return markdown(("loss", "score $r$", "margin $h$", "line of code", "said to be good for"), rows, numbers_from=5)


def compare_table() -> str:
    """Return what each published loss learned from the same checkpoint."""
    results = load("compare")
    columns = {
        "ranking accuracy": "accuracy",
        "accuracy on easy pairs": "easy pairs",
        "accuracy on even pairs": "even pairs",
        "accuracy on hard pairs": "hard pairs",
        "accuracy by own score": "accuracy by own score",
        "gradient weight, misranked pairs": "weight, misranked",
        "gradient weight, correctly ranked pairs": "weight, correct",
    }
    before = {metric: (value, None) for metric, value in results["imitation alone"].items()}
    rows = []
    for name, metrics in ({"imitation alone": before} | results["mean and standard deviation over the orders"]).items():
        cells = [name]
        for key in columns:
            mean, std = metrics.get(key, (None, None))
            if mean is None:
                cells.append("")
            elif "accuracy" in key:
                cells.append(f"{mean:.1%}" + ("" if std is None else f" ({std:.1%})"))
            else:
                cells.append(f"{mean:.2f}")
        rows.append(cells)
    return markdown(("", *columns.values()), rows)


def latency_table(name: str = "latency_cpu") -> str:
    """Return the latency of the loss. On a GPU, also how long the device is busy, and with how many launches."""
    rows = load(name)["rows"]
    device = {"device_us": "device µs", "launches": "launches"} if rows[0]["device_us"] is not None else {}
    outputs = list(dict.fromkeys(row["outputs"] for row in rows))
    by_outputs = rows_by(rows, "pairs", "variant", "outputs")
    table = []
    for pairs, variant in dict.fromkeys((row["pairs"], row["variant"]) for row in rows):
        found = [by_outputs.get((pairs, variant, name)) for name in outputs]
        cells = ["" if row is None else f"{row['median_us']:,.0f} ({row['ratio']:.2f})" for row in found]
        cells += [f"{by_outputs[pairs, variant, outputs[0]][key]:,.3g}".replace("e+03", "e3") for key in device]
        table.append((f"{pairs:,}", variant, *cells))
    return markdown(("pairs", "", *outputs, *device.values()), table, numbers_from=2)


def trainer_table() -> str:
    """Return the time and the memory of a training step on a CPU and on a GPU."""
    on_cpu, on_gpu = (rows_by(load(f"trainer_{device}")["rows"], "trainer") for device in ("cpu", "gpu"))
    rows = []
    for name in on_cpu:
        cells = (
            cell
            for row in (on_cpu[name], on_gpu[name])
            for cell in (f"{row['ms']:,.0f} ({row['ratio']:.2f})", f"{row['peak_mb']:.0f}")
        )
        rows.append((name, *cells))
    return markdown(("", "CPU: ms per step", "peak MB", "H200: ms per step", "peak MB"), rows)


def estimators_table() -> str:
    """Return the gradient error of micro-batches under each estimator."""
    rows = load("estimators")["rows"]
    names = {"itself": "micro-batch alone"}
    columns = [key for key in rows[0] if key != "pairs"]
    cells = [(f"{row['pairs']:.0f}", *(f"{row[key]:.0%}" for key in columns)) for row in rows]
    return markdown(("pairs per micro-batch", *(names.get(key, key) for key in columns)), cells, numbers_from=0)


def real_ranking_table() -> str:
    """Return the ranking study on real pairs."""
    study = load("studies_own/ranking")["table, mean and standard deviation over the seeds"]
    study["imitation alone"]["held out, own score"] = None  # no loss, no score
    remarks = {
        "SimPO, gamma 0.5": ", the best gamma above 0 on validation pairs",
        "SimPO, gamma 2": ", the best gamma on held-out pairs",
    }
    rows = []
    for name, columns in study.items():
        found = (columns[key] for key in ("validation", "held out", "held out, own score"))
        cells = (f"{100 * summary[0]:.1f} ({100 * summary[1]:.1f})" if summary else "" for summary in found)
        gain, error = columns.get(f"over {SIMPO}, own score"), columns.get(ERROR_OVER_PROMPTS)
        compared = f"{100 * gain[0]:+.1f} ({100 * gain[1]:.1f})" if gain else ""
        rows.append((name + remarks.get(name, ""), *cells, compared, f"{100 * error[0]:.1f}" if error else ""))
    header = (
        "validation pairs",
        "held-out pairs",
        "by the loss's own score",
        "over SimPO, gamma 0, by own score",
        "error of this over prompts",
    )
    return markdown(("", *header), rows)


def pretrained_table(study_files: Sequence[str], columns: dict[str, tuple[str, ...]]) -> str:
    """Return how the pretrained model ranks pairs after training.

    DPO's own score is not the average log-prob, so it has a second row if there are accuracies by both.

    Args:
        study_files: the JSON files of a study whose treatments are losses, see `merge`.
        columns: for each heading, the keys of a metric. Accuracies become percent, log-probs keep nats per token.
    """
    study = merge(*study_files)
    runs = [Run.from_json(entry) for entry in study["runs"]]
    pairs_by_source = study.get("held-out pairs by source", {})  # the key is missing in files of earlier versions
    for run in runs:
        run.metrics["authors"] = accuracy_by_author(run.metrics["sources"], pairs_by_source)
    rows = []
    for name in treatment_names(runs):
        treatment = study["treatments"].get(name)
        if treatment is None:  # the checkpoint, which all seeds share, and which has no loss and thus no score
            first = [run for run in runs if run.treatment == name][:1]
            cells = ["" if keys == ("held out, own score",) else spread(first, name, keys) for keys in columns.values()]
            rows.append(["before training", "", *cells])
            continue
        rate = format_rate(treatment["learning_rate"] or study["settings"]["learning_rate"])
        rows.append([name, rate, *(spread(runs, name, keys) for keys in columns.values())])
        own_keys = [own_score_keys(keys) for keys in columns.values()]
        by_own_score = [spread(runs, name, keys) if keys else "" for keys in own_keys]
        if treatment["loss"] == "dpo" and any(by_own_score):
            rows.append([f"{name}, by its own score", rate, *by_own_score])
    return markdown(("", "learning rate", *columns), rows)


def pretrained_change_table() -> str:
    """Return the pretrained model's accuracies, among them that by the change, which means the same for all losses."""
    study = load(PRETRAINED_CHANGE_FILE)
    columns = {
        "by the average log-prob": ("held out",),
        "by the loss's own score": ("held out, own score",),
        "by the change of the average log-prob": (CHANGE,),
        "log-prob of chosen answers": ("chosen log-prob",),
    }
    runs = [Run.from_json(entry) for entry in study["runs"]]
    compared = tabulate(runs, {}, SIMPO, compared=CHANGE, prompts=study["prompts of the held-out pairs"])
    rows = []
    for name in treatment_names(runs):
        treatment = study["treatments"].get(name)
        if treatment is None:  # the checkpoint, which all seeds share
            first = [run for run in runs if run.treatment == name][:1]
            accuracy, logp = (spread(first, name, (key,)) for key in ("held out", "chosen log-prob"))
            rows.append(["before training", "", accuracy, "", "", "", "", logp])
            continue
        gain, error = compared[name].get(f"over {SIMPO}"), compared[name].get(ERROR_OVER_PROMPTS)
        *accuracies, logp = (spread(runs, name, keys) for keys in columns.values())
        gain_text = "" if gain is None else format_summary(f"over {SIMPO}", gain)
        error_text = "" if error is None else f"{100 * error[0]:.1f}"
        rows.append([name, format_rate(treatment["learning_rate"]), *accuracies, gain_text, error_text, logp])
    *titles, last = columns
    header = ("", "learning rate", *titles, "over SimPO, gamma 0, by the change", ERROR_OVER_PROMPTS, last)
    return markdown(header, rows)


def answer_table() -> str:
    """Return the README's accuracies and log-prob, which are those of the runs of `pretrained_change_table`."""
    study = load(PRETRAINED_CHANGE_FILE)
    runs = [Run.from_json(entry) for entry in study["runs"]]
    columns = {
        "ranked correctly by the average log-prob": "held out",
        "ranked correctly by its change in training": CHANGE,
        "log-prob of chosen answers": "chosen log-prob",
    }
    rows = []
    for name in treatment_names(runs):
        is_trained = name in study["treatments"]
        selected = [run for run in runs if run.treatment == name][
            : None if is_trained else 1
        ]  # all seeds have the same checkpoint
        cells = (spread(selected, name, (key,)) for key in columns.values())
        rows.append((name if is_trained else "before training", *cells))
    return markdown(("", *columns), rows)


def spread(runs: list[Run], treatment: str, keys: tuple[str, ...]) -> str:
    """Return the mean of a metric over the seeds and, in brackets, its standard deviation; "" if no run has it.

    An accuracy becomes percent.
    """
    values = seed_values(runs, treatment, metric_at(*keys)) * (1 if keys[-1] == "chosen log-prob" else 100)
    if not len(values):
        return ""
    return f"{values.mean():.1f} ({values.std():.1f})" if len(values) > 1 else f"{values.mean():.1f}"


def own_score_keys(keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the keys of the same accuracy of a style or a further file by the loss's own score, or None."""
    group, *rest = keys
    if group == "styles":
        return (group, rest[0], "own score", rest[1])
    return (*keys[:-1], "own score") if group == "further" and keys[-1] == "accuracy" else None


def accuracy_by_author(accuracies: dict[str, float], num_pairs: dict[str, int]) -> dict[str, float]:
    """Return the accuracy on pairs of solutions whose right one a human has written, and on those of models alone.

    Args:
        accuracies: for each source, "author of the correct solution against author of the wrong one".
        num_pairs: for each source, its number of pairs.
    """
    by_author: dict[str, list[str]] = {"human": [], "model": []}
    for source in num_pairs:
        by_author["human" if source.startswith("ground_truth against") else "model"].append(source)
    return {
        author: sum(num_pairs[source] * accuracies[source] for source in sources)
        / sum(num_pairs[source] for source in sources)
        for author, sources in by_author.items()
        if sources
    }


EQUAL_RATE = "sizes/SmolLM2-135M-Instruct/gradient-flow"
PRETRAINED_CHANGE_FILE, CHANGE = "studies_pretrained_tuned/ranking", "held out, change"
PRETRAINED_FILES = ("studies_pretrained/ranking", "studies_pretrained_dpo/ranking")
PRETRAINED_RANKING: dict[str, tuple[str, ...]] = {
    "validation pairs": ("validation",),
    "held-out pairs": ("held out",),
    "by the loss's own score": ("held out, own score",),
    "low confidence": ("bands", "low"),
    "middle": ("bands", "middle"),
    "high": ("bands", "high"),
    "log-prob of chosen answers": ("chosen log-prob",),
}
PRETRAINED_OTHERS: dict[str, tuple[str, ...]] = {
    **{
        f"RM-Bench {part}, {difficulty}": ("styles", f"rm_bench_{part}", difficulty)
        for part in ("chat", "code")
        for difficulty in ("easy", "normal", "hard")
    },
    "GSM8K pairs": ("further", "gsm8k_test", "accuracy"),
    "log-prob of correct solutions": ("further", "gsm8k_test", "chosen log-prob"),
}
PRETRAINED_REASONING: dict[str, tuple[str, ...]] = {
    "validation pairs": ("validation",),
    "held-out pairs": ("held out",),
    "correct solution by a human": ("authors", "human"),
    "both solutions by models": ("authors", "model"),
    "all held-out pairs, by the loss's own score": ("held out, own score",),
    "log-prob of correct solutions": ("chosen log-prob",),
}
PRETRAINED_ABLATION = {title: PRETRAINED_RANKING[title] for title in ("validation pairs", "held-out pairs")} | {
    "GSM8K pairs": PRETRAINED_OTHERS["GSM8K pairs"],
    "log-prob of chosen answers": ("chosen log-prob",),
}
PRETRAINED_BATCH_SIZE = {
    "held-out pairs": PRETRAINED_RANKING["held-out pairs"],
    "error of the gradient weights": ("gradient error",),
    "log-prob of chosen answers": ("chosen log-prob",),
}
MODELS_REASONING = {title: keys for title, keys in PRETRAINED_REASONING.items() if keys[0] != "authors"}


def gradient_flow_table() -> str:
    """Return the gradient weights and norms of the gradient-flow study."""
    columns = {f"gradient weight, {ranked} pairs": metric_at(f"weight {ranked}") for ranked in ("misranked", "correct")}
    columns |= {f"gradient norm, {ranked} pairs": gradient_norm(ranked) for ranked in ("misranked", "correct")}
    rows = []
    for pairs, files in {
        "generated": ["studies/gradient-flow"],
        "real": ["studies_own/gradient-flow"],
        "real, pretrained model": ["studies_pretrained/gradient-flow", PRETRAINED_FILES[1]],
    }.items():
        study = merge(*files)
        runs = [Run.from_json(entry) for entry in study["runs"] if entry["treatment"] in study["treatments"]]
        for name in treatment_names(runs):
            means = (seed_values(runs, name, column).mean() for column in columns.values())
            rows.append((pairs, name, *(f"{mean:.2f}" for mean in means)))
    return markdown(("pairs", "", *columns), rows, numbers_from=2)


def reasoning_table() -> str:
    """Return the table of the reasoning study on arithmetic: solved problems, ranking and log-prob."""
    study = load("studies/reasoning")["table, mean and standard deviation over the seeds"]
    rows = []
    for name, metrics in study.items():
        solved, ranked, logp = (metrics[key] for key in ("share solved", "held out", "chosen log-prob"))
        gain = metrics.get("over AMaPO, paper")
        rows.append(
            (
                name,
                f"{100 * solved[0]:.1f} ({100 * solved[1]:.1f})",
                f"{100 * gain[0]:+.1f} ({100 * gain[1]:.1f})" if gain else "",
                f"{100 * ranked[0]:.1f} ({100 * ranked[1]:.1f})",
                f"{logp[0]:.3f} ({logp[1]:.3f})",
            )
        )
    header = ("problems solved", "against AMaPO, paper", "pairs ranked correctly", "log-prob of correct solutions")
    return markdown(("", *header), rows)


def rates_table(study: str, names: dict[str, str]) -> str:
    """Return how well each loss ranks the validation pairs after training with several rates, and their log-prob.

    Args:
        study: the JSON file of a study whose rates were tuned.
        names: for each loss of the tuning, its name in the table.
    """
    entries = load(study)["tuning of the learning rates on the validation pairs"]
    rates = dict.fromkeys(entry["learning rate"] for entry in entries)
    by_loss = rows_by(entries, "loss", "learning rate")
    rows = []
    for loss, name in names.items():
        cells = []
        for rate in rates:
            entry = by_loss[loss, rate]
            cells.append(f"{100 * tuned_accuracy(entry):.1f} ({entry['chosen log-prob']:.2f})")
        rows.append((name, *cells))
    return markdown(("", *map(format_rate, rates)), rows)


def change_rates_table() -> str:
    """Return what the losses do at two rates below the tuned one of SimPO and AMaPO, in one run each."""
    entries = load("studies_pretrained_rates/ranking")["tuning of the learning rates on the validation pairs"]
    names = {**TUNED, "amapo, released": "AMaPO, released"}
    rows = []
    for entry in entries:
        accuracies = (f"{100 * entry[key]:.1f}" for key in (TUNED_ACCURACY, "validation, change"))
        logp = f"{entry['chosen log-prob']:.2f}"
        rows.append((names[entry["loss"]], format_rate(entry["learning rate"]), *accuracies, logp))
    header = ("by the loss's own score", "by the change of the average log-prob", "log-prob of chosen answers")
    return markdown(("", "learning rate", *header), rows)


TUNED = {"dpo": "DPO", "simpo": "SimPO, gamma 0", "amapo, paper": "AMaPO, paper"}


def sizes_table() -> str:
    """Return what misranked pairs have of the gradient in models of different sizes."""
    result = load("sizes/sizes")
    quantities = result["misranked pairs"]
    rows = []
    for treatment in next(iter(quantities.values())):
        for model, parameters in enumerate(result["parameters"].values()):
            cells = []
            for title, table in quantities.items():
                mean, std = list(table[treatment].values())[model]
                is_share = title.startswith("share")
                cells.append(f"{100 * mean:.1f}% ({100 * std:.1f}%)" if is_share else f"{mean:.2f} ({std:.2f})")
            rows.append((treatment, f"{parameters / 1e6:.1f}", *cells))
    headings = (f"misranked pairs: {title}" for title in quantities)
    return markdown(("", "million parameters", *headings), rows)


def size_ranking_table() -> str:
    """Return how models of different sizes rank held-out pairs, DPO also by its own score, and their log-prob."""
    sizes = {f"{count / 1e6:.1f} million": name for name, count in load("sizes/sizes")["parameters"].items()}
    studies = [load(f"sizes/{name}/gradient-flow") for name in sizes.values()]
    runs_by_size = [[Run.from_json(entry) for entry in study["runs"]] for study in studies]
    rows = []
    for name in treatment_names(runs_by_size[0]):
        treatment = studies[0]["treatments"].get(name)  # None: the checkpoints
        titles = {name if treatment else "before preference training": "held out"}
        if treatment and treatment["loss"] == "dpo":
            titles[f"{name}, by its own score"] = "held out, own score"
        for title, key in titles.items():
            cells = [spread(runs, name, (column,)) for runs in runs_by_size for column in (key, "chosen log-prob")]
            rows.append((title, *cells))
    return markdown(("", *(heading for size in sizes for heading in (f"{size}: accuracy", "log-prob"))), rows)


def scale_table() -> str:
    """Return what a rank holds and receives for a step of a trainable head, by the formulas."""
    rows = []
    for row in load("scaling_cpu")["formulas"]:
        if row["trainable"]:
            split, gathered = row["split vocabulary"], row["gathered logits"]
            numbers = (split["weight_bytes"], split["workspace_bytes"], gathered["workspace_bytes"])
            cells = [f"{value / 2**30:.2f}" for value in numbers]
            cells += [f"{cost['received_bytes'] / 2**30:.2f}" for cost in (split, gathered)]
            cells += [f"{cost['flops'] / 1e12:.1f}" for cost in (split, gathered)]
            rows.append((row["head"], str(row["ranks"]), *cells))
    header = (
        "weight and gradient, GiB",
        "workspace, GiB: split",
        "workspace, GiB: gathered logits",
        "received, GiB: split",
        "received, GiB: gathered logits",
        "TFLOP: split",
        "TFLOP: gathered logits",
    )
    return markdown(("", "ranks", *header), rows)


def weak_scaling_table() -> str:
    """Return the measured times, collectives and bytes of the weak-scaling run."""
    rows = [
        (
            f"{row['processes']}",
            row["step"],
            f"{row['ms']:,.1f}",
            f"{row['collectives']['all_gather']}",
            f"{row['collectives']['all_reduce']}",
            f"{row['received_bytes']:,.0f}",
        )
        for row in load("scaling_cpu")["measured"]
    ]
    header = ("processes", "step", "ms", "all-gathers", "all-reduces", "bytes received per process")
    return markdown(header, rows, numbers_from=2)


TABLES: dict[str, Callable[[], str]] = {
    "cost": cost_table,
    "head": head_table,
    "head-gpu": partial(head_gpu_table, "frozen"),
    "head-gpu-trainable": partial(head_gpu_table, "trainable"),
    "precision": precision_table,
    "precision-gpu": partial(precision_table, "head_gpu"),
    "losses": losses_table,
    "compare": compare_table,
    "demo": demo_table,
    "latency": latency_table,
    "latency-gpu": partial(latency_table, "latency_gpu"),
    "trainer": trainer_table,
    "estimators": estimators_table,
    "scale": scale_table,
    "weak-scaling": weak_scaling_table,
    "gradient-flow": gradient_flow_table,
    "real-ranking": real_ranking_table,
    "pretrained-ranking": partial(pretrained_table, PRETRAINED_FILES, PRETRAINED_RANKING),
    "pretrained-others": partial(pretrained_table, PRETRAINED_FILES, PRETRAINED_OTHERS),
    "pretrained-change": pretrained_change_table,
    "answer": answer_table,
    "change-rates": change_rates_table,
    "equal-rate-ranking": partial(pretrained_table, [EQUAL_RATE], PRETRAINED_RANKING),
    "equal-rate-others": partial(pretrained_table, [EQUAL_RATE], PRETRAINED_OTHERS),
    "reasoning": reasoning_table,
    "pretrained-reasoning": partial(pretrained_table, ["studies_pretrained/reasoning"], PRETRAINED_REASONING),
    "models-reasoning": partial(pretrained_table, ["studies_models/reasoning"], MODELS_REASONING),
    "reasoning-rates": partial(
        rates_table,
        "studies_tuned/reasoning",
        {**TUNED, "simpo, with SFT": "SFT alone", "amapo, paper, with SFT": "AMaPO, paper, with SFT"},
    ),
    "pretrained-ablation": partial(pretrained_table, ["studies_pretrained/ablation"], PRETRAINED_ABLATION),
    "pretrained-batch-size": partial(pretrained_table, ["studies_pretrained/batch-size"], PRETRAINED_BATCH_SIZE),
    "pretrained-rates": partial(
        rates_table,
        "studies_pretrained_tuned/ranking",
        {**TUNED, "amapo, released": "AMaPO, released"},
    ),
    "sizes": sizes_table,
    "size-ranking": size_ranking_table,
}

if __name__ == "__main__":
    main()
