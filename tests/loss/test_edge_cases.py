"""Edge cases: one pair, equal scores, empty batches, non-finite or huge log-probs, half precision, lengths of 0."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from amapo_loss import (
    AdaptiveMargin,
    AMaPOOutput,
    ScoreStatistics,
    ScoreWindow,
    _reference,
    amapo_loss,
    dpo_loss,
    simpo_loss,
)
from tests.support.backends import OnBackend, every_backend, on_gpu, triton_loss, two_launches
from tests.support.generators import (
    LOSSES,
    MARGINS,
    NO_SPREAD,
    every_loss,
    every_margin,
    examples,
    gradients,
    random_logps,
    score_statistics,
)


@every_backend
@every_margin
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_pair_is_simpo_with_gamma_0(loss_fn: OnBackend, margin: AdaptiveMargin, reduction: Any) -> None:
    chosen, rejected = random_logps(1)
    loss, diagnostics = loss_fn(chosen, rejected, margin=margin, reduction=reduction)
    torch.testing.assert_close(loss, simpo_loss(chosen, rejected, gamma=margin.floor, reduction=reduction).loss)
    assert diagnostics.margins.tolist() == [pytest.approx(margin.floor)]
    assert diagnostics.statistics.std == 0
    assert diagnostics.statistics.count == 1


@every_backend
@examples(300)
@given(
    st.integers(2, 500),
    st.floats(-1e3, 1e3),
    st.floats(-1e3, 1e3),
    st.sampled_from([0.01, 0.3, 2.0, 7.0]),
    st.sampled_from(MARGINS),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_equal_scores_get_no_margin(
    loss_fn: OnBackend,
    n: int,
    chosen: float,
    rejected: float,
    beta: float,
    margin: AdaptiveMargin,
    dtype: torch.dtype,
) -> None:
    if loss_fn.backend == "triton" and dtype == torch.float64:
        dtype = torch.float16
    pairs = (torch.full((n,), chosen, dtype=dtype), torch.full((n,), rejected, dtype=dtype))
    assert torch.all(loss_fn(*pairs, beta=beta, margin=margin).diagnostics.margins == margin.floor)


@every_backend
@examples(300)
@given(st.integers(2, 500), st.integers(0, 2**31), st.floats(-30, 30), st.sampled_from(MARGINS), st.booleans())
def test_scores_that_differ_only_by_rounding_get_no_margin(
    loss_fn: OnBackend, n: int, seed: int, difference: float, margin: AdaptiveMargin, with_ref: bool
) -> None:
    """The log-probs differ from pair to pair. Their differences are the same except for the rounding to float32."""
    rng = np.random.default_rng(seed)
    rejected = rng.uniform(-900, -100, n)
    refs = (rejected + 3.0, rejected) if with_ref else ()
    batch = [torch.tensor(x, dtype=torch.float32) for x in (rejected + difference, rejected, *refs)]
    assert torch.all(loss_fn(*batch, margin=margin).diagnostics.margins == margin.floor)


@every_backend
@examples()
@given(st.floats(-2.0, 2.0).filter(lambda x: abs(x) > 0.01), st.integers(0, 50))
def test_a_pair_at_the_mean_gets_no_margin(loss_fn: OnBackend, offset: float, extra_steps: int) -> None:
    """The other scores lie symmetrically around pair 0, so its score is the mean up to the rounding of the sum."""
    deviations = torch.cat([torch.zeros(1), *(torch.tensor([-k, k]) / 7 for k in range(1, extra_steps + 2))])
    margins = loss_fn(deviations + offset, torch.zeros(len(deviations))).diagnostics.margins
    assert margins[0] == 0
    # All pairs on one side get a margin: those below a positive mean, or those above a negative mean.
    assert torch.count_nonzero(margins) == extra_steps + 1


@pytest.mark.parametrize("beta", [1e-3, 0.1, 2.0, 1e2])
@pytest.mark.parametrize("formula", ["paper", "released"])
def test_the_cap_of_the_exponent_does_not_change_the_gradient(
    beta: float, formula: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, rejected = random_logps(512)
    # The exponent of the released formula does not contain beta. A larger mean makes it reach the cap, too.
    chosen = chosen + 3
    scale = 1e4 / beta / (chosen - rejected).abs().max().item()
    inputs = [(x.detach() * scale).requires_grad_() for x in (chosen, rejected)]
    margin = AdaptiveMargin(formula=formula)

    def run() -> tuple[AMaPOOutput, tuple[torch.Tensor, ...]]:
        output = amapo_loss(*inputs, beta=beta, margin=margin, reduction="sum")
        return output, torch.autograd.grad(output.loss, inputs)

    capped, capped_gradients = run()
    monkeypatch.setattr(_reference, "MAX_EXPONENT", math.inf)
    uncapped, uncapped_gradients = run()
    assert capped.diagnostics.margins.max() == torch.tensor(beta) * torch.tensor(60.0).exp()  # the cap was reached
    assert capped.loss.isfinite()
    assert not uncapped.loss.isfinite()
    for got, expected in zip(capped_gradients, uncapped_gradients):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("loss_fn", [pytest.param(triton_loss, marks=on_gpu), pytest.param(two_launches, marks=on_gpu)])
def test_the_kernel_caps_the_exponent_at_the_same_value(loss_fn: OnBackend) -> None:
    inputs = [x.detach() * 1e3 for x in random_logps(64)]
    expected = amapo_loss(*inputs).diagnostics.margins
    assert expected.max() == 2 * torch.tensor(60.0).exp()
    torch.testing.assert_close(loss_fn(*inputs).diagnostics.margins, expected, rtol=1e-3, atol=0)


def test_the_sum_of_a_million_capped_losses_is_finite() -> None:
    margins = torch.full((1_000_000,), 100.0) * torch.tensor(_reference.MAX_EXPONENT).exp()
    losses = _reference.pair_losses(torch.full_like(margins, -1e2), margins, 100.0, 0.0)
    assert losses.sum().isfinite()


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_has_loss_zero_and_backpropagates(loss_fn: Any, reduction: Any) -> None:
    chosen, rejected = random_logps(0)
    loss, diagnostics = loss_fn(chosen, rejected, reduction=reduction)
    assert loss.sum() == 0
    loss.sum().backward()
    for x in (chosen, rejected):
        assert x.grad is not None
        assert x.grad.shape == (0,)
    summary = diagnostics.summary()
    for name in summary.keys() - {"amapo/score_mean", "amapo/score_std"}:
        assert summary[name] == 0, name


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_nonfinite_log_prob_makes_the_loss_nan(loss_fn: Any, bad: float, side: int) -> None:
    inputs = random_logps(6)
    with torch.no_grad():
        inputs[side][2] = bad
    loss, diagnostics = loss_fn(*inputs)
    assert loss.isnan()
    assert diagnostics.summary()["amapo/nonfinite"] == 1


@every_backend
@every_margin
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 6, 40])
def test_a_nonfinite_log_prob_makes_the_loss_nan_with_every_margin(
    loss_fn: OnBackend, margin: AdaptiveMargin, bad: float, n: int
) -> None:
    chosen, rejected = random_logps(n)
    with torch.no_grad():
        chosen[n // 2] = bad
    for supplied in (None, score_statistics(0.3, 1.0), score_statistics(-0.3, 1.0)):
        loss, diagnostics = loss_fn(chosen, rejected, margin=margin, statistics=supplied, reduction="none")
        assert loss.isnan().all()
        assert diagnostics.summary()["amapo/margin_max"].isnan()
    ref = (torch.zeros(n).index_fill(0, torch.tensor(n // 2), bad), torch.zeros(n))
    chosen, rejected = random_logps(n)
    assert loss_fn(chosen, rejected, *ref, margin=margin).loss.isnan()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss_fn: Any, dtype: torch.dtype) -> None:
    half_inputs = [x.detach().to(dtype).requires_grad_() for x in random_logps(33)]
    float32_inputs = [x.detach().float().requires_grad_() for x in half_inputs]
    output, expected = loss_fn(*half_inputs), loss_fn(*float32_inputs)
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, expected.loss)
    output.loss.backward()
    expected.loss.backward()
    for half, float32 in zip(half_inputs, float32_inputs):
        assert half.grad is not None
        assert float32.grad is not None
        assert half.grad.dtype == dtype
        assert torch.equal(half.grad, float32.grad.to(dtype))


@every_loss
def test_autocast_changes_nothing(loss_fn: Any) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.detach().to(dtype) for x in random_logps(33)]
        expected = loss_fn(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = loss_fn(*inputs)
        assert actual.loss.dtype == torch.float32
        assert torch.equal(actual.loss, expected.loss)
        assert torch.equal(actual.diagnostics.margins, expected.diagnostics.margins)


def test_mixed_dtypes_are_computed_in_the_widest() -> None:
    chosen, rejected = random_logps(5)
    loss, diagnostics = amapo_loss(chosen.double(), rejected.bfloat16())
    assert loss.dtype == diagnostics.margins.dtype == torch.float64


@pytest.mark.parametrize("loss_fn", [loss_fn for loss_fn in LOSSES.values() if not isinstance(loss_fn, OnBackend)])
def test_float64_stays_float64(loss_fn: Any) -> None:
    loss, diagnostics = loss_fn(*(x.double() for x in random_logps(5)))
    assert loss.dtype == torch.float64
    tensors = [diagnostics.margins, diagnostics.scores, diagnostics.gradient_weights, diagnostics.chosen_rewards]
    assert {x.dtype for x in tensors} == {torch.float64}


# Autograd treats the adaptive margin as a constant, but finite differences do not. Here all margins are constant, so
# that gradcheck can compare the two.
CONSTANT_MARGINS: dict[str, Any] = {
    "amapo": lambda *x, **o: amapo_loss(*x, statistics=NO_SPREAD, **o).loss,
    "simpo": lambda *x, **o: simpo_loss(*x, gamma=0.7, **o).loss,
    "dpo": lambda *x, **o: dpo_loss(*x, *torch.zeros(2, 5, dtype=torch.float64), **o).loss,
}


@pytest.mark.parametrize("loss_fn", CONSTANT_MARGINS.values(), ids=CONSTANT_MARGINS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_first_and_second_derivatives_match_finite_differences(
    loss_fn: Any, reduction: Any, label_smoothing: float
) -> None:
    inputs = [x.detach().double().requires_grad_() for x in random_logps(5)]

    def loss(*x: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = loss_fn(*x, reduction=reduction, label_smoothing=label_smoothing)
        return value

    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


@every_margin
def test_the_second_derivative_treats_the_margin_as_a_constant(margin: AdaptiveMargin) -> None:
    chosen, rejected = (x.detach().double().requires_grad_() for x in random_logps(9))
    loss, diagnostics = amapo_loss(chosen, rejected, beta=2.0, margin=margin, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, chosen, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), chosen)
    w = diagnostics.gradient_weights
    torch.testing.assert_close(second, 4 * w * (1 - w))  # beta**2 * sigmoid'(h - r)


@every_margin
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func.jvp calls it
def test_forward_mode_gives_the_gradient(margin: AdaptiveMargin) -> None:
    inputs, tangents = random_logps(9), torch.randn(2, 9)
    gradients = torch.autograd.grad(amapo_loss(*inputs, margin=margin).loss, inputs)
    primals = tuple(x.detach() for x in inputs)
    derivative = torch.func.jvp(lambda *x: amapo_loss(*x, margin=margin).loss, primals, (*tangents,))[1]
    torch.testing.assert_close(derivative, (torch.stack(gradients) * tangents).sum())
    with pytest.raises((ValueError, RuntimeError), match=r"forward mode|cannot run"):
        torch.func.jvp(lambda *x: amapo_loss(*x, backend="triton").loss, primals, (*tangents,))


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_response_without_tokens_leaves_its_pair_out(loss_fn: OnBackend, reduction: Any) -> None:
    """The other pairs get what they would get alone."""
    inputs = random_logps(5)
    chosen_lengths, rejected_lengths = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 2, 0, 3, 4])
    counted = torch.tensor([False, True, False, True, True])
    loss, diagnostics = loss_fn(
        *inputs, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, reduction=reduction
    )
    expected = loss_fn(
        *(x[counted] for x in inputs),
        chosen_lengths=chosen_lengths[counted],
        rejected_lengths=rejected_lengths[counted],
        reduction=reduction,
    )
    torch.testing.assert_close(loss[counted] if reduction == "none" else loss, expected.loss)
    torch.testing.assert_close(diagnostics.margins[counted], expected.diagnostics.margins)
    assert not diagnostics.margins[~counted].any()
    assert not diagnostics.gradient_weights[~counted].any()
    assert diagnostics.statistics.count == 3
    assert diagnostics.summary()["amapo/left_out"] == 2


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_whose_pairs_are_all_left_out_backpropagates(loss_fn: Any, reduction: Any) -> None:
    """The loss and the gradients are 0, whatever the log-probs are."""
    inputs = [torch.full((3,), value, requires_grad=True) for value in (torch.nan, torch.inf)]
    output = loss_fn(*inputs, weights=torch.zeros(3, dtype=torch.bool), reduction=reduction)
    assert not output.loss.any()
    for gradient in gradients(output, inputs):
        assert not gradient.any()
    summary = output.diagnostics.summary()
    assert summary.pop("amapo/left_out") == 3
    for value in ("amapo/score_mean", "amapo/score_std"):
        summary.pop(value)
    assert not any(summary.values())


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_an_invalid_weight_makes_the_loss_nan_or_infinite(loss_fn: OnBackend, reduction: Any, bad: float) -> None:
    weights = torch.tensor([1.0, 2.0, bad, 1.0])
    loss, diagnostics = loss_fn(*random_logps(4), weights=weights, reduction=reduction)
    assert not loss.isfinite()
    assert diagnostics.summary()["amapo/nonfinite"] == 1


@every_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [math.inf, -math.inf])
def test_an_infinite_given_margin_changes_only_its_own_pair(
    loss_fn: OnBackend, margin: float, label_smoothing: float
) -> None:
    """A margin function such as the logarithm of a gap may return -inf. Without smoothing, the loss is then 0."""
    chosen, rejected = random_logps(3)
    expected = {(math.inf, 0.0): math.inf, (-math.inf, 0.0): 0.0, (math.inf, 0.1): math.nan, (-math.inf, 0.1): math.inf}
    margins = torch.tensor([0.0, margin, 0.0])
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": "none"}
    loss, diagnostics = loss_fn(chosen, rejected, margin=margins, **options)
    assert loss[1].item() == pytest.approx(expected[margin, label_smoothing], nan_ok=True)
    assert diagnostics.gradient_weights[1].item() == pytest.approx((margin > 0) - label_smoothing)
    of_others, _ = loss_fn(chosen[::2], rejected[::2], margin=torch.zeros(2), **options)
    torch.testing.assert_close(loss[::2], of_others)


@every_backend
def test_a_given_margin_of_nan_makes_the_loss_nan(loss_fn: OnBackend) -> None:
    loss, diagnostics = loss_fn(*random_logps(4), margin=torch.tensor([0.0, math.nan, 0.0, 0.0]), reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    summary = diagnostics.summary()
    assert summary["amapo/margin_mean"].isnan()
    assert summary["amapo/margin_max"].isnan()


@every_backend
def test_a_nonfinite_score_with_a_given_margin_concerns_its_pair_alone(loss_fn: OnBackend) -> None:
    chosen, rejected = (x.detach().clone() for x in random_logps(4))
    chosen[1] = math.inf
    for margin in (0.5, torch.full((4,), 0.5)):
        loss, diagnostics = loss_fn(chosen, rejected, margin=margin, reduction="none")
        for tensor in (loss, diagnostics.margins):
            assert tensor.isnan().tolist() == [False, True, False, False]


@every_backend
@pytest.mark.parametrize(
    "margin", [0.5, torch.zeros(0), lambda scores, _: scores], ids=["number", "tensor", "function"]
)
def test_an_empty_batch_takes_every_kind_of_margin_and_weights(loss_fn: OnBackend, margin: Any) -> None:
    inputs = random_logps(0)
    for weights in (torch.zeros(0), torch.zeros(0, dtype=torch.bool)):
        loss, diagnostics = loss_fn(*inputs, margin=margin, weights=weights, beta=torch.tensor(2.0))
        assert loss == 0
        assert all(gradient.shape == (0,) for gradient in torch.autograd.grad(loss, inputs))
        assert diagnostics.summary()["amapo/margin_max"] == 0


@every_backend
def test_no_weight_of_false_changes_nothing(loss_fn: OnBackend) -> None:
    inputs = random_logps(9)
    loss, weighted = (loss_fn(*inputs, **options) for options in ({}, {"weights": torch.ones(9, dtype=torch.bool)}))
    torch.testing.assert_close(weighted.loss, loss.loss)
    torch.testing.assert_close(weighted.diagnostics.summary(), loss.diagnostics.summary())


@every_backend
def test_the_statistics_of_a_batch_as_an_estimator_leave_pairs_out(loss_fn: OnBackend) -> None:
    inputs, weights = random_logps(6), torch.tensor([True, False, True, True, False, True])
    loss = loss_fn(*inputs, weights=weights, statistics=ScoreStatistics.of).loss
    torch.testing.assert_close(loss, loss_fn(*inputs, weights=weights).loss)
    scores = torch.tensor([1.0, torch.nan, 3.0])
    assert list(ScoreStatistics.of(scores, mask=scores.isfinite())) == [2.0, pytest.approx(2**0.5), 2]


@every_backend
def test_estimators_see_nan_for_pairs_that_are_left_out(loss_fn: OnBackend) -> None:
    """A window ignores them, and the loss stays finite."""
    inputs, weights, seen = random_logps(6), torch.tensor([True, False, True, True, False, True]), []

    def estimator(scores: torch.Tensor, process_group: Any) -> ScoreStatistics:
        seen.append(scores)
        statistics: ScoreStatistics = window(scores, process_group)
        return statistics

    window = ScoreWindow(8).to(loss_fn.device)
    loss, diagnostics = loss_fn(*inputs, weights=weights, statistics=estimator)
    assert seen[0].isfinite().tolist() == weights.tolist()
    assert window.seen == 4
    expected = loss_fn(*(x[weights] for x in inputs))
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(diagnostics.statistics.mean.float(), expected.diagnostics.statistics.mean.float())


@every_backend
def test_an_estimator_that_averages_scores_holds_no_graph(loss_fn: OnBackend) -> None:
    averages: list[torch.Tensor] = []

    def running_average(scores: torch.Tensor, _: Any) -> ScoreStatistics:
        assert scores.requires_grad
        averages.append(scores.mean() + (averages[-1] if averages else 0))
        return ScoreStatistics(averages[-1] / len(averages), scores.std(), torch.tensor(len(scores)))

    for _ in range(2):
        loss_fn(*random_logps(6), statistics=running_average).loss.backward()
    assert not averages[-1].requires_grad


def test_supplied_statistics_may_have_another_dtype() -> None:
    inputs = [x.double() for x in random_logps(6)]
    in_float32 = score_statistics(0.5, 1.0)
    in_float64 = ScoreStatistics(in_float32.mean.double(), in_float32.std.double(), in_float32.count)
    losses = [amapo_loss(*inputs, statistics=supplied).loss for supplied in (in_float32, in_float64)]
    assert torch.equal(*losses)


@every_backend
def test_no_gradient_reaches_the_lengths(loss_fn: OnBackend) -> None:
    lengths = torch.full((4,), 2.0, requires_grad=True)
    loss = loss_fn(*random_logps(4), chosen_lengths=lengths, rejected_lengths=lengths).loss
    (gradient,) = torch.autograd.grad(loss, lengths, allow_unused=True)
    assert gradient is None
