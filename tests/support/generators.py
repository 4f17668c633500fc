"""Batches, options and margins that the tests draw from, lists of losses to run over, and small helpers."""

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.torch_version import TorchVersion

from amapo_loss import AdaptiveMargin, AMaPOOutput, ScoreStatistics, amapo_loss, dpo_loss, simpo_loss
from tests.support.backends import GPU, OnBackend, on_gpu, triton_loss, two_launches
from tests.support.oracle import Array

# Margins.

MARGINS = [
    AdaptiveMargin(formula, normalize, scaling, clip)
    for formula in ("paper", "released")
    for normalize in (True, False)
    for scaling in ("exp", "linear")
    for clip in (True, False)
] + [
    AdaptiveMargin(formula, scaling=scaling, floor=0.7)
    for formula in ("paper", "released")
    for scaling in ("exp", "linear")
]
every_margin = pytest.mark.parametrize(
    "margin", MARGINS, ids=lambda m: f"{m.formula}-{m.normalize}-{m.scaling}-{m.clip}-{m.floor}"
)

# Hypothesis: settings and strategies.


def examples(n: int = 100) -> settings:
    """Return the settings of a test with n examples, or a tenth of them on a GPU, where most compile a kernel."""
    return settings(max_examples=max(n // 10, 5) if GPU else n, deadline=None)


Batch = tuple[Array, Array]  # chosen and rejected log-probs, [n] each
Options = dict[str, float]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Draw log-probs of any number and scale, with a negative or a positive mean, perhaps with ties or an outlier."""
    n = draw(st.one_of(st.integers(1, 9), st.integers(10, 3000)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.floats(-6, 4))
    chosen = rng.normal(draw(st.floats(-3, 3)), 1, n)
    rejected = rng.normal(0, draw(st.sampled_from([0.0, 1e-3, 1.0])), n) + draw(st.sampled_from([0.0, -100.0]))
    shape = draw(st.sampled_from(["plain", "plain", "ties", "outlier", "equal differences"]))
    if shape == "ties":
        chosen, rejected = np.round(chosen * 2) / 2, np.round(rejected * 2) / 2
    elif shape == "outlier":
        chosen[rng.integers(n)] *= 1e3
    elif shape == "equal differences":
        chosen = rejected + 0.3
    return chosen * scale, rejected * scale


loss_options = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.01, 0.1, 1.0, 2.0, 3.0, 10.0]),
        "label_smoothing": st.sampled_from([0.0, 0.0, 0.1, 0.49]),
    }
)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16])


# From arrays to tensors and back.


def to_tensors(arrays: dict[str, Array | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert the arrays to tensors of a dtype, and leave out those that are None."""
    return {name: torch.tensor(array).to(dtype) for name, array in arrays.items() if array is not None}


def as_float64(tensors: dict[str, Tensor]) -> dict[str, Array]:
    """Convert the tensors to arrays for the oracle, which must get the values after their rounding to the dtype."""
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def float32_logps(batch: Batch) -> list[Tensor]:
    """Return the chosen and the rejected log-probs of a generated batch as float32 tensors with gradients."""
    return [torch.tensor(values, dtype=torch.float32, requires_grad=True) for values in batch]


def unit_of(dtype: torch.dtype) -> float:
    """Return the machine epsilon of the dtype that log-probs of this dtype are computed in."""
    return 2.0**-52 if dtype == torch.float64 else 2.0**-23


# Fixed inputs and their gradients.


def random_logps(n: int, seed: int = 0) -> list[Tensor]:
    """Return chosen and rejected log-probs [n] in float32 with gradients, around -1.0 and -1.4."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator) - mean).requires_grad_() for mean in (1.0, 1.4)]


def score_statistics(mean: float, std: float) -> ScoreStatistics:
    """Return statistics to supply to a loss, in float32."""
    return ScoreStatistics(torch.tensor(mean), torch.tensor(std), torch.tensor(100))


NO_SPREAD = score_statistics(1.0, 0.0)  # with a standard deviation of 0, every margin is 0


def gradients(output: AMaPOOutput, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of the loss, or of the sum of the losses, with respect to the inputs."""
    return torch.autograd.grad(output.loss.sum(), inputs)


# Losses and compilers.

LOSSES: dict[str, Any] = {
    "amapo": amapo_loss,
    "amapo in triton": triton_loss,
    "amapo in two launches": two_launches,
    "amapo, supplied statistics": lambda *x, **o: amapo_loss(*x, statistics=score_statistics(0.3, 1.0), **o),
    "simpo": simpo_loss,
    "dpo": lambda chosen, rejected, **o: dpo_loss(chosen, rejected, *torch.zeros(2, len(chosen)), **o),
}
every_loss = pytest.mark.parametrize(
    "loss_fn",
    [
        pytest.param(loss_fn, id=name, marks=on_gpu if isinstance(loss_fn, OnBackend) else [])
        for name, loss_fn in LOSSES.items()
    ],
)
COMPILERS = ["aot_eager"] + ["inductor"] * bool(shutil.which("g++") or shutil.which("clang++"))


def compiled_gradient(gradient: Callable[..., Any], *arguments: Tensor) -> Any:
    """Return a gradient by `torch.func.grad` inside torch.compile. Skip if an older PyTorch cannot trace it."""
    try:
        return torch.compile(gradient, fullgraph=True, backend="aot_eager")(*arguments)
    except TorchDynamoException as error:
        if TorchVersion(torch.__version__) >= "2.13":
            raise
        pytest.skip(f"torch.compile cannot trace it: {error}")
