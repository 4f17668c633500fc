"""Run many treatments with several seeds on a process pool, and keep every finished run in a store.

Depends on torch, rich, amapo_loss, benchmarks.record, and on data.py, evaluation.py, harness.py and models.py.

Each seed has one checkpoint, and each combination of treatment and seed is one run. A result is written to a file of
the store as soon as it is computed, so an interrupted sweep loses only the runs in progress. The name of the file is a
hash of everything that the result depends on: the settings, the treatment, the seed, the content of the data files, and
the code.
"""

import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import amapo_loss
from benchmarks.record import write_whole
from benchmarks.studies.data import Corpus, both_answers, file_corpus, generated_corpus
from benchmarks.studies.evaluation import evaluate, training_metrics
from benchmarks.studies.harness import AnswerLogps, Metrics, Optimization, Treatment, all_logps, imitate, prefer
from benchmarks.studies.models import (
    BYTES,
    ByteLM,
    HuggingFaceLM,
    Texts,
    Tokenizer,
    check_fit,
    hugging_face_tokenizer,
    tensors,
)

IMITATION = "imitation alone"  # the name of the checkpoints among the treatments
# The modules of this folder that decide the numbers of a run. A module missing here could change without a new key, and
# the store would then return results of the old code.
RUN_MODULES = ("data", "estimators", "evaluation", "harness", "models", "sweep")


@dataclass(frozen=True)
class Settings:
    """The options that all runs of a study share.

    The names of the fields are keys of the JSON that a study writes.
    """

    data: Path | None  # preference file for training; None: generated pairs and generated styles
    eval: Path | None  # preference file for the evaluation
    rm_bench: tuple[Path, ...]  # RM-Bench files
    model: Path | None  # directory of a Hugging Face model; None: a byte model with this width and these layers
    width: int
    layers: int
    max_prompt: int  # tokens kept from the end of a prompt
    max_answer: int  # tokens kept from the start of an answer
    imitation_steps: int
    imitation_learning_rate: float
    steps: int  # of preference training
    batch_size: int  # pairs per step of preference training, texts per step of imitation
    learning_rate: float  # of preference training
    probe_every: int  # steps between two measurements of the gradient norms; 0: no measurement
    generated: int  # number of generated pairs for training and validation


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


class Data(NamedTuple):
    """A corpus and its texts as tensors."""

    corpus: Corpus
    texts: dict[str, Texts]  # keys: "demonstrations", "train", "validation", "held out", and those of `corpus.styled`
    num_truncated: dict[str, int]  # number of truncated texts, same keys


def sweep(
    settings: Settings, treatments: dict[str, Treatment], seeds: int, jobs: int, store: Path, device: str
) -> list[Run]:
    """Run every treatment with every seed, starting with the checkpoints.

    Args:
        settings: options of all runs.
        treatments: the treatments, by name.
        seeds: number of seeds.
        jobs: number of processes. Each uses one CPU thread, so the results do not depend on this number.
        store: folder of the finished runs.
        device: device of the models.

    Returns:
        The checkpoints' runs under the name `IMITATION`, then those of the treatments.
    """
    checkpoints: list[tuple[str, Treatment | None, int]] = [(IMITATION, None, seed) for seed in range(seeds)]
    runs = [(name, treatment, seed) for name, treatment in treatments.items() for seed in range(seeds)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("remaining"),
    )
    metrics: dict[tuple[str, int], Metrics] = {}
    spawn = multiprocessing.get_context("spawn")  # fork is unsafe once torch has threads or CUDA
    pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with Progress(*columns) as progress:
            for description, phase in (("training the checkpoints", checkpoints), ("training the treatments", runs)):
                bar = progress.add_task(description, total=len(phase))
                futures = {}
                for name, treatment, seed in phase:
                    result_path = store / f"{store_key(settings, treatment, seed, device)}.json"
                    checkpoint_path = store / f"{store_key(settings, None, seed, device)}.pt"
                    if result_path.exists():
                        metrics[name, seed] = json.loads(result_path.read_text())
                        progress.advance(bar)
                    else:
                        future = pool.submit(
                            perform_run, settings, treatment, seed, device, result_path, checkpoint_path
                        )
                        futures[future] = name, seed
                for future in as_completed(futures):
                    metrics[futures[future]] = future.result()
                    progress.advance(bar)
    finally:
        pool.shutdown(cancel_futures=True)
    return [Run(name, seed, metrics[name, seed]) for name, _, seed in [*checkpoints, *runs]]


def perform_run(
    settings: Settings,
    treatment: Treatment | None,
    seed: int,
    device: str,
    result_path: Path,
    checkpoint_path: Path,
) -> Metrics:
    """Perform one run, write its metrics to `result_path`, and return them.

    With a treatment, start from the checkpoint in `checkpoint_path`. Without one, make this checkpoint, which all runs
    of the seed start from.
    """
    data = load(settings)
    if treatment is None:
        checkpoint = make_checkpoint(settings, data, seed, device)
        buffer = BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(checkpoint_path, buffer.getvalue())
        metrics = evaluate(Treatment(), data.corpus, data.texts, checkpoint["logps"], checkpoint["logps"])
    else:
        checkpoint = torch.load(checkpoint_path, weights_only=True)
        model = new_model(settings, seed, device)
        if checkpoint["state"] is not None:
            model.load_state_dict(checkpoint["state"])
        optimization = Optimization(
            settings.steps, settings.batch_size, settings.learning_rate, settings.probe_every or None
        )
        ref = checkpoint["logps"]
        trace = prefer(model, treatment, data.texts["train"], ref["train"], optimization, seed)
        policy = evaluation_logps(model, data)
        metrics = evaluate(treatment, data.corpus, data.texts, policy, ref) | training_metrics(trace)
    write_whole(result_path, json.dumps(metrics).encode())
    return metrics


def make_checkpoint(settings: Settings, data: Data, seed: int, device: str) -> dict[str, Any]:
    """Train a model by imitation and return its weights and its log-probs of all texts.

    The weights are None without imitation steps, because `new_model` returns the same ones.
    """
    model = new_model(settings, seed, device)
    imitate(
        model,
        data.texts["demonstrations"],
        settings.imitation_steps,
        settings.batch_size,
        settings.imitation_learning_rate,
        seed,
    )
    logps = evaluation_logps(model, data) | {"train": all_logps(model, data.texts["train"])}
    return {"state": model.state_dict() if settings.imitation_steps else None, "logps": logps}


def new_model(settings: Settings, seed: int, device: str) -> nn.Module:
    """Return the model before imitation: a byte model initialized with this seed, or the Hugging Face model."""
    torch.manual_seed(seed)
    if settings.model:
        return HuggingFaceLM(settings.model).to(device)
    return ByteLM(settings.width, settings.layers, 1 + settings.max_prompt + settings.max_answer).to(device)


@cache
def load(settings: Settings) -> Data:
    """Load or generate the corpus and convert it to tensors. Each process does this once."""
    if settings.data and settings.eval:
        corpus = file_corpus(settings.data, settings.eval, settings.rm_bench)
    else:
        pairs = settings.generated
        corpus = generated_corpus(pairs, held_out=pairs // 4, demonstrations=2 * pairs, seed=0)
    tokenizer: Tokenizer = hugging_face_tokenizer(settings.model) if settings.model else BYTES
    strings = {
        "demonstrations": corpus.demonstrations,
        "train": both_answers(corpus.train),
        "validation": both_answers(corpus.validation),
        "held out": both_answers(corpus.held_out),
    } | {
        name: [(pair.prompt, answer) for pair in pairs for answer in (*pair.chosen, *pair.rejected)]
        for name, pairs in corpus.styled.items()
    }
    texts, num_truncated = {}, {}
    for name, prompts_and_answers in strings.items():
        texts[name], num_truncated[name] = tensors(
            prompts_and_answers, settings.max_prompt, settings.max_answer, tokenizer
        )
    if settings.model:
        check_fit(settings.model, list(texts.values()))
    return Data(corpus, texts, num_truncated)


def evaluation_logps(model: nn.Module, data: Data) -> dict[str, AnswerLogps]:
    """Return the log-probs and lengths of all answers that a model is evaluated on."""
    return {name: all_logps(model, data.texts[name]) for name in ("validation", "held out", *data.corpus.styled)}


def store_key(settings: Settings, treatment: Treatment | None, seed: int, device: str) -> str:
    """Return the name of a run's files in the store, a hash of everything that the result depends on."""
    if treatment is None:
        # A checkpoint does not depend on the options of preference training. With them in its key, a new learning rate
        # would repeat the imitation.
        settings = replace(settings, steps=0, learning_rate=0.0, probe_every=0)
    paths = [settings.data, settings.eval, *settings.rm_bench, settings.model]
    numbers = asdict(replace(settings, data=None, eval=None, rm_bench=(), model=None))
    treatment_fields = asdict(treatment) if treatment else None
    inputs: list[Any] = [numbers, treatment_fields, seed, device, torch.__version__, code_digest()]
    inputs += [(path.name, path_digest(path)) if path else None for path in paths]
    return hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()[:16]


@cache
def path_digest(path: Path) -> str:
    """Return a digest of a file's content.

    A directory holds a model, which can have gigabytes. Its digest covers the names, sizes and times of its files.
    """
    if path.is_dir():
        stats = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in sorted(path.iterdir())]
        return hashlib.sha256(repr(stats).encode()).hexdigest()
    return content_digest([path])


@cache
def code_digest() -> str:
    """Return a digest of the package's code and of `RUN_MODULES`."""
    package, folder = Path(amapo_loss.__file__).parent, Path(__file__).parent
    run_modules = [folder / f"{name}.py" for name in RUN_MODULES]
    return content_digest([*sorted(package.rglob("*.py")), *run_modules])


def content_digest(paths: list[Path]) -> str:
    """Return one digest of the contents of all files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
