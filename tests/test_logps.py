"""From logits to sequence log-probs, against log_softmax and gather in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from amapo_loss import amapo_loss, sequence_logps

IGNORED = -100


def naive(logits: torch.Tensor, labels: torch.Tensor, average: bool, shift: bool) -> torch.Tensor:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    tokens = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counted
    return tokens.sum(1) / (counted.sum(1).clamp(min=1) if average else 1)


@settings(deadline=None)
@given(
    st.integers(0, 4), st.integers(0, 9), st.integers(1, 50), st.booleans(), st.booleans(), st.integers(0, 2**31),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), st.floats(0, 1),
)  # fmt: skip
def test_against_naive(
    n: int, length: int, vocabulary: int, average: bool, shift: bool, seed: int, dtype: torch.dtype, ignored: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, length, vocabulary, generator=generator).mul(5).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (n, length), generator=generator)
    labels[torch.rand(n, length, generator=generator) < ignored] = IGNORED
    reference = logits.detach().double().requires_grad_()
    expected = naive(reference, labels, average, shift)
    upstream = torch.randn(n, generator=generator)

    got = sequence_logps(logits, labels, average=average, shift=shift)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-5, atol=1e-5)
    got.backward(upstream.to(got.dtype))
    expected.backward(upstream.double())
    assert logits.grad is not None
    assert reference.grad is not None
    rounding = 4 * torch.finfo(dtype).eps + 1e-5
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=rounding, atol=rounding)


def test_a_sequence_without_a_counted_token_gives_0_and_no_gradient() -> None:
    logits = torch.randn(2, 4, 5, requires_grad=True)
    labels = torch.tensor([[IGNORED] * 4, [IGNORED, 1, 2, IGNORED]])
    for average in (True, False):
        logps = sequence_logps(logits, labels, average=average)
        assert logps[0] == 0
        (gradient,) = torch.autograd.grad(logps.sum(), logits)
        assert not gradient[0].any()
        assert gradient.isfinite().all()


def test_the_first_label_never_counts_when_shifted() -> None:
    """No logits predict it."""
    logits, labels = torch.randn(1, 3, 5), torch.tensor([[1, 2, 3]])
    other = torch.tensor([[4, 2, 3]])
    assert torch.equal(sequence_logps(logits, labels), sequence_logps(logits, other))
    assert not torch.equal(sequence_logps(logits, labels, shift=False), sequence_logps(logits, other, shift=False))


def test_another_ignore_index() -> None:
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[0, 1, 2, 0], [3, 4, 0, 0]])
    expected = sequence_logps(logits, labels.masked_fill(labels == 0, IGNORED))
    assert torch.equal(sequence_logps(logits, labels, ignore_index=0), expected)


def test_the_callers_labels_and_logits_are_left_alone() -> None:
    logits, labels = torch.randn(2, 4, 5), torch.randint(5, (2, 4))
    before = logits.clone(), labels.clone()
    sequence_logps(logits.requires_grad_(), labels).sum().backward()
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


def test_bfloat16_logits_keep_the_precision_of_long_answers() -> None:
    """Summed in bfloat16, a log-prob near -400 would be off by up to 1."""
    logits = torch.randn(1, 200, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.randint(50, (1, 200), generator=torch.Generator().manual_seed(1))
    got = sequence_logps(logits, labels, average=False)
    assert got.item() == pytest.approx(naive(logits, labels, False, True).item(), abs=1e-3)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_gradcheck(average: bool, shift: bool) -> None:
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[IGNORED, 1, 2, 3], [4, 0, IGNORED, IGNORED]])
    assert gradcheck(lambda x: sequence_logps(x, labels, average=average, shift=shift), (logits,))


def test_confident_tokens_keep_their_gradient() -> None:
    """p > 0.99, as after training: 1 - p must not be what is left of 1 in float32."""
    logits = torch.zeros(1, 2, 100)
    logits[0, 0, 7] = 14.0
    labels = torch.tensor([[IGNORED, 7]])
    single, double = (logits.clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    for x in (single, double):
        sequence_logps(x, labels).sum().backward()
    assert single.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=2e-3, atol=1e-10)


def test_feeds_the_loss() -> None:
    """Logits to loss to logits' gradient, as in a training step."""
    logits = torch.randn(4, 6, 11, requires_grad=True)
    logps = sequence_logps(logits, torch.randint(11, (4, 6)))
    amapo_loss(*logps.chunk(2)).loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
