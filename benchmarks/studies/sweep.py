"""Many treatments by several seeds, over processes, going on where it was interrupted. Knows no study.

A checkpoint is made once a seed, a run once a treatment and seed. Each is kept in a file of the store as soon as it is
done, under a key of everything that it depends on: the settings, the content of the files, and the code.
"""

import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

import amapo_loss
from benchmarks.record import write_whole
from benchmarks.studies.data import STYLES, Corpus, Pair, both_answers, file_corpus, generated_corpus
from benchmarks.studies.harness import Figures, Optimization, Trace, Treatment, all_logps, as_pairs, imitate, prefer
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

IMITATION = "imitation alone"
Answers = tuple[Tensor, Tensor]  # summed log-probs and lengths of some answers, [N] each
BANDS = {"low": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "high": (2 / 3, 1.01)}  # of the judge's confidence


@dataclass(frozen=True)
class Settings:
    """What all runs of a study have in common."""

    data: Path | None  # None: generated pairs, and generated styles
    eval: Path | None
    rm_bench: tuple[Path, ...]
    model: Path | None  # a Hugging Face directory; None: a byte model of this size
    width: int
    layers: int
    max_prompt: int
    max_answer: int
    imitation_steps: int
    imitation_learning_rate: float
    steps: int
    batch_size: int
    learning_rate: float
    probe_every: int
    generated: int  # training pairs, where they are generated


class Run(NamedTuple):
    """One treatment from the checkpoint of one seed, and what came of it."""

    treatment: str
    seed: int
    figures: Figures


class Data(NamedTuple):
    """A corpus, as tensors."""

    corpus: Corpus
    texts: dict[str, Texts]  # of "demonstrations", "train", "validation", "held out" and every name of `corpus.styled`
    cut: dict[str, int]


def sweep(
    settings: Settings, treatments: dict[str, Treatment], seeds: int, jobs: int, store: Path, device: str
) -> list[Run]:
    """Every treatment with every seed, the checkpoints first; on a CPU one thread a process, whatever their number."""
    checkpoints: list[tuple[str, Treatment | None, int]] = [(IMITATION, None, seed) for seed in range(seeds)]
    runs = [(name, treatment, seed) for name, treatment in treatments.items() for seed in range(seeds)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("of"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    found: dict[tuple[str, int], Figures] = {}
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with Progress(*columns) as progress:
            for description, work in (("imitating", checkpoints), ("learning preferences", runs)):
                bar = progress.add_task(description, total=len(work))
                futures = {}
                for name, treatment, seed in work:
                    path = store / f"{key(settings, treatment, seed, device)}.json"
                    checkpoint = store / f"{key(settings, None, seed, device)}.pt"
                    if path.exists():
                        found[name, seed] = json.loads(path.read_text())
                        progress.advance(bar)
                    else:
                        futures[pool.submit(perform, settings, treatment, seed, device, path, checkpoint)] = name, seed
                for future in as_completed(futures):
                    found[futures[future]] = future.result()
                    progress.advance(bar)
    finally:
        pool.shutdown(cancel_futures=True)
    return [Run(name, seed, found[name, seed]) for name, _, seed in [*checkpoints, *runs]]


def perform(
    settings: Settings, treatment: Treatment | None, seed: int, device: str, path: Path, checkpoint: Path
) -> Figures:
    """One run, or with no treatment the checkpoint that all runs of a seed start from; kept in these files."""
    data = load(settings)
    if treatment is None:
        kept = make_checkpoint(settings, data, seed, device)
        buffer = BytesIO()
        torch.save(kept, buffer)
        write_whole(checkpoint, buffer.getvalue())
        figures = evaluate(Treatment(), data, kept["logps"], kept["logps"])
    else:
        kept = torch.load(checkpoint, weights_only=True)
        model = new_model(settings, seed, device)
        if kept["state"] is not None:
            model.load_state_dict(kept["state"])
        optimization = Optimization(
            settings.steps, settings.batch_size, settings.learning_rate, settings.probe_every or None
        )
        trace = prefer(model, treatment, data.texts["train"], kept["logps"]["train"], optimization, seed)
        figures = evaluate(treatment, data, log_probs(model, data), kept["logps"]) | curves(trace)
    write_whole(path, json.dumps(figures).encode())
    return figures


def make_checkpoint(settings: Settings, data: Data, seed: int, device: str) -> dict[str, Any]:
    """A model that imitates the demonstrations, and its log-probs of everything."""
    model = new_model(settings, seed, device)
    imitate(
        model, data.texts["demonstrations"], settings.imitation_steps, settings.batch_size,
        settings.imitation_learning_rate, seed,
    )  # fmt: skip
    logps = log_probs(model, data) | {"train": all_logps(model, data.texts["train"])}
    return {"state": model.state_dict() if settings.imitation_steps else None, "logps": logps}


def new_model(settings: Settings, seed: int, device: str) -> nn.Module:
    """As it is before imitation."""
    torch.manual_seed(seed)
    if settings.model:
        return HuggingFaceLM(settings.model).to(device)
    return ByteLM(settings.width, settings.layers, 1 + settings.max_prompt + settings.max_answer).to(device)


@cache
def load(settings: Settings) -> Data:
    """The pairs as tensors, once a process."""
    if settings.data and settings.eval:
        corpus = file_corpus(settings.data, settings.eval, settings.rm_bench)
    else:
        pairs = settings.generated
        corpus = generated_corpus(pairs, held_out=pairs // 4, demonstrations=2 * pairs, seed=0)
    tokenizer: Tokenizer = hugging_face_tokenizer(settings.model) if settings.model else BYTES
    answers = {
        "demonstrations": corpus.demonstrations,
        "train": both_answers(corpus.train),
        "validation": both_answers(corpus.validation),
        "held out": both_answers(corpus.held_out),
    } | {
        name: [(entry.prompt, text) for entry in entries for text in (*entry.chosen, *entry.rejected)]
        for name, entries in corpus.styled.items()
    }
    texts, cut = {}, {}
    for name, these in answers.items():
        texts[name], cut[name] = tensors(these, settings.max_prompt, settings.max_answer, tokenizer)
    if settings.model:
        check_fit(settings.model, list(texts.values()))
    return Data(corpus, texts, cut)


def log_probs(model: nn.Module, data: Data) -> dict[str, Answers]:
    """Of all answers that a model is judged by."""
    return {name: all_logps(model, data.texts[name]) for name in ("validation", "held out", *data.corpus.styled)}


def evaluate(treatment: Treatment, data: Data, policy: dict[str, Answers], ref: dict[str, Answers]) -> Figures:
    """How a model ranks pairs that it has not learned from, by average log-prob but for "own score"."""
    ranking = as_pairs(*policy["held out"]).ranking()
    right = (ranking > 0).double()
    pairs = data.corpus.held_out
    chosen, rejected = treatment.rewards(*policy["held out"], ref["held out"][0]).chunk(2)
    figures: Figures = {
        "validation": (as_pairs(*policy["validation"]).ranking() > 0).double().mean().item(),
        "held out": right.mean().item(),
        "held out, own score": (chosen > rejected).double().mean().item(),
        "ranking mean": ranking.mean().item(),
        "ranking std": ranking.std().item(),
        "chosen log-prob": (policy["held out"][0] / policy["held out"][1]).chunk(2)[0].mean().item(),
        "bands": {name: mean_where(right, in_band(pairs, band)) for name, band in BANDS.items()},
        "sources": {source: mean_where(right, rows) for source, rows in by_source(pairs).items()},
        "correlations": correlations(policy["held out"], pairs),
        "styles": {},
    }
    for name in data.corpus.styled:
        sums, lengths = policy[name]
        same = same_answers(data.texts[name])
        figures["styles"][name] = style_figures(sums / lengths, same)
        own_scores = treatment.rewards(sums, lengths, ref[name][0])
        figures["styles"][name]["own score"] = style_figures(own_scores, same)
    return figures


def mean_where(values: Tensor, rows: list[int]) -> float | None:
    """Over these rows; None where there is none."""
    return values[rows].mean().item() if rows else None


def in_band(pairs: list[Pair], band: tuple[float, float]) -> list[int]:
    """Numbers of the pairs with a confidence in it, its lower end included."""
    return [i for i, pair in enumerate(pairs) if pair.confidence is not None and band[0] <= pair.confidence < band[1]]


def by_source(pairs: list[Pair]) -> dict[str, list[int]]:
    """Numbers of the pairs of each source, by its name."""
    numbers = sorted(range(len(pairs)), key=lambda i: pairs[i].source)
    return {source: list(these) for source, these in groupby(numbers, key=lambda i: pairs[i].source) if source}


def correlations(answers: Answers, pairs: list[Pair]) -> dict[str, dict[str, float | None]]:
    """Spearman's, of the judge's confidence with the gaps in log-prob and in perplexity, in all and by source."""
    chosen, rejected = (answers[0] / answers[1]).double().chunk(2)
    gaps = {"log-prob": chosen - rejected, "perplexity": (-rejected).exp() - (-chosen).exp()}
    judged = [i for i, pair in enumerate(pairs) if pair.confidence is not None]
    groups = {"all": judged} | {
        source: [i for i in rows if pairs[i].confidence is not None] for source, rows in by_source(pairs).items()
    }
    confidence = torch.tensor([pair.confidence or 0.0 for pair in pairs], dtype=torch.float64)
    return {
        group: {name: spearman(gap[rows], confidence[rows]) for name, gap in gaps.items()}
        for group, rows in groups.items()
    }


def spearman(x: Tensor, y: Tensor) -> float | None:
    """The correlation of ranks, equal values sharing their mean rank; None where one of the two does not vary."""

    def ranks(values: Tensor) -> Tensor:
        _, place, counts = values.unique(return_inverse=True, return_counts=True)
        rank_of_each: Tensor = (counts.cumsum(0) - (counts - 1) / 2)[place]
        return rank_of_each

    if len(x.unique()) < 2 or len(y.unique()) < 2:
        return None
    return torch.corrcoef(torch.stack((ranks(x), ranks(y))))[0, 1].item()


def same_answers(texts: Texts) -> Tensor:
    """[entries, 3, 3] where chosen answer i and rejected answer j, cut as they are, read the same."""
    chosen, rejected = texts.labels.view(-1, 2, len(STYLES), texts.labels.shape[1]).unbind(1)
    same: Tensor = (chosen[:, :, None] == rejected[:, None, :]).all(-1)
    return same


def style_figures(scores: Tensor, same: Tensor) -> Figures:
    """RM-Bench's, of the scores of each entry's chosen answers in the three styles and its rejected ones, [N * 6].

    The matrix holds the share of entries where `chosen[i]` outscores `rejected[j]`; where they read the same, neither
    does, whatever rounding says. easy is the mean of its lower left triangle, normal of the diagonal, hard of the upper
    right one.
    """
    chosen, rejected = scores.view(-1, 2, len(STYLES)).unbind(1)
    matrix = ((chosen[:, :, None] > rejected[:, None, :]) & ~same).double().mean(0)
    pairs = len(STYLES) * (len(STYLES) - 1) / 2
    return {
        "matrix": matrix.tolist(),
        "easy": (matrix.tril(-1).sum() / pairs).item(),
        "normal": matrix.diagonal().mean().item(),
        "hard": (matrix.triu(1).sum() / pairs).item(),
        "ties": same.double().mean().item(),
    }


def curves(trace: Trace) -> Figures:
    """Means over the pairs of every step; the four cases are (ranked right or not) by (margin above 0 or not)."""
    correct, raised = trace.ranking > 0, trace.margins > 0
    ranked_as = {"correct": correct, "misranked": ~correct}
    cases = {
        f"{ranked}, {margin}": rows & where
        for ranked, rows in ranked_as.items()
        for margin, where in {"margin": raised, "no margin": ~raised}.items()
    }
    return {
        "curves": {
            "accuracy": rounded(correct.double().mean(1)),
            "ranking": rounded(trace.ranking.mean(1)),
            "margin": rounded(trace.margins.mean(1)),
            "gradient error": rounded(trace.gradient_error),
        }
        | {f"share, {name}": rounded(rows.double().mean(1)) for name, rows in cases.items()}
        | {f"spent, {name}": rounded((trace.weights * rows).mean(1)) for name, rows in cases.items()},
        "gradient error": trace.gradient_error.double().mean().item(),
        "weight correct": trace.weights[correct].double().mean().item(),
        "weight misranked": trace.weights[~correct].double().mean().item(),
        "margin": trace.margins.double().mean().item(),
        "probes": trace.probes,
    }


def rounded(values: Tensor) -> list[float]:
    """To four digits: a curve is for drawing."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def key(settings: Settings, treatment: Treatment | None, seed: int, device: str) -> str:
    """Names the result of a run, by everything that it depends on."""
    if treatment is None:  # a checkpoint knows nothing of the training after it
        settings = replace(settings, steps=0, learning_rate=0.0, probe_every=0)
    files = [settings.data, settings.eval, *settings.rm_bench, settings.model]
    numbers = replace(settings, data=None, eval=None, rm_bench=(), model=None)
    everything: list[Any] = [asdict(numbers), treatment and asdict(treatment), seed, device, torch.__version__, code()]
    everything += [path and (path.name, content(path)) for path in files]
    return hashlib.sha256(json.dumps(everything, default=str).encode()).hexdigest()[:16]


@cache
def content(path: Path) -> str:
    """A digest of a file; of a directory, which may hold gigabytes, its names, sizes and times."""
    if path.is_dir():
        stats = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in sorted(path.iterdir())]
        return hashlib.sha256(repr(stats).encode()).hexdigest()
    return digest([path])


@cache
def code() -> str:
    """A digest of the package's code and of that which runs experiments."""
    package, here = Path(amapo_loss.__file__).parent, Path(__file__).parent
    used = [here / f"{name}.py" for name in ("harness", "sweep", "models", "data", "estimators")]
    return digest([*sorted(package.rglob("*.py")), *used])


def digest(paths: list[Path]) -> str:
    """Of all of them."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
