"""Run a function in several real processes that form one gloo process group, and collect their results.

Depends only on torch.
"""

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Return what `function(rank, group, *arguments)` returns on each rank.

    Args:
        world: number of ranks, each a process on this machine.
        function: a function at the top level of its module, because the new processes import it.
        arguments: more arguments, which are pickled.
        timeout: seconds after which a collective fails if a rank does not take part.

    Raises:
        Exception: if the function raises on any rank, with the traceback of that rank in the message.

    """
    # The ranks compute on the CPU, so that no test needs several GPUs. Triton must interpret its kernels there, also on
    # a machine with a GPU.
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRITON_INTERPRET="1"):
        spawn(_run, (world, Path(folder), timeout, function, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _run(
    rank: int,
    world: int,
    folder: Path,
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """Join the group, call the function and save its result for the parent process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        timeout=datetime.timedelta(seconds=timeout),
        world_size=world,
        rank=rank,
    )
    result = function(rank, dist.group.WORLD, *arguments)
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
