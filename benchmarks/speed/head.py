"""What the language-model head in front of a preference loss costs: time, memory, and precision, of ours and of peers.

    python -m benchmarks.speed.head

Forward and backward from hidden states to the average log-prob of every sequence, with a gradient from upstream for
each; half of the tokens count. Everyone but `logits of all` gets those alone. Peers that are not installed, or
that cannot run here, are left out: `pip install "amapo-loss[trl]" liger-kernel cut-cross-entropy` for all of them.

The variants take turns, so that whatever else the machine does meets all of them; a ratio is taken within a round, and
its median over the rounds is reported. Memory is what PyTorch allocates over the inputs: the gradients, which everyone
returns, apart from the rest. Errors are relative, in norm, to float64. Prints tables, writes JSON, draws a picture.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
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

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

IGNORED = -100
EVERYTHING = 2**60  # bytes
BASELINE = "logits"
ALL_TOKENS = "logits of all"


class Case(NamedTuple):
    """A head, and a batch in front of it."""

    width: int
    vocabulary: int
    sequences: int
    length: int
    dtype: torch.dtype
    device: str


CASES = {
    "small": Case(256, 32_000, 8, 256, torch.float32, "cpu"),
    "Llama-3-8B": Case(4096, 128_256, 16, 2048, torch.bfloat16, "cuda"),
    "Qwen3-8B": Case(4096, 151_936, 16, 2048, torch.bfloat16, "cuda"),
}
# The one in which the numbers of the second table are taken; small, so that a CPU gets there in bfloat16.
PRECISION = Case(512, 16_000, 8, 64, torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu")


class Batch(NamedTuple):
    """In front of the loss."""

    hidden: Tensor  # [N, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N, T]
    upstream: Tensor  # [N] the loss's gradient

    @property
    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        return [x for x in self[:2] if x.requires_grad]

    def needing(self, weight: bool) -> "Batch":
        """The same tensors, as leaves."""
        return self._replace(
            hidden=self.hidden.detach().requires_grad_(), weight=self.weight.detach().requires_grad_(weight)
        )


def generated(case: Case) -> Batch:
    """Tokens of every confidence, some half of them with p > 0.99; a head whose rows share a mean, as real ones do."""
    width, vocabulary, n, length, dtype, device = case
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=generator, device=device)
    weight = 0.04 * (randn(vocabulary, width) + 3 * randn(1, width))
    labels = torch.randint(vocabulary, (n, length), generator=generator, device=device)
    hidden, mean = randn(n, length, width) * (2.3 / (0.04 * width**0.5)), weight.mean(0)
    hidden -= (hidden @ mean / mean.square().sum())[..., None] * mean
    own = weight[labels] - mean
    logit = torch.empty((n, length), device=device).uniform_(9, 24, generator=generator)
    hidden += own * ((logit - (hidden * own).sum(-1)) / own.square().sum(-1))[..., None]
    labels[:, : length // 2] = IGNORED  # the prompt
    upstream = torch.rand(n, generator=generator, device=device) / n
    upstream[n // 2 :] *= -1  # the second half was rejected
    return Batch(hidden.to(dtype), weight.to(dtype), labels, upstream)


# ------------------------------------------------------------------------------------------------- the variants

Tokens = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [n, H], weight [V, H], targets [n] to log-probs [n]


def sequences(tokens: Tokens, batch: Batch) -> Tensor:
    """[N] averages over the tokens that count, which alone are computed."""
    counted = batch.labels != IGNORED
    logps = tokens(batch.hidden[counted], batch.weight, batch.labels[counted])
    return logps.new_zeros(counted.shape).masked_scatter(counted, logps).sum(1) / counted.sum(1)


def logits_of_all_tokens(batch: Batch) -> Tensor:
    """As most loops do."""
    counted = batch.labels != IGNORED
    logps = (batch.hidden @ batch.weight.T).float().log_softmax(-1)
    logps = logps.gather(2, batch.labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (logps * counted).sum(1) / counted.sum(1)


def logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Of the tokens that count."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """PyTorch's own, from 2.13 on."""
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=rows, chunking_method=None if rows else "auto", acc_policy="auto"
    )
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options).float()


def trl(hidden: Tensor, weight: Tensor, targets: Tensor, words: int = 32_768) -> Tensor:
    """The head that TRL's trainers run, in tiles as wide as theirs."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logps: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, words, None, 1.0, ())[0]
    return logps


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Its fused linear cross entropy; its fused preference losses cannot couple a batch."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    losses = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, None, None, IGNORED, 0.0, 0.0, "none", None, False, torch.float32
    )
    of_tokens: Tensor = losses[0] if isinstance(losses, tuple) else losses
    return -of_tokens


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """An approximate gradient, of the entries that are not negligible."""
    from cut_cross_entropy import linear_cross_entropy

    losses: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none")
    return -losses


def ours(batch: Batch, keep_bytes: int = 0) -> Tensor:
    """Whose gathering of the tokens is its own."""
    return linear_sequence_logps(batch.hidden, batch.weight, batch.labels, shift=False, keep_bytes=keep_bytes)


Step = Callable[[Batch], Tensor]


def variants(device: str, with_weight: bool) -> dict[str, Step]:
    """Those that can run there; compiled afresh."""
    torch.compiler.reset()
    every: dict[str, Step] = {
        ALL_TOKENS: logits_of_all_tokens,
        BASELINE: partial(sequences, logits),
        "compiled logits": partial(sequences, torch.compile(logits)),
    }
    if hasattr(F, "linear_cross_entropy"):
        every["torch, chunked"] = partial(sequences, torch_chunked)
    if find_spec("trl"):
        every["TRL"] = partial(sequences, trl)
    if device == "cuda" and find_spec("liger_kernel"):
        every["Liger"] = partial(sequences, liger)
    if device == "cuda" and find_spec("cut_cross_entropy"):
        every["cut-cross-entropy"] = partial(sequences, cut_cross_entropy)
    every["ours"] = ours
    if with_weight:
        every["ours, keep_bytes"] = partial(ours, keep_bytes=EVERYTHING)
    return every


def forward_backward(step: Step, batch: Batch) -> tuple[Tensor, ...]:
    """The gradients of a training step."""
    logps = step(batch)
    return torch.autograd.grad(logps, batch.leaves, batch.upstream.to(logps))


# ------------------------------------------------------------------------------------------------- time and memory


class Cost(NamedTuple):
    """Of one variant."""

    ms: list[float]  # of each round
    workspace: int  # bytes at the peak, over inputs and gradients
    errors: list[float]  # of the gradients


def costs(batch: Batch, device: str, rounds: int, progress: Progress, title: str) -> dict[str, Cost | str]:
    """Of every variant, or why it has none."""
    exact = exact_gradients(batch)
    outputs = sum(x.numel() * x.element_size() for x in batch.leaves)
    found: dict[str, Cost | str] = {}
    timers = {}
    every = variants(device, batch.weight.requires_grad)
    bar = progress.add_task(title, total=len(every) * 2 + rounds)
    for name, step in every.items():
        progress.advance(bar)
        run = partial(forward_backward, step, batch)
        try:
            errors = [relative(x, right) for x, right in zip(run(), exact)]  # compiles, warms up
            found[name] = Cost([], peak_bytes(run, device) - outputs, errors)
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
            continue
        timers[name] = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    for _ in range(rounds):
        progress.advance(bar)
        for name, timer in timers.items():
            cost = found[name]
            assert isinstance(cost, Cost)
            cost.ms.append(timer.timeit(1).median * 1e3)
    progress.update(bar, completed=len(every) * 2 + rounds)
    return found


def exact_gradients(batch: Batch, rows: int = 512) -> list[Tensor]:
    """In float64, by autograd through the logits of a few tokens at a time."""
    counted = batch.labels != IGNORED
    hidden, targets = batch.hidden.detach()[counted].double(), batch.labels[counted]
    upstream = (batch.upstream / counted.sum(1)).unsqueeze(1).expand(counted.shape)[counted].double()
    weight = batch.weight.detach().double().requires_grad_(batch.weight.requires_grad)
    parts = []
    of_weight = torch.zeros_like(weight) if weight.requires_grad else None
    for x, y, g in zip(hidden.split(rows), targets.split(rows), upstream.split(rows)):
        x = x.requires_grad_()
        logps = (x @ weight.T).log_softmax(-1).gather(1, y.unsqueeze(1)).squeeze(1)
        gradients = torch.autograd.grad(logps, [x, weight] if of_weight is not None else [x], g)
        parts.append(gradients[0])
        if of_weight is not None:
            of_weight += gradients[1]
    of_hidden = torch.zeros(batch.hidden.shape, dtype=torch.float64, device=hidden.device)
    of_hidden[counted] = torch.cat(parts)
    return [of_hidden] if of_weight is None else [of_hidden, of_weight]


def relative(got: Tensor, right: Tensor) -> float:
    """Error, in norm."""
    return float((got.double() - right).norm() / right.norm())


# ------------------------------------------------------------------------------------------------------- precision


class Precision(NamedTuple):
    """Of one variant's gradients."""

    logps: float  # largest error of a sequence's log-prob
    hidden: float  # relative error of its gradient
    confident: float  # of those of tokens with p > 0.99
    weight: float
    changed_hidden: float | None  # share of entries that another number of tiles changes
    changed_weight: float | None


def precisions(device: str) -> dict[str, Precision]:
    """Of every variant on the same batch, with tiles as they come and, where that can be said, many small ones."""
    batch = generated(PRECISION._replace(device=device)).needing(weight=True)
    counted = batch.labels != IGNORED
    exact_logps, confident = exact_tokens(batch)
    exact = exact_gradients(batch)
    small_tiles: dict[str, tuple[Step, AbstractContextManager[Any]]] = {
        "torch, chunked": (partial(sequences, partial(torch_chunked, rows=16)), nullcontext()),
        "TRL": (partial(sequences, partial(trl, words=1000)), nullcontext()),
        "ours": (ours, patch.dict(_online_lse.ELEMENTS, {device: 256_000})),
        "ours, keep_bytes": (partial(ours, keep_bytes=EVERYTHING), patch.dict(_online_lse.ELEMENTS, {device: 256_000})),
    }
    found = {}
    for name, step in variants(device, with_weight=True).items():
        logps = step(batch)
        gradients = torch.autograd.grad(logps, batch.leaves, batch.upstream.to(logps))
        changed: list[float | None] = [None, None]
        if name in small_tiles:
            other_step, context = small_tiles[name]
            with context:
                others = forward_backward(other_step, batch)
            kept = (gradients[0][counted], others[0][counted]), (gradients[1], others[1])
            changed = [float((a != b).float().mean()) for a, b in kept]
        found[name] = Precision(
            float((logps.detach().double() - exact_logps).abs().max()),
            relative(gradients[0], exact[0]),
            relative(gradients[0][confident], exact[0][confident]),
            relative(gradients[1], exact[1]),
            *changed,
        )
    return found


def exact_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """[N] log-probs of the sequences, and [N, T] which counted tokens have p > 0.99; in float64."""
    counted = batch.labels != IGNORED
    with torch.no_grad():
        logps = (batch.hidden.double() @ batch.weight.double().T).log_softmax(-1)
        logps = logps.gather(2, batch.labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (logps * counted).sum(1) / counted.sum(1), counted & (logps.exp() > 0.99)


# --------------------------------------------------------------------------------------------------------- report


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Time against memory; a panel for each case and each kind of head."""
    panels = list(dict.fromkeys((row["case"], row["head"]) for row in rows))
    colors = dict(zip(dict.fromkeys(row["variant"] for row in rows), (f"C{i}" for i in range(10))))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels) + 2, 3.8), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        for row in rows:
            if (row["case"], row["head"]) == panel and row["ms"] is not None:
                marker, size = ("*", 180) if row["variant"].startswith("ours") else ("o", 60)
                axis.scatter(
                    row["workspace_mb"], row["ms"], size, color=colors[row["variant"]], marker=marker, zorder=3,
                    label=row["variant"],
                )  # fmt: skip
        axis.set(xscale="log", ylim=(0, None), title=f"{panel[0]}, {panel[1]} head")
        axis.set(xlabel="MB beside inputs and gradients", ylabel="ms, forward + backward")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    write_picture(path, figure)


def titled(title: str, *columns: str) -> Table:
    """An empty table of variants."""
    table = Table(title=title, box=SIMPLE)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def cells(row: dict[str, Any]) -> list[str]:
    """Of a table of costs."""
    errors = [f"{error:.1e}" for error in row["errors"]]
    return [f"{row['ms']:,.0f}", f"{row['ratio']:.2f}", f"{row['workspace_mb']:,.0f}", *errors]


def main() -> None:
    """Measure every case, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = [name for name, case in CASES.items() if case.device == device]
    parser.add_argument("--case", choices=here, nargs="+", default=here, help="default: all that fit the device")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / f"head_{device}.json", help="the picture goes beside it")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")  # of torch.compile, about the hardware

    console = Console()
    rows: list[dict[str, Any]] = []
    with Progress(console=console) as progress:
        for name in args.case:
            batch = generated(CASES[name])
            for head, with_weight in (("frozen", False), ("trainable", True)):
                found = costs(batch.needing(with_weight), device, args.rounds, progress, f"{name}, {head}")
                base = found[BASELINE]
                for variant, cost in found.items():
                    row = {"case": name, "head": head, "variant": variant}
                    if isinstance(cost, str) or isinstance(base, str):
                        rows.append(row | {"ms": None, "why": cost})
                        continue
                    ratios = [ms / of_base for ms, of_base in zip(cost.ms, base.ms)]
                    rows.append(
                        row
                        | {"ms": statistics.median(cost.ms), "ratio": statistics.median(ratios), "min_ms": min(cost.ms)}
                        | {"workspace_mb": cost.workspace / 2**20, "errors": cost.errors}
                    )
        bar = progress.add_task("precision", total=1)
        precision = precisions(device)
        progress.advance(bar)

    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    for case, head in dict.fromkeys((row["case"], row["head"]) for row in rows):
        table = titled(f"{case}, {head} head, {where}", "ms", f"over {BASELINE}", "MB", "error: hidden", "weight")
        for row in rows:
            if (row["case"], row["head"]) == (case, head):
                table.add_row(row["variant"], *((row["why"],) if row["ms"] is None else cells(row)))
        console.print(table)
    table = titled("in bfloat16", "error: log-prob", "hidden", "p > 0.99", "weight", "changed: hidden", "weight")
    for variant, found_there in precision.items():
        errors = [f"{error:.1e}" for error in found_there[:4]]
        changed = ["" if share is None else f"{share:.2%}" for share in found_there[4:]]
        table.add_row(variant, *errors, *changed)
    console.print(table)

    figures = {
        "rounds": args.rounds,
        "peers": {package: version_of(package) for package in ("trl", "liger-kernel", "cut-cross-entropy")},
        "cases": {name: CASES[name]._asdict() | {"dtype": str(CASES[name].dtype)} for name in args.case},
        "rows": rows,
        "precision": {name: numbers._asdict() for name, numbers in precision.items()},
    }
    write_json(args.out, "benchmarks.speed.head", figures)
    draw(args.out.with_suffix(".png"), rows)
    console.print(f"wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
