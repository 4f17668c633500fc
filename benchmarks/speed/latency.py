"""How long the loss takes, forward and backward: on a GPU where there is one, else on one CPU thread.

    python -m benchmarks.speed.latency

Against the released trainer's arithmetic, which has no guards and no diagnostics; eager and compiled; the fused kernel;
and the floor below it, a kernel that does nothing. Without a GPU, the kernel and what only a GPU can tell stay empty.

The variants take turns, so that whatever else the machine does meets all of them; a ratio is taken within a round, and
its median over the rounds is reported. Prints a table, writes JSON, draws a picture.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from amapo_loss import AMaPOOutput, Diagnostics, amapo_loss
from benchmarks.record import RESULTS, write_json, write_picture

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

Inputs = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Any]]  # a loss, and what else is to be computed
BASELINE = "released arithmetic"
READS: dict[str, Callable[[Diagnostics], Any]] = {
    "loss": lambda _: (),
    "and per pair": lambda d: (d.scores, d.margins, d.gradient_weights, d.chosen_rewards, d.rejected_rewards),
    "and summary": lambda d: d.summary(),
}
MANY_PAIRS = 1_000_000  # from here on memory is the limit, and a step is long enough to time a few of


class Variant(NamedTuple):
    """A loss in every form in which it is timed, by the names of `READS`."""

    steps: dict[str, Step]
    capturable: bool = True  # by a CUDA graph of ours; not if it replays its own


def released_arithmetic(chosen_logps: Tensor, rejected_logps: Tensor, beta: float = 2.0, eps: float = 0.0) -> Tensor:
    """What the authors' published trainer computes: no guard, no diagnostics, the statistics of this batch."""
    d = chosen_logps - rejected_logps
    q = d.detach()
    mean, std = q.mean(), q.std()
    z = (mean - q) / std
    h = beta * torch.where(z > 0, torch.exp(z * mean), 0)
    r = beta * d
    losses = -F.logsigmoid(r - h) * (1 - eps) - F.logsigmoid(h - r) * eps
    return losses.mean()


def variants(device: str) -> dict[str, Variant]:
    """What can run there; compiled afresh, for one batch size."""

    def released(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Any]:
        return released_arithmetic(chosen, rejected), ()

    def read(loss_fn: Callable[..., AMaPOOutput], what: Callable[[Diagnostics], Any]) -> Step:
        def step(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Any]:
            loss, diagnostics = loss_fn(chosen, rejected)
            return loss, what(diagnostics)

        return step

    torch.compiler.reset()
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    eager = {name: read(partial(amapo_loss, backend="torch"), what) for name, what in READS.items()}
    every = {
        BASELINE: Variant({"loss": released}),
        "amapo_loss": Variant(eager),
        "torch.compile: released": Variant({"loss": compiled(released)}),
        "torch.compile: amapo_loss": Variant({name: compiled(step) for name, step in eager.items()}),
    }
    if device == "cuda":
        from benchmarks.speed.floor import empty_kernel

        overhead = {name: compiled(step, mode="reduce-overhead") for name, step in eager.items()}
        every |= {
            "reduce-overhead: amapo_loss": Variant(overhead, capturable=False),
            "fused kernel": Variant({name: read(amapo_loss, what) for name, what in READS.items()}),
            "floor: empty kernel": Variant({"loss": lambda *inputs: (empty_kernel(*inputs), ())}),
        }
    return every


def forward_backward(step: Step, inputs: Inputs) -> Any:
    """One training step's share of the loss; gradients start from None, as after `zero_grad()`."""
    for x in inputs:
        x.grad = None
    loss, others = step(*inputs)
    loss.backward()
    return others


class Timings(NamedTuple):
    """Of one variant at one batch size."""

    wall: dict[str, list[float]]  # microseconds a step, for every round
    device: float | None = None  # microseconds a step, replayed as a CUDA graph
    launches: int | None = None
    waits: int | None = None


def measure(pairs: int, rounds: int, repeats: int, device: str) -> dict[str, Timings]:
    """Every variant on a batch of this size."""
    generator = torch.Generator().manual_seed(0)
    logps = [(torch.randn(pairs, generator=generator) - mean).to(device) for mean in (1.0, 1.4)]
    inputs = (logps[0].requires_grad_(), logps[1].requires_grad_())
    every = variants(device)
    timers = {
        (name, reading): Timer("run(step, inputs)", globals={"run": forward_backward, "step": step, "inputs": inputs})
        for name, variant in every.items()
        for reading, step in variant.steps.items()
    }
    for timer in timers.values():
        timer.timeit(repeats)  # compiles, warms up
    wall: dict[str, dict[str, list[float]]] = {name: {reading: [] for reading in v.steps} for name, v in every.items()}
    for _ in track(range(rounds), f"{pairs:,} pairs"):
        for (name, reading), timer in timers.items():
            wall[name][reading].append(timer.timeit(repeats).median * 1e6)
    timings = {name: Timings(of_this) for name, of_this in wall.items()}
    if device == "cuda":
        for name, (steps, capturable) in every.items():
            run = partial(forward_backward, steps["loss"], inputs)
            timings[name] = Timings(wall[name], replayed(run) if capturable else None, launches(run), waits(run))
    return timings


def replayed(run: Callable[[], Any], repeats: int = 50) -> float:
    """Microseconds of the device alone: what `run` launches, replayed without the host."""
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats * 1e3


def launches(run: Callable[[], Any]) -> int:
    """Kernels, copies and fills that the device saw."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def waits(run: Callable[[], Any]) -> int:
    """How often the host waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def share_of_copy_bandwidth(pairs: int) -> float:
    """Of the fused forward pass, counting each input read twice and each gradient written once: 24 bytes a pair."""
    chosen, rejected = (torch.randn(pairs, device="cuda").requires_grad_() for _ in range(2))
    source = torch.randn(3 * pairs, device="cuda")  # 12 bytes a pair to read, and 12 to write
    target = torch.empty_like(source)
    return replayed(lambda: target.copy_(source)) / replayed(lambda: amapo_loss(chosen, rejected).loss)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Time over pairs, a line for every variant; on a GPU that of the host beside that of the device."""
    quantities = {"median_us": "wall clock", "device_us": "device alone"}
    quantities = {key: label for key, label in quantities.items() if any(row[key] is not None for row in rows)}
    figure, panels = plt.subplots(1, len(quantities), figsize=(6 * len(quantities), 4), squeeze=False)
    for panel, (key, label) in zip(panels[0], quantities.items()):
        for name in dict.fromkeys(row["variant"] for row in rows):
            these = [
                row for row in rows if row["variant"] == name and row["reading"] == "loss" and row[key] is not None
            ]
            if these:
                panel.plot([row["pairs"] for row in these], [row[key] for row in these], "o-", label=name)
        panel.set(xscale="log", xlabel="pairs", ylabel="microseconds, forward + backward", title=label, ylim=(0, None))
        if max(row["pairs"] for row in rows) >= MANY_PAIRS:
            panel.set(yscale="log", ylim=(None, None))
    panels[0][0].legend()
    figure.tight_layout()
    write_picture(path, figure)


def main() -> None:
    """Measure every size, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [2, 32, 128, 1024, 4096, 8192, 65536, 2**24] if device == "cuda" else [32, 1024]
    parser.add_argument("--pairs", type=int, nargs="+", default=sizes, help="batch sizes")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=20, help="steps a round")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"latency_{device}.json", help="the picture goes beside it"
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread"
    table = Table(title=f"Forward + backward on {where}, median microseconds (over the baseline)", box=SIMPLE)
    for column in ("pairs", "", *READS, *(("device", "launches", "waits") if device == "cuda" else ())):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    rows: list[dict[str, Any]] = []
    for pairs in args.pairs:
        rounds = args.rounds if pairs < MANY_PAIRS else min(args.rounds, 5)
        timings = measure(pairs, rounds, args.repeats, device)
        base = timings[BASELINE].wall["loss"]
        for name, timing in timings.items():
            cells = dict.fromkeys(READS, "")
            for reading, times in timing.wall.items():
                median, ratio = statistics.median(times), statistics.median(t / b for t, b in zip(times, base))
                cells[reading] = f"{median:,.0f} ({ratio:.2f})"
                rows.append(
                    {
                        "pairs": pairs,
                        "variant": name,
                        "reading": reading,
                        "min_us": min(times),
                        "median_us": median,
                        "ratio": ratio,
                        "device_us": timing.device,
                        "launches": timing.launches,
                        "waits": timing.waits,
                    }
                )
            alone = [f"{timing.device:.1f}" if timing.device else "", str(timing.launches), str(timing.waits)]
            table.add_row(f"{pairs:,}", name, *cells.values(), *(alone if device == "cuda" else ()))

    console = Console()
    console.print(table)
    figures: dict[str, Any] = {"rounds": args.rounds, "repeats": args.repeats, "rows": rows}
    if device == "cuda":
        largest = max(args.pairs)
        share = share_of_copy_bandwidth(largest)
        figures["share of copy bandwidth"] = {"pairs": largest, "share": share}
        console.print(f"at {largest:,} pairs the fused forward pass reaches {share:.0%} of the copy bandwidth")
    write_json(args.out, "benchmarks.speed.latency", figures)
    draw(args.out.with_suffix(".png"), rows)
    console.print(f"wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
