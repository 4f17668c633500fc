"""Properties that hold for every batch, and the outputs that each argument changes."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from amapo_loss import AdaptiveMargin, ScoreStatistics, ScoreWindow, amapo_loss, dpo_loss, simpo_loss
from tests.support.backends import OnBackend, every_backend, on_gpu, torch_loss, triton_loss, two_launches
from tests.support.generators import (
    MARGINS,
    NO_SPREAD,
    Batch,
    Options,
    batches,
    examples,
    float32_logps,
    gradients,
    loss_options,
    random_logps,
    score_statistics,
)


@every_backend
@examples()
@given(batches(), loss_options)
def test_pairs_at_or_above_a_positive_mean_get_no_paper_margin(
    loss_fn: OnBackend, batch: Batch, options: Options
) -> None:
    diagnostics = loss_fn(*float32_logps(batch), **options).diagnostics
    if diagnostics.statistics.mean > 0:
        at_or_above = diagnostics.scores >= diagnostics.statistics.mean
        assert torch.all(diagnostics.margins[at_or_above] == 0)
        assert torch.all(diagnostics.margins >= 0)


@every_backend
@examples()
@given(batches(), loss_options, st.sampled_from(MARGINS), st.integers(0, 2**31))
def test_permuting_the_pairs_permutes_the_outputs(
    loss_fn: OnBackend, batch: Batch, options: Options, margin: AdaptiveMargin, seed: int
) -> None:
    inputs = float32_logps(batch)
    order = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(seed))
    # Both calls get the same statistics, because the rounding of a sum depends on the order of its terms.
    batch_statistics = loss_fn(*inputs, **options).diagnostics.statistics
    options_of_both = {**options, "margin": margin, "statistics": batch_statistics, "reduction": "none"}
    original = loss_fn(*inputs, **options_of_both)
    permuted = loss_fn(*(x[order] for x in inputs), **options_of_both)
    # PyTorch computes the last elements of a tensor without vector instructions. The last bit of their exponentials may
    # differ from that of the vectorized elements.
    torch.testing.assert_close(permuted.loss, original.loss[order], rtol=1e-5, atol=1e-30)
    assert torch.equal(permuted.diagnostics.margins == 0, (original.diagnostics.margins == 0)[order])
    for name in ("scores", "margins", "gradient_weights", "chosen_rewards", "rejected_rewards"):
        actual, expected = (getattr(output.diagnostics, name) for output in (permuted, original))
        torch.testing.assert_close(actual, expected[order], rtol=1e-5, atol=1e-6 * options["label_smoothing"] + 1e-30)


@every_backend
@examples()
@given(batches(), loss_options)
def test_amapo_without_margins_is_simpo_with_gamma_0(loss_fn: OnBackend, batch: Batch, options: Options) -> None:
    inputs = float32_logps(batch)
    amapo = loss_fn(*inputs, **options, statistics=NO_SPREAD)
    simpo = simpo_loss(*inputs, **options, gamma=0.0)
    assert torch.all(amapo.diagnostics.margins == 0)
    if loss_fn.backend == "torch":  # both losses run the same operations
        tolerance = {"rtol": 0.0, "atol": 0.0}
    else:
        # The relative error of exp(x) is the absolute error of x, which is larger for a larger x. Here |x| reaches 100.
        tolerance = {"rtol": 2e-5, "atol": 1e-6 * options["beta"] * options["label_smoothing"] + 1e-30}
    torch.testing.assert_close(amapo.loss, simpo.loss, **tolerance)
    torch.testing.assert_close(gradients(amapo, inputs), gradients(simpo, inputs), **tolerance)


@every_backend
@examples()
@given(batches(), loss_options)
def test_gradient_weights_are_at_least_those_of_simpo_with_gamma_0(
    loss_fn: OnBackend, batch: Batch, options: Options
) -> None:
    inputs = float32_logps(batch)
    amapo = loss_fn(*inputs, **options).diagnostics
    simpo = simpo_loss(*inputs, **options, gamma=0.0).diagnostics
    assert torch.all(amapo.gradient_weights >= simpo.gradient_weights)
    no_margin = amapo.margins == 0
    assert torch.equal(amapo.gradient_weights[no_margin], simpo.gradient_weights[no_margin])


@examples()
@given(batches(), loss_options, st.sampled_from(MARGINS))
def test_no_gradient_reaches_the_statistics(batch: Batch, options: Options, margin: AdaptiveMargin) -> None:
    """The gradient is that of a loss whose margins are constants."""
    inputs = [x.detach().double().requires_grad_() for x in float32_logps(batch)]
    output = amapo_loss(*inputs, **options, margin=margin, reduction="sum")
    eps, r = options["label_smoothing"], options["beta"] * (inputs[0] - inputs[1])
    h = output.diagnostics.margins
    losses = (1 - eps) * F.softplus(h - r) + eps * F.softplus(r - h)
    expected = torch.autograd.grad(losses.sum(), inputs)
    torch.testing.assert_close(gradients(output, inputs), expected, rtol=1e-8, atol=1e-10)


def test_no_gradient_reaches_supplied_statistics() -> None:
    mean, std = (torch.tensor(x, requires_grad=True) for x in (0.3, 1.0))
    supplied = ScoreStatistics(mean, std, torch.tensor(8))
    loss, diagnostics = amapo_loss(*random_logps(8), statistics=supplied)
    assert not any(torch.autograd.grad(loss, supplied[:2], allow_unused=True))
    assert not any(value.requires_grad for value in diagnostics.statistics)


@every_backend
@examples()
@given(batches(), loss_options, st.sampled_from(MARGINS), st.integers(0, 2**31))
def test_each_grad_output_scales_the_gradient_of_its_pair(
    loss_fn: OnBackend, batch: Batch, options: Options, margin: AdaptiveMargin, seed: int
) -> None:
    chosen, rejected = float32_logps(batch)
    output = loss_fn(chosen, rejected, **options, margin=margin, reduction="none")
    grad_output = torch.randn(len(chosen), generator=torch.Generator().manual_seed(seed))
    grad_chosen, grad_rejected = torch.autograd.grad(output.loss, (chosen, rejected), grad_output, retain_graph=True)
    expected = -options["beta"] * output.diagnostics.gradient_weights * grad_output
    # The weight depends on h - r. If h and r nearly cancel, the difference still has the rounding error of r.
    rounding = torch.finfo(torch.float32).eps * output.diagnostics.scores.abs().max().item()
    torch.testing.assert_close(grad_chosen, expected, rtol=1e-4, atol=(1e-5 + 4 * rounding) * options["beta"])
    assert torch.equal(grad_chosen, -grad_rejected)
    second_time = torch.autograd.grad(output.loss, (chosen, rejected), grad_output)
    assert torch.equal(grad_chosen, second_time[0])


@pytest.mark.parametrize(
    "loss_fn",
    [
        torch_loss,
        pytest.param(triton_loss, marks=on_gpu),
        pytest.param(two_launches, marks=on_gpu),
        simpo_loss,
        lambda *x, **o: dpo_loss(*x, *random_logps(7, 5), **o),
    ],
)
def test_reductions_agree(loss_fn: Any) -> None:
    inputs = random_logps(7)
    none, total, mean = (loss_fn(*inputs, reduction=reduction).loss for reduction in ("none", "sum", "mean"))
    assert none.shape == (7,)
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.mean())
    assert mean.ndim == total.ndim == 0


@every_backend
def test_a_second_backward_pass_doubles_the_gradients(loss_fn: OnBackend) -> None:
    inputs = random_logps(9)
    loss = loss_fn(*inputs).loss
    loss.backward(retain_graph=True)
    after_one_pass = [x.grad.clone() for x in inputs if x.grad is not None]
    loss.backward()
    for x, gradient in zip(inputs, after_one_pass, strict=True):
        torch.testing.assert_close(x.grad, 2 * gradient, rtol=0, atol=0)


@every_backend
def test_one_input_may_need_no_gradient(loss_fn: OnBackend) -> None:
    chosen, rejected = random_logps(9)
    expected = torch.autograd.grad(loss_fn(chosen, rejected).loss, rejected)[0]
    without_gradient = chosen.detach()
    assert torch.equal(torch.autograd.grad(loss_fn(without_gradient, rejected).loss, rejected)[0], expected)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_of_the_reference_is_minus_that_of_the_policy(loss_fn: OnBackend, reduction: Any) -> None:
    inputs = random_logps(9) + random_logps(9, seed=1)
    chosen, rejected, ref_chosen, ref_rejected = gradients(loss_fn(*inputs, reduction=reduction), inputs)
    assert torch.equal(ref_chosen, -chosen)
    assert torch.equal(ref_rejected, -rejected)


@every_backend
def test_the_reference_is_subtracted_and_the_lengths_divide(loss_fn: OnBackend) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (*random_logps(16), *random_logps(16, seed=1))
    lengths = torch.arange(1, 17), torch.arange(17, 1, -1)
    output = loss_fn(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    expected = loss_fn((chosen - ref_chosen) / lengths[0], (rejected - ref_rejected) / lengths[1])
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.diagnostics.chosen_rewards, expected.diagnostics.chosen_rewards)
    # TRL logs the log-probs of the policy, without the reference and not divided by the length.
    assert torch.equal(output.diagnostics.pairs.chosen_logps, chosen)


@every_backend
@examples()
@given(batches(), loss_options, st.sampled_from(MARGINS), st.integers(1, 5))
def test_micro_batches_with_the_statistics_of_the_whole_batch_add_up_to_it(
    loss_fn: OnBackend, batch: Batch, options: Options, margin: AdaptiveMargin, num_micro_batches: int
) -> None:
    inputs = float32_logps(batch)
    whole = loss_fn(*inputs, **options, margin=margin, reduction="sum")
    expected = gradients(whole, inputs)
    losses = [
        loss_fn(*micro_batch, **options, margin=margin, statistics=whole.diagnostics.statistics, reduction="sum").loss
        for micro_batch in zip(*(x.tensor_split(num_micro_batches) for x in inputs))
    ]
    actual = torch.autograd.grad(torch.stack(losses).sum(), inputs)

    scores, (mean, std, _) = whole.diagnostics.scores, whole.diagnostics.statistics
    eps = torch.finfo(torch.float32).eps
    # A standard deviation counts as 0 if it is tiny compared with the inputs. The inputs of a micro-batch may be
    # smaller than those of the whole batch, so the same standard deviation may count as 0 in one and not in the other.
    if std <= 20 * eps * options["beta"] * max(x.abs().max() for x in inputs):
        return
    # Likewise, a score counts as equal to the mean, and the mean as 0, if the difference is tiny compared with the
    # largest score. Only pairs for which this is the case may differ between the whole batch and a micro-batch.
    tolerance = 4 * eps * scores.abs().max()
    at_gate = ((scores - mean).abs() <= tolerance) | (mean.abs() <= tolerance)
    for whole_gradient, sum_gradient in zip(expected, actual):
        torch.testing.assert_close(
            sum_gradient[~at_gate], whole_gradient[~at_gate], rtol=1e-3, atol=1e-4 * options["beta"]
        )


PER_PAIR = {"scores", "margins", "gradient_weights", "chosen_rewards", "rejected_rewards"}
# One row per argument: another value for it, and the outputs that must change. All other outputs must stay the same.
CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({"beta": 3.0}, PER_PAIR | {"loss"}),
    ({"label_smoothing": 0.2}, {"loss", "gradient_weights"}),
    ({"margin": AdaptiveMargin(formula="released")}, {"loss", "margins", "gradient_weights"}),
    ({"margin": AdaptiveMargin(normalize=False)}, {"loss", "margins", "gradient_weights"}),
    ({"margin": AdaptiveMargin(scaling="linear")}, {"loss", "margins", "gradient_weights"}),
    ({"margin": AdaptiveMargin(clip=False)}, {"loss", "margins", "gradient_weights"}),
    ({"margin": AdaptiveMargin(floor=0.5)}, {"loss", "margins", "gradient_weights"}),
    ({"margin": 0.5}, {"loss", "margins", "gradient_weights"}),
    ({"margin": torch.arange(17)}, {"loss", "margins", "gradient_weights"}),
    ({"margin": lambda scores, _: scores / 2}, {"loss", "margins", "gradient_weights"}),
    ({"statistics": score_statistics(0.4, 2.0)}, {"loss", "margins", "gradient_weights"}),
    (
        {"ref_chosen_logps": torch.full((17,), -0.3), "ref_rejected_logps": torch.zeros(17)},
        PER_PAIR - {"rejected_rewards"} | {"loss"},
    ),
    ({"chosen_lengths": torch.full((17,), 2), "rejected_lengths": torch.full((17,), 3)}, PER_PAIR | {"loss"}),
    # Leaving pairs out changes the statistics, and with them the margins of the others.
    ({"weights": torch.arange(17) % 5 > 0}, PER_PAIR | {"loss"}),
    ({"reduction": "sum"}, {"loss"}),
]


@every_backend
@pytest.mark.parametrize(("changed", "expected"), CHANGES, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_every_argument_changes_only_what_it_should(
    loss_fn: OnBackend, changed: dict[str, Any], expected: set[str]
) -> None:
    inputs = random_logps(17)
    default, other = loss_fn(*inputs), loss_fn(*inputs, **changed)
    outputs_of_both = {
        name: (getattr(default.diagnostics, name), getattr(other.diagnostics, name)) for name in PER_PAIR
    } | {"loss": (default.loss, other.loss)}
    assert {name for name, outputs in outputs_of_both.items() if not torch.equal(*outputs)} == expected
    assert torch.equal(other.diagnostics.pairs.chosen_logps, inputs[0])


def test_every_argument_has_a_row_in_changes() -> None:
    names = set(inspect.signature(amapo_loss).parameters) - {
        "chosen_logps",
        "rejected_logps",
        "process_group",
        "backend",
    }
    assert names == {name for changed, _ in CHANGES for name in changed}


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("margin", [AdaptiveMargin(), 0.5], ids=["adaptive", "constant"])
def test_a_weight_of_k_is_the_pair_k_times(loss_fn: OnBackend, reduction: Any, margin: Any) -> None:
    """This holds for the loss, the gradients and the weighted entries of the summary, with the same statistics."""
    inputs, repeats = random_logps(6), torch.tensor([3, 1, 0, 2, 1, 4])
    repeated = [x.detach().repeat_interleave(repeats).requires_grad_() for x in inputs]
    options: dict[str, Any] = {"statistics": score_statistics(0.4, 1.1), "margin": margin, "reduction": reduction}
    weighted, expected = loss_fn(*inputs, weights=repeats, **options), loss_fn(*repeated, **options)
    torch.testing.assert_close(weighted.loss, expected.loss)
    for actual, of_copies in zip(gradients(weighted, inputs), gradients(expected, repeated)):
        added = torch.zeros(6).index_add(0, torch.arange(6).repeat_interleave(repeats), of_copies)
        torch.testing.assert_close(actual, added)
    unweighted = {"amapo/score_mean", "amapo/score_std", "amapo/left_out"}
    summaries = [
        {name: value for name, value in output.diagnostics.summary().items() if name not in unweighted}
        for output in (weighted, expected)
    ]
    torch.testing.assert_close(*summaries)


@every_backend
def test_weights_above_0_change_neither_the_statistics_nor_the_margins(loss_fn: OnBackend) -> None:
    inputs = random_logps(17)
    weighted, unweighted = (loss_fn(*inputs, weights=weights) for weights in (torch.arange(1, 18) ** 2, None))
    torch.testing.assert_close(weighted.diagnostics.margins, unweighted.diagnostics.margins)
    for actual, expected in zip(weighted.diagnostics.statistics, unweighted.diagnostics.statistics):
        torch.testing.assert_close(actual.double(), expected.double())
    assert not torch.isclose(weighted.loss, unweighted.loss)


@every_backend
@examples(30)
@given(batches(), loss_options, st.sampled_from(MARGINS), st.sampled_from([0.25, 2.0, 1024.0]))
def test_a_common_factor_of_the_weights_changes_nothing_in_the_mean(
    loss_fn: OnBackend, batch: Batch, options: Options, margin: AdaptiveMargin, factor: float
) -> None:
    inputs = float32_logps(batch)
    weights = torch.rand(len(inputs[0]), generator=torch.Generator().manual_seed(0)) + 0.5
    outputs = [loss_fn(*inputs, weights=w, margin=margin, **options) for w in (weights, factor * weights)]
    # The factors are powers of two, so that only the division of the loss rounds differently.
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-6, atol=0)
    assert torch.equal(outputs[1].diagnostics.margins, outputs[0].diagnostics.margins)


@every_backend
@examples(30)
@given(batches(), loss_options)
def test_margins_may_be_given_in_any_form(loss_fn: OnBackend, batch: Batch, options: Options) -> None:
    """The adaptive margins, given as a tensor or by a function, give the same loss and gradients."""
    inputs = float32_logps(batch)
    adaptive = loss_fn(*inputs, **options)
    margins, adaptive_gradients = adaptive.diagnostics.margins, gradients(adaptive, inputs)
    for margin in (margins, margins.double(), lambda scores, _: margins.to(scores)):
        given_margins = loss_fn(*inputs, **options, margin=margin)
        assert torch.equal(given_margins.loss, adaptive.loss)
        assert torch.equal(given_margins.diagnostics.margins, margins)
        assert all(map(torch.equal, gradients(given_margins, inputs), adaptive_gradients))


@every_backend
def test_a_margin_function_gets_the_scores_and_the_statistics(loss_fn: OnBackend) -> None:
    """The statistics are those that an adaptive margin would be made from. Pairs that are left out have score NaN."""
    inputs, weights = random_logps(9), torch.arange(9) % 3
    calls: list[Any] = []

    def margin(scores: torch.Tensor, statistics: ScoreStatistics) -> torch.Tensor:
        calls.append((scores, statistics, torch.is_grad_enabled()))
        return 0.1 * (scores - statistics.mean.to(scores.dtype)) / statistics.std.to(scores.dtype)

    window = ScoreWindow(16).to(loss_fn.device)
    window(torch.linspace(-1, 2, 12, device=loss_fn.device, requires_grad=True))
    window.eval()  # it takes part in both calls below, and must not change between them
    for supplied in (None, score_statistics(0.4, 1.1), ScoreStatistics.of, window):
        output = loss_fn(*inputs, weights=weights, statistics=supplied, margin=margin, reduction="sum")
        expected = loss_fn(*inputs, weights=weights, statistics=supplied).diagnostics
        scores, statistics, grad_enabled = calls.pop()
        assert torch.equal(scores.isnan().cpu(), weights == 0)
        assert not grad_enabled
        assert not scores.requires_grad
        torch.testing.assert_close(scores.cpu()[weights > 0], expected.scores[weights > 0])
        for actual, value in zip(statistics, expected.statistics):
            torch.testing.assert_close(actual.cpu().double(), value.double())
        torch.testing.assert_close(output.diagnostics.statistics.mean.double(), expected.statistics.mean.double())
        z = (expected.scores - expected.statistics.mean) / expected.statistics.std
        torch.testing.assert_close(output.diagnostics.margins, torch.where(weights > 0, 0.1 * z, 0).float())


@every_backend
def test_no_gradient_reaches_margins_weights_and_beta(loss_fn: OnBackend) -> None:
    inputs = random_logps(5)
    others = [torch.ones(5, requires_grad=True), torch.ones(5, requires_grad=True), torch.tensor(2.0).requires_grad_()]
    margins, weights, beta = others
    for margin in (margins, lambda scores, _: margins.to(scores.device) + scores):
        loss = loss_fn(*inputs, margin=margin, weights=weights, beta=beta).loss
        assert not any(x is not None for x in torch.autograd.grad(loss, others, allow_unused=True, retain_graph=True))
        assert all(gradient.any() for gradient in torch.autograd.grad(loss, inputs))


@every_backend
@examples(30)
@given(batches(), loss_options, st.sampled_from(MARGINS))
def test_beta_may_be_a_tensor(loss_fn: OnBackend, batch: Batch, options: Options, margin: AdaptiveMargin) -> None:
    """It gives what the Python number gives, up to the rounding of the tensor to float32."""
    inputs, beta = float32_logps(batch), float(np.float32(options["beta"]))
    expected = loss_fn(*inputs, **options | {"beta": beta}, margin=margin, reduction="none")
    expected_gradients = gradients(expected, inputs)
    for dtype in (torch.float32, torch.float64):
        tensor: Any = torch.tensor(beta, dtype=dtype)
        actual = loss_fn(*inputs, **options | {"beta": tensor}, margin=margin, reduction="none")
        assert torch.equal(actual.loss, expected.loss)
        assert torch.equal(actual.diagnostics.scores, expected.diagnostics.scores)
        assert all(map(torch.equal, gradients(actual, inputs), expected_gradients))


@every_backend
@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tensor_that_is_no_valid_beta_makes_the_loss_nan(loss_fn: OnBackend, beta: float) -> None:
    """An error would need the value on the host."""
    for margin in (AdaptiveMargin(), 0.5):
        loss, diagnostics = loss_fn(*random_logps(5), beta=torch.tensor(beta), margin=margin)
        assert loss.isnan()
        assert diagnostics.summary()["amapo/nonfinite"] == 5


def test_gamma_changes_simpo_and_the_reference_changes_dpo() -> None:
    inputs = random_logps(4)
    assert simpo_loss(*inputs, gamma=0.1).loss != simpo_loss(*inputs, gamma=0.2).loss
    chosen, rejected = inputs
    reference_is_policy = dpo_loss(chosen, rejected, chosen, rejected).loss  # every score is 0, so this is log(2)
    assert reference_is_policy.item() == pytest.approx(0.693147, abs=1e-6)
    assert dpo_loss(chosen, rejected, chosen + 1, rejected).loss > reference_is_policy
