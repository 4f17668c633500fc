"""What a language-model head costs when ranks share its vocabulary: by formulas, and measured with gloo processes.

    python -m benchmarks.speed.scaling

The formulas give the cost of one rank for the heads of large models. tests/repository/test_scaling.py compares each of
them with what small heads really compute, hold and send. The measurement is one of weak scaling: every process has the
same number of rows of the vocabulary and of pairs, and so the same products with a split vocabulary. The time still
grows, with the communication and with processes that share a core. The script prints the measurement, and writes both
to JSON.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from amapo_loss import _collectives, amapo_loss, linear_token_logps, sequence_logps
from amapo_loss.logps import _online_lse
from benchmarks.record import RESULTS, write_json


class Head(NamedTuple):
    """The sizes of a head and of its batch."""

    tokens: int  # n, those that count
    width: int  # H
    vocabulary: int  # V
    element_bytes: int = 2  # of the weight and the hidden states, as in bfloat16


class Cost(NamedTuple):
    """What one rank computes, holds and receives for one training step of the head."""

    flops: int
    weight_bytes: int  # of its part of the weight, and of the gradient if the weight is trained
    workspace_bytes: int  # at the peak, on top of the weight and the hidden states
    received_bytes: float  # with ring algorithms, which receive as much as they send


# The heads of Llama 3, and the tokens of 32 pairs with answers of 256 tokens.
HEADS = {"Llama 3 70B": Head(16_384, 8192, 128_256), "Llama 3 405B": Head(16_384, 16_384, 128_256)}
RANKS = (1, 8, 16, 32, 64)


def vocab_parallel_cost(head: Head, ranks: int, trainable: bool, device: str = "cuda") -> Cost:
    """Return the cost of `linear_token_logps` with the vocabulary split over the ranks, in bfloat16 or float16.

    In float32, products and sums are written to their gradients, and the workspace is smaller.
    """
    n, width, rows = head.tokens, head.width, -(-head.vocabulary // ranks)
    hidden_bytes, accumulated_bytes = n * width * head.element_bytes, n * width * 4
    if trainable:
        block_v = _online_lse.block_length(rows, n, torch.device(device))
        tile, product = n * block_v * 4, block_v * width * 4
        workspace = tile + product + accumulated_bytes + hidden_bytes
    else:
        block_n = _online_lse.block_length(n, rows, torch.device(device))
        tile, product = block_n * rows * 4, block_n * width * 4
        workspace = tile + product + hidden_bytes
    return Cost(
        flops=(4 if trainable else 2) * 2 * n * width * rows,
        weight_bytes=rows * width * head.element_bytes * (2 if trainable else 1),
        workspace_bytes=workspace,
        received_bytes=gathered(24 + 12 * n, ranks) + reduced(accumulated_bytes, ranks),
    )


def gathered_logits_cost(head: Head, ranks: int, trainable: bool) -> Cost:
    """Return the cost of gathering the logits of all ranks.

    The workspace counts the logits and their gradient only.
    """
    n, width, rows = head.tokens, head.width, -(-head.vocabulary // ranks)
    local_logits, all_logits = (n * columns * head.element_bytes for columns in (rows, rows * ranks))
    return Cost(
        flops=(3 if trainable else 2) * 2 * n * width * rows,
        weight_bytes=rows * width * head.element_bytes * (2 if trainable else 1),
        workspace_bytes=2 * all_logits,
        received_bytes=gathered(local_logits, ranks) + reduced(n * width * head.element_bytes, ranks),
    )


def gathered(sent_bytes: float, ranks: int) -> float:
    """Return the bytes that a rank receives in a ring all-gather to which each rank contributes `sent_bytes`."""
    return (ranks - 1) * sent_bytes


def received_bytes(contributed: dict[str, list[int]], ranks: int) -> float:
    """Return the bytes that a rank receives in the collectives of `recorded_collectives`."""
    return gathered(sum(contributed["all_gather"]), ranks) + reduced(sum(contributed["all_reduce"]), ranks)


def reduced(tensor_bytes: float, ranks: int) -> float:
    """Return the bytes that a rank receives in a ring all-reduce of a tensor."""
    return 2 * (ranks - 1) / ranks * tensor_bytes


@contextmanager
def recorded_collectives() -> Iterator[dict[str, list[int]]]:
    """Record the bytes that this rank contributes to each collective of the library, by the kind of the collective."""
    contributed: dict[str, list[int]] = {"all_gather": [], "all_reduce": []}
    gather, reduce = _collectives._all_gather, dist.all_reduce

    def all_gather(out: Tensor, tensor: Tensor, **options: Any) -> Any:
        contributed["all_gather"].append(tensor.nbytes)
        return gather(out, tensor, **options)

    def all_reduce(tensor: Tensor, **options: Any) -> Any:
        contributed["all_reduce"].append(tensor.nbytes)
        return reduce(tensor, **options)

    with patch.object(_collectives, "_all_gather", all_gather), patch.object(dist, "all_reduce", all_reduce):
        yield contributed


class _GatherLogits(torch.autograd.Function):
    """The logits [n, V] of all ranks, from those of this rank [n, V_r]. Backward returns the gradient of its columns.

    The logits are gathered column by column, so that no copy is needed to put those of a token side by side.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        columns = _collectives.all_gather_row(logits.t().flatten(), group, "the logits")
        ctx.first, ctx.size = dist.get_rank(group) * logits.shape[1], logits.shape[1]
        return columns.view(-1, len(logits)).t()

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor, None]:
        return grad_logits[:, ctx.first : ctx.first + ctx.size], None


class _SumGradients(torch.autograd.Function):
    """The hidden states themselves. Backward adds up the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, None]:
        _collectives.all_reduce_sum(grad_hidden, ctx.group, "the gradients")
        return grad_hidden, None


def gathered_logps(hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the log-probs [n] from the gathered logits of all ranks."""
    hidden = _SumGradients.apply(hidden, group)  # type: ignore[no-untyped-call]
    logits = _GatherLogits.apply(hidden @ weight.t(), group)  # type: ignore[no-untyped-call]
    return sequence_logps(logits[:, None], targets[:, None], shift=False)


STEPS: dict[str, Callable[..., Tensor]] = {
    "split vocabulary": lambda hidden, weight, targets, group: linear_token_logps(
        hidden, weight, targets, vocab_group=group
    ),
    "gathered logits": gathered_logps,
}


def measure(rows: int, tokens: int, width: int, pairs: int, rounds: int) -> list[dict[str, Any]]:
    """Return what this rank measured, one row for each way to compute the log-probs and one for the loss."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group, generator = dist.group.WORLD, torch.Generator().manual_seed(0)
    assert group is not None
    targets = torch.randint(rows * group.size(), (tokens,), generator=generator)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(rows, width).requires_grad_()
    logps = torch.randn(2, pairs).requires_grad_()
    steps: dict[str, Callable[[], Tensor]] = {
        name: partial(function, hidden, weight, targets, group) for name, function in STEPS.items()
    }
    steps["loss over all pairs"] = lambda: amapo_loss(*logps, process_group=group).loss
    results = []
    for name, step in steps.items():
        seconds = []
        for _ in range(rounds + 1):  # the first one warms up
            dist.barrier()
            start = time.perf_counter()
            with recorded_collectives() as contributed:
                step().sum().backward()
            seconds.append(time.perf_counter() - start)
        counts = {kind: len(sizes) for kind, sizes in contributed.items()}
        received = received_bytes(contributed, group.size())
        ms = 1e3 * statistics.median(seconds[1:])
        results.append({"step": name, "ms": ms, "collectives": counts, "received_bytes": received})
    dist.destroy_process_group()
    return results


def measured_rows(ranks: int, *sizes: int) -> list[dict[str, Any]]:
    """Return the rows of `measure` with this many processes, with the times of the slowest one."""
    os.environ["OMP_NUM_THREADS"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"scaling-{ranks}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
    )
    by_rank = elastic_launch(config, measure)(*sizes)
    return [{"processes": ranks, **rows[0], "ms": max(row["ms"] for row in rows)} for rows in zip(*by_rank.values())]


def cost_rows() -> list[dict[str, Any]]:
    """Return the formulas' numbers for the heads of large models."""
    return [
        {
            "head": name,
            "ranks": ranks,
            "trainable": trainable,
            "split vocabulary": vocab_parallel_cost(head, ranks, trainable)._asdict(),
            "gathered logits": gathered_logits_cost(head, ranks, trainable)._asdict(),
        }
        for name, head in HEADS.items()
        for trainable in (False, True)
        for ranks in RANKS
    ]


def main() -> None:
    """Measure weak scaling, print it, and write it with what the formulas say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4, 8], help="numbers of processes")
    parser.add_argument("--rows", type=int, default=4000, help="rows of the vocabulary of each process")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the batch, which all processes have")
    parser.add_argument("--width", type=int, default=256, help="hidden size")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of each process")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling_cpu.json", help="JSON file to write")
    args = parser.parse_args()
    sizes = (args.rows, args.tokens, args.width, args.pairs, args.rounds)
    measured = [row for ranks in track(args.processes, "measuring") for row in measured_rows(ranks, *sizes)]

    console = Console()
    table = Table(title="Weak scaling: one step, forward and backward", box=SIMPLE)
    for heading in ("processes", "step", "ms", "all-gathers", "all-reduces", "bytes received per rank"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for row in measured:
        counts = (str(row["collectives"][kind]) for kind in ("all_gather", "all_reduce"))
        table.add_row(str(row["processes"]), row["step"], f"{row['ms']:.1f}", *counts, f"{row['received_bytes']:,.0f}")
    console.print(table)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    results = {
        "settings": settings,
        "heads": {name: head._asdict() for name, head in HEADS.items()},
        "formulas": cost_rows(),
        "measured": measured,
    }
    write_json(args.out, "benchmarks.speed.scaling", results)
    console.print(f"wrote {args.out.name} in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
