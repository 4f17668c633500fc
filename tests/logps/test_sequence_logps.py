"""Check the log-probs of sequences from logits against `log_softmax` and `gather` in float64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from amapo_loss import amapo_loss, sequence_logps
from benchmarks.speed.memory import peak_bytes
from tests.support.backends import every_tiling, tiled
from tests.support.generators import compiled_gradient, examples
from tests.support.logps import IGNORE_INDEX, reference_logps, relative_error

# How logits [N, T, V] may lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "[T, N, V]": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "[N, V, T]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a slice": lambda x: F.pad(x, (3, 2, 1, 2))[:, 1 : 1 + x.shape[1], 3 : 3 + x.shape[2]],
}


@every_tiling
@examples(60)
@given(
    n=st.integers(0, 4),
    length=st.integers(0, 9),
    vocab_size=st.integers(1, 50),
    average=st.booleans(),
    shift=st.booleans(),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    ignored_share=st.floats(0, 1),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_log_probs_and_gradients_match_log_softmax_in_float64(
    backend: str,
    n: int,
    length: int,
    vocab_size: int,
    average: bool,
    shift: bool,
    seed: int,
    dtype: torch.dtype,
    ignored_share: float,
    layout: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = LAYOUTS[layout](torch.randn(n, length, vocab_size, generator=generator).mul(5).to(dtype))
    labels = torch.randint(vocab_size, (n, length), generator=generator)
    labels[torch.rand(n, length, generator=generator) < ignored_share] = IGNORE_INDEX
    grad_output = torch.randn(n, generator=generator)
    logits_double = logits.to(torch.float64, copy=True).requires_grad_()
    expected = reference_logps(logits_double, labels, average, shift)
    (expected_gradient,) = torch.autograd.grad(expected, logits_double, grad_output.double())

    with tiled(backend) as device:
        on_device = logits.to(device).requires_grad_()
        actual = sequence_logps(on_device, labels.to(device), average=average, shift=shift)
        gradient, repeated_gradient = (
            torch.autograd.grad(actual, on_device, grad_output.to(actual), retain_graph=True)[0] for _ in range(2)
        )
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(actual.cpu(), expected.to(actual.dtype), rtol=1e-5, atol=1e-5)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, repeated_gradient)
    rtol = torch.finfo(dtype).eps + 1e-5
    atol = 1e-7 if dtype == torch.float16 else 1e-12
    torch.testing.assert_close(gradient.cpu().double(), expected_gradient, rtol=rtol, atol=atol)


def test_a_sequence_without_counted_tokens_gives_0_and_no_gradient() -> None:
    logits = torch.randn(2, 4, 5, requires_grad=True)
    labels = torch.tensor([[IGNORE_INDEX] * 4, [IGNORE_INDEX, 1, 2, IGNORE_INDEX]])
    for average in (True, False):
        logps = sequence_logps(logits, labels, average=average)
        assert logps[0] == 0
        (gradient,) = torch.autograd.grad(logps.sum(), logits)
        assert not gradient[0].any()
        assert gradient.isfinite().all()


def test_the_first_label_counts_only_without_shift() -> None:
    """With the shift, no logits predict the first label."""
    logits, labels = torch.randn(1, 3, 5), torch.tensor([[1, 2, 3]])
    other_labels = torch.tensor([[4, 2, 3]])
    assert torch.equal(sequence_logps(logits, labels), sequence_logps(logits, other_labels))
    assert not torch.equal(
        sequence_logps(logits, labels, shift=False), sequence_logps(logits, other_labels, shift=False)
    )


def test_the_ignore_index_may_be_any_label() -> None:
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[0, 1, 2, 0], [3, 4, 0, 0]])
    expected = sequence_logps(logits, labels.masked_fill(labels == 0, IGNORE_INDEX))
    assert torch.equal(sequence_logps(logits, labels, ignore_index=0), expected)


def test_the_inputs_are_not_modified() -> None:
    logits, labels = torch.randn(2, 4, 5), torch.randint(5, (2, 4))
    logits_copy, labels_copy = logits.clone(), labels.clone()
    sequence_logps(logits.requires_grad_(), labels).sum().backward()
    assert torch.equal(logits, logits_copy)
    assert torch.equal(labels, labels_copy)


def test_log_probs_of_bfloat16_logits_are_summed_in_float32() -> None:
    """A sum in bfloat16 near -400 would have an error of up to 1."""
    logits = torch.randn(1, 200, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.randint(50, (1, 200), generator=torch.Generator().manual_seed(1))
    actual = sequence_logps(logits, labels, average=False)
    expected = reference_logps(logits.double(), labels, average=False, shift=True)
    assert actual.item() == pytest.approx(expected.item(), abs=1e-3)


@every_tiling
@pytest.mark.parametrize("value", [1e4, -1e4, 1e6, -1e30, torch.finfo(torch.float32).min])
def test_equal_logits_of_any_size_give_the_uniform_distribution(backend: str, value: float) -> None:
    labels = torch.zeros(1, 1, dtype=torch.int64)
    with tiled(backend) as device:
        logps = sequence_logps(torch.full((1, 1, 1000), value, device=device), labels.to(device), shift=False)
    assert logps.item() == pytest.approx(-math.log(1000), rel=1e-6)


@every_tiling
@examples(60)
@given(
    vocab_size=st.integers(2, 50),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    offset=st.one_of(st.floats(-1e6, 1e6), st.floats(-1e3, 1e3)),
    seed=st.integers(0, 2**31),
)
def test_an_offset_of_the_logits_costs_no_more_digits_than_in_log_softmax(
    backend: str,
    vocab_size: int,
    spread: float,
    offset: float,
    seed: int,
) -> None:
    """The softmax does not change if a number is added to all logits, apart from their rounding."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 10, vocab_size, generator=generator) * spread + offset
    labels = torch.randint(vocab_size, (1, 10), generator=generator)
    grad_output = torch.ones(1)

    def logps_and_gradient(logps_of_logits: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        logps = logps_of_logits(x, labels.to(x.device), shift=False)
        return [logps, *torch.autograd.grad(logps, x, grad_output.to(logps))]

    expected = logps_and_gradient(reference_logps, logits.double())
    of_log_softmax = logps_and_gradient(reference_logps, logits)
    with tiled(backend) as device:
        actual = logps_and_gradient(sequence_logps, logits.to(device))
    for x, of_torch, exact in zip(actual, of_log_softmax, expected):
        assert relative_error(x, exact) <= 2 * relative_error(of_torch, exact) + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_sequence_log_probs_pass_gradcheck(average: bool, shift: bool) -> None:
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[IGNORE_INDEX, 1, 2, 3], [4, 0, IGNORE_INDEX, IGNORE_INDEX]])
    assert gradcheck(lambda x: sequence_logps(x, labels, average=average, shift=shift), (logits,))


def test_confident_tokens_keep_their_gradient() -> None:
    """At p > 0.99, as after training, 1 - p would lose most of its digits if p were subtracted from 1 in float32."""
    logits = torch.zeros(1, 2, 100)
    logits[0, 0, 7] = 14.0
    labels = torch.tensor([[IGNORE_INDEX, 7]])
    single, double = (logits.clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    for x in (single, double):
        sequence_logps(x, labels).sum().backward()
    assert single.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=2e-3, atol=1e-10)


def test_the_loss_sends_a_gradient_back_to_the_logits() -> None:
    logits = torch.randn(4, 6, 11, requires_grad=True)
    logps = sequence_logps(logits, torch.randint(11, (4, 6)))
    amapo_loss(*logps.chunk(2)).loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@every_tiling
def test_nonfinite_logits_matter_only_where_a_label_counts(backend: str) -> None:
    """Attention may leave NaN at padding positions."""
    logits = torch.randn(2, 4, 5)
    logits[0, 2:] = torch.nan
    logits[1, 0, 4] = torch.inf
    labels = torch.tensor([[IGNORE_INDEX, 1, 2, IGNORE_INDEX], [IGNORE_INDEX, 3, IGNORE_INDEX, IGNORE_INDEX]])
    with tiled(backend) as device:
        on_device = logits.to(device).requires_grad_()
        logps = sequence_logps(on_device, labels.to(device))
        (gradient,) = torch.autograd.grad(logps[0], on_device)
    assert logps.isfinite().tolist() == [True, False]
    assert gradient[0].isfinite().all()
    assert not gradient[0, 2:].any()


@every_tiling
@pytest.mark.parametrize(
    "logits",
    [
        [math.inf, 0.0, 1.0],
        [0.0, math.inf, 1.0],
        [math.inf, 0.0, math.inf],
        [math.nan, 0.0, 1.0],
        [0.0, math.nan, 1.0],
        [-math.inf, 0.0, 1.0],
        [0.0, -math.inf, 1.0],
        [0.0, -math.inf, -math.inf],
        [-math.inf, 0.0, -math.inf],
        [-math.inf, -math.inf, -math.inf],
        [torch.finfo(torch.float32).min, 0.0, 1.0],
        [0.0, torch.finfo(torch.float32).min, torch.finfo(torch.float32).min],
    ],
)
def test_infinite_logits_and_nan_give_what_log_softmax_gives(backend: str, logits: list[float]) -> None:
    """The target is the first entry."""
    on_cpu, target_ids = torch.tensor([[logits]]).requires_grad_(), torch.zeros(1, 1, dtype=torch.int64)
    expected = on_cpu.log_softmax(-1)[0, :, 0]
    with tiled(backend) as device:
        on_device = on_cpu.detach().to(device).requires_grad_()
        actual = sequence_logps(on_device, target_ids.to(device), shift=False)
        (gradient,) = torch.autograd.grad(actual, on_device)
    torch.testing.assert_close(actual.cpu(), expected, equal_nan=True)
    torch.testing.assert_close(gradient.cpu(), *torch.autograd.grad(expected, on_cpu), equal_nan=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func.jvp calls it
@pytest.mark.parametrize("power", [1, 2])
def test_double_backward_and_forward_mode_raise(power: int) -> None:
    """With a power of 1, the gradient of the output is constant, and PyTorch's `once_differentiable` gives 0."""
    logits, labels = torch.randn(2, 4, 5, requires_grad=True), torch.randint(5, (2, 4))
    loss = sequence_logps(logits, labels).pow(power).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="reverse mode"):
        torch.func.jvp(lambda x: sequence_logps(x, labels), (logits.detach(),), (logits.detach(),))


def test_modifying_the_logits_before_backward_raises() -> None:
    """The logits are saved without a copy, and PyTorch notices that they have changed."""
    leaf = torch.randn(2, 4, 5, requires_grad=True)
    logits = leaf * 2
    logps = sequence_logps(logits, torch.randint(5, (2, 4)))
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler raises them about itself
def test_torch_compile_has_no_graph_break() -> None:
    compiled = torch.compile(sequence_logps, fullgraph=True, backend="aot_eager")
    for n in (2, 5, 3):
        logits, labels = torch.randn(n, 6, 11, requires_grad=True), torch.randint(11, (n, 6))
        actual, expected = compiled(logits, labels), sequence_logps(logits, labels)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits) for x in (actual, expected)))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler raises them about itself
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # jacrev calls an operator once per row
def test_func_grad_inside_compile_and_jacrev_agree_with_autograd() -> None:
    """Inside torch.compile, the arguments of such a function have `requires_grad=False` by mistake."""
    logits, labels = torch.randn(2, 4, 5, dtype=torch.float64), torch.randint(5, (2, 4))
    expected = torch.autograd.functional.jacobian(lambda x: sequence_logps(x, labels), logits)
    torch.testing.assert_close(torch.func.jacrev(lambda x: sequence_logps(x, labels))(logits), expected)
    gradient = torch.func.grad(lambda x: sequence_logps(x, labels).sum())
    torch.testing.assert_close(compiled_gradient(gradient, logits), expected.sum(0))
    torch.compiler.reset()


def test_the_operators_pass_opcheck() -> None:
    """opcheck tests the schemas, the fake implementations, and that the operators have no autograd of their own."""
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, IGNORE_INDEX, 4], [IGNORE_INDEX, 0, 2]])
    for with_entropy in (False, True):
        inputs = (logits, labels, IGNORE_INDEX, "", with_entropy)
        torch.library.opcheck(torch.ops.amapo_loss.logit_statistics.default, inputs)
    _, *saved = torch.ops.amapo_loss.logit_statistics(*inputs)
    arguments = (torch.randn(6), logits, *saved)
    torch.library.opcheck(torch.ops.amapo_loss.logit_gradient.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_only_new_tensor_of_the_size_of_the_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 512, 8192).to(dtype).requires_grad_()
    labels = torch.randint(8192, (2, 512))
    with tiled("torch", 2**17):
        peak = peak_bytes(lambda: sequence_logps(logits, labels).sum().backward())
    assert 1 <= peak / (logits.numel() * logits.element_size()) < 1.2
