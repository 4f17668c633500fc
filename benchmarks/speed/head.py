"""Compare the time, memory and precision of language-model heads: `linear_sequence_logps` and its alternatives.

    python -m benchmarks.speed.head

A step runs forward and backward, from hidden states to the average log-prob of each sequence. Half of the tokens are
counted, because the prompt is not. The first variant computes the logits of all tokens; the other variants skip the
prompt. Variants whose package is not installed, or that need a GPU when there is none, are left out. To install all
packages: `pip install "amapo-loss[trl]" liger-kernel cut-cross-entropy`.

The variants take turns, so that a slowdown of the machine affects all of them. Each time is divided by the baseline's
time of the same round, and the tables show the median ratio over the rounds. Memory is the peak that PyTorch allocates,
without the inputs and the returned gradients. Gradient errors are relative errors in the 2-norm against float64. The
script also writes JSON and a picture.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import matplotlib
import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from amapo_loss import linear_sequence_logps
from amapo_loss.logps import _online_lse
from benchmarks.record import RESULTS, version_of, write_json, write_picture
from benchmarks.speed.memory import peak_bytes

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt

IGNORED = -100  # the label of tokens that are not counted
UNLIMITED_BYTES = 2**60
ALL_TOKENS = "full logits, all tokens"
BASELINE = "full logits, counted tokens only"
TORCH = "F.linear_cross_entropy (chunked)"
TRL = "TRL ChunkedLogProbFunction"
OURS = "linear_sequence_logps"
OURS_CACHED = "linear_sequence_logps (keep_bytes)"


class Case(NamedTuple):
    """The sizes of a head and of the batch that goes through it."""

    hidden_size: int
    vocab_size: int
    sequences: int
    length: int  # tokens in a sequence
    dtype: torch.dtype
    device: str


CASES = {
    "small": Case(256, 32_000, 8, 256, torch.float32, "cpu"),
    "Llama-3-8B": Case(4096, 128_256, 16, 2048, torch.bfloat16, "cuda"),
    "Qwen3-8B": Case(4096, 151_936, 16, 2048, torch.bfloat16, "cuda"),
}
# The precision table uses this case. It is small, because bfloat16 is slow on a CPU.
PRECISION_CASE = Case(512, 16_000, 8, 64, torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu")


class Batch(NamedTuple):
    """The inputs of a head, and the gradient of the loss with respect to its output."""

    hidden: Tensor  # [N, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N, T]
    grad_output: Tensor  # [N]

    @property
    def differentiable(self) -> list[Tensor]:
        """Return the inputs that require a gradient."""
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]

    def as_leaves(self, trainable: bool) -> "Batch":
        """Return the same values as leaf tensors. Hidden states require a gradient; the weight does if `trainable`."""
        return self._replace(
            hidden=self.hidden.detach().requires_grad_(), weight=self.weight.detach().requires_grad_(trainable)
        )


def generate_batch(case: Case) -> Batch:
    """Return a batch in which the model is confident (p > 0.99) of about half of the tokens.

    The rows of the weight share a mean, like those of trained models.
    """
    hidden_size, vocab_size, n, length, dtype, device = case
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=generator, device=device)
    weight = 0.04 * (randn(vocab_size, hidden_size) + 3 * randn(1, hidden_size))
    labels = torch.randint(vocab_size, (n, length), generator=generator, device=device)
    hidden, mean_row = randn(n, length, hidden_size) * (2.3 / (0.04 * hidden_size**0.5)), weight.mean(0)
    # The shared mean must add nothing to the logits, so hidden states are made orthogonal to it.
    hidden -= (hidden @ mean_row / mean_row.square().sum())[..., None] * mean_row
    # The component of each hidden state along its label's row is set so that the label gets a chosen logit.
    label_row = weight[labels] - mean_row
    label_logit = torch.empty((n, length), device=device).uniform_(9, 24, generator=generator)
    hidden += label_row * ((label_logit - (hidden * label_row).sum(-1)) / label_row.square().sum(-1))[..., None]
    labels[:, : length // 2] = IGNORED  # the prompt
    grad_output = torch.rand(n, generator=generator, device=device) / n
    grad_output[n // 2 :] *= -1  # the second half of the sequences are rejected answers
    return Batch(hidden.to(dtype), weight.to(dtype), labels, grad_output)


# From hidden [n, H], weight [V, H] and target_ids [n] to the log-probs [n] of tokens.
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]
# From a batch to the average log-probs [N] of its sequences.
SequenceLogps = Callable[[Batch], Tensor]


def average_counted(token_logps: TokenLogps, batch: Batch) -> Tensor:
    """Return the average log-probs [N] of the sequences. Only the counted tokens go through the head."""
    counted = batch.labels != IGNORED
    logps = token_logps(batch.hidden[counted], batch.weight, batch.labels[counted])
    return logps.new_zeros(counted.shape).masked_scatter(counted, logps).sum(1) / counted.sum(1)


def full_logits_of_all_tokens(batch: Batch) -> Tensor:
    """Return the average log-probs [N], computed from the logits of all tokens, as in most training loops."""
    counted = batch.labels != IGNORED
    logps = (batch.hidden @ batch.weight.T).float().log_softmax(-1)
    logps = logps.gather(2, batch.labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (logps * counted).sum(1) / counted.sum(1)


def full_logits(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [n]
) -> Tensor:
    """Return the log-probs, computed from the full logits of the given tokens."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, target_ids.unsqueeze(1)).squeeze(1)


def torch_chunked(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [n]
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the log-probs from PyTorch's chunked linear cross-entropy, which exists from version 2.13 on."""
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=chunk_tokens, chunking_method=None if chunk_tokens else "auto", acc_policy="auto"
    )
    return -F.linear_cross_entropy(hidden, weight, target_ids, reduction="none", options=options).float()


def trl_chunked(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [n]
    block_v: int = 32_768,
) -> Tensor:
    """Return the log-probs from the head of TRL's trainers.

    `block_v` is the width of a vocabulary block; the default is TRL's.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logps: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, target_ids, 1.0, block_v, None, 1.0, ())[0]
    return logps


def liger(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [n]
) -> Tensor:
    """Return the log-probs from Liger's fused linear cross-entropy.

    Its fused preference losses are not compared, because they cannot compute a loss that couples the pairs of a batch.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    result = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, target_ids, None, None, IGNORED, 0.0, 0.0, "none", None, False, torch.float32
    )
    losses: Tensor = result[0] if isinstance(result, tuple) else result  # some versions return a tuple
    return -losses


def cut_cross_entropy(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [n]
) -> Tensor:
    """Return the log-probs from Apple's Cut Cross-Entropy.

    Its gradient is approximate, because it skips blocks of negligible softmax entries, and because it adds up the other
    blocks in the dtype of the hidden states.
    """
    from cut_cross_entropy import linear_cross_entropy

    losses: Tensor = linear_cross_entropy(hidden, weight, target_ids, reduction="none")
    return -losses


def ours(batch: Batch, keep_bytes: int = 0) -> Tensor:
    """Return the average log-probs [N] from this library, which selects the counted tokens itself."""
    return linear_sequence_logps(batch.hidden, batch.weight, batch.labels, shift=False, keep_bytes=keep_bytes)


def variants(device: str, trainable: bool) -> dict[str, SequenceLogps]:
    """Return the variants that run on a device. Each call compiles the compiled variant anew."""
    torch.compiler.reset()
    available: dict[str, SequenceLogps] = {
        ALL_TOKENS: full_logits_of_all_tokens,
        BASELINE: partial(average_counted, full_logits),
        "full logits, torch.compile": partial(average_counted, torch.compile(full_logits)),
    }
    if hasattr(F, "linear_cross_entropy"):
        available[TORCH] = partial(average_counted, torch_chunked)
    if find_spec("trl"):
        available[TRL] = partial(average_counted, trl_chunked)
    if device == "cuda" and find_spec("liger_kernel"):
        available["Liger fused linear cross-entropy"] = partial(average_counted, liger)
    if device == "cuda" and find_spec("cut_cross_entropy"):
        available["Cut Cross-Entropy"] = partial(average_counted, cut_cross_entropy)
    available[OURS] = ours
    if trainable:
        available[OURS_CACHED] = partial(ours, keep_bytes=UNLIMITED_BYTES)
    return available


def forward_backward(variant: SequenceLogps, batch: Batch) -> tuple[Tensor, ...]:
    """Run forward and backward; return the gradients of `batch.differentiable`."""
    logps = variant(batch)
    return torch.autograd.grad(logps, batch.differentiable, batch.grad_output.to(logps))


class Cost(NamedTuple):
    """The time, memory and error of one variant."""

    ms: list[float]  # of each round
    workspace: int  # peak bytes, without inputs and gradients
    errors: list[float]  # of the gradients with respect to hidden states and, if trainable, weight


def measure_costs(
    batch: Batch, device: str, rounds: int, progress: Progress, description: str
) -> dict[str, Cost | str]:
    """Return the cost of every variant, or the reason why it failed."""
    exact = exact_gradients(batch)
    gradient_bytes = sum(tensor.numel() * tensor.element_size() for tensor in batch.differentiable)
    costs: dict[str, Cost | str] = {}
    timers = {}
    available = variants(device, batch.weight.requires_grad)
    bar = progress.add_task(description, total=len(available) * 2 + rounds)
    for name, variant in available.items():
        progress.advance(bar)
        run = partial(forward_backward, variant, batch)
        try:
            # The first run also compiles and warms up.
            errors = [relative_error(gradient, expected) for gradient, expected in zip(run(), exact)]
            costs[name] = Cost([], peak_bytes(run, device) - gradient_bytes, errors)
        except torch.OutOfMemoryError:
            costs[name] = "out of memory"
            continue
        timers[name] = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    for _ in range(rounds):
        progress.advance(bar)
        for name, timer in timers.items():
            cost = costs[name]
            assert isinstance(cost, Cost)
            cost.ms.append(timer.timeit(1).median * 1e3)
    progress.update(bar, completed=len(available) * 2 + rounds)
    return costs


def cost_rows(case: str, head: str, costs: dict[str, Cost | str]) -> list[dict[str, Any]]:
    """Return the JSON rows of one case and one head, "frozen" or "trainable"."""
    baseline = costs[BASELINE]
    rows = []
    for variant, cost in costs.items():
        row: dict[str, Any] = {"case": case, "head": head, "variant": variant}
        if isinstance(cost, str) or isinstance(baseline, str):
            rows.append(row | {"ms": None, "failure": cost if isinstance(cost, str) else "the baseline failed"})
            continue
        ratios = [ms / baseline_ms for ms, baseline_ms in zip(cost.ms, baseline.ms)]
        rows.append(
            row
            | {"ms": statistics.median(cost.ms), "ratio": statistics.median(ratios), "min_ms": min(cost.ms)}
            | {"workspace_mb": cost.workspace / 2**20, "errors": cost.errors}
        )
    return rows


def exact_gradients(batch: Batch, chunk_tokens: int = 512) -> list[Tensor]:
    """Return the gradients of `batch.differentiable` in float64, by autograd through chunks of the tokens."""
    counted = batch.labels != IGNORED
    hidden, target_ids = batch.hidden.detach()[counted].double(), batch.labels[counted]
    grad_logps = (batch.grad_output / counted.sum(1)).unsqueeze(1).expand(counted.shape)[counted].double()
    weight = batch.weight.detach().double().requires_grad_(batch.weight.requires_grad)
    grad_hidden_chunks = []
    grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
    chunks = zip(hidden.split(chunk_tokens), target_ids.split(chunk_tokens), grad_logps.split(chunk_tokens))
    for hidden_chunk, targets_chunk, grad_chunk in chunks:
        hidden_chunk = hidden_chunk.requires_grad_()
        logps = (hidden_chunk @ weight.T).log_softmax(-1).gather(1, targets_chunk.unsqueeze(1)).squeeze(1)
        inputs = [hidden_chunk] if grad_weight is None else [hidden_chunk, weight]
        gradients = torch.autograd.grad(logps, inputs, grad_chunk)
        grad_hidden_chunks.append(gradients[0])
        if grad_weight is not None:
            grad_weight += gradients[1]
    grad_hidden = torch.zeros(batch.hidden.shape, dtype=torch.float64, device=hidden.device)
    grad_hidden[counted] = torch.cat(grad_hidden_chunks)
    return [grad_hidden] if grad_weight is None else [grad_hidden, grad_weight]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of the expected tensor."""
    return float((actual.double() - expected).norm() / expected.norm())


class Precision(NamedTuple):
    """The errors of one variant, and how much its gradients depend on the chunk size."""

    logp_error: float  # the largest absolute error among the log-probs of the sequences
    grad_hidden_error: float  # relative
    grad_hidden_error_confident: float  # relative, over the tokens with p > 0.99 only
    grad_weight_error: float  # relative
    grad_hidden_changed: float | None  # share of entries that change with the chunk size, None without chunks
    grad_weight_changed: float | None


def measure_precision(device: str) -> dict[str, Precision]:
    """Return the precision of every variant.

    Variants that work in chunks run a second time with smaller chunks. If that changes their gradients, they round
    partial results.
    """
    batch = generate_batch(PRECISION_CASE._replace(device=device)).as_leaves(trainable=True)
    counted = batch.labels != IGNORED
    expected_logps, confident = exact_logps(batch)
    expected = exact_gradients(batch)
    smaller_chunks: dict[str, tuple[SequenceLogps, AbstractContextManager[Any]]] = {
        TORCH: (partial(average_counted, partial(torch_chunked, chunk_tokens=16)), nullcontext()),
        TRL: (partial(average_counted, partial(trl_chunked, block_v=1000)), nullcontext()),
        OURS: (ours, patch.dict(_online_lse.TILE_ELEMENTS, {device: 256_000})),
        OURS_CACHED: (
            partial(ours, keep_bytes=UNLIMITED_BYTES),
            patch.dict(_online_lse.TILE_ELEMENTS, {device: 256_000}),
        ),
    }
    precisions = {}
    for name, variant in variants(device, trainable=True).items():
        logps = variant(batch)
        grad_hidden, grad_weight = torch.autograd.grad(logps, batch.differentiable, batch.grad_output.to(logps))
        changed: list[float | None] = [None, None]
        if name in smaller_chunks:
            variant_with_smaller_chunks, context = smaller_chunks[name]
            with context:
                other_grad_hidden, other_grad_weight = forward_backward(variant_with_smaller_chunks, batch)
            changed = [
                float((grad_hidden[counted] != other_grad_hidden[counted]).float().mean()),
                float((grad_weight != other_grad_weight).float().mean()),
            ]
        precisions[name] = Precision(
            float((logps.detach().double() - expected_logps).abs().max()),
            relative_error(grad_hidden, expected[0]),
            relative_error(grad_hidden[confident], expected[0][confident]),
            relative_error(grad_weight, expected[1]),
            *changed,
        )
    return precisions


def exact_logps(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the log-probs [N] of the sequences in float64, and a mask [N, T] of the counted tokens with p > 0.99."""
    counted = batch.labels != IGNORED
    with torch.no_grad():
        logps = (batch.hidden.double() @ batch.weight.double().T).log_softmax(-1)
        logps = logps.gather(2, batch.labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (logps * counted).sum(1) / counted.sum(1), counted & (logps.exp() > 0.99)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw time over memory, with a row of panels for each case, and a panel for each head."""
    cases, heads = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "head"))
    colors = dict(zip(dict.fromkeys(row["variant"] for row in rows), (f"C{i}" for i in range(10))))
    size = (4.2 * len(heads) + 3, 3.6 * len(cases))
    figure, axes = plt.subplots(len(cases), len(heads), figsize=size, squeeze=False, sharey="row")
    for (case, head), axis in zip(product(cases, heads), axes.flat):
        for row in rows:
            if (row["case"], row["head"]) == (case, head) and row["ms"] is not None:
                marker, size_of_marker = ("*", 180) if row["variant"] in (OURS, OURS_CACHED) else ("o", 60)
                axis.scatter(
                    row["workspace_mb"],
                    row["ms"],
                    size_of_marker,
                    color=colors[row["variant"]],
                    marker=marker,
                    zorder=3,
                    label=row["variant"],
                )
        axis.set(xscale="log", title=f"{case}, vocabulary of {CASES[case].vocab_size:,}:\n{head} head")
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("peak memory beyond\ninputs and gradients [MB]")
    for axis in axes[:, 0]:
        axis.set(ylim=(0, None), ylabel="forward + backward [ms]")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    write_picture(path, figure)


def print_table(console: Console, title: str, headings: tuple[str, ...], rows: dict[str, list[str]]) -> None:
    """Print one row of cells for each variant."""
    table = Table(title=title, box=SIMPLE, collapse_padding=True)
    table.add_column("variant", vertical="bottom")
    for heading in headings:
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for variant, cells in rows.items():
        table.add_row(variant, *cells)
    console.print(table)


def cost_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a JSON row in the table of costs."""
    if row["ms"] is None:
        return [row["failure"]]
    errors = [f"{error:.1e}" for error in row["errors"]]
    return [f"{row['ms']:,.0f}", f"{row['ratio']:.2f}", f"{row['workspace_mb']:,.0f}", *errors]


def precision_cells(precision: Precision) -> list[str]:
    """Return the cells of a variant in the table of precision."""
    errors = [f"{error:.1e}" for error in precision[:4]]
    return errors + ["" if share is None else f"{share:.2%}" for share in precision[4:]]


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [name for name, case in CASES.items() if case.device == device]
    parser.add_argument(
        "--case", choices=cases, nargs="+", default=cases, help="cases to measure (default: all for this device)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="times that every variant is measured")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / f"head_{device}.json",
        help="JSON file to write; the picture is written beside it",
    )
    args = parser.parse_args()
    # torch.compile warns about the hardware, which would hide the tables.
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")

    console = Console()
    rows: list[dict[str, Any]] = []
    results = {
        "rounds": args.rounds,
        "peers": {package: version_of(package) for package in ("trl", "liger-kernel", "cut-cross-entropy")},
        "cases": {name: CASES[name]._asdict() | {"dtype": str(CASES[name].dtype)} for name in args.case},
        "rows": rows,
    }
    with Progress(console=console) as progress:
        for case in args.case:
            batch = generate_batch(CASES[case])
            for head in ("frozen", "trainable"):
                batch = batch.as_leaves(trainable=head == "trainable")
                costs = measure_costs(batch, device, args.rounds, progress, f"{case}, {head}")
                rows += cost_rows(case, head, costs)
                write_json(args.out, "benchmarks.speed.head", results)  # a run that is cut off leaves what it has
        bar = progress.add_task("precision", total=1)
        precisions = measure_precision(device)
        progress.advance(bar)

    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    headings = ("ms", "time /\nbaseline", "memory\nMB", "hidden\ngrad\nerror", "weight\ngrad\nerror")
    for case, head in dict.fromkeys((row["case"], row["head"]) for row in rows):
        cells = {row["variant"]: cost_cells(row) for row in rows if (row["case"], row["head"]) == (case, head)}
        vocabulary = f"vocabulary of {CASES[case].vocab_size:,}"
        title = f"{case}, {vocabulary}: {head} head on {hardware}\nbaseline: {BASELINE}"
        print_table(console, title, headings, cells)
    print_table(
        console,
        "Errors in bfloat16, and gradient entries changed by the chunk size",
        (
            "logp\nerror",
            "hidden\ngrad\nerror",
            "hidden\ngrad\nerror,\np > .99",
            "weight\ngrad\nerror",
            "hidden\ngrad\nchanged",
            "weight\ngrad\nchanged",
        ),
        {variant: precision_cells(precision) for variant, precision in precisions.items()},
    )

    results["precision"] = {variant: precision._asdict() for variant, precision in precisions.items()}
    write_json(args.out, "benchmarks.speed.head", results)
    draw(args.out.with_suffix(".png"), rows)
    console.print(f"wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
