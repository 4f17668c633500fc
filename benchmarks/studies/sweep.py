"""Run many treatments with several seeds on a process pool.

Depends on torch, rich, and on harness.py and jobs.py.

Each seed has one checkpoint, and each combination of treatment and seed is one run. `jobs` keeps the finished runs in a
store, so an interrupted sweep continues.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.studies.harness import Metrics, Treatment
from benchmarks.studies.jobs import Job, Settings, load, perform_job, result_path, with_activations

IMITATION = "imitation alone"  # the name of the checkpoints among the treatments
TUNED_ACCURACY = "validation, own score"  # the metric that a learning rate is chosen by
BATCH_ACCURACY = "accuracy of each batch before its step"  # the name of a training curve among the results of a tuning
PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("elapsed,"),
    TimeRemainingColumn(elapsed_when_finished=False),
    TextColumn("remaining"),
)


class Run(NamedTuple):
    """One treatment with one seed, and its metrics."""

    treatment: str
    seed: int
    metrics: Metrics

    def without_curves(self) -> "Run":
        """Return the run without its training curves, which are by far the largest metrics."""
        return self._replace(metrics={name: metric for name, metric in self.metrics.items() if name != "curves"})

    def to_json(self) -> dict[str, Any]:
        """Return the run as it stands in a study's JSON, where the metrics are called "figures"."""
        return {"treatment": self.treatment, "seed": self.seed, "figures": self.metrics}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Run":
        """Return the run that `to_json` has written."""
        return cls(record["treatment"], record["seed"], record["figures"])


class Sweep(NamedTuple):
    """All that `sweep` has computed."""

    runs: list[Run]  # those of the checkpoints under the name `IMITATION`, then those of the treatments
    treatments: dict[str, Treatment]  # with their learning rates, if these were tuned
    tuning: list[dict[str, Any]]  # one entry for each loss and learning rate; empty if nothing was tuned


class Workers(NamedTuple):
    """A process pool, and the counter of the pairs that its processes have trained on."""

    pool: ProcessPoolExecutor
    trained_pairs: Any


@contextmanager
def start_workers(jobs: int) -> Iterator[Workers]:
    """Start `jobs` processes with one CPU thread each, so that results do not depend on their number."""
    spawn = multiprocessing.get_context("spawn")  # fork is unsafe once torch has threads or CUDA
    trained_pairs = spawn.Value("q")
    pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=initialize_process, initargs=(trained_pairs,))
    try:
        yield Workers(pool, trained_pairs)
    finally:
        pool.shutdown(cancel_futures=True)


def sweep(
    settings: Settings,
    treatments: dict[str, Treatment],
    seeds: int,
    workers: Workers,
    store: Path,
    device: str,
    learning_rates: Sequence[float] = (),
    only_tune: bool = False,
) -> Sweep:
    """Run every treatment with every seed, starting with the checkpoints.

    Args:
        settings: options of all runs.
        treatments: the treatments, by name.
        seeds: number of seeds.
        workers: the processes that perform the runs.
        store: folder of the finished runs.
        device: device of the models.
        learning_rates: with more than one, they are tuned, see `tune`.
        only_tune: stop after the tuning, without any runs.
    """
    with Progress(*PROGRESS_COLUMNS) as progress:
        data = load(settings)
        if settings.trained_blocks:
            total = sum(len(texts.tokens) for texts in data.texts.values())
            bar = progress.add_task("computing the frozen blocks", total=total)
            with_activations(settings, data, store, device, lambda texts: progress.advance(bar, texts))

        def perform(description: str, phase: list[Job]) -> list[Metrics]:
            unit = 1 if phase[0].treatment is None else settings.steps * settings.batch_size
            paths = [result_path(settings, job, device, store) for job in phase]
            missing = {path: job for path, job in zip(paths, phase) if not path.exists()}
            by_seed = sorted(
                missing.values(), key=lambda job: job.seed
            )  # an interrupted sweep has whole seeds, with all losses
            futures = {workers.pool.submit(perform_in_process, settings, job, device, store) for job in by_seed}
            follow(progress, description, futures, len({*paths}), unit, workers.trained_pairs)
            return [json.loads(path.read_text()) for path in paths]

        is_tuned, tuning = len(learning_rates) > 1, list[dict[str, Any]]()
        run_seeds, tuning_seeds = range(0 if only_tune else seeds), range(seeds, seeds + is_tuned)
        checkpoints = perform("training the checkpoints", [Job(None, seed) for seed in (*run_seeds, *tuning_seeds)])
        if is_tuned:
            treatments, tuning = tune(treatments, learning_rates, seeds, partial(perform, "tuning"))
        if only_tune:
            return Sweep([], treatments, tuning)
        runs = [(name, seed) for name in treatments for seed in range(seeds)]
        trained = perform("training the treatments", [Job(treatments[name], seed) for name, seed in runs])
    of_checkpoints = [Run(IMITATION, seed, metrics) for seed, metrics in enumerate(checkpoints[:seeds])]
    of_treatments = [Run(name, seed, metrics) for (name, seed), metrics in zip(runs, trained)]
    return Sweep(of_checkpoints + of_treatments, treatments, tuning)


def tune(
    treatments: dict[str, Treatment],
    learning_rates: Sequence[float],
    seed: int,
    perform: Callable[[list[Job]], list[Metrics]],
) -> tuple[dict[str, Treatment], list[dict[str, Any]]]:
    """Choose a learning rate for each `tuning_group` on the validation pairs.

    The first treatment of a group in the study is trained once with each rate. The rate with the highest accuracy by
    the loss's own score wins, or the smallest of several that are equal. All treatments of the group take it.

    Args:
        treatments: the treatments, by name.
        learning_rates: the rates to choose from.
        seed: seed of these trainings, which is not one of the study's seeds.
        perform: performs jobs and returns their metrics.

    Returns:
        The treatments with their rates, and one entry for each training.
    """
    first: dict[str, Treatment] = {}
    for treatment in treatments.values():
        first.setdefault(tuning_group(treatment), treatment)
    tried = [(group, rate) for group in first for rate in sorted(learning_rates)]
    found = perform([Job(replace(first[group], learning_rate=rate), seed, True) for group, rate in tried])
    entries = [
        {"loss": group, "learning rate": rate}
        | {name: metrics[name] for name in (TUNED_ACCURACY, "validation, change", "chosen log-prob")}
        | {BATCH_ACCURACY: metrics["curves"]["accuracy"]}
        for (group, rate), metrics in zip(tried, found)
    ]
    best = {group: entry["learning rate"] for group, entry in best_entries(entries).items()}
    tuned = {name: replace(of_name, learning_rate=best[tuning_group(of_name)]) for name, of_name in treatments.items()}
    return tuned, entries


def best_entries(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the entry of a tuning with the highest accuracy for each loss, or that of the smallest rate of several."""
    best: dict[str, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda entry: entry["learning rate"]):
        if tuned_accuracy(entry) > tuned_accuracy(best.setdefault(entry["loss"], entry)):
            best[entry["loss"]] = entry
    return best


def tuned_accuracy(entry: dict[str, Any]) -> float:
    """Return the accuracy of an entry of a tuning. Files of earlier versions have only that by the average log-prob."""
    accuracy: float = entry[TUNED_ACCURACY if TUNED_ACCURACY in entry else "validation"]
    return accuracy


def tuning_group(treatment: Treatment) -> str:
    """Return the name of what a learning rate is tuned for: the loss, for AMaPO the formula, and whether it has SFT."""
    name = f"amapo, {treatment.margin.formula}" if treatment.loss == "amapo" else treatment.loss
    return f"{name}, with SFT" if treatment.sft else name


def follow(progress: Progress, description: str, futures: set[Future[None]], total: int, unit: int, pairs: Any) -> None:
    """Show the progress of the jobs of a phase until all are done.

    Args:
        progress: where to show it.
        description: title of the bar.
        futures: the jobs that are not in the store yet.
        total: number of all jobs of the phase.
        unit: pairs of a job that trains, or 1 for jobs that do not.
        pairs: the counter of `Workers`.
    """
    found, finished, pairs.value = unit * (total - len(futures)), 0, 0
    bar = progress.add_task(description, total=unit * total, completed=found)
    pending = futures
    while pending:
        done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()  # raises what the job has raised
        finished += len(done)
        progress.update(bar, completed=found + (finished if unit == 1 else pairs.value))
        if done and not progress.console.is_terminal:  # a log file shows no progress bar
            remaining = progress.tasks[bar].time_remaining
            estimate = "" if remaining is None else f", about {remaining / 60:.0f} minutes remaining"
            progress.console.print(f"{description}: {finished} of {len(futures)} runs{estimate}")
    progress.update(bar, completed=unit * total)


_trained_pairs: Any = None  # in a process of the pool, the counter that all its processes share


def initialize_process(trained_pairs: Any) -> None:
    """Prepare a process of the pool. The counter is for the pairs that all processes have trained on."""
    global _trained_pairs
    _trained_pairs = trained_pairs
    torch.set_num_threads(1)


def count_pairs(pairs: int) -> None:
    """Add to the number of pairs that all processes have trained on."""
    with _trained_pairs.get_lock():
        _trained_pairs.value += pairs


def perform_in_process(settings: Settings, job: Job, device: str, store: Path) -> None:
    """Perform a job in a process of the pool."""
    perform_job(settings, job, device, store, count_pairs)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
