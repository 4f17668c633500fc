"""Mean and standard deviation of scores, against NumPy in float64: of a batch, of its parts, and of a window."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amapo_loss import AMaPOLoss, ScoreStatistics, ScoreWindow, amapo_loss
from amapo_loss._moments import merge_moments, moments
from tests.support.backends import OnBackend, every_backend, triton_loss
from tests.support.generators import random_logps


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


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=8),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**31),
)
def test_merged_parts_are_the_whole(sizes: list[int], mean: float, spread: float, seed: int) -> None:
    """Uneven and empty parts, and a mean up to a million times the spread."""
    parts = [torch.tensor(np.random.default_rng([seed, k]).normal(mean, spread, n)) for k, n in enumerate(sizes)]
    whole = torch.cat(parts).numpy()
    statistics = ScoreStatistics(*merge_moments(torch.stack([moments(x) for x in parts])))
    assert statistics.count == len(whole)
    if len(whole):
        assert statistics.mean.item() == pytest.approx(math.fsum(whole) / len(whole), rel=1e-13, abs=1e-13)
    expected = whole.std(ddof=1) if len(whole) > 1 else 0.0
    assert statistics.std.item() == pytest.approx(expected, rel=1e-8, abs=1e-15 * abs(mean))


@settings(deadline=None)
@given(
    st.integers(1, 40), st.lists(st.one_of(st.integers(0, 6), st.integers(0, 60)), max_size=12), st.floats(0, 0.3),
    st.integers(0, 2**31),
)  # fmt: skip
def test_a_window_is_the_latest_scores(size: int, batches: list[int], nan_rate: float, seed: int) -> None:
    """Against a list: the batch and, before it, the finite scores that fit."""
    rng = np.random.default_rng(seed)
    window, remembered = ScoreWindow(size), np.empty(0)
    for n in batches:
        scores = rng.normal(3, 2, n).astype(np.float32)
        if rng.random() < nan_rate and n:
            scores[rng.integers(n)] = rng.choice([np.nan, np.inf])
        expected = np.concatenate([remembered[max(len(remembered) - max(size - n, 0), 0) :], scores]).astype(np.float64)
        mean, std, count = window(torch.tensor(scores))
        assert count == len(expected)
        if np.isfinite(expected).all() and len(expected):
            assert mean.item() == pytest.approx(expected.mean(), rel=1e-12, abs=1e-12)
            assert std.item() == pytest.approx(expected.std(ddof=1) if len(expected) > 1 else 0, rel=1e-9, abs=1e-12)
        elif len(expected):
            assert not mean.isfinite()
        latest = scores[-size:]
        remembered = np.concatenate([remembered, latest[np.isfinite(latest)]])
    state = window.scores[: int(window.seen.clamp(max=size))]
    assert sorted(state.tolist()) == sorted(remembered[-size:].tolist())
    window.reset()
    assert window(torch.tensor([1.0, 3.0])).count == 2


def test_micro_batches_of_a_window_approach_the_whole_batch() -> None:
    """What it is for: the last micro-batch of an optimizer's batch sees the statistics of all of it."""
    inputs, window = random_logps(64), ScoreWindow(64)
    for micro_batch in zip(*(x.split(8) for x in inputs)):
        diagnostics = amapo_loss(*micro_batch, statistics=window).diagnostics
    expected = amapo_loss(*inputs).diagnostics
    torch.testing.assert_close(diagnostics.statistics.mean.float(), expected.statistics.mean)
    torch.testing.assert_close(diagnostics.statistics.std.float(), expected.statistics.std)
    torch.testing.assert_close(diagnostics.margins, expected.margins[-8:])


def test_a_window_remembers_in_training_only() -> None:
    loss_fn = AMaPOLoss(statistics=ScoreWindow(8))
    loss_fn(*random_logps(5))
    state = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    assert state.keys() == {"statistics.scores", "statistics.seen"}
    assert state["statistics.seen"] == 5
    loss_fn.eval()
    evaluated = loss_fn(*random_logps(5, seed=1))[0]
    assert all(torch.equal(loss_fn.state_dict()[name], value) for name, value in state.items())
    loss_fn.train()
    assert torch.equal(loss_fn(*random_logps(5, seed=1))[0], evaluated)
    assert loss_fn.state_dict()["statistics.seen"] == 10


def test_a_resumed_window_gives_the_same_next_loss() -> None:
    """To the last bit, through a file, also where the new module has already seen something else."""
    loss_fn, resumed = AMaPOLoss(statistics=ScoreWindow(16)), AMaPOLoss(statistics=ScoreWindow(16))
    for seed in range(5):
        loss_fn(*random_logps(6, seed))
        resumed(*random_logps(3, seed + 9))
    with io.BytesIO() as file:
        torch.save(loss_fn.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file))
    for seed in range(5, 9):
        losses = [module(*random_logps(6, seed))[0] for module in (loss_fn, resumed)]
        assert torch.equal(*losses)


def test_a_window_never_waits() -> None:
    """A meta tensor has no values to wait for."""
    window = ScoreWindow(8).to("meta")
    assert window(torch.empty(3, device="meta")).mean.is_meta


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
def test_a_window_compiles(backend: Any) -> None:
    plain, compiled = (AMaPOLoss(statistics=ScoreWindow(8), backend=backend).to(triton_loss.device) for _ in range(2))
    torch.compiler.reset()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        inputs = [x.to(triton_loss.device) for x in random_logps(5, seed)]
        torch.testing.assert_close(step(*inputs)[0], plain(*inputs)[0])
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


@every_backend
def test_a_caller_has_an_estimator_of_their_own(loss_fn: OnBackend) -> None:
    """Median and median absolute deviation, which an outlier does not move."""

    def robust(scores: torch.Tensor, _: object) -> ScoreStatistics:
        assert not scores.requires_grad
        middle = scores.median()
        spread = 1.4826 * (scores - middle).abs().median()
        return ScoreStatistics(middle, spread, torch.tensor(len(scores)))

    chosen, rejected = random_logps(33)
    with torch.no_grad():
        chosen[3] = 1e3
    output = loss_fn(chosen, rejected, statistics=robust)
    assert output.diagnostics.statistics.mean == (2 * (chosen - rejected)).median()
    by_hand = loss_fn(chosen, rejected, statistics=robust(2 * (chosen - rejected).detach(), None))
    assert torch.equal(output.loss, by_hand.loss)
    own = loss_fn(chosen, rejected, statistics=ScoreStatistics.of)
    torch.testing.assert_close(own.loss, loss_fn(chosen, rejected).loss)
