"""Run many treatments with several seeds on a process pool, and keep every finished run in a store.

Depends on torch, rich, amapo_loss, benchmarks.record, and on the modules of `RUN_MODULES`.

Each seed has one checkpoint, and each combination of treatment and seed is one run. A result is written to a file of
the store as soon as it is computed, and a long training saves its state there, so an interrupted sweep loses at most a
minute of each training in progress. The name of the file is a hash of everything that the result depends on: the
settings, the treatment, the seed, the content of the data files, and the code.
"""

import ast
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import amapo_loss
from benchmarks.record import version_of, write_tensors, write_whole
from benchmarks.studies.arithmetic import arithmetic_problems, own_mistakes, own_pairs, share_solved, solve
from benchmarks.studies.data import Corpus, both_answers, file_corpus, generated_corpus
from benchmarks.studies.evaluation import accuracy, evaluate, training_metrics
from benchmarks.studies.harness import AnswerLogps, Metrics, Optimization, Treatment, all_logps, imitate, prefer
from benchmarks.studies.models import (
    BYTES,
    ByteLM,
    HuggingFaceLM,
    LanguageModel,
    Texts,
    Tokenizer,
    check_fit,
    frozen_activations,
    hugging_face_tokenizer,
    tensors,
)

IMITATION = "imitation alone"  # the name of the checkpoints among the treatments
PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("elapsed,"),
    TimeRemainingColumn(elapsed_when_finished=False),
    TextColumn("remaining"),
)
# The modules of this folder that decide the numbers of a run. A module missing here could change without a new key, and
# the store would then return results of the old code.
RUN_MODULES = ("arithmetic", "data", "estimators", "evaluation", "harness", "models", "sweep")


@dataclass(frozen=True)
class Settings:
    """The options that all runs of a study share.

    The names of the fields are keys of the JSON that a study writes.
    """

    data: Path | None  # preference file for training; None: generated pairs and generated styles
    task: str  # what generated pairs are about: "sounds", or "arithmetic", whose pairs are the checkpoint's mistakes
    eval: Path | None  # preference file for the evaluation
    rm_bench: tuple[Path, ...]  # RM-Bench files
    also_eval: tuple[Path, ...]  # other preference files for the evaluation
    train_pairs: int | None  # largest number of training pairs; None: all
    eval_pairs: int | None  # largest number of pairs of each group that is evaluated; None: all
    rm_bench_entries: int | None  # largest number of entries of each RM-Bench file; None: all
    model: Path | None  # directory of a Hugging Face model; None: a byte model with this width and these layers
    trained_blocks: int  # number of blocks of the Hugging Face model that are trained; 0: all weights
    dtype: str  # name of the torch dtype of the Hugging Face model's matrix products
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
    problems: dict[str, list[str]]  # for the task "arithmetic", keys: "train", "validation", "held out"


class Job(NamedTuple):
    """What one process does at a time."""

    treatment: Treatment | None  # None: make the checkpoint that all runs of the seed start from
    seed: int
    only_validate: bool = False  # whether the trained model is only evaluated on the validation pairs


class Sweep(NamedTuple):
    """All that `sweep` has computed."""

    runs: list[Run]  # those of the checkpoints under the name `IMITATION`, then those of the treatments
    treatments: dict[str, Treatment]  # with their learning rates, if these were tuned
    tuning: list[dict[str, Any]]  # one entry for each loss and learning rate; empty if nothing was tuned


def sweep(
    settings: Settings,
    treatments: dict[str, Treatment],
    seeds: int,
    jobs: int,
    store: Path,
    device: str,
    learning_rates: Sequence[float] = (),
) -> Sweep:
    """Run every treatment with every seed, starting with the checkpoints.

    Args:
        settings: options of all runs.
        treatments: the treatments, by name.
        seeds: number of seeds.
        jobs: number of processes. Each uses one CPU thread, so the results do not depend on this number.
        store: folder of the finished runs.
        device: device of the models.
        learning_rates: with more than one, each loss gets the one with the highest accuracy on the validation pairs
            after one run with a seed of its own. See `tuning_group`.

    """
    with Progress(*PROGRESS_COLUMNS) as progress:
        data = load(settings)
        if settings.trained_blocks:
            total = sum(len(texts.tokens) for texts in data.texts.values())
            bar = progress.add_task("computing the frozen blocks", total=total)
            with_activations(settings, data, store, device, lambda texts: progress.advance(bar, texts))
        spawn = multiprocessing.get_context("spawn")  # fork is unsafe once torch has threads or CUDA
        pairs = spawn.Value("q")
        pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=initialize_process, initargs=(pairs,))

        def perform(description: str, phase: list[Job]) -> list[Metrics]:
            return perform_jobs(pool, progress, pairs, description, phase, settings, store, device)

        try:
            tuned, tuning = len(learning_rates) > 1, list[dict[str, Any]]()
            seeds_with_checkpoint = [Job(None, seed) for seed in range(seeds + tuned)]
            checkpoints = perform("training the checkpoints", seeds_with_checkpoint)[:seeds]
            if tuned:
                groups = {tuning_group(treatment): treatment for treatment in reversed(treatments.values())}
                candidates = [
                    replace(treatment, learning_rate=rate) for treatment in groups.values() for rate in learning_rates
                ]
                found = perform("tuning the learning rates", [Job(treatment, seeds, True) for treatment in candidates])
                best: dict[tuple[str, ...], tuple[float, float]] = {}
                for treatment, metrics in zip(candidates, found):
                    group, rate = tuning_group(treatment), treatment.learning_rate or 0
                    best[group] = max(best.get(group, (0.0, 0.0)), (metrics["validation"], -rate))
                    curve = metrics["curves"]["accuracy"]
                    tuning.append(
                        {"loss": " ".join(group), "learning rate": rate, "validation": metrics["validation"]}
                        | {"accuracy of each batch before the step": curve}
                    )
                treatments = {
                    name: replace(treatment, learning_rate=-best[tuning_group(treatment)][1])
                    for name, treatment in treatments.items()
                }
            runs = [(name, seed) for name in treatments for seed in range(seeds)]
            metrics_of_runs = perform("training the treatments", [Job(treatments[name], seed) for name, seed in runs])
        finally:
            pool.shutdown(cancel_futures=True)
    of_checkpoints = [Run(IMITATION, seed, metrics) for seed, metrics in enumerate(checkpoints)]
    of_treatments = [Run(name, seed, metrics) for (name, seed), metrics in zip(runs, metrics_of_runs)]
    return Sweep(of_checkpoints + of_treatments, treatments, tuning)


def tuning_group(treatment: Treatment) -> tuple[str, ...]:
    """Return what a learning rate is tuned for: the loss, and for AMaPO the formula.

    A study tunes it with the first of its treatments of a group, and all others of the group take the same.
    """
    return (treatment.loss, treatment.margin.formula) if treatment.loss == "amapo" else (treatment.loss,)


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


def perform_jobs(
    pool: ProcessPoolExecutor,
    progress: Progress,
    pairs: Any,
    description: str,
    phase: list[Job],
    settings: Settings,
    store: Path,
    device: str,
) -> list[Metrics]:
    """Perform the jobs that are not in the store yet, and return the metrics of all of them in their order.

    The progress bar counts jobs for checkpoints, and pairs for trainings.
    """
    paths = [store / f"{store_key(settings, job, device)}.json" for job in phase]
    missing = {path: job for path, job in zip(paths, phase) if not path.exists()}
    unit = 1 if phase[0].treatment is None else settings.steps * settings.batch_size
    found = unit * (len(set(paths)) - len(missing))
    bar = progress.add_task(description, total=unit * len(set(paths)), completed=found)
    pairs.value = 0
    pending = {pool.submit(perform_job, settings, job, device, store) for job in missing.values()}
    finished = 0
    while pending:
        done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        finished += len(done)
        progress.update(bar, completed=found + (finished if unit == 1 else pairs.value))
        if done and not progress.console.is_terminal:  # a log file has no progress bar
            remaining = progress.tasks[bar].time_remaining
            estimate = "" if remaining is None else f", about {remaining / 60:.0f} minutes remaining"
            progress.console.print(f"{description}: {finished} of {len(missing)} runs{estimate}")
    progress.update(bar, completed=unit * len(set(paths)))
    return [json.loads(path.read_text()) for path in paths]


def perform_job(settings: Settings, job: Job, device: str, store: Path) -> None:
    """Perform a job and write its metrics to the store."""
    path = store / f"{store_key(settings, job, device)}.json"
    checkpoint_path = store / f"{store_key(settings, Job(None, job.seed), device)}.pt"
    data = load(settings)
    if settings.trained_blocks:
        data = with_activations(settings, data, store, device)
    model = new_model(settings, job.seed, device)
    if job.treatment is None:
        if settings.imitation_steps:
            imitate(
                model,
                data.texts["demonstrations"],
                settings.imitation_steps,
                settings.batch_size,
                settings.imitation_learning_rate,
                job.seed,
            )
        mistakes = {}
        if isinstance(model, ByteLM) and settings.task == "arithmetic":
            mistakes = {group: own_mistakes(model, prompts, job.seed) for group, prompts in data.problems.items()}
            data = with_mistakes(settings, data, mistakes)
        logps = evaluation_logps(model, data) | {"train": all_logps(model, data.texts["train"])}
        # Without imitation steps, `new_model` returns the same weights again.
        state = model.state_dict() if settings.imitation_steps else None
        write_tensors(checkpoint_path, {"state": state, "mistakes": mistakes, "logps": logps})
        metrics = evaluate(Treatment(), data.corpus, data.texts, logps, logps)
    else:
        checkpoint = torch.load(checkpoint_path, weights_only=True)
        if checkpoint["state"] is not None:
            model.load_state_dict(checkpoint["state"])
        if settings.task == "arithmetic":
            data = with_mistakes(settings, data, checkpoint["mistakes"])
        optimization = Optimization(
            settings.steps, settings.batch_size, settings.learning_rate, settings.probe_every or None
        )
        train, ref, state_path = data.texts["train"], checkpoint["logps"], path.with_suffix(".state")
        trace = prefer(model, job.treatment, train, ref["train"], optimization, job.seed, "", state_path, count_pairs)
        if job.only_validate:
            metrics = {"validation": accuracy(all_logps(model, data.texts["validation"]))}
        else:
            metrics = evaluate(job.treatment, data.corpus, data.texts, evaluation_logps(model, data), ref)
        metrics |= training_metrics(trace)
    if isinstance(model, ByteLM) and settings.task == "arithmetic" and not job.only_validate:
        metrics["solved"] = share_solved(model, data.problems["held out"])
    write_whole(path, json.dumps(metrics).encode())
    path.with_suffix(".state").unlink(missing_ok=True)


def new_model(settings: Settings, seed: int, device: str) -> LanguageModel:
    """Return the model before imitation: a byte model initialized with this seed, or the Hugging Face model."""
    torch.manual_seed(seed)
    if settings.model:
        return HuggingFaceLM(settings.model, settings.trained_blocks, getattr(torch, settings.dtype)).to(device)
    return ByteLM(settings.width, settings.layers, 1 + settings.max_prompt + settings.max_answer).to(device)


@cache
def load(settings: Settings) -> Data:
    """Load or generate the corpus and convert it to tensors. Each process does this once."""
    if settings.data and settings.eval:
        corpus = file_corpus(
            settings.data,
            settings.eval,
            settings.rm_bench,
            settings.also_eval,
            settings.train_pairs,
            settings.eval_pairs,
            settings.rm_bench_entries,
        )
    elif settings.task == "arithmetic":
        pairs = settings.generated
        groups = {"demonstrations": 4 * pairs, "train": pairs, "validation": pairs // 8, "held out": pairs // 4}
        prompts = arithmetic_problems(groups)
        demonstrations = [(prompt, solve(prompt)) for prompt in prompts.pop("demonstrations")]
        corpus = Corpus(demonstrations, train=[], validation=[], held_out=[], styled={}, further={})
        demonstrated, _ = tensors(demonstrations, settings.max_prompt, settings.max_answer)
        return Data(corpus, {"demonstrations": demonstrated}, num_truncated={}, problems=prompts)
    else:
        pairs = settings.generated
        corpus = generated_corpus(pairs, held_out=pairs // 4, demonstrations=2 * pairs, seed=0)
    tokenizer: Tokenizer = hugging_face_tokenizer(settings.model) if settings.model else BYTES
    strings = {
        **({"demonstrations": corpus.demonstrations} if settings.imitation_steps else {}),
        "train": both_answers(corpus.train),
        "validation": both_answers(corpus.validation),
        "held out": both_answers(corpus.held_out),
    }
    strings |= {name: both_answers(pairs) for name, pairs in corpus.further.items()}
    strings |= {
        name: [(pair.prompt, answer) for pair in pairs for answer in (*pair.chosen, *pair.rejected)]
        for name, pairs in corpus.styled.items()
    }
    converted = {
        name: tensors(of_group, settings.max_prompt, settings.max_answer, tokenizer)
        for name, of_group in strings.items()
    }
    texts = {name: of_group for name, (of_group, _) in converted.items()}
    if settings.model:
        check_fit(settings.model, list(texts.values()))
    return Data(corpus, texts, {name: count for name, (_, count) in converted.items()}, problems={})


def with_mistakes(settings: Settings, data: Data, mistakes: dict[str, dict[str, str]]) -> Data:
    """Return the data of the task "arithmetic" with the pairs that a checkpoint's mistakes give.

    Args:
        settings: options of all runs.
        data: the problems.
        mistakes: for each group of problems, a wrong solution by problem.
    """
    pairs = {group: own_pairs(of_group) for group, of_group in mistakes.items()}
    texts = {
        group: tensors(both_answers(of_group), settings.max_prompt, settings.max_answer)[0]
        for group, of_group in pairs.items()
    }
    corpus = data.corpus._replace(train=pairs["train"], validation=pairs["validation"], held_out=pairs["held out"])
    return data._replace(corpus=corpus, texts=data.texts | texts)


def with_activations(
    settings: Settings, data: Data, store: Path, device: str, advance: Callable[[int], None] = lambda texts: None
) -> Data:
    """Return the data with the inputs of the model's first trained block, which the store keeps.

    Args:
        settings: options of all runs, with a Hugging Face model.
        data: the texts.
        store: folder of the finished runs.
        device: device of the model.
        advance: called with the number of texts that were computed or found.
    """
    texts, dtype = dict[str, Texts](), getattr(torch, settings.dtype)
    assert settings.model is not None  # the command line allows trained blocks only with a model
    for name, group in data.texts.items():
        inputs = [settings.trained_blocks, settings.dtype, path_digest(settings.model), version_of("transformers")]
        digest = hashlib.sha256(json.dumps(inputs).encode() + group.tokens.numpy().tobytes()).hexdigest()[:16]
        path = store / f"{digest}.activations"
        activations = frozen_activations(settings.model, settings.trained_blocks, group, path, dtype, device, advance)
        texts[name] = group._replace(activations=activations)
    return data._replace(texts=texts)


def evaluation_logps(model: LanguageModel, data: Data) -> dict[str, AnswerLogps]:
    """Return the log-probs and lengths of all answers that a model is evaluated on."""
    names = ("validation", "held out", *data.corpus.further, *data.corpus.styled)
    return {name: all_logps(model, data.texts[name]) for name in names}


def store_key(settings: Settings, job: Job, device: str) -> str:
    """Return the name of a job's files in the store, a hash of everything that the result depends on."""
    treatment, seed = job.treatment, job.seed
    if treatment is None:
        # A checkpoint does not depend on the options of preference training. With them in its key, a new learning rate
        # would repeat the imitation.
        settings = replace(settings, steps=0, learning_rate=0.0, probe_every=0)
        if settings.imitation_steps == 0 and settings.model:
            settings, seed = replace(settings, batch_size=0), 0  # all seeds have the same checkpoint
    elif treatment.learning_rate:
        # The same rate gives the same run, wherever it was given.
        settings = replace(settings, learning_rate=treatment.learning_rate)
        treatment = replace(treatment, learning_rate=None)
    paths = [settings.data, settings.eval, *settings.rm_bench, *settings.also_eval, settings.model]
    numbers = asdict(replace(settings, data=None, eval=None, rm_bench=(), also_eval=(), model=None))
    treatment_fields = asdict(treatment) if treatment else None
    inputs: list[Any] = [numbers, treatment_fields, seed, job.only_validate, device, torch.__version__, code_digest()]
    inputs += [(path.name, path_digest(path)) if path else None for path in paths]
    return hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()[:16]


@cache
def path_digest(path: Path) -> str:
    """Return a digest of the content of a file, or of all files of a directory, which holds a model."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """Return a digest of the code that computes a run: the library without its trainer, and `RUN_MODULES`.

    Comments, docstrings and the layout of the code do not count, so a run survives their change.
    """
    package, folder = Path(amapo_loss.__file__).parent, Path(__file__).parent
    library = {*package.rglob("*.py")} - {package / "trl.py", package / "__main__.py"}
    paths = [*sorted(library), *(folder / f"{name}.py" for name in RUN_MODULES)]
    return hashlib.sha256("".join(dump_code(path.read_text()) for path in paths).encode()).hexdigest()


def dump_code(source: str) -> str:
    """Return the syntax tree of Python code as text, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            is_text = [isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) for line in body]
            node.body = [line for line, skip in zip(body, is_text) if not skip]  # type: ignore[attr-defined]
    return ast.dump(tree)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
