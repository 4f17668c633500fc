"""The most memory that PyTorch's tensors take at once. Knows no benchmark."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below, the profiler reports every step of its own


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """While `run` runs, over what there was before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        run()
    now = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: int(event.start_ns())):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
