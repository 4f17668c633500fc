"""Check the log-probs from hidden states against autograd through the logits in float64."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from amapo_loss import amapo_loss, linear_sequence_logps, linear_token_logps, sequence_logps
from amapo_loss.kernels import online_lse
from amapo_loss.logps import _linear_head, _online_lse
from amapo_loss.logps._linear_head import _mm_out
from amapo_loss.logps._online_lse import LogitTransform, OnlineLSE
from benchmarks.speed.memory import peak_bytes
from tests.support.backends import GPU, every_tiling, needs_gpu, no_synchronization, on_gpu, tiled
from tests.support.generators import compiled_gradient, examples
from tests.support.logps import IGNORE_INDEX, reference_logps, relative_error

# Each string names the tensors that require a gradient. `random_head` makes a bias only if the string names it.
WITH_GRADIENTS = ["hidden", "hidden weight", "weight", "hidden bias", "bias", "hidden weight bias"]
WITHOUT_GRADIENTS = ""


class Head(NamedTuple):
    """The hidden states before a language-model head, its parameters, and the transform of its logits."""

    hidden: Tensor  # [N, T, H] or [n, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that require a gradient."""
        return [x for x in self[:3] if isinstance(x, Tensor) and x.requires_grad]

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Head":
        """Return a copy whose tensors are leaves of their own."""

        def copy(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype).requires_grad_(x.requires_grad)

        bias = None if self.bias is None else copy(self.bias)
        return self._replace(hidden=copy(self.hidden), weight=copy(self.weight), bias=bias)

    def logits(self) -> Tensor:
        return self.transform(self.hidden @ self.weight.T)

    def transform(self, products: Tensor) -> Tensor:
        """Return the logits of the products `hidden @ weight.T`."""
        z = (products if self.bias is None else products + self.bias) * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def sequence_logps(self, labels: Tensor, **options: Any) -> Tensor:
        """Return the result of the function under test."""
        logps: Tensor = linear_sequence_logps(
            self.hidden,
            self.weight,
            labels,
            self.bias,
            logit_scale=self.scale,
            final_logit_softcapping=self.softcap,
            **options,
        )
        return logps


def gradients(output: Tensor, head: Head, grad_output: Tensor) -> list[Tensor]:
    """Return the gradients of the leaves of the head. The graph stays for another backward pass."""
    return list(torch.autograd.grad(output, head.leaves, grad_output.to(output), retain_graph=True))


def random_head(n: int, length: int, hidden_size: int, vocab_size: int, requires_grad: str, seed: int = 0) -> Head:
    """Return a head in float64 with hidden states [n, length, H]. It has a bias only if `requires_grad` names it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (n, length, hidden_size), "weight": (vocab_size, hidden_size), "bias": (vocab_size,)}
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(name in requires_grad.split())
        for name, shape in shapes.items()
    )
    return Head(hidden, weight, bias if "bias" in requires_grad else None)


def random_labels(n: int, length: int, vocab_size: int, ignored_share: float = 0.4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab_size, (n, length), generator=generator)
    labels[torch.rand(n, length, generator=generator) < ignored_share] = IGNORE_INDEX
    return labels


def confident_head(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    shared_mean: float,
    requires_grad: str,
    doubt: float | None = None,
) -> tuple[Head, Tensor]:
    """Return a head and its targets [num_tokens], most of which have a probability above 0.99.

    With `doubt`, 1 - p is this number for each of them, before the rounding to bfloat16.
    The rows of the weight share a mean, as those of trained models do. The mean is about `shared_mean` times as large
    as the deviations from it. All numbers are float64 and can be converted to bfloat16 without rounding.
    """
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    weight = (0.04 * (randn(vocab_size, hidden_size) + shared_mean * randn(1, hidden_size))).bfloat16().double()
    target_ids = torch.randint(vocab_size, (num_tokens,), generator=generator)
    # The noise gives the logits a standard deviation of 2.3. It is orthogonal to the mean of the rows, because a
    # component along the mean would shift all logits of a token alike.
    noise, mean = randn(num_tokens, hidden_size) * (2.3 / (0.04 * hidden_size**0.5)), weight.mean(0)
    noise -= (noise @ mean / mean.square().sum()).outer(mean)
    direction = weight[target_ids] - mean
    target_logit = torch.empty(num_tokens, dtype=torch.float64).uniform_(15, 24, generator=generator)
    coefficient = (target_logit - (noise * direction).sum(1)) / direction.square().sum(1)
    if doubt is not None:
        for _ in range(20):  # Newton's method, whose slope leaves out what the coefficient does to the other logits
            logits = (noise + direction * coefficient[:, None]) @ weight.T
            target_logit = logits.gather(1, target_ids[:, None]).squeeze(1)
            log_odds = target_logit - logits.scatter(1, target_ids[:, None], -torch.inf).logsumexp(1)
            coefficient += (math.log(1 / doubt - 1) - log_odds) / direction.square().sum(1)
    hidden = (noise + direction * coefficient[:, None]).bfloat16().double()
    head = Head(hidden.requires_grad_("hidden" in requires_grad), weight.requires_grad_("weight" in requires_grad))
    return head, target_ids


class ErrorBounds(NamedTuple):
    """The largest errors that rounding to a dtype can cause."""

    logps: float
    gradients: list[Tensor]  # the bounds of each element, one tensor per leaf of the head


def rounding_error_bounds(
    head: Head,  # in float64
    labels: Tensor,  # [N, T]
    grad_output: Tensor,  # [N]
    dtype: torch.dtype,
    average: bool,
    shift: bool,
) -> ErrorBounds:
    """Return the largest errors if the inputs have this dtype, and products and sums are at least float32."""
    eps, acc_eps = (torch.finfo(x).eps for x in (dtype, torch.promote_types(dtype, torch.float32)))
    hidden, weight = head.hidden.detach(), head.weight.detach()
    bias = None if head.bias is None else head.bias.detach()
    products = (hidden @ weight.T).requires_grad_()
    logits = head._replace(bias=bias).transform(products)
    logps = reference_logps(logits, labels, average, shift)
    grad_products, grad_logits = torch.autograd.grad(logps, (products, logits), grad_output)

    largest = max((x.abs().max().item() for x in (hidden, weight, bias) if x is not None and x.numel()), default=0)
    logit_error = 8 * acc_eps * max(head.scale, 1) * (hidden.shape[2] * largest**2 + 1)
    # The gradient of a product is rounded to `dtype`, and it inherits a relative error from its logit. In float16,
    # small gradients are subnormal, and their rounding error is absolute.
    product_error = grad_products.abs() * (eps + 4 * logit_error)
    if dtype == torch.float16:
        product_error = product_error + 2 * torch.finfo(dtype).tiny
    if head.softcap is not None:
        # The slope of the softcap is 1 - (z / softcap)^2. Near 0 it has an absolute error, because digits cancel.
        product_error = product_error + 8 * acc_eps * head.scale * grad_logits.abs()
    bounds = (
        product_error @ weight.abs(),
        torch.einsum("ntv,nth->vh", product_error, hidden.abs()),
        product_error.sum((0, 1)),
    )
    return ErrorBounds(
        logps=logit_error * (1 if average else labels.shape[1]),
        gradients=[bound for bound, x in zip(bounds, head[:3]) if isinstance(x, Tensor) and x.requires_grad],
    )


@every_tiling
@examples(60)
@given(
    n=st.integers(0, 4),
    length=st.integers(0, 7),
    hidden_size=st.integers(1, 9),
    vocab_size=st.integers(1, 40),
    tile_elements=st.integers(1, 200),
    requires_grad=st.sampled_from([*WITH_GRADIENTS, WITHOUT_GRADIENTS]),
    keep_bytes=st.sampled_from([0, 100, 400, 10**9]),
    average=st.booleans(),
    shift=st.booleans(),
    ignored_share=st.floats(0, 1),
    scale_and_softcap=st.sampled_from([(1.0, None), (0.3, None), (1.0, 3.0), (2.0, 1.5)]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_log_probs_and_gradients_match_autograd_through_the_logits(
    backend: str,
    n: int,
    length: int,
    hidden_size: int,
    vocab_size: int,
    tile_elements: int,
    requires_grad: str,
    keep_bytes: int,
    average: bool,
    shift: bool,
    ignored_share: float,
    scale_and_softcap: tuple[float, float | None],
    seed: int,
    dtype: torch.dtype,
) -> None:
    # Round the inputs to `dtype` first, so that the float64 reference gets the same numbers.
    head = random_head(n, length, hidden_size, vocab_size, requires_grad, seed)
    head = head.to("cpu", dtype).to("cpu", torch.float64)
    scale, softcap = scale_and_softcap
    head = head._replace(scale=scale, softcap=softcap)
    labels = random_labels(n, length, vocab_size, ignored_share, seed)
    grad_output = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = reference_logps(head.logits(), labels, average, shift)
    bounds = rounding_error_bounds(head, labels, grad_output, dtype, average, shift)

    with tiled(backend, tile_elements) as device:
        on_device = head.to(device, dtype)
        actual = on_device.sequence_logps(labels.to(device), keep_bytes=keep_bytes, average=average, shift=shift)
        acc_dtype = torch.promote_types(dtype, torch.float32)
        assert actual.dtype == acc_dtype
        rtol = 8 * torch.finfo(acc_dtype).eps
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=rtol, atol=bounds.logps)
        assert actual.requires_grad == bool(on_device.leaves)
        if not on_device.leaves:
            return
        actual_gradients, repeated_gradients = (gradients(actual, on_device, grad_output) for _ in range(2))
    expected_gradients = gradients(expected, head, grad_output)
    for gradient, repeated, expected_gradient, bound in zip(
        actual_gradients, repeated_gradients, expected_gradients, bounds.gradients
    ):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, repeated), "a second backward pass gives another gradient"
        allowed = bound + 2 * torch.finfo(dtype).eps * expected_gradient.abs() + torch.finfo(dtype).tiny
        error = (gradient.cpu().double() - expected_gradient).abs() / allowed
        assert (error <= 1).all(), f"the error is {error.max():.2f} times the bound"


@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("requires_grad", WITH_GRADIENTS)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.7, 2.0)])
def test_token_log_probs_pass_gradcheck(
    scale: float,
    softcap: float | None,
    requires_grad: str,
    keep_bytes: int,
) -> None:
    """gradcheck compares with finite differences, for a separate gradient of each token."""
    head = random_head(1, 6, 3, 9, requires_grad)
    target_ids = torch.tensor([0, 8, 3, 3, 7, 1])

    def logps_of_leaves(*leaves: Tensor) -> Tensor:
        remaining = iter(leaves)
        hidden, weight = (next(remaining) if x.requires_grad else x for x in head[:2])
        bias = None if head.bias is None else next(remaining)
        return linear_token_logps(
            hidden[0],
            weight,
            target_ids,
            bias,
            keep_bytes=keep_bytes,
            logit_scale=scale,
            final_logit_softcapping=softcap,
        )

    with tiled("torch", 20):
        assert gradcheck(logps_of_leaves, head.leaves)


every_batch_shape = pytest.mark.parametrize(
    ("n", "length", "requires_grad"),
    [(0, 4, "hidden weight"), (3, 0, "hidden"), (2, 5, "hidden"), (2, 5, "hidden weight bias")],
)


@every_tiling
@every_batch_shape
def test_without_counted_tokens_log_probs_and_gradients_are_0(
    backend: str,
    n: int,
    length: int,
    requires_grad: str,
) -> None:
    with tiled(backend) as device:
        head = random_head(n, length, 8, 30, requires_grad).to(device, torch.float32)
        logps = head.sequence_logps(torch.full((n, length), IGNORE_INDEX, device=device))
        assert torch.equal(logps.cpu(), torch.zeros(n))
        for gradient in gradients(logps, head, torch.ones(n)):
            assert not gradient.any()


@every_tiling
@every_batch_shape
def test_a_sequence_without_counted_tokens_does_not_change_the_others(
    backend: str,
    n: int,
    length: int,
    requires_grad: str,
) -> None:
    with tiled(backend) as device:
        head = random_head(n, length, 8, 30, requires_grad).to(device, torch.float32)
        labels = random_labels(n, length, 30).to(device)
        labels[:1] = IGNORE_INDEX
        logps = head.sequence_logps(labels)
        others = head._replace(hidden=head.hidden[1:])
        assert torch.equal(logps[1:], others.sequence_logps(labels[1:]))
        (grad_hidden, *_) = gradients(logps, head, torch.ones(n))
        assert not grad_hidden[:1].any()


@pytest.mark.parametrize("requires_grad", WITH_GRADIENTS)
def test_without_grad_mode_the_log_probs_are_the_same(requires_grad: str) -> None:
    head, labels = random_head(3, 5, 8, 30, requires_grad), random_labels(3, 5, 30)
    expected = head.sequence_logps(labels)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            actual = head.sequence_logps(labels)
        assert not actual.requires_grad
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
def test_double_backward_raises(requires_grad: str, power: int) -> None:
    """With a power of 1, the gradient of the output is constant, and PyTorch's `once_differentiable` gives 0."""
    head = random_head(2, 5, 8, 30, requires_grad)
    loss = head.sequence_logps(random_labels(2, 5, 30)).pow(power).sum()
    for gradient in torch.autograd.grad(loss, head.leaves, create_graph=True):
        with pytest.raises(RuntimeError, match="first derivatives"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func.jvp calls it
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_forward_mode_raises(name: str) -> None:
    head, labels = random_head(2, 5, 8, 30, "bias"), random_labels(2, 5, 30)
    x = getattr(head, name).detach()
    with pytest.raises(RuntimeError, match="reverse mode"):
        torch.func.jvp(lambda x: head._replace(**{name: x}).sequence_logps(labels), (x,), (x,))


@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight bias"])
def test_activation_checkpointing_does_not_change_the_gradients(requires_grad: str, keep_bytes: int) -> None:
    """Checkpointing discards what forward saved, and runs forward again in the backward pass."""
    head, labels = random_head(3, 5, 8, 30, requires_grad), random_labels(3, 5, 30)
    grad_output = torch.randn(3, dtype=torch.float64)

    def logps_of_hidden(hidden: Tensor) -> Tensor:
        return head._replace(hidden=hidden).sequence_logps(labels, keep_bytes=keep_bytes)

    expected = gradients(logps_of_hidden(head.hidden), head, grad_output)
    logps = checkpoint(logps_of_hidden, head.hidden, use_reentrant=False)
    actual = torch.autograd.grad(logps, head.leaves, grad_output)
    torch.testing.assert_close(actual, tuple(expected))


def test_the_inputs_are_not_modified() -> None:
    for requires_grad in (*WITH_GRADIENTS, WITHOUT_GRADIENTS):
        head, labels = random_head(2, 6, 8, 30, requires_grad), random_labels(2, 6, 30)
        inputs = [x for x in (*head[:3], labels) if isinstance(x, Tensor)]
        copies = [x.clone() for x in inputs]
        logps = head.sequence_logps(labels)
        if head.leaves:
            logps.sum().backward()
        assert all(map(torch.equal, inputs, copies))


@pytest.mark.parametrize("keep_bytes", [0, 10**6])
@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
def test_the_rows_of_tiles_are_aligned_for_any_vocabulary(
    monkeypatch: pytest.MonkeyPatch, requires_grad: str, keep_bytes: int
) -> None:
    """Matrix units need rows of a multiple of 16 bytes. GPT-2 has 50,257 tokens."""
    row_lengths: list[int] = []
    for name in ("_mm_out", "_addmm_out"):

        def recorded(*matrices: Tensor, product: Callable[..., Tensor] = getattr(_linear_head, name)) -> Tensor:
            row_lengths.extend(max(matrix.stride()) for matrix in matrices)
            return product(*matrices)

        monkeypatch.setattr(_linear_head, name, recorded)
    head, labels = random_head(2, 6, 8, 33, requires_grad), random_labels(2, 6, 33)
    logps = head.sequence_logps(labels, keep_bytes=keep_bytes)
    torch.testing.assert_close(logps, reference_logps(head.logits(), labels))
    logps.sum().backward()
    assert {length % 8 for length in row_lengths} == {0}


def column_major(x: Tensor) -> Tensor:
    """Return the same numbers with the first two dimensions exchanged in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def test_inputs_may_have_any_strides() -> None:
    """The hidden states are [T, N, H] in memory, the weight is transposed, and every other label is taken."""
    head, labels = random_head(3, 6, 8, 30, "hidden weight"), random_labels(3, 12, 30)[:, ::2]
    strided = Head(column_major(head.hidden), column_major(head.weight))
    torch.testing.assert_close(strided.sequence_logps(labels), head.sequence_logps(labels), rtol=1e-14, atol=0)


@every_tiling
@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
def test_gradients_may_have_any_strides(backend: str, requires_grad: str) -> None:
    """The gradient of a leaf has its strides. No hidden state is left out, which would copy the others."""
    head, grad_output = random_head(6, 1, 8, 30, requires_grad), torch.arange(6.0)
    with tiled(backend, 40) as device:
        by_rows = head._replace(hidden=head.hidden.squeeze(1)).to(device, torch.float32)
        bias, target_ids = torch.randn(30, 2, device=device), torch.arange(12, device=device)
        by_columns = Head(column_major(by_rows.hidden), column_major(by_rows.weight)).to(device, torch.float32)
        assert not by_columns.hidden.is_contiguous()
        of_rows, of_columns = (
            gradients(linear_token_logps(head.hidden, head.weight, target_ids, bias), head, grad_output)
            for head, target_ids, bias in (
                (by_rows, target_ids[::2].contiguous(), bias[:, 0].contiguous()),
                (by_columns, target_ids[::2], bias[:, 0]),
            )
        )
    torch.testing.assert_close(of_columns, of_rows)


@pytest.mark.filterwarnings("ignore")  # the compiler raises many warnings about itself
@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
def test_compiled_autograd_gives_the_same_gradients(requires_grad: str) -> None:
    head, labels = random_head(2, 5, 8, 30, requires_grad), random_labels(2, 5, 30)
    expected = gradients(head.sequence_logps(labels), head, torch.ones(2))
    compiler = partial(torch.compile, backend="eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        head.sequence_logps(labels).sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in head.leaves], expected)


def test_meta_tensors_show_shapes() -> None:
    hidden, weight, target_ids = (torch.empty(shape, device="meta") for shape in ((6, 4), (5, 4), (6,)))
    logps = linear_token_logps(hidden.requires_grad_(), weight.requires_grad_(), target_ids.long())
    assert logps.shape == (6,)
    assert [gradient.shape for gradient in torch.autograd.grad(logps.sum(), (hidden, weight))] == [(6, 4), (5, 4)]


@every_tiling
@pytest.mark.parametrize("target_id", [-1, 30, -100, 10**12])
@pytest.mark.parametrize("requires_grad", ["", "hidden", "hidden weight"])
def test_a_target_outside_the_vocabulary_raises(backend: str, requires_grad: str, target_id: int) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("a device-side assertion ends the process: TestOnGPU checks it in a process of its own")
    head = random_head(1, 3, 8, 30, requires_grad).to("cpu", torch.float32)
    message = rf"token ids must be in \[0, 30\), got {target_id}"
    with tiled(backend), pytest.raises(IndexError, match=message):
        linear_token_logps(head.hidden[0], head.weight, torch.tensor([0, target_id, 3]))
    if target_id != IGNORE_INDEX:
        with tiled(backend), pytest.raises(IndexError, match=message):
            head.sequence_logps(torch.tensor([[IGNORE_INDEX, target_id, IGNORE_INDEX]]))


@every_tiling
@pytest.mark.parametrize("requires_grad", ["", "hidden", "hidden weight"])
def test_a_nonfinite_hidden_state_affects_only_its_own_token(backend: str, requires_grad: str) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        head = random_head(1, 4, 8, 30, requires_grad)
        head.hidden.data[0, 2] = value
        with tiled(backend) as device:
            on_device = head.to(device, torch.float32)
            target_ids = torch.tensor([0, 4, 3, 9], device=device)
            logps = linear_token_logps(on_device.hidden[0], on_device.weight, target_ids)
        assert logps.isfinite().tolist() == [True, True, False, True]


@every_tiling
@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
def test_a_bias_of_minus_infinity_excludes_vocabulary_tokens(
    backend: str,
    requires_grad: str,
    keep_bytes: int,
) -> None:
    """The log-probs and gradients stay right, even if only the target is allowed or a whole tile is excluded."""
    for allowed_ids in ([3], [3, 20], [20, 25, 3]):
        head, target_ids = random_head(1, 4, 8, 30, requires_grad), torch.tensor([3, 3, allowed_ids[-1], 3])
        bias = torch.full((30,), -torch.inf, dtype=torch.float64).index_fill(0, torch.tensor(allowed_ids), 0.0)
        logits = head.hidden[0] @ head.weight.T + bias
        expected = logits.log_softmax(-1)[torch.arange(4), target_ids]
        expected_gradients = gradients(expected, head, torch.ones(4))
        with tiled(backend, 16) as device:
            on_device = head.to(device, torch.float32)
            actual = linear_token_logps(
                on_device.hidden[0],
                on_device.weight,
                target_ids.to(device),
                bias.float().to(device),
                keep_bytes=keep_bytes,
            )
            torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-5)
            for gradient, expected_gradient in zip(gradients(actual, on_device, torch.ones(4)), expected_gradients):
                torch.testing.assert_close(gradient.cpu().double(), expected_gradient, rtol=1e-4, atol=1e-5)


@every_tiling
@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
def test_confident_tokens_keep_their_gradient(backend: str, requires_grad: str) -> None:
    """At p > 0.99, 1 - p would lose most of its digits if it came from a sum that includes the target."""
    head, target_ids = confident_head(96, 64, 500, shared_mean=0.0, requires_grad=requires_grad)
    grad_output = torch.ones(96, dtype=torch.float64)
    expected = head.logits().log_softmax(-1)[torch.arange(96), target_ids]
    assert expected.exp().quantile(0.1) > 0.99
    with tiled(backend, 2**14) as device:
        on_device = head.to(device, torch.bfloat16)
        actual = linear_token_logps(on_device.hidden, on_device.weight, target_ids.to(device))
        actual_gradients = gradients(actual, on_device, grad_output)
    assert relative_error(actual, expected) < 1e-4
    for gradient, expected_gradient in zip(actual_gradients, gradients(expected, head, grad_output)):
        assert relative_error(gradient, expected_gradient) < 4e-3


@every_tiling
@examples(40)
@given(
    doubt=st.floats(-6, -1).map(lambda x: 10**x),
    grad_scale=st.floats(-10, 16).map(lambda x: 2**x),
    requires_grad=st.sampled_from(["hidden", "hidden weight"]),
    keep_bytes=st.sampled_from([0, 10**9]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
@example(doubt=5e-6, grad_scale=2.0**16, requires_grad="hidden", keep_bytes=0, dtype=torch.float16)
def test_gradients_are_as_exact_as_those_of_autograd_for_any_confidence_and_loss_scale(
    backend: str,
    doubt: float,
    grad_scale: float,
    requires_grad: str,
    keep_bytes: int,
    dtype: torch.dtype,
) -> None:
    """In float16, a gradient times 1 - p may underflow before the loss scale multiplies it."""
    head, target_ids = confident_head(8, 64, 300, 0.5, requires_grad, doubt)
    head = head.to("cpu", dtype)  # the reference gets the same numbers
    grad_output = torch.full((8,), grad_scale)

    def grad_hidden_of_autograd(head: Head, acc_dtype: torch.dtype) -> Tensor:
        logps = head.logits().to(acc_dtype).log_softmax(-1)[torch.arange(8), target_ids]
        return gradients(logps, head, grad_output)[0].double()

    expected = grad_hidden_of_autograd(head.to("cpu", torch.float64), torch.float64)
    of_autograd = grad_hidden_of_autograd(head, torch.float32)
    with tiled(backend, 2**11) as device:
        on_device = head.to(device, dtype)
        logps = linear_token_logps(on_device.hidden, on_device.weight, target_ids.to(device), keep_bytes=keep_bytes)
        actual = gradients(logps, on_device, grad_output)[0].cpu().double()

    def largest_error(error: Tensor) -> Tensor:
        """Return the largest error of a token, relative to the norm of its gradient."""
        errors: Tensor = error.norm(dim=1) / expected.norm(dim=1)
        return errors.max()

    limits = torch.finfo(dtype)
    rounding = largest_error(limits.eps * (expected.abs() + limits.smallest_normal))
    error = largest_error(actual - expected)
    assert error <= 2 * largest_error(of_autograd - expected) + rounding
    assert error <= 2 * rounding + 1e-5  # logits near 20 have an error of a few 1e-6 in float32


@every_tiling
@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
def test_many_entries_below_the_smallest_float16_number_add_up(backend: str, requires_grad: str) -> None:
    """Forward rounds exp(z_j - m) to float16 before backward knows the loss scale.

    It is 1.5e-8 for 998 vocabulary tokens, and the gradient of the second hidden unit comes from them alone.
    """
    weight = torch.tensor([[4.0, 0.0], [2.0, 0.0], *[[-14.0, 16.0]] * 998], dtype=torch.float64)
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    head = Head(hidden, weight.requires_grad_("weight" in requires_grad))
    target_ids, grad_output = torch.tensor([1]), torch.tensor([2.0**14])
    expected, *_ = gradients(head.logits().log_softmax(-1)[:, 1], head, grad_output)
    with tiled(backend, 2**8) as device:
        on_device = head.to(device, torch.float16)
        logps = linear_token_logps(on_device.hidden, on_device.weight, target_ids.to(device), keep_bytes=10**6)
        actual, *_ = gradients(logps, on_device, grad_output)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-3, atol=0)


def head_with_exact_products(vocab_size: int, requires_grad: str, offset: float, seed: int) -> tuple[Head, Tensor]:
    """Return a head and its targets [8], in float32. All products and the bias are multiples of 1/4.

    If `offset`, which is added to the bias, is between -1e6 and 1e6, float32 holds the logits without rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    randint = partial(torch.randint, generator=generator, dtype=torch.float32)
    hidden, weight, bias = randint(-2, 3, (8, 6)), randint(-8, 9, (vocab_size, 6)), randint(-8, 9, (vocab_size,))
    tensors = {"hidden": hidden, "weight": weight / 4, "bias": bias / 4 + round(4 * offset) / 4}
    head = Head(*(x.requires_grad_(name in requires_grad.split()) for name, x in tensors.items()))
    return head, torch.randint(vocab_size, (8,), generator=generator)


def sizes_of_summands(logps: Tensor, products: Tensor, head: Head, grad_output: Tensor) -> list[Tensor]:
    """Return the gradients of the leaves with the sums over tokens and vocabulary taken over absolute values.

    Args:
        logps: [n] log-probs that have been computed from `products`.
        products: [n, V] `hidden @ weight.T`, as a leaf.
        head: the head.
        grad_output: [n].
    """
    (grad_products,) = torch.autograd.grad(logps, products, grad_output.to(logps))
    size = grad_products.abs()
    by_leaf = {"hidden": size @ head.weight.abs(), "weight": size.T @ head.hidden.abs(), "bias": size.sum(0)}
    return [by_leaf[name] for name, x in zip(head._fields, head[:3]) if isinstance(x, Tensor) and x.requires_grad]


def assert_as_exact_as_autograd(
    backend: str,
    head: Head,  # in float32
    target_ids: Tensor,  # [n]
    keep_bytes: int = 0,
) -> None:
    """Compare the errors of the log-probs and gradients with those of autograd in float32.

    A gradient may also have two rounding errors of its summands. They can cancel in the sum, so that rounding errors
    are large compared with the sum, and it is a matter of luck whose are larger.
    """
    grad_output = torch.randn(len(target_ids), generator=torch.Generator().manual_seed(0))

    def logps_and_gradients(head: Head) -> list[Tensor]:
        logps = head.logits().log_softmax(-1)[torch.arange(len(target_ids)), target_ids]
        return [logps, *gradients(logps, head, grad_output)]

    exact_head = head.to("cpu", torch.float64)
    expected, of_autograd = logps_and_gradients(exact_head), logps_and_gradients(head)
    products = (exact_head.hidden @ exact_head.weight.T).detach().requires_grad_()
    exact_logps = exact_head.transform(products).log_softmax(-1)[torch.arange(len(target_ids)), target_ids]
    sizes = [exact_logps, *sizes_of_summands(exact_logps, products, exact_head, grad_output)]
    with tiled(backend, 64) as device:
        on_device = head.to(device, torch.float32)
        logps = linear_token_logps(
            on_device.hidden,
            on_device.weight,
            target_ids.to(device),
            on_device.bias,
            keep_bytes=keep_bytes,
            logit_scale=head.scale,
            final_logit_softcapping=head.softcap,
        )
        actual = [logps, *gradients(logps, on_device, grad_output)]
    for x, of_torch, exact, size in zip(actual, of_autograd, expected, sizes, strict=True):
        error, error_of_torch = ((y.detach().cpu().double() - exact).norm() for y in (x, of_torch))
        assert error <= 2 * error_of_torch + 2 * torch.finfo(torch.float32).eps * size.norm()


@every_tiling
@examples(40)
@given(
    vocab_size=st.integers(2, 40),
    requires_grad=st.sampled_from(WITH_GRADIENTS),
    keep_bytes=st.sampled_from([0, 1000, 10**9]),
    offset=st.one_of(st.floats(-1e6, 1e6), st.floats(-1e3, 1e3)),
    seed=st.integers(0, 2**31),
)
# The gradient of the bias is 1/47 of the sum of its absolute summands.
@example(vocab_size=2, requires_grad="hidden bias", keep_bytes=1000, offset=203.0, seed=84)
def test_an_offset_of_the_logits_costs_no_more_digits_than_in_log_softmax(
    backend: str,
    vocab_size: int,
    requires_grad: str,
    keep_bytes: int,
    offset: float,
    seed: int,
) -> None:
    """The softmax does not change if a number is added to the bias of every vocabulary token."""
    head, target_ids = head_with_exact_products(vocab_size, requires_grad, offset, seed)
    assert_as_exact_as_autograd(backend, head, target_ids, keep_bytes)


@every_tiling
@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
@pytest.mark.parametrize("softcap", [5.0, 30.0, 1000.0])
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_a_softcap_costs_no_more_digits_than_with_autograd(
    backend: str,
    requires_grad: str,
    softcap: float,
    scale: float,
) -> None:
    head, target_ids = head_with_exact_products(50, requires_grad, 0.0, seed=0)
    assert_as_exact_as_autograd(backend, head._replace(scale=scale, softcap=softcap), target_ids)


@every_tiling
@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
def test_the_number_of_tiles_hardly_changes_the_gradient(backend: str, requires_grad: str, keep_bytes: int) -> None:
    """Few of the bfloat16 elements change. If the product of each tile were rounded, 36% would change.

    On an H200, a product over 1,600 columns has 8 times the error of its float32 sum in tiles of 100 columns, because
    tensor cores add with fewer digits than float32 has. The share is therefore higher there: 1.1% were measured.
    """
    head, target_ids = confident_head(64, 64, 1600, shared_mean=3.0, requires_grad=requires_grad)
    grad_output = torch.randn(64, generator=torch.Generator().manual_seed(0))
    results = []
    for tile_elements in (64 * 1600, 64 * 100):
        with tiled(backend, tile_elements) as device:
            on_device = head.to(device, torch.bfloat16)
            logps = linear_token_logps(on_device.hidden, on_device.weight, target_ids.to(device), keep_bytes=keep_bytes)
            results.append(gradients(logps, on_device, grad_output))
    for with_one_tile, with_many_tiles in zip(*results):
        assert (with_one_tile != with_many_tiles).float().mean() < (0.03 if GPU else 0.01)


@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
def test_autocast_rounds_the_inputs_of_products_except_float64(requires_grad: str) -> None:
    """The gradient of float32 inputs is float32, and it is the same whether backward runs inside autocast or not."""
    head = random_head(2, 6, 16, 40, requires_grad)
    labels, grad_output = random_labels(2, 6, 40), torch.tensor([0.3, -0.7], dtype=torch.float64)
    rounded = head.to("cpu", torch.bfloat16).to("cpu", torch.float64)
    expected = reference_logps(rounded.logits(), labels)
    single = head.to("cpu", torch.float32)
    mixed = single._replace(hidden=single.hidden.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        single_logps = single.sequence_logps(labels)
        mixed_logps = mixed.sequence_logps(labels)
        double_logps = head.sequence_logps(labels)
    assert single_logps.dtype == mixed_logps.dtype == torch.float32
    torch.testing.assert_close(double_logps, reference_logps(head.logits(), labels), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(single_logps.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed_logps.double(), expected, rtol=1e-5, atol=1e-5)

    with torch.autocast("cpu", torch.bfloat16):
        gradients_inside = gradients(single_logps, single, grad_output)
    gradients_outside = gradients(single_logps, single, grad_output)
    expected_gradients = gradients(expected, rounded, grad_output)
    for inside, outside, expected_gradient in zip(gradients_inside, gradients_outside, expected_gradients):
        assert outside.dtype == torch.float32
        assert torch.equal(outside, inside)
        assert relative_error(outside, expected_gradient) < 1e-5


@pytest.fixture
def _compiler_reset() -> Iterator[None]:
    """Let compilers before torch 2.10 trace `nonzero`, as later ones do. Discard the code after the test."""
    is_old = TorchVersion(torch.__version__) < "2.10"
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True) if is_old else nullcontext():
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_compiler_reset")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler raises them about itself
@pytest.mark.parametrize("keep_bytes", [0, 2000])
@pytest.mark.parametrize("requires_grad", [*WITH_GRADIENTS, WITHOUT_GRADIENTS])
def test_torch_compile_has_no_graph_break(requires_grad: str, keep_bytes: int) -> None:
    if keep_bytes and TorchVersion(torch.__version__) < "2.11":
        pytest.skip("torch.compile before torch 2.11 cannot partition a graph with kept tiles")

    def sequence_step(head: Head, labels: Tensor) -> Tensor:
        return head.sequence_logps(labels, keep_bytes=keep_bytes).square()

    compiled = torch.compile(sequence_step, fullgraph=True, backend="aot_eager")
    for n in (2, 5, 3):
        head, labels = random_head(n, 6, 8, 30, requires_grad), random_labels(n, 6, 30, seed=n)
        actual, expected = compiled(head, labels), sequence_step(head, labels)
        torch.testing.assert_close(actual, expected)
        if head.leaves:
            torch.testing.assert_close(*(torch.autograd.grad(x.sum(), head.leaves) for x in (actual, expected)))

    def token_step(head: Head, target_ids: Tensor) -> Tensor:
        logps = linear_token_logps(head.hidden[0], head.weight, target_ids, head.bias, keep_bytes=keep_bytes)
        return logps.exp().sum()

    explanation = torch._dynamo.explain(token_step)(head, torch.zeros(6, dtype=torch.int64))
    assert explanation.graph_break_count == 0


@pytest.mark.usefixtures("_compiler_reset")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler raises them about itself
@pytest.mark.parametrize("names", WITH_GRADIENTS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # jacrev calls an operator once per row
def test_func_grad_inside_compile_and_jacrev_agree_with_autograd(names: str) -> None:
    """Inside torch.compile, the arguments of such a function have `requires_grad=False` by mistake."""
    head, labels = random_head(2, 5, 8, 30, names), random_labels(2, 5, 30)
    expected = torch.autograd.functional.jacobian(
        lambda *x: head._replace(**dict(zip(names.split(), x))).sequence_logps(labels), tuple(head.leaves)
    )
    head = Head(*(x.detach() if isinstance(x, Tensor) else x for x in head))

    def logps(*x: Tensor) -> Tensor:
        return head._replace(**dict(zip(names.split(), x))).sequence_logps(labels)

    arguments = tuple(getattr(head, name) for name in names.split())
    every = tuple(range(len(arguments)))
    torch.testing.assert_close(torch.func.jacrev(logps, argnums=every)(*arguments), expected)
    gradient = torch.func.grad(lambda *x: logps(*x).sum(), argnums=every)
    torch.testing.assert_close(compiled_gradient(gradient, *arguments), tuple(x.sum(0) for x in expected))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operators_pass_opcheck(with_bias: bool, softcap: float | None) -> None:
    """opcheck tests the schemas, the fake implementations, and that the operators have no autograd of their own."""
    head = random_head(1, 6, 8, 30, "bias" if with_bias else "")
    bias = None if head.bias is None else head.bias.detach()
    inputs = (head.hidden[0], head.weight, torch.arange(6), bias, torch.float64, 0.5, softcap, "", True)
    grad_output = torch.randn(6, dtype=torch.float64)
    for keep_bytes in (0, 10**9):
        _, *saved = torch.ops.amapo_loss.head_statistics(*inputs, keep_bytes)
        torch.library.opcheck(torch.ops.amapo_loss.head_statistics.default, (*inputs, keep_bytes))
        for needs_gradient in ((True, True, with_bias), (True, False, False), (False, True, False)):
            arguments = (grad_output, *inputs[:2], *inputs[3:-1], *saved, *needs_gradient)
            torch.library.opcheck(torch.ops.amapo_loss.head_gradients.default, arguments)
    torch.library.opcheck(torch.ops.amapo_loss.frozen_head.default, inputs)


def test_tied_embeddings_get_the_gradient_of_both_uses() -> None:
    """The same weight embeds the input tokens and is the head."""
    embedding = torch.nn.Embedding(30, 8, dtype=torch.float64)
    input_ids, labels = torch.randint(30, (4, 6)), random_labels(4, 6, 30)

    def grad_weight(logps_of_hidden: Callable[[Tensor], Tensor]) -> Tensor:
        logps = logps_of_hidden(embedding(input_ids).tanh())
        return torch.autograd.grad(amapo_loss(*logps.chunk(2)).loss, embedding.weight)[0]

    torch.testing.assert_close(
        grad_weight(lambda hidden: linear_sequence_logps(hidden, embedding.weight, labels)),
        grad_weight(lambda hidden: reference_logps(hidden @ embedding.weight.T, labels)),
    )


def test_the_logits_are_never_held_in_memory() -> None:
    """The inputs take 0.6 MB and the logits 34 MB. Memory that is allocated before the step does not count."""
    labels, logits_bytes = random_labels(2, 512, 8192, ignored_share=0.0), 1024 * 8192 * 4

    def step(head: Head, logps_of_head: Callable[[Head], Tensor]) -> None:
        logps_of_head(head).sum().backward()

    head = random_head(2, 512, 16, 8192, "hidden").to("cpu", torch.float32)
    assert peak_bytes(lambda: step(head, lambda head: reference_logps(head.logits(), labels))) > 2.9 * logits_bytes
    for requires_grad in ("hidden", "hidden weight"):
        head = random_head(2, 512, 16, 8192, requires_grad).to("cpu", torch.float32)
        with tiled("torch", 2**18):
            assert peak_bytes(partial(step, head, lambda head: head.sequence_logps(labels))) < logits_bytes / 8


# The sizes of tensors in the next two tests, in bytes. A tile of 2^18 numbers has 128 rows or 512 columns.
TOKENS, VOCABULARY = 512, 2048
TILE, ROWS_OF_TILE = 4 * 2**18, 4 * 64 * VOCABULARY  # the softmax of a CPU copies 64 rows at a time


@pytest.mark.parametrize(
    ("hidden_size", "order", "workspace"),
    [
        pytest.param(256, torch.Tensor.contiguous, TILE + ROWS_OF_TILE, id="rows"),
        # The result of a tile is not contiguous, so its product needs 1 MB of its own, after the softmax.
        pytest.param(2048, column_major, TILE + 4 * 128 * 2048, id="columns"),
    ],
)
def test_a_frozen_head_keeps_the_gradient_and_needs_one_tile(
    hidden_size: int, order: Callable[[Tensor], Tensor], workspace: int
) -> None:
    """Backward only scales the gradient."""
    hidden, weight = torch.randn(TOKENS, hidden_size), torch.randn(VOCABULARY, hidden_size)
    hidden = order(hidden).requires_grad_()
    with patch.dict(_online_lse.TILE_ELEMENTS, cpu=2**18):
        peak = peak_bytes(lambda: linear_token_logps(hidden, weight, torch.arange(TOKENS)))
    assert peak == pytest.approx(hidden.nbytes + workspace, rel=0.03)


@pytest.mark.parametrize(
    ("requires_grad", "autocast", "copies"),
    [
        ("hidden weight", False, 0),
        ("weight", False, 0),
        # A CPU stores rounded numbers in four bytes again: the hidden states, a block of the weight, and half a block
        # more while it is converted.
        ("hidden weight", True, 4 * 256 * (TOKENS + 1.5 * 512)),
    ],
)
def test_a_trainable_head_needs_one_tile_and_no_second_copy_of_a_gradient(
    requires_grad: str, autocast: bool, copies: float
) -> None:
    hidden, weight = torch.randn(TOKENS, 256), torch.randn(VOCABULARY, 256, requires_grad=True)
    head = Head(hidden.requires_grad_("hidden" in requires_grad), weight)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logps = linear_token_logps(hidden, weight, torch.arange(TOKENS))
        gradients(logps, head, torch.ones(TOKENS))

    with patch.dict(_online_lse.TILE_ELEMENTS, cpu=2**18):
        peak = peak_bytes(step)
    assert peak == pytest.approx(sum(leaf.nbytes for leaf in head.leaves) + TILE + copies, rel=0.03)


@pytest.mark.parametrize(
    ("vocab_size", "num_storages"),
    [
        pytest.param(40, 1, id="they fit"),  # 20 columns of float32 are covered, and the 16 of a product begin at 24
        pytest.param(39, 3, id="one column is missing"),
    ],
)
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=on_gpu)])
def test_a_frozen_head_writes_products_into_unused_columns_of_the_tile(
    backend: str, vocab_size: int, num_storages: int
) -> None:
    head = random_head(8, 1, 16, vocab_size, "hidden")
    with (
        tiled(backend, 4 * vocab_size) as device,
        patch.object(_linear_head, "_mm_out", wraps=_linear_head._mm_out) as mm,
    ):
        on_device = head.to(device, torch.bfloat16)
        linear_token_logps(on_device.hidden[:, 0], on_device.weight, torch.arange(8, device=device))
    calls = [call.args[:2] for call in mm.call_args_list]  # of two tiles: the logits, and the product of their gradient
    assert len(calls) == 4
    assert len({out.untyped_storage().data_ptr() for out, _ in calls}) == num_storages
    if num_storages == 1:
        for product, gradient in calls[1::2]:
            first_byte = product.data_ptr() - gradient.data_ptr()
            assert 2 * vocab_size <= first_byte <= 4 * product.stride(0) - 4 * 16


def test_pytorch_has_the_products_of_bfloat16_with_float32_results() -> None:
    """Only a GPU computes them. The meta device checks the call of `torch.mm` without computing anything."""
    half, single = (partial(torch.empty, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    out = _mm_out(single(4, 8)[:, :6], half(4, 5), half(6, 5).T)
    assert (out.dtype, out.shape) == (torch.float32, (4, 6))
    assert "dtype_out" in torch.ops.aten.addmm.overloads()


class CountOperations(TorchDispatchMode):
    """Counts the operations of PyTorch, views included."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_gpu_without_triton_gets_few_launches() -> None:
    """A tile of 4,096 rows has two parts. The meta device stands for a GPU, where an operation is a launch."""
    state = OnlineLSE.start(torch.zeros(4096, dtype=torch.int64, device="meta"), torch.float64)
    z = torch.empty(4096, 8192, dtype=torch.float64, device="meta")
    with CountOperations() as operations:  # type: ignore[no-untyped-call]
        _online_lse.update(state, z, 0, LogitTransform())
    assert operations.count < 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("v", [pytest.param(v, marks=on_gpu) for v in (5, 300, 20_000)])
def test_a_gradient_in_the_memory_of_the_logits_is_the_same(v: int, dtype: torch.dtype) -> None:
    """A store must not hit what another thread has yet to load. On a GPU, a race would show only now and then."""
    device, n = ("cuda", 500) if GPU else ("cpu", 6)
    products = torch.randn(n, v + v % 2, device=device)
    state = OnlineLSE.start(torch.arange(n, device=device) % v, torch.float32)
    coefficients = torch.rand(2, n, device=device)
    online_lse.update(*state, products[:, :v], 0, None, 1.0, None)
    rows = (state.target_ids, state.max_rest)
    out_of_place = torch.empty(n, v, dtype=dtype, device=device)
    online_lse.write_gradient(out_of_place, products[:, :v], *rows, 0, None, 1.0, None, *coefficients, False)
    for _ in range(100 if GPU else 1):
        z = products.clone()
        in_place = z.view(dtype)[:, :v]
        online_lse.write_gradient(in_place, z[:, :v], *rows, 0, None, 1.0, None, *coefficients, False)
        assert torch.equal(in_place, out_of_place)


TARGET_OUT_OF_RANGE = """
import torch
from amapo_loss import linear_token_logps
from tests.support.generators import examples
hidden = torch.zeros(3, 8, device="cuda", requires_grad=True)
linear_token_logps(hidden, torch.zeros(5, 8, device="cuda"), torch.tensor([0, {}, 4], device="cuda")).sum().item()
"""


class TestOnGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("keep_bytes", [0, 2**30, 2**40])
    @pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
    def test_a_head_of_realistic_size_is_exact_and_does_not_hold_the_logits(
        self,
        requires_grad: str,
        keep_bytes: int,
    ) -> None:
        """The head has 2,000 tokens, a vocabulary of 128,256, and tiles of the default size."""
        num_tokens, vocab_size = 2000, 128_256
        head, target_ids = confident_head(num_tokens, 1024, vocab_size, shared_mean=1.0, requires_grad=requires_grad)
        target_ids, grad_output = target_ids.cuda(), torch.randn(num_tokens, device="cuda")
        half = head.to("cuda", torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        bytes_before = torch.cuda.memory_allocated()
        actual = linear_token_logps(half.hidden, half.weight, target_ids, keep_bytes=keep_bytes)
        actual_gradients = gradients(actual, half, grad_output)
        returned = sum(gradient.nbytes for gradient in actual_gradients)
        peak = torch.cuda.max_memory_allocated() - bytes_before - returned
        assert peak < 4 * num_tokens * vocab_size + min(keep_bytes, 2 * num_tokens * vocab_size)
        double = half.to("cuda", torch.float64)
        expected = double.logits().log_softmax(-1).gather(1, target_ids[:, None]).squeeze(1)
        assert relative_error(actual, expected) < 1e-5
        for gradient, expected_gradient in zip(actual_gradients, gradients(expected, double, grad_output)):
            assert relative_error(gradient, expected_gradient) < 5e-3

    @pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
    def test_log_probs_do_not_synchronize_with_the_device(self, requires_grad: str) -> None:
        head = random_head(1, 64, 32, 1000, requires_grad).to("cuda", torch.bfloat16)
        target_ids = torch.arange(64, device="cuda")
        with no_synchronization():
            linear_token_logps(head.hidden[0], head.weight, target_ids, keep_bytes=10**6).sum().backward()
            sequence_logps(head.logits(), target_ids[None]).sum().backward()

    @pytest.mark.parametrize("target_id", [-1, 5, 2**32 + 3])
    def test_a_target_outside_the_vocabulary_fails_a_device_side_assertion(self, target_id: int) -> None:
        code = TARGET_OUT_OF_RANGE.format(target_id)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert result.returncode != 0
        assert b"Assertion" in result.stderr  # printed by the kernel; what PyTorch raises afterwards varies

    def test_logits_may_have_more_than_2_to_the_31_elements(self) -> None:
        """Offsets in the kernels have to be 64-bit integers."""
        logits = torch.zeros(1, 2**15, 2**16 + 8, dtype=torch.bfloat16, device="cuda")
        logits[0, -1, -1] = 3.0
        logits.requires_grad_()
        labels = torch.full((1, 2**15), IGNORE_INDEX, device="cuda")
        labels[0, -1] = 2**16 + 7
        logps = sequence_logps(logits, labels, shift=False)
        logps.sum().backward()
        lse_rest = torch.tensor(2**16 + 7.0).log()
        torch.testing.assert_close(logps.cpu(), torch.nn.functional.logsigmoid(3 - lse_rest)[None])
        assert logits.grad is not None
        assert logits.grad[0, -1, -1].item() == pytest.approx(torch.sigmoid(lse_rest - 3).item(), rel=1e-2)
        assert not logits.grad[0, :-1].any()
