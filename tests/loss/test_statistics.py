"""The score statistics of a batch, merged from several parts, of a window, and from a custom estimator."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amapo_loss import AMaPOLoss, ScoreStatistics, ScoreWindow, amapo_loss
from amapo_loss._moments import mean_std_count, merge_moments, moments
from tests.support.backends import OnBackend, every_backend, needs_gpu, triton_loss
from tests.support.generators import examples, random_logps


@examples(200)
@given(st.integers(2, 5000), st.floats(-4, 4), st.integers(-3, 3), st.integers(0, 2**31), st.booleans())
def test_statistics_of_a_batch_agree_with_numpy(n: int, mean: float, magnitude: int, seed: int, float64: bool) -> None:
    dtype = torch.float64 if float64 else torch.float32
    scores = torch.tensor(np.random.default_rng(seed).normal(mean, 1, n) * 10.0**magnitude, dtype=dtype)
    statistics = ScoreStatistics.of(scores)
    exact = scores.double().numpy()
    expected = math.fsum(exact) / n
    # The gate compares scores with the mean, so the error of the mean must be within the rounding of the largest score.
    assert abs(statistics.mean.item() - expected) <= torch.finfo(dtype).eps * np.abs(exact).max()
    assert statistics.std.item() == pytest.approx(exact.std(ddof=1), rel=32 * torch.finfo(dtype).eps)
    assert statistics.count == n
    assert statistics.mean.dtype == statistics.std.dtype == dtype


def test_a_mean_far_larger_than_the_std_costs_no_precision() -> None:
    scores = 1e4 + torch.linspace(-1, 1, 101)
    assert ScoreStatistics.of(scores).std.item() == pytest.approx(scores.double().std().item(), rel=1e-5)


@given(st.integers(1, 3000), st.floats(-1e6, 1e6, width=32))
def test_equal_scores_have_std_zero(n: int, value: float) -> None:
    mean, std, _ = ScoreStatistics.of(torch.full((n,), value))
    assert std == 0
    assert mean == torch.tensor(value)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_scores_have_std_zero(n: int) -> None:
    statistics = ScoreStatistics.of(torch.full((n,), 3.0))
    assert [value.item() for value in statistics] == [3.0 * n, 0.0, n]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    scores = torch.linspace(-1, 3, 50, dtype=dtype, requires_grad=True)
    statistics = ScoreStatistics.of(scores)
    assert statistics[:2] == ScoreStatistics.of(scores.float())[:2]
    assert statistics.mean.dtype == torch.float32
    assert not statistics.mean.requires_grad


@examples()
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=8),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**31),
)
def test_merged_moments_are_those_of_all_scores(sizes: list[int], mean: float, std: float, seed: int) -> None:
    """The parts differ in size and may be empty. The mean is up to a million times the standard deviation."""
    parts = [torch.tensor(np.random.default_rng([seed, k]).normal(mean, std, n)) for k, n in enumerate(sizes)]
    whole = torch.cat(parts).numpy()
    statistics = ScoreStatistics(*mean_std_count(merge_moments(torch.stack([moments(x) for x in parts]))))
    assert statistics.count == len(whole)
    if len(whole):
        assert statistics.mean.item() == pytest.approx(math.fsum(whole) / len(whole), rel=1e-13, abs=1e-13)
    expected = whole.std(ddof=1) if len(whole) > 1 else 0.0
    assert statistics.std.item() == pytest.approx(expected, rel=1e-8, abs=1e-15 * abs(mean))


@examples()
@given(
    st.integers(1, 40),
    st.lists(st.one_of(st.integers(0, 6), st.integers(0, 60)), max_size=12),
    st.sampled_from([0, 0.1, 0.5, 0.9]),
    st.integers(0, 2**31),
)
def test_a_window_holds_the_latest_scores(size: int, batch_sizes: list[int], nan_rate: float, seed: int) -> None:
    """A plain array keeps all finite scores. The window must return the statistics of the batch and of earlier scores.

    The finite scores of the batch count in full. Earlier scores fill the rest of the window, the latest ones first.
    """
    rng = np.random.default_rng(seed)
    window, remembered = ScoreWindow(size), np.empty(0)
    for n in batch_sizes:
        scores = rng.normal(3, 2, n).astype(np.float32)
        nonfinite = rng.random(n) < nan_rate
        scores[nonfinite] = rng.choice([np.nan, np.inf, -np.inf], nonfinite.sum())
        finite = scores[np.isfinite(scores)]
        num_earlier = min(len(remembered), max(size - len(finite), 0))
        expected = np.concatenate([remembered[len(remembered) - num_earlier :], finite]).astype(np.float64)
        mean, std, count = window(torch.tensor(scores, requires_grad=True))
        assert count == len(expected)
        if len(expected):
            assert mean.item() == pytest.approx(expected.mean(), rel=1e-12, abs=1e-12)
            assert std.item() == pytest.approx(expected.std(ddof=1) if len(expected) > 1 else 0, rel=1e-9, abs=1e-12)
        remembered = np.concatenate([remembered, finite])
    assert window.seen == len(remembered)
    empty = max(size - len(remembered), 0)
    assert window.scores.tolist() == [0.0] * empty + remembered[-size:].tolist()
    window.reset()
    assert window(torch.tensor([1.0, 3.0])).count == 2


def test_the_last_micro_batch_gets_the_statistics_of_the_whole_batch_from_a_window() -> None:
    """This is the purpose of a window as large as the optimizer's batch."""
    inputs, window = random_logps(64), ScoreWindow(64)
    for micro_batch in zip(*(x.split(8) for x in inputs)):
        diagnostics = amapo_loss(*micro_batch, statistics=window).diagnostics
    expected = amapo_loss(*inputs).diagnostics
    torch.testing.assert_close(diagnostics.statistics.mean.float(), expected.statistics.mean)
    torch.testing.assert_close(diagnostics.statistics.std.float(), expected.statistics.std)
    torch.testing.assert_close(diagnostics.margins, expected.margins[-8:])


def test_a_window_remembers_scores_only_in_training_mode_and_with_a_gradient() -> None:
    """OpenRLHF evaluates with `model.eval()` and `no_grad`, and leaves the loss module in training mode."""
    loss_fn = AMaPOLoss(statistics=ScoreWindow(8))
    loss_fn(*random_logps(5))
    state = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    assert state.keys() == {"statistics._extra_state"}
    assert state["statistics._extra_state"][-1] == 5
    loss_fn.eval()
    evaluated = loss_fn(*random_logps(5, seed=1))[0]
    assert all(torch.equal(loss_fn.state_dict()[name], value) for name, value in state.items())
    loss_fn.train()
    with torch.no_grad():
        loss_fn(*random_logps(5, seed=2))
    loss_fn(*(x.detach() for x in random_logps(5, seed=2)))
    assert all(torch.equal(loss_fn.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(loss_fn(*random_logps(5, seed=1))[0], evaluated)
    assert loss_fn.state_dict()["statistics._extra_state"][-1] == 10


def test_a_resumed_window_gives_the_same_next_loss() -> None:
    """The losses are bitwise equal, although the new window has seen other scores before it loads the state."""
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


@examples()
@given(st.integers(1, 12), st.integers(1, 12), st.lists(st.integers(1, 9), max_size=5))
def test_a_window_of_another_size_loads_the_newest_scores(size: int, other_size: int, batch_sizes: list[int]) -> None:
    window, scores = ScoreWindow(size), torch.arange(float(sum(batch_sizes)), requires_grad=True)
    for batch in scores.split(batch_sizes):
        window(batch)
    other = ScoreWindow(other_size)
    other.load_state_dict(window.state_dict())
    expected = scores[-min(size, other_size, len(scores)) :] if len(scores) else scores
    empty = [0.0] * (other_size - len(expected))
    assert other.scores.tolist() == [*empty, *expected.tolist()]
    other(torch.tensor([100.0], requires_grad=True))  # the next score replaces the oldest one
    assert other.scores.tolist() == [*empty, *expected.tolist(), 100.0][1:]


def test_a_window_may_be_built_while_a_model_is() -> None:
    """Then the default dtype or the default device is that of the model. The window has its own."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            window = ScoreWindow(4)
            AMaPOLoss(statistics=window).to_empty(device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert window(torch.tensor([1.0, 257.0], requires_grad=True)).mean == 129
    assert window.scores.tolist() == [0, 0, 1, 257], "257 has too many digits for bfloat16"


def test_a_window_that_moves_in_inference_mode_can_be_trained_with() -> None:
    window = ScoreWindow(4)
    with torch.inference_mode():
        window(torch.empty(2, device="meta"))
    window(torch.empty(2, device="meta", requires_grad=True))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)
def test_a_window_that_is_copied_in_inference_mode_can_be_trained_with(copy_of: Callable[[Any], Any]) -> None:
    window = ScoreWindow(4)
    window(torch.tensor([1.0, 2.0], requires_grad=True))
    with torch.inference_mode():
        window, loss_fn = copy_of(window), copy_of(AMaPOLoss(statistics_window=4))
    assert window(torch.tensor([3.0], requires_grad=True)).count == 3
    loss_fn(torch.zeros(2, requires_grad=True), torch.zeros(2))
    assert loss_fn.statistics.seen == 2


def test_a_window_that_comes_back_from_the_meta_device_is_empty() -> None:
    window = ScoreWindow(4)
    window(torch.tensor([1.0, 2.0], requires_grad=True))
    window.to("meta").to_empty(device="cpu")
    assert window(torch.tensor([3.0], requires_grad=True)).count == 1
    window(torch.empty(2, device="meta"))
    assert window(torch.tensor([3.0], requires_grad=True)).count == 1


def test_a_window_that_is_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        window = ScoreWindow(4)
    assert window(torch.tensor([1.0, 2.0], requires_grad=True)).count == 2
    assert window.seen == 2


def test_a_window_ignores_scores_beyond_float32() -> None:
    window = ScoreWindow(4)
    window(torch.tensor([1.0, 1e39], dtype=torch.float64, requires_grad=True))
    assert window(torch.tensor([3.0], requires_grad=True))[:2] == (2, 2**0.5)


def test_the_scores_of_a_window_are_no_buffers() -> None:
    """`.to(torch.bfloat16)` would round buffers, and DDP would overwrite them with those of rank 0."""
    loss_fn = AMaPOLoss(statistics=ScoreWindow(8))
    loss_fn(200 + random_logps(8)[0], torch.zeros(8))
    expected = loss_fn.state_dict()["statistics._extra_state"].clone()
    assert not list(loss_fn.buffers())
    loss_fn.to(torch.bfloat16)
    assert torch.equal(loss_fn.state_dict()["statistics._extra_state"], expected)


def test_a_state_without_a_window_is_reported() -> None:
    loss_fn = AMaPOLoss(statistics=ScoreWindow(8))
    with pytest.raises(RuntimeError, match=r'Missing key.*"statistics._extra_state"'):
        loss_fn.load_state_dict({})
    state = loss_fn.state_dict() | {"statistics.other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"statistics.other"'):
        loss_fn.load_state_dict(state)


def test_a_window_does_not_synchronize_with_the_device() -> None:
    """A meta tensor has no values, so code that reads a value on the host, and thus would synchronize, raises here."""
    window = ScoreWindow(8).to("meta")
    assert window(torch.empty(3, device="meta")).mean.is_meta


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=needs_gpu)])
def test_a_window_moves_to_the_device_of_the_scores(device: str) -> None:
    window = ScoreWindow(8)
    window(torch.tensor([1.0, 2.0], requires_grad=True))
    statistics = window(torch.tensor([6.0], device=device, requires_grad=True))
    assert {x.device.type for x in (*statistics, window.scores, window.seen)} == {device}
    if device != "meta":
        assert statistics.mean == 3.0
        assert window(torch.tensor([11.0])).mean == 5.0  # back on the CPU


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the compiler
def test_a_window_compiles(backend: Any) -> None:
    eager, compiled = (AMaPOLoss(statistics=ScoreWindow(8), backend=backend).to(triton_loss.device) for _ in range(2))
    torch.compiler.reset()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        inputs = [x.to(triton_loss.device) for x in random_logps(5, seed)]
        torch.testing.assert_close(step(*inputs)[0], eager(*inputs)[0])
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())


@every_backend
def test_the_estimator_may_be_a_function_of_the_caller(loss_fn: OnBackend) -> None:
    """The example estimates with the median and the median absolute deviation, which one outlier hardly changes."""

    def robust_estimator(scores: torch.Tensor, _: object) -> ScoreStatistics:
        median = scores.median()
        std = 1.4826 * (scores - median).abs().median()  # consistent with the standard deviation of normal scores
        return ScoreStatistics(median, std, torch.tensor(len(scores)))

    chosen, rejected = random_logps(33)
    with torch.no_grad():
        chosen[3] = 10  # an outlier, but no margin so large that it depends on the rounding of the mean
    scores = 2 * (chosen - rejected).detach()
    output = loss_fn(chosen, rejected, statistics=robust_estimator)
    assert output.diagnostics.statistics.mean == scores.median()
    supplied = loss_fn(chosen, rejected, statistics=robust_estimator(scores, None))
    assert torch.equal(output.loss, supplied.loss)
    with_default_estimator = loss_fn(chosen, rejected, statistics=ScoreStatistics.of)
    torch.testing.assert_close(with_default_estimator.loss, loss_fn(chosen, rejected).loss)
