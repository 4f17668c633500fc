"""Measure the peak memory that PyTorch allocates while a function runs. Depends only on torch."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # at lower levels the profiler prints its own progress


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """Return the peak bytes of tensor memory that `run` allocates on top of what was allocated before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        run()
    allocated = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: int(event.start_ns())):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak
