"""Mean and standard deviation of scores, against NumPy in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amapo_loss import ScoreStatistics


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 5000), st.floats(-4, 4), st.integers(-3, 3), st.integers(0, 2**31), st.booleans())
def test_against_numpy(n: int, mean: float, magnitude: int, seed: int, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    scores = torch.tensor(np.random.default_rng(seed).normal(mean, 1, n) * 10.0**magnitude, dtype=dtype)
    statistics = ScoreStatistics.of(scores)
    exact = scores.double().numpy()
    expected = math.fsum(exact) / n
    # The mean is what the gate turns on: right to the last bit of the largest score.
    assert abs(statistics.mean.item() - expected) <= torch.finfo(dtype).eps * np.abs(exact).max()
    assert statistics.std.item() == pytest.approx(exact.std(ddof=1), rel=32 * torch.finfo(dtype).eps)
    assert statistics.count == n
    assert statistics.mean.dtype == statistics.std.dtype == dtype


def test_a_mean_far_larger_than_the_spread() -> None:
    scores = 1e4 + torch.linspace(-1, 1, 101)
    assert ScoreStatistics.of(scores).std.item() == pytest.approx(scores.double().std().item(), rel=1e-5)


@given(st.integers(1, 3000), st.floats(-1e6, 1e6, width=32))
def test_equal_scores_have_no_spread(n: int, value: float) -> None:
    mean, std, _ = ScoreStatistics.of(torch.full((n,), value))
    assert std == 0
    assert mean == torch.tensor(value)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_scores_have_no_spread(n: int) -> None:
    statistics = ScoreStatistics.of(torch.full((n,), 3.0))
    assert [value.item() for value in statistics] == [3.0 * n, 0.0, n]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    scores = torch.linspace(-1, 3, 50, dtype=dtype, requires_grad=True)
    statistics = ScoreStatistics.of(scores)
    assert statistics[:2] == ScoreStatistics.of(scores.float())[:2]
    assert statistics.mean.dtype == torch.float32
    assert not statistics.mean.requires_grad
