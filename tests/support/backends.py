"""The backends of `amapo_loss` as callables, and small tiles for the log-prob functions.

The callables take and return CPU tensors, whatever the device that the backend computes on. Without a GPU, Triton
interprets its kernels on the CPU.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from amapo_loss import AMaPOOutput, Diagnostics, amapo_loss
from amapo_loss.kernels import pair_loss
from amapo_loss.logps import _linear_head, _online_lse

GPU = torch.cuda.is_available()


def _sum_in_pairs(self: interpreter.ReduceOps, x: Any) -> Any:
    """Sum as a GPU does, in a tree. NumPy does so along contiguous memory, and elsewhere adds one number at a time."""
    axis = 0 if self.axis is None else self.axis
    data = x.handle.data.ravel() if self.axis is None else x.handle.data
    in_memory_order = np.ascontiguousarray(np.moveaxis(data, axis, -1))
    return self.to_tensor(in_memory_order.sum(-1), x.dtype)


if not GPU:
    interpreter.ReduceOps.sum = _sum_in_pairs

on_gpu = [pytest.mark.gpu] if GPU else []  # the marks of a test that runs on a GPU where there is one
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]


class OnBackend(NamedTuple):
    """`amapo_loss` on one backend."""

    backend: str
    device: str
    constants: Mapping[str, int] = MappingProxyType({})  # constants of `kernels.pair_loss` to replace, by name

    def __call__(self, *tensors: Tensor | None, **options: Any) -> AMaPOOutput:
        """Call `amapo_loss` with these arguments, and return the loss and the diagnostics on the CPU."""
        with ExitStack() as stack:
            for name, value in self.constants.items():
                stack.enter_context(patch.object(pair_loss, name, value))
            loss, diagnostics = amapo_loss(
                *to_device(tensors, self.device), **to_device(options, self.device), backend=self.backend
            )
        return AMaPOOutput(loss.cpu(), Diagnostics(*to_device(tuple(diagnostics), "cpu")))


def to_device(value: Any, device: str) -> Any:
    """Copy the tensors and modules in nested tuples and dictionaries to a device. Gradients flow through the copy."""
    if isinstance(value, (Tensor, torch.nn.Module)):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(x, device) for name, x in value.items()}
    if isinstance(value, tuple):
        items = [to_device(x, device) for x in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


torch_loss = OnBackend("torch", "cpu")
triton_loss = OnBackend("triton", "cuda" if GPU else "cpu")
# The Triton backend with limits so small that test batches reach every path of its two launches: batches above 16 pairs
# take two launches, those above 256 pairs several programs, and those above 512 pairs several blocks per program.
two_launches = triton_loss._replace(
    constants={
        "MAX_PAIRS_ONE_LAUNCH": 16,
        "BLOCK_PAIRS": 256,
        "MAX_STATISTICS_PROGRAMS": 4,
        "MAX_LOSS_PROGRAMS": 2,
    }
)
every_backend = pytest.mark.parametrize(
    "loss_fn",
    [
        pytest.param(torch_loss, id="torch"),
        pytest.param(triton_loss, id="triton", marks=on_gpu),
        pytest.param(two_launches, id="triton in two launches", marks=on_gpu),
    ],
)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Make PyTorch raise an error for every operation that makes the host wait for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that it does not detect all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The log-prob functions process their logits in tiles.

every_tiling = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=on_gpu)])


@contextmanager
def tiled(backend: str, elements: int = 64) -> Iterator[str]:
    """Process logits in tiles of about `elements` elements, so that small tests need many tiles.

    Args:
        backend: `"torch"` or `"triton"`, the backend of the log-prob functions within the context.
        elements: approximate number of elements in a tile.

    Yields:
        The device that tensors must be on for this backend.

    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(_online_lse, "TILE_ELEMENTS", {"cpu": elements, "cuda": elements}))
        stack.enter_context(patch.object(_online_lse, "BLOCK_MULTIPLE", 4))
        stack.enter_context(patch.object(_online_lse, "CPU_LSE_ROWS", 3))
        if backend == "triton" and not GPU:
            stack.enter_context(patch.object(_online_lse, "uses_triton", lambda tensor: tensor.dtype != torch.float64))
            # PyTorch accumulates matrix products in a wider dtype than that of the factors only on a GPU.
            for name, beta in {"_mm_out": 0, "_addmm_out": 1}.items():
                stack.enter_context(patch.object(_linear_head, name, partial(_addmm_in_out_dtype, beta)))
        yield "cuda" if backend == "triton" and GPU else "cpu"


def _addmm_in_out_dtype(
    beta: int,
    out: Tensor,  # [n, m], updated
    a: Tensor,  # [n, k]
    b: Tensor,  # [k, m]
) -> Tensor:
    """Set `out` to beta * out + a @ b, computed in the dtype of `out`."""
    return out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)
