"""From logits to sequence log-probs, against log_softmax and gather in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from amapo_loss import amapo_loss, sequence_logps
from benchmarks.speed.memory import peak_bytes
from tests.support.backends import every_tiling, tiled

IGNORED = -100


def naive(logits: torch.Tensor, labels: torch.Tensor, average: bool, shift: bool) -> torch.Tensor:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    tokens = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counted
    return tokens.sum(1) / (counted.sum(1).clamp(min=1) if average else 1)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of logits [N, T, V] in memory
    "contiguous": lambda x: x,
    "[T, N, V]": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "[N, V, T]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a slice": lambda x: F.pad(x, (3, 2, 1, 2))[:, 1 : 1 + x.shape[1], 3 : 3 + x.shape[2]],
}


@every_tiling
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 4), st.integers(0, 9), st.integers(1, 50), st.booleans(), st.booleans(), st.integers(0, 2**31),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), st.floats(0, 1),
    st.sampled_from(sorted(LAYOUTS)),
)  # fmt: skip
def test_against_naive(
    backend: str, n: int, length: int, vocabulary: int, average: bool, shift: bool, seed: int, dtype: torch.dtype,
    ignored: float, layout: str,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits = LAYOUTS[layout](torch.randn(n, length, vocabulary, generator=generator).mul(5).to(dtype)).requires_grad_()
    labels = torch.randint(vocabulary, (n, length), generator=generator)
    labels[torch.rand(n, length, generator=generator) < ignored] = IGNORED
    reference = logits.detach().double().requires_grad_()
    expected = naive(reference, labels, average, shift)
    upstream = torch.randn(n, generator=generator)

    with tiled(backend) as device:
        there = logits.detach().to(device).requires_grad_()
        got = sequence_logps(there, labels.to(device), average=average, shift=shift)
        gradient, again = (torch.autograd.grad(got, there, upstream.to(got), retain_graph=True)[0] for _ in range(2))
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.cpu(), expected.to(got.dtype), rtol=1e-5, atol=1e-5)
    (expected_gradient,) = torch.autograd.grad(expected, reference, upstream.double())
    assert gradient.dtype == dtype
    assert torch.equal(gradient, again)
    rounding = torch.finfo(dtype).eps + 1e-5
    tiny = 1e-7 if dtype == torch.float16 else 1e-12
    torch.testing.assert_close(gradient.cpu().double(), expected_gradient, rtol=rounding, atol=tiny)


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


@every_tiling
def test_what_does_not_count_may_be_anything(backend: str) -> None:
    """NaN in the logits of padding, as attention may leave them; but not where a label counts."""
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[IGNORED, 1, 2, IGNORED], [IGNORED, 3, IGNORED, IGNORED]])
    logits[0, 2:] = torch.nan
    logits[1, 0, 4] = torch.inf
    with tiled(backend) as device:
        there = logits.to(device).requires_grad_()
        logps = sequence_logps(there, labels.to(device))
        (gradient,) = torch.autograd.grad(logps[0], there)
    assert logps.isfinite().tolist() == [True, False]
    assert gradient[0].isfinite().all()
    assert not gradient[0, 2:].any()
    with tiled(backend) as device:  # an infinite logit of the target: all or nothing, nobody can say
        assert sequence_logps(logits.to(device), torch.tensor([[IGNORED] * 4, [IGNORED, 4, 1, 1]], device=device))[
            1
        ].isnan()


def test_double_backward_raises() -> None:
    logits = torch.randn(2, 4, 5, requires_grad=True)
    loss = sequence_logps(logits, torch.randint(5, (2, 4))).square().sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_logits_changed_in_between_are_noticed() -> None:
    """They are not copied; PyTorch sees that they are not what they were."""
    leaf = torch.randn(2, 4, 5, requires_grad=True)
    logits = leaf * 2
    logps = sequence_logps(logits, torch.randint(5, (2, 4)))
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(sequence_logps, fullgraph=True, backend="aot_eager")
    for n in (2, 5, 3):
        logits, labels = torch.randn(n, 6, 11, requires_grad=True), torch.randint(11, (n, 6))
        got, expected = compiled(logits, labels), sequence_logps(logits, labels)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits) for x in (got, expected)))
    torch.compiler.reset()


def test_the_operators_are_what_they_say() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, IGNORED, 4], [IGNORED, 0, 2]])
    statistics = torch.ops.amapo_loss.logit_statistics(logits, labels, IGNORED)
    torch.library.opcheck(torch.ops.amapo_loss.logit_statistics.default, (logits, labels, IGNORED))
    arguments = (torch.randn(6), logits, labels, IGNORED, *statistics)
    torch.library.opcheck(torch.ops.amapo_loss.logit_gradient.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_nothing_of_their_size_but_their_gradient(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 512, 8192).to(dtype).requires_grad_()
    labels = torch.randint(8192, (2, 512))
    with tiled("torch", 2**17):
        peak = peak_bytes(lambda: sequence_logps(logits, labels).sum().backward())
    assert 1 <= peak / (logits.numel() * logits.element_size()) < 1.2
