"""Measure how long the loss takes, forward and backward, on a GPU if there is one, else on one CPU thread.

    python -m benchmarks.speed.latency

The baseline is the loss of the authors' released trainer, which has no numerical guards and no diagnostics. The other
variants are `amapo_loss` in eager mode, under torch.compile and, on a GPU, as a fused Triton kernel. On a GPU there is
also an empty Triton kernel as a lower bound, and columns for device time, launches and host-device synchronizations.

The variants take turns, so that a slowdown of the machine affects all of them. Each time is divided by the baseline's
time of the same round, and the table shows the median ratio over the rounds. The script also writes JSON and a picture.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt

Inputs = tuple[Tensor, Tensor]  # chosen_logps [B], rejected_logps [B]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Any]]  # from the inputs to the loss and the diagnostics that are read
BASELINE = "released loss, eager"
# Diagnostics are computed when they are read, so each way of reading them has a time of its own.
OUTPUTS: dict[str, Callable[[Diagnostics], Any]] = {
    "loss only": lambda _: (),
    "loss and per-pair diagnostics": lambda diagnostics: (
        diagnostics.scores,
        diagnostics.margins,
        diagnostics.gradient_weights,
        diagnostics.chosen_rewards,
        diagnostics.rejected_rewards,
    ),
    "loss and summary": lambda diagnostics: diagnostics.summary(),
}
LOSS_ONLY = next(iter(OUTPUTS))
# From this size on, memory bandwidth limits the loss. A step then takes so long that a few rounds suffice to time it.
MANY_PAIRS = 1_000_000


# One implementation of the loss: a step for each entry of `OUTPUTS` that it supports.
Variant = dict[str, Step]


def released_loss(chosen_logps: Tensor, rejected_logps: Tensor, beta: float = 2.0, eps: float = 0.0) -> Tensor:
    """Return the loss as the authors' released trainer computes it, with the statistics of this batch."""
    differences = chosen_logps - rejected_logps
    detached = differences.detach()
    mean, std = detached.mean(), detached.std()
    z_scores = (mean - detached) / std
    margins = beta * torch.where(z_scores > 0, torch.exp(z_scores * mean), 0)
    scores = beta * differences
    losses = -F.logsigmoid(scores - margins) * (1 - eps) - F.logsigmoid(margins - scores) * eps
    return losses.mean()


def variants(device: str) -> dict[str, Variant]:
    """Return the variants that run on a device.

    Each call compiles the compiled variants anew, so that they specialize on one batch size.
    """

    def released_step(chosen_logps: Tensor, rejected_logps: Tensor) -> tuple[Tensor, Any]:
        return released_loss(chosen_logps, rejected_logps), ()

    def step_that_reads(loss_fn: Callable[..., AMaPOOutput], read: Callable[[Diagnostics], Any]) -> Step:
        def step(chosen_logps: Tensor, rejected_logps: Tensor) -> tuple[Tensor, Any]:
            loss, diagnostics = loss_fn(chosen_logps, rejected_logps)
            return loss, read(diagnostics)

        return step

    torch.compiler.reset()
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    eager = {name: step_that_reads(partial(amapo_loss, backend="torch"), read) for name, read in OUTPUTS.items()}
    # On a GPU, a step takes seconds to compile for each batch size, and the diagnostics change little.
    to_compile = {LOSS_ONLY: eager[LOSS_ONLY]} if device == "cuda" else eager
    available: dict[str, Variant] = {
        BASELINE: {LOSS_ONLY: released_step},
        "amapo_loss, eager": eager,
        "released loss, torch.compile": {LOSS_ONLY: compiled(released_step)},
        "amapo_loss, torch.compile": {name: compiled(step) for name, step in to_compile.items()},
    }
    if device == "cuda":
        from benchmarks.speed.floor import empty_kernel

        available |= {
            "amapo_loss, reduce-overhead": {
                name: compiled(step, mode="reduce-overhead") for name, step in to_compile.items()
            },
            "amapo_loss, Triton kernel": {name: step_that_reads(amapo_loss, read) for name, read in OUTPUTS.items()},
            "empty Triton kernel": {LOSS_ONLY: lambda *inputs: (empty_kernel(*inputs), ())},
        }
    return available


def forward_backward(step: Step, inputs: Inputs) -> Any:
    """Run forward and backward once; return the gradients and the diagnostics.

    In training the log-probs come from a model, so their gradients are passed on and not accumulated in `grad`.
    """
    loss, diagnostics = step(*inputs)
    return torch.autograd.grad(loss, inputs), diagnostics


class Timings(NamedTuple):
    """The measurements of one variant at one batch size. Those that need a GPU are None without one."""

    wall: dict[str, list[float]]  # microseconds per step in each round, keyed like `OUTPUTS`
    device: float | None = None  # microseconds per step that the device is busy
    launches: float | None = None  # kernels, copies and fills per step
    synchronizations: int | None = None


def measure(pairs: int, rounds: int, repeats: int, device: str) -> dict[str, Timings]:
    """Return the timings of every variant on a batch with this number of pairs."""
    generator = torch.Generator().manual_seed(0)
    logps = [(torch.randn(pairs, generator=generator) - mean).to(device) for mean in (1.0, 1.4)]
    inputs = (logps[0].requires_grad_(), logps[1].requires_grad_())
    available = variants(device)
    timers = {
        (name, output): Timer("run(step, inputs)", globals={"run": forward_backward, "step": step, "inputs": inputs})
        for name, variant in available.items()
        for output, step in variant.items()
    }
    for timer in timers.values():
        timer.timeit(repeats)  # the first steps compile and warm up, so their times are discarded
    wall: dict[str, dict[str, list[float]]] = {
        name: {output: [] for output in variant} for name, variant in available.items()
    }
    for _ in track(range(rounds), f"{pairs:,} pairs"):
        for (name, output), timer in timers.items():
            wall[name][output].append(timer.timeit(repeats).median * 1e6)
    timings = {name: Timings(times) for name, times in wall.items()}
    if device == "cuda":
        for name, variant in available.items():
            run = partial(forward_backward, variant[LOSS_ONLY], inputs)
            timings[name] = Timings(wall[name], *device_cost(run), count_synchronizations(run))
    return timings


def device_cost(run: Callable[[], Any], repeats: int = 20) -> tuple[float, float]:
    """Return how long the device is busy with `run` in microseconds, and with how many kernels, copies and fills."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return sum(event.time_range.elapsed_us() for event in events) / repeats, len(events) / repeats


def count_synchronizations(run: Callable[[], Any]) -> int:
    """Return how often the host waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def share_of_copy_bandwidth(pairs: int) -> float:
    """Return the memory bandwidth of the fused forward pass, divided by that of a device copy.

    The forward pass moves 28 bytes per pair: it reads each input twice, and writes two gradients and a margin.
    """
    chosen_logps, rejected_logps = (torch.randn(pairs, device="cuda").requires_grad_() for _ in range(2))
    source = torch.randn(7 * pairs // 2, device="cuda")  # the copy reads 14 bytes per pair and writes 14
    target = torch.empty_like(source)
    copy_time, _ = device_cost(lambda: target.copy_(source))
    return copy_time / device_cost(lambda: amapo_loss(chosen_logps, rejected_logps).loss)[0]


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw time over pairs, with a line for every variant and, on a GPU, a second panel for the device time."""
    titles = {"median_us": "wall-clock time", "device_us": "device time"}
    titles = {key: title for key, title in titles.items() if any(row[key] is not None for row in rows)}
    figure, panels = plt.subplots(1, len(titles), figsize=(4.5 * len(titles) + 3, 4), squeeze=False)
    for panel, (key, title) in zip(panels[0], titles.items()):
        for name in dict.fromkeys(row["variant"] for row in rows):
            points = sorted(
                (row["pairs"], row[key])
                for row in rows
                if row["variant"] == name and row["outputs"] == LOSS_ONLY and row[key] is not None
            )
            if points:
                panel.plot(*zip(*points), "o-", label=name)
        panel.set(xscale="log", xlabel="pairs in the batch", ylabel="forward + backward [µs]")
        panel.set(title=f"Loss without diagnostics: {title}")
        if max(row["pairs"] for row in rows) >= MANY_PAIRS:
            panel.set(yscale="log")
        else:
            panel.set(ylim=(0, None))
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    write_picture(path, figure)


def main() -> None:
    """Measure every batch size and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_sizes = [2, 32, 128, 1024, 4096, 8192, 65536, 2**24] if device == "cuda" else [32, 1024]
    parser.add_argument("--pairs", type=int, nargs="+", default=batch_sizes, help="batch sizes to measure")
    parser.add_argument(
        "--rounds", type=int, default=30 if device == "cuda" else 200, help="times that every variant is measured"
    )
    parser.add_argument("--repeats", type=int, default=20, help="steps in each measurement")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / f"latency_{device}.json",
        help="JSON file to write; the picture is written beside it",
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    hardware = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread"
    table = Table(
        title=f"Forward + backward on {hardware}: median µs (ratio to baseline)\nbaseline: {BASELINE}",
        box=SIMPLE,
        collapse_padding=True,
    )
    headings = ["pairs", "variant", *(output.replace(" ", "\n") for output in OUTPUTS)]
    if device == "cuda":
        headings += ["device\nµs", "device\nlaunches", "host\nsyncs"]
    for heading in headings:
        alignment: Literal["left", "right"] = "left" if heading == "variant" else "right"
        table.add_column(heading, justify=alignment, vertical="bottom", no_wrap=True)
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {"rounds": args.rounds, "repeats": args.repeats, "rows": rows}
    for pairs in args.pairs:
        rounds = args.rounds if pairs < MANY_PAIRS else min(args.rounds, 5)
        timings = measure(pairs, rounds, args.repeats, device)
        baseline_times = timings[BASELINE].wall[LOSS_ONLY]
        for name, timing in timings.items():
            cells = dict.fromkeys(OUTPUTS, "")
            for output, times in timing.wall.items():
                median = statistics.median(times)
                ratio = statistics.median(time / baseline for time, baseline in zip(times, baseline_times))
                cells[output] = f"{median:,.0f} ({ratio:.2f})"
                rows.append(
                    {
                        "pairs": pairs,
                        "variant": name,
                        "outputs": output,
                        "min_us": min(times),
                        "median_us": median,
                        "ratio": ratio,
                        "device_us": timing.device,
                        "launches": timing.launches,
                        "synchronizations": timing.synchronizations,
                    }
                )
            gpu_cells = [
                f"{timing.device:.1f}" if timing.device else "",
                f"{timing.launches:.3g}" if timing.launches else "",
                str(timing.synchronizations),
            ]
            table.add_row(f"{pairs:,}", name, *cells.values(), *(gpu_cells if device == "cuda" else ()))
        write_json(args.out, "benchmarks.speed.latency", results)  # a run that is cut off leaves what it has measured

    console = Console()
    console.print(table)
    if device == "cuda":
        largest = max(args.pairs)
        share = share_of_copy_bandwidth(largest)
        results["share of copy bandwidth"] = {"pairs": largest, "share": share}
        console.print(f"At {largest:,} pairs the fused forward pass reaches {share:.0%} of the bandwidth of a copy.")
    write_json(args.out, "benchmarks.speed.latency", results)
    draw(args.out.with_suffix(".png"), rows)
    console.print(f"wrote {args.out.name} and {args.out.stem}.png in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
