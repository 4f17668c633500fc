"""Run a function on several real processes of one gloo group, and collect what each returns."""

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
    """What `function(rank, group, *arguments)`, of a module, returns on each rank; raises if one of them does."""
    # On the CPU, where several ranks need no more than one machine: Triton has to interpret, also beside a GPU.
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRITON_INTERPRET="1"):
        spawn(_run, (world, Path(folder), timeout, function, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _run(
    rank: int, world: int, folder: Path, timeout: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=limit, world_size=world, rank=rank)
    result = function(rank, dist.group.WORLD, *arguments)
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
