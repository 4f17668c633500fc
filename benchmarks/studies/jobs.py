"""Perform one training of a study, and keep its result in a store.

Depends on torch, amapo_loss, benchmarks.record, and on the other modules of `RUN_MODULES`.

A result is written to a file of the store as soon as it is computed, and a long training saves its state there, so that
an interruption costs at most a minute of a training. The name of the file is a hash of everything that the result
depends on: the settings, the treatment, the seed, the content of the data files, and the code.
"""

import ast
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import amapo_loss
from amapo_loss import kernels
from benchmarks.record import version_of, write_tensors, write_whole
from benchmarks.studies.arithmetic import arithmetic_problems, own_mistakes, own_pairs, share_solved, solve
from benchmarks.studies.data import Corpus, both_answers, file_corpus, generated_corpus
from benchmarks.studies.evaluation import chosen_logp, evaluate, ranked_correctly, share_of, training_metrics
from benchmarks.studies.harness import AnswerLogps, Optimization, Treatment, all_logps, imitate, prefer
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

# The modules of this folder that decide the numbers of a run. A module missing here could change without a new key, and
# the store would then return results of the old code.
RUN_MODULES = ("arithmetic", "data", "estimators", "evaluation", "harness", "jobs", "models")


@dataclass(frozen=True)
class Settings:
    """The options that all runs of a study share.

    The names of the fields are keys of the JSON that a study writes.
    """

    data: Path | None  # preference file for training; None: generated pairs and generated styles
    task: str | None  # of generated pairs: "sounds", or "arithmetic", whose pairs are the checkpoint's mistakes
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


def result_path(settings: Settings, job: Job, device: str, store: Path) -> Path:
    """Return the file of the store that a job's metrics are written to."""
    return store / f"{store_key(settings, job, device)}.json"


def perform_job(
    settings: Settings, job: Job, device: str, store: Path, advance: Callable[[int], None] = lambda pairs: None
) -> None:
    """Perform a job and write its metrics to the store.

    Args:
        settings: options of all jobs.
        job: the job. If it trains a treatment, the checkpoint of its seed must be in the store.
        device: device of the model.
        store: folder of the results.
        advance: called after each step of preference training with the number of its pairs.
    """
    path = result_path(settings, job, device, store)
    checkpoint_path = result_path(settings, Job(None, job.seed), device, store).with_suffix(".pt")
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
        trace = prefer(model, job.treatment, train, ref["train"], optimization, job.seed, "", state_path, advance)
        if job.only_validate:
            texts = data.texts["validation"]
            policy = all_logps(model, texts)
            ranked = ranked_correctly(job.treatment, texts, policy, ref["validation"])
            metrics = {
                "validation, own score": share_of(ranked.by_own_score),
                "validation, change": share_of(ranked.by_change),
                "chosen log-prob": chosen_logp(policy),
            }
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
    for group, of_group in pairs.items():
        if not of_group:
            raise ValueError(
                f"the model makes no mistakes in the {group} problems, so it has no pairs: use fewer --imitation-steps"
            )
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
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    versions = [torch.__version__, version_of("transformers") if settings.model else None]
    inputs: list[Any] = [numbers, treatment_fields, seed, job.only_validate, where, versions, code_digest()]
    inputs += [(path.name, path_digest(path)) if path else None for path in paths]
    return hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()[:16]


@cache
def path_digest(path: Path) -> str:
    """Return a digest of the content of a file, or of all files of a directory, which holds a model."""
    digest = hashlib.sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """Return a digest of the code that computes a run, see `run_files`.

    Comments, docstrings and the layout of the code do not count, so a run survives their change.
    """
    return hashlib.sha256("".join(dump_code(path.read_text()) for path in run_files()).encode()).hexdigest()


def run_files() -> list[Path]:
    """Return the files whose change makes stored runs stale. The library's trainer and self-check compute no run."""
    package, folder = Path(amapo_loss.__file__).parent, Path(__file__).parent
    kernel_files = Path(kernels.__file__).parent.glob("*.py")  # in a clone, they are not inside the package
    library = {*package.rglob("*.py"), *kernel_files} - {package / "trl.py", package / "__main__.py"}
    return [*sorted(library), *(folder / f"{name}.py" for name in RUN_MODULES)]


def dump_code(source: str) -> str:
    """Return the syntax tree of Python code as text, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            is_text = [isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) for line in body]
            node.body = [line for line, skip in zip(body, is_text) if not skip]  # type: ignore[attr-defined]
    return ast.dump(tree)
