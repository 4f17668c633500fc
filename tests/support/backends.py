"""The backends, each as a function that the tests call with tensors on the CPU, wherever it computes."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from amapo_loss import AMaPOOutput, Diagnostics, amapo_loss
from amapo_loss.kernels import pair_loss
from amapo_loss.logps import _linear_head, _online_lse

GPU = torch.cuda.is_available()
on_gpu = [pytest.mark.gpu] if GPU else []


class OnBackend(NamedTuple):
    """`amapo_loss` of one backend."""

    backend: str
    device: str
    sizes: Mapping[str, int] = MappingProxyType({})  # instead of those of the kernels

    def __call__(self, *tensors: torch.Tensor | None, **options: Any) -> AMaPOOutput:
        with ExitStack() as stack:
            for name, size in self.sizes.items():
                stack.enter_context(patch.object(pair_loss, name, size))
            loss, diagnostics = amapo_loss(
                *moved(tensors, self.device), **moved(options, self.device), backend=self.backend
            )
        return AMaPOOutput(loss.cpu(), Diagnostics(*moved(tuple(diagnostics), "cpu")))


def moved(value: Any, device: str) -> Any:
    """The tensors in modules, nested tuples and dictionaries to another device; gradients find their way back."""
    if isinstance(value, (torch.Tensor, torch.nn.Module)):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(x, device) for name, x in value.items()}
    if isinstance(value, tuple):
        parts = [moved(x, device) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


torch_loss = OnBackend("torch", "cpu")
triton_loss = OnBackend("triton", "cuda" if GPU else "cpu")
two_launches = triton_loss._replace(  # from 17 pairs on; several programs from 257, of several blocks from 513
    sizes={
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


every_tiling = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=on_gpu)])


@contextmanager
def tiled(backend: str, elements: int = 64) -> Iterator[str]:
    """Heads and logits in tiles of about so many elements; the device on which that backend computes them."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(_online_lse, "TILE_ELEMENTS", {"cpu": elements, "cuda": elements}))
        stack.enter_context(patch.object(_online_lse, "BLOCK_MULTIPLE", 4))
        stack.enter_context(patch.object(_online_lse, "CPU_LSE_ROWS", 3))
        if backend == "triton" and not GPU:
            stack.enter_context(patch.object(_online_lse, "uses_triton", lambda tensor: tensor.dtype != torch.float64))
            # What only a GPU can do for factors narrower than the product.
            for name, beta in {"_mm_out": 0, "_addmm_out": 1}.items():
                stack.enter_context(patch.object(_linear_head, name, partial(_product, beta)))
        yield "cuda" if backend == "triton" and GPU else "cpu"


def _product(beta: int, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)
