"""What must hold for every batch, whatever the numbers: properties of the losses, and what each argument changes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from amapo_loss import AdaptiveMargin, ScoreStatistics, amapo_loss, dpo_loss, simpo_loss
from tests.support.backends import OnBackend, every_backend, on_gpu, torch_loss, triton_loss, two_launches
from tests.support.generators import (
    MARGINS,
    NO_MARGIN,
    Options,
    batches,
    gradients,
    logps,
    options,
    random_logps,
    statistics,
)
from tests.support.oracle import Array


@every_backend
@settings(deadline=None)
@given(batches(), options)
def test_paper_margin_is_zero_from_a_positive_mean_up(
    loss_fn: OnBackend, batch: tuple[Array, Array], options: Options
) -> None:
    diagnostics = loss_fn(*logps(batch), **options).diagnostics
    if diagnostics.statistics.mean > 0:
        at_or_above = diagnostics.scores >= diagnostics.statistics.mean
        assert torch.all(diagnostics.margins[at_or_above] == 0)
        assert torch.all(diagnostics.margins >= 0)


@every_backend
@settings(deadline=None)
@given(batches(), options, st.sampled_from(MARGINS), st.integers(0, 2**31))
def test_permuting_the_pairs_permutes_the_outputs(
    loss_fn: OnBackend, batch: tuple[Array, Array], options: Options, margin: AdaptiveMargin, seed: int
) -> None:
    inputs = logps(batch)
    order = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(seed))
    # Given statistics: their own rounding may depend on the order of the sum.
    own = loss_fn(*inputs, **options).diagnostics.statistics
    straight = loss_fn(*inputs, **options, margin=margin, statistics=own, reduction="none")
    permuted = loss_fn(*(x[order] for x in inputs), **options, margin=margin, statistics=own, reduction="none")
    # Vectorized and remaining elements of one tensor may differ in the last bit of an exponential.
    torch.testing.assert_close(permuted.loss, straight.loss[order], rtol=1e-5, atol=1e-30)
    assert torch.equal(permuted.diagnostics.margins == 0, (straight.diagnostics.margins == 0)[order])
    for name in ("scores", "margins", "gradient_weights", "chosen_rewards", "rejected_rewards"):
        got, expected = (getattr(output.diagnostics, name) for output in (permuted, straight))
        torch.testing.assert_close(got, expected[order], rtol=1e-5, atol=1e-6 * options["label_smoothing"] + 1e-30)


@every_backend
@settings(deadline=None)
@given(batches(), options)
def test_without_margins_it_is_simpo_with_gamma_0(
    loss_fn: OnBackend, batch: tuple[Array, Array], options: Options
) -> None:
    inputs = logps(batch)
    amapo = loss_fn(*inputs, **options, statistics=NO_MARGIN)
    simpo = simpo_loss(*inputs, **options, gamma=0.0)
    assert torch.all(amapo.diagnostics.margins == 0)
    if loss_fn.backend == "torch":  # the same operations
        tolerance = {"rtol": 0.0, "atol": 0.0}
    else:  # an exponential loses the digits that its argument, up to 100 here, has before the point
        tolerance = {"rtol": 2e-5, "atol": 1e-6 * options["beta"] * options["label_smoothing"] + 1e-30}
    torch.testing.assert_close(amapo.loss, simpo.loss, **tolerance)
    torch.testing.assert_close(gradients(amapo, inputs), gradients(simpo, inputs), **tolerance)


@every_backend
@settings(deadline=None)
@given(batches(), options)
def test_weight_is_at_least_simpos(loss_fn: OnBackend, batch: tuple[Array, Array], options: Options) -> None:
    inputs = logps(batch)
    amapo = loss_fn(*inputs, **options).diagnostics
    simpo = simpo_loss(*inputs, **options, gamma=0.0).diagnostics
    assert torch.all(amapo.gradient_weights >= simpo.gradient_weights)
    unmoved = amapo.margins == 0
    assert torch.equal(amapo.gradient_weights[unmoved], simpo.gradient_weights[unmoved])


@settings(deadline=None)
@given(batches(), options, st.sampled_from(MARGINS))
def test_no_gradient_reaches_the_statistics(
    batch: tuple[Array, Array], options: Options, margin: AdaptiveMargin
) -> None:
    """The gradient is that of the objective with the margins as constants."""
    inputs = [x.detach().double().requires_grad_() for x in logps(batch)]
    output = amapo_loss(*inputs, **options, margin=margin, reduction="sum")
    eps, r = options["label_smoothing"], options["beta"] * (inputs[0] - inputs[1])
    h = output.diagnostics.margins
    objective = (1 - eps) * F.softplus(h - r) + eps * F.softplus(r - h)
    expected = torch.autograd.grad(objective.sum(), inputs)
    torch.testing.assert_close(gradients(output, inputs), expected, rtol=1e-8, atol=1e-10)


def test_no_gradient_reaches_supplied_statistics() -> None:
    mean, std = (torch.tensor(x, requires_grad=True) for x in (0.3, 1.0))
    supplied = ScoreStatistics(mean, std, torch.tensor(8))
    loss, diagnostics = amapo_loss(*random_logps(8), statistics=supplied)
    assert not any(torch.autograd.grad(loss, supplied[:2], allow_unused=True))
    assert not any(value.requires_grad for value in diagnostics.statistics)


@every_backend
@settings(deadline=None)
@given(batches(), options, st.sampled_from(MARGINS), st.integers(0, 2**31))
def test_any_upstream_gradient(
    loss_fn: OnBackend, batch: tuple[Array, Array], options: Options, margin: AdaptiveMargin, seed: int
) -> None:
    """Each loss carries its own upstream gradient to its own pair."""
    chosen, rejected = logps(batch)
    output = loss_fn(chosen, rejected, **options, margin=margin, reduction="none")
    upstream = torch.randn(len(chosen), generator=torch.Generator().manual_seed(seed))
    first = torch.autograd.grad(output.loss, (chosen, rejected), upstream, retain_graph=True)
    expected = -options["beta"] * output.diagnostics.gradient_weights * upstream
    # Where h and r cancel, what is left of them has the rounding of the larger.
    rounding = torch.finfo(torch.float32).eps * output.diagnostics.scores.abs().max().item()
    torch.testing.assert_close(first[0], expected, rtol=1e-4, atol=(1e-5 + 4 * rounding) * options["beta"])
    assert torch.equal(first[0], -first[1])
    again = torch.autograd.grad(output.loss, (chosen, rejected), upstream)
    assert torch.equal(first[0], again[0])


@pytest.mark.parametrize(
    "loss_fn",
    [torch_loss, pytest.param(triton_loss, marks=on_gpu), pytest.param(two_launches, marks=on_gpu), simpo_loss,
     lambda *x, **o: dpo_loss(*x, *random_logps(7, 5), **o)],
)  # fmt: skip
def test_reductions_agree(loss_fn: Any) -> None:
    inputs = random_logps(7)
    none, total, mean = (loss_fn(*inputs, reduction=reduction).loss for reduction in ("none", "sum", "mean"))
    assert none.shape == (7,)
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.mean())
    assert mean.ndim == total.ndim == 0


@every_backend
def test_backward_twice_accumulates(loss_fn: OnBackend) -> None:
    inputs = random_logps(9)
    loss = loss_fn(*inputs).loss
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in inputs if x.grad is not None]
    loss.backward()
    for x, gradient in zip(inputs, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * gradient, rtol=0, atol=0)


@every_backend
def test_gradient_of_one_input_only(loss_fn: OnBackend) -> None:
    chosen, rejected = random_logps(9)
    expected = torch.autograd.grad(loss_fn(chosen, rejected).loss, rejected)[0]
    frozen = chosen.detach()
    assert torch.equal(torch.autograd.grad(loss_fn(frozen, rejected).loss, rejected)[0], expected)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_references_gradient_is_the_policys_reversed(loss_fn: OnBackend, reduction: Any) -> None:
    inputs = random_logps(9) + random_logps(9, seed=1)
    chosen, rejected, ref_chosen, ref_rejected = gradients(loss_fn(*inputs, reduction=reduction), inputs)
    assert torch.equal(ref_chosen, -chosen)
    assert torch.equal(ref_rejected, -rejected)


@every_backend
def test_a_reference_is_subtracted_and_lengths_divide(loss_fn: OnBackend) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (*random_logps(16), *random_logps(16, seed=1))
    lengths = torch.arange(1, 17), torch.arange(17, 1, -1)
    whole = loss_fn(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    by_hand = loss_fn((chosen - ref_chosen) / lengths[0], (rejected - ref_rejected) / lengths[1])
    torch.testing.assert_close(whole.loss, by_hand.loss)
    torch.testing.assert_close(whole.diagnostics.chosen_rewards, by_hand.diagnostics.chosen_rewards)
    assert torch.equal(whole.diagnostics.pairs.chosen_logps, chosen)  # TRL's logps/chosen is the policy's alone


@every_backend
@settings(deadline=None)
@given(batches(), options, st.sampled_from(MARGINS), st.integers(1, 5))
def test_micro_batches_with_the_whole_batchs_statistics_add_up(
    loss_fn: OnBackend, batch: tuple[Array, Array], options: Options, margin: AdaptiveMargin, parts: int
) -> None:
    inputs = logps(batch)
    whole = loss_fn(*inputs, **options, margin=margin, reduction="sum")
    expected = gradients(whole, inputs)
    losses = [
        loss_fn(*micro_batch, **options, margin=margin, statistics=whole.diagnostics.statistics, reduction="sum").loss
        for micro_batch in zip(*(x.tensor_split(parts) for x in inputs))
    ]
    got = torch.autograd.grad(torch.stack(losses).sum(), inputs)
    # What is within rounding depends on the largest score of the part: pairs at the gate may differ, no others.
    scores, mean = whole.diagnostics.scores, whole.diagnostics.statistics.mean
    limit = 4 * torch.finfo(torch.float32).eps * scores.abs().max()
    near = ((scores - mean).abs() <= limit) | (mean.abs() <= limit)
    spread = whole.diagnostics.statistics.std
    if spread <= 20 * torch.finfo(torch.float32).eps * options["beta"] * max(x.abs().max() for x in inputs):
        return  # no spread in the whole batch, perhaps one in a part whose scores are smaller
    for whole_gradient, part_gradient in zip(expected, got):
        torch.testing.assert_close(part_gradient[~near], whole_gradient[~near], rtol=1e-3, atol=1e-4 * options["beta"])


# For every argument: another value, what it must change, and what it must leave alone.
PER_PAIR = {"scores", "margins", "gradient_weights", "chosen_rewards", "rejected_rewards"}
CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({"beta": 3.0}, PER_PAIR | {"loss"}),
    ({"label_smoothing": 0.2}, {"loss", "gradient_weights"}),
    ({"margin": AdaptiveMargin(formula="released")}, {"loss", "margins", "gradient_weights"}),
    ({"margin": AdaptiveMargin(normalize=False)}, {"loss", "margins", "gradient_weights"}),
    ({"margin": AdaptiveMargin(scaling="linear")}, {"loss", "margins", "gradient_weights"}),
    ({"margin": AdaptiveMargin(clip=False)}, {"loss", "margins", "gradient_weights"}),
    ({"statistics": statistics(0.4, 2.0)}, {"loss", "margins", "gradient_weights"}),
    ({"ref_chosen_logps": torch.full((17,), -0.3), "ref_rejected_logps": torch.zeros(17)},
     PER_PAIR - {"rejected_rewards"} | {"loss"}),
    ({"chosen_lengths": torch.full((17,), 2), "rejected_lengths": torch.full((17,), 3)}, PER_PAIR | {"loss"}),
    ({"reduction": "sum"}, {"loss"}),
]  # fmt: skip


@every_backend
@pytest.mark.parametrize(("changed", "expected"), CHANGES, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_every_argument_changes_what_it_should(loss_fn: OnBackend, changed: dict[str, Any], expected: set[str]) -> None:
    inputs = random_logps(17)
    plain, other = loss_fn(*inputs), loss_fn(*inputs, **changed)
    differing = {
        name for name in PER_PAIR if not torch.equal(getattr(plain.diagnostics, name), getattr(other.diagnostics, name))
    } | ({"loss"} if not torch.equal(plain.loss, other.loss) else set())
    assert differing == expected
    assert torch.equal(other.diagnostics.pairs.chosen_logps, inputs[0])


def test_every_argument_is_in_that_table() -> None:
    import inspect

    names = set(inspect.signature(amapo_loss).parameters) - {
        "chosen_logps",
        "rejected_logps",
        "process_group",
        "backend",
    }
    assert names == {name for changed, _ in CHANGES for name in changed}


def test_simpo_gamma_and_dpo_reference_matter() -> None:
    inputs = random_logps(4)
    assert simpo_loss(*inputs, gamma=0.1).loss != simpo_loss(*inputs, gamma=0.2).loss
    chosen, rejected = inputs
    unmoved = dpo_loss(chosen, rejected, chosen, rejected).loss  # every score is 0
    assert unmoved.item() == pytest.approx(0.693147, abs=1e-6)
    assert dpo_loss(chosen, rejected, chosen + 1, rejected).loss > unmoved
