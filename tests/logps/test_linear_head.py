"""From hidden states to log-probs without the logits, against autograd through the logits in float64."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from amapo_loss import amapo_loss, linear_sequence_logps, linear_token_logps, sequence_logps
from amapo_loss.logps._linear_head import _mm_out
from benchmarks.speed.memory import peak_bytes
from tests.support.backends import GPU, every_tiling, tiled
from tests.support.ranks import on_ranks

Tensor = torch.Tensor
IGNORED = -100


class Head(NamedTuple):
    """Its inputs, and how they become logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self[:3] if isinstance(x, Tensor) and x.requires_grad]

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Head":
        """A copy, with leaves of its own."""

        def copy(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype).requires_grad_(x.requires_grad)

        bias = None if self.bias is None else copy(self.bias)
        return self._replace(hidden=copy(self.hidden), weight=copy(self.weight), bias=bias)

    def logits(self) -> Tensor:
        return self.finished(self.hidden @ self.weight.T)

    def finished(self, product: Tensor) -> Tensor:
        z = (product if self.bias is None else product + self.bias) * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def sequence_logps(self, labels: Tensor, **options: Any) -> Tensor:
        """Of the package."""
        return linear_sequence_logps(
            self.hidden, self.weight, labels, self.bias, logit_scale=self.scale,
            final_logit_softcapping=self.softcap, **options,
        )  # fmt: skip


def naive(logits: Tensor, labels: Tensor, average: bool = True, shift: bool = True) -> Tensor:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    tokens = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counted
    return tokens.sum(1) / (counted.sum(1).clamp(min=1) if average else 1)


def gradients(outputs: Tensor, head: Head, upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, head.leaves, upstream.to(outputs), retain_graph=True))


def random_head(n: int, length: int, width: int, vocabulary: int, needs: str, seed: int = 0) -> Head:
    """Float64, with gradients for those of "hidden weight bias" that `needs` names; no bias unless it says so."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (n, length, width), "weight": (vocabulary, width), "bias": (vocabulary,)}
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(name in needs.split())
        for name, shape in shapes.items()
    )
    return Head(hidden, weight, bias if "bias" in needs else None)


def random_labels(n: int, length: int, vocabulary: int, ignored: float = 0.4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (n, length), generator=generator)
    labels[torch.rand(n, length, generator=generator) < ignored] = IGNORED
    return labels


class Rounding(NamedTuple):
    """How far roundings to a dtype may take a log-prob and, elementwise, each of the gradients."""

    of_logps: float
    of_gradients: list[Tensor]


def rounding(head: Head, labels: Tensor, upstream: Tensor, dtype: torch.dtype, options: dict[str, bool]) -> Rounding:
    """For a head in float64."""
    eps, computing = (torch.finfo(x).eps for x in (dtype, torch.promote_types(dtype, torch.float32)))
    hidden, weight, bias = head.hidden.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach()
    product = (hidden @ weight.T).requires_grad_()
    logits = head._replace(bias=bias).finished(product)
    of_product, of_capped = torch.autograd.grad(naive(logits, labels, **options), (product, logits), upstream)
    largest = max((x.abs().max().item() for x in (hidden, weight, bias) if x is not None and x.numel()), default=0)
    of_logits = 8 * computing * max(head.scale, 1) * (hidden.shape[2] * largest**2 + 1)
    # An element is off by what its logit is; is rounded when kept, and as a factor; and below a point absolutely.
    off = of_product.abs() * (eps + 4 * of_logits) + (2 * torch.finfo(dtype).tiny if dtype == torch.float16 else 0)
    if head.softcap is not None:  # whose slope is what is left of 1
        off += 8 * computing * head.scale * of_capped.abs()
    bounds = (off @ weight.abs(), torch.einsum("ntv,ntk->vk", off, hidden.abs()), off.sum((0, 1)))
    needed = [bound for bound, x in zip(bounds, head[:3]) if isinstance(x, Tensor) and x.requires_grad]
    return Rounding(of_logits * (1 if options["average"] else labels.shape[1]), needed)


NEEDS = ["hidden", "hidden weight", "weight", "hidden bias", "bias", "hidden weight bias", ""]


@every_tiling
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 4), st.integers(0, 7), st.integers(1, 9), st.integers(1, 40), st.integers(1, 200),
    st.sampled_from(NEEDS), st.sampled_from([0, 100, 400, 10**9]), st.booleans(), st.booleans(), st.floats(0, 1),
    st.sampled_from([(1.0, None), (0.3, None), (1.0, 3.0), (2.0, 1.5)]), st.integers(0, 2**31),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_against_autograd(
    backend: str, n: int, length: int, width: int, vocabulary: int, elements: int, needs: str, keep_bytes: int,
    average: bool, shift: bool, ignored: float, finish: tuple[float, float | None], seed: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    head = random_head(n, length, width, vocabulary, needs, seed).to("cpu", dtype).to("cpu", torch.float64)
    head = head._replace(scale=finish[0], softcap=finish[1])
    labels = random_labels(n, length, vocabulary, ignored, seed)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = {"average": average, "shift": shift}
    expected, bounds = naive(head.logits(), labels, **options), rounding(head, labels, upstream, dtype, options)

    with tiled(backend, elements) as device:
        there = head.to(device, dtype)
        got = there.sequence_logps(labels.to(device), keep_bytes=keep_bytes, **options)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(
            got.cpu().double(), expected, rtol=8 * torch.finfo(got.dtype).eps, atol=bounds.of_logps
        )
        assert got.requires_grad == bool(there.leaves)
        if not there.leaves:
            return
        got_gradients, again = (gradients(got, there, upstream) for _ in range(2))
    expected_gradients = gradients(expected, head, upstream)
    for gradient, same, right, bound in zip(got_gradients, again, expected_gradients, bounds.of_gradients):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, same), "another backward gives the same"
        allowed = bound + 2 * torch.finfo(dtype).eps * right.abs() + torch.finfo(dtype).tiny
        error = (gradient.cpu().double() - right).abs() / allowed
        assert (error <= 1).all(), f"{error.max():.2f} of what rounding may do"


@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("needs", NEEDS[:-1])
@pytest.mark.parametrize("finish", [(1.0, None), (0.7, 2.0)])
def test_gradcheck(needs: str, finish: tuple[float, float | None], keep_bytes: int) -> None:
    """Against finite differences, with any gradient from upstream for every token."""
    head = random_head(1, 6, 3, 9, needs)
    targets = torch.tensor([0, 8, 3, 3, 7, 1])

    def logps(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        hidden, weight = (next(given) if x.requires_grad else x for x in head[:2])
        bias = None if head.bias is None else next(given)
        return linear_token_logps(
            hidden[0], weight, targets, bias, keep_bytes=keep_bytes, logit_scale=finish[0],
            final_logit_softcapping=finish[1],
        )  # fmt: skip

    with tiled("torch", 20):
        assert gradcheck(logps, head.leaves)


@every_tiling
def test_of_no_tokens_and_of_sequences_without_a_counted_one(backend: str) -> None:
    """Zero, connected to the graph, with zero gradients."""
    for n, length, needs in ((0, 4, "hidden weight"), (3, 0, "hidden"), (2, 5, "hidden"), (2, 5, "hidden weight bias")):
        with tiled(backend) as device:
            head = random_head(n, length, 8, 30, needs).to(device, torch.float32)
            logps = head.sequence_logps(torch.full((n, length), IGNORED, device=device))
            assert torch.equal(logps.cpu(), torch.zeros(n))
            for gradient in gradients(logps, head, torch.ones(n)):
                assert not gradient.any()
            # Of one sequence without, the others are as they would be by themselves.
            labels = random_labels(n, length, 30).to(device)
            labels[:1] = IGNORED
            logps = head.sequence_logps(labels)
            assert torch.equal(logps[1:], head._replace(hidden=head.hidden[1:]).sequence_logps(labels[1:]))
            (gradient, *_) = gradients(logps, head, torch.ones(n))
            assert not gradient[:1].any()


@pytest.mark.parametrize("needs", NEEDS[:-1])
def test_without_a_graph(needs: str) -> None:
    """Under no_grad and in inference mode: the same numbers, and nothing saved."""
    head, labels = random_head(3, 5, 8, 30, needs), random_labels(3, 5, 30)
    expected = head.sequence_logps(labels)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            got = head.sequence_logps(labels)
        assert not got.requires_grad
        torch.testing.assert_close(got, expected.detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("needs", ["hidden", "hidden weight"])
def test_double_backward_raises(needs: str) -> None:
    head = random_head(2, 5, 8, 30, needs)
    loss = head.sequence_logps(random_labels(2, 5, 30)).square().sum()
    (gradient, *_) = torch.autograd.grad(loss, head.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("needs", ["hidden", "hidden weight bias"])
def test_inside_a_checkpoint(needs: str, keep_bytes: int) -> None:
    """What forward saves can be thrown away, and made again."""
    head, labels = random_head(3, 5, 8, 30, needs), random_labels(3, 5, 30)
    upstream = torch.randn(3, dtype=torch.float64)

    def logps(hidden: Tensor) -> Tensor:
        return head._replace(hidden=hidden).sequence_logps(labels, keep_bytes=keep_bytes)

    expected = gradients(logps(head.hidden), head, upstream)
    got = checkpoint(logps, head.hidden, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(got, head.leaves, upstream), tuple(expected))


def test_the_callers_tensors_are_left_alone() -> None:
    for needs in NEEDS:
        head, labels = random_head(2, 6, 8, 30, needs), random_labels(2, 6, 30)
        before = [x.clone() for x in (*head[:3], labels) if isinstance(x, Tensor)]
        logps = head.sequence_logps(labels)
        if head.leaves:
            logps.sum().backward()
        assert all(map(torch.equal, before, (x for x in (*head[:3], labels) if isinstance(x, Tensor))))


def test_strides() -> None:
    """Hidden states of [T, N, H] models, a weight that is transposed, every other label."""
    head, labels = random_head(3, 6, 8, 30, "hidden weight"), random_labels(3, 12, 30)[:, ::2]
    strided = Head(head.hidden.transpose(0, 1).contiguous().transpose(0, 1), head.weight.T.contiguous().T)
    torch.testing.assert_close(strided.sequence_logps(labels), head.sequence_logps(labels), rtol=1e-14, atol=0)


@every_tiling
@pytest.mark.parametrize("target", [-1, 30, -100, 10**12])
@pytest.mark.parametrize("needs", ["", "hidden", "hidden weight"])
def test_a_target_outside_the_vocabulary_fails(backend: str, needs: str, target: int) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("an assertion on a device ends its process; see TestOnAGpu")
    head = random_head(1, 3, 8, 30, needs).to("cpu", torch.float32)
    message = rf"token ids must be in \[0, 30\), got {target}"
    with tiled(backend), pytest.raises(IndexError, match=message):
        linear_token_logps(head.hidden[0], head.weight, torch.tensor([0, target, 3]))
    if target != IGNORED:
        with tiled(backend), pytest.raises(IndexError, match=message):
            head.sequence_logps(torch.tensor([[IGNORED, target, IGNORED]]))


@every_tiling
@pytest.mark.parametrize("needs", ["", "hidden", "hidden weight"])
def test_nan_and_infinity_stay_what_they_are(backend: str, needs: str) -> None:
    """In the log-probs of their tokens, and nowhere else."""
    for wrong in (torch.nan, torch.inf, -torch.inf):
        head = random_head(1, 4, 8, 30, needs)
        head.hidden.data[0, 2] = wrong
        with tiled(backend) as device:
            there = head.to(device, torch.float32)
            logps = linear_token_logps(there.hidden[0], there.weight, torch.tensor([0, 4, 3, 9], device=device))
        assert logps.isfinite().tolist() == [True, True, False, True]


@every_tiling
@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("needs", ["hidden", "hidden weight"])
def test_words_that_a_bias_rules_out(backend: str, needs: str, keep_bytes: int) -> None:
    """A bias of -inf, whole tiles of it, even for all words but the target; no gradient becomes NaN."""
    for allowed in ([3], [3, 20], [20, 25, 3]):
        head, targets = random_head(1, 4, 8, 30, needs), torch.tensor([3, 3, allowed[-1], 3])
        bias = torch.full((30,), -torch.inf, dtype=torch.float64).index_fill(0, torch.tensor(allowed), 0.0)
        expected = (head.hidden[0] @ head.weight.T + bias).log_softmax(-1)[torch.arange(4), targets]
        with tiled(backend, 16) as device:
            there = head.to(device, torch.float32)
            got = linear_token_logps(
                there.hidden[0], there.weight, targets.to(device), bias.float().to(device), keep_bytes=keep_bytes
            )
            torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)
            for gradient, right in zip(gradients(got, there, torch.ones(4)), gradients(expected, head, torch.ones(4))):
                torch.testing.assert_close(gradient.cpu().double(), right, rtol=1e-4, atol=1e-5)


# Precision.


def confident_head(tokens: int, width: int, vocabulary: int, shared: float, seed: int = 0) -> tuple[Head, Tensor]:
    """A head whose rows share a mean, as those of trained models do, and tokens of all confidences above p = 0.99.

    In float64, of numbers that bfloat16 holds.
    """
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    weight = (0.04 * (randn(vocabulary, width) + shared * randn(1, width))).bfloat16().double()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    noise, mean = randn(tokens, width) * (2.3 / (0.04 * width**0.5)), weight.mean(0)
    noise -= (noise @ mean / mean.square().sum()).outer(mean)
    own = weight[targets] - mean
    logit = torch.empty(tokens, dtype=torch.float64).uniform_(15, 24, generator=generator)
    hidden = noise + own * ((logit - (noise * own).sum(1)) / own.square().sum(1))[:, None]
    return Head(hidden.bfloat16().double(), weight), targets


def relative(got: Tensor, right: Tensor) -> float:
    got, right = got.detach().cpu().double(), right.detach()
    return float((got - right).norm() / right.norm())


@every_tiling
@pytest.mark.parametrize("needs", ["hidden", "hidden weight"])
def test_confident_tokens_keep_their_gradient(backend: str, needs: str) -> None:
    """In bfloat16 at p > 0.99, where 1 - p from a sum of exponentials with the target has lost most of its digits."""
    head, targets = confident_head(96, 64, 500, shared=0.0)
    head = head.to("cpu", torch.float64)
    for x, name in ((head.hidden, "hidden"), (head.weight, "weight")):
        x.requires_grad_(name in needs)
    upstream = torch.ones(96, dtype=torch.float64)
    expected = head.logits().log_softmax(-1)[torch.arange(96), targets]
    assert expected.exp().quantile(0.1) > 0.99
    with tiled(backend, 2**14) as device:
        there = head.to(device, torch.bfloat16)
        got = linear_token_logps(there.hidden, there.weight, targets.to(device))
        got_gradients = gradients(got, there, upstream)
    assert relative(got, expected) < 1e-4
    for gradient, right in zip(got_gradients, gradients(expected, head, upstream)):
        assert relative(gradient, right) < 4e-3


@every_tiling
@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("needs", ["hidden", "hidden weight"])
def test_tiles_do_not_round_the_gradient(backend: str, needs: str, keep_bytes: int) -> None:
    """Of its bfloat16 entries hardly any changes with the number of tiles; with the product of each rounded, 36% do."""
    head, targets = confident_head(64, 64, 1600, shared=3.0)
    upstream = torch.randn(64, generator=torch.Generator().manual_seed(0))
    results = []
    for elements in (64 * 1600, 64 * 100):
        with tiled(backend, elements) as device:
            there = Head(*(x.to(device, torch.bfloat16).requires_grad_(name in needs)
                           for x, name in zip(head[:2], ("hidden", "weight"))))  # fmt: skip
            got = linear_token_logps(there.hidden, there.weight, targets.to(device), keep_bytes=keep_bytes)
            results.append(gradients(got, there, upstream))
    for whole, parts in zip(*results):
        assert (whole != parts).float().mean() < 0.01


# In other people's programs.


@pytest.mark.parametrize("needs", ["hidden", "hidden weight"])
def test_under_autocast(needs: str) -> None:
    """Factors are rounded as autocast does, float32 weights get a float32 gradient, float64 is left alone."""
    exact = random_head(2, 6, 16, 40, needs)
    labels, upstream = random_labels(2, 6, 40), torch.tensor([0.3, -0.7], dtype=torch.float64)
    rounded = exact.to("cpu", torch.bfloat16).to("cpu", torch.float64)
    expected = naive(rounded.logits(), labels)
    single = exact.to("cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = single.sequence_logps(labels)
        mixed = single._replace(hidden=single.hidden.bfloat16()).sequence_logps(labels)
        double = exact.sequence_logps(labels)
    assert got.dtype == mixed.dtype == torch.float32
    torch.testing.assert_close(double, naive(exact.logits(), labels), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # nor does it matter where backward is called
        inside = gradients(got, single, upstream)
    for gradient, same, right in zip(gradients(got, single, upstream), inside, gradients(expected, rounded, upstream)):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, same)
        assert relative(gradient, right) < 1e-5


@pytest.fixture
def _forget_compiled_code() -> Any:
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_forget_compiled_code")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
@pytest.mark.parametrize("keep_bytes", [0, 2000])
@pytest.mark.parametrize("needs", NEEDS)
def test_compiles_without_a_graph_break(needs: str, keep_bytes: int) -> None:
    def step(head: Head, labels: Tensor) -> Tensor:
        return head.sequence_logps(labels, keep_bytes=keep_bytes).square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (2, 5, 3):
        head, labels = random_head(n, 6, 8, 30, needs), random_labels(n, 6, 30, seed=n)
        got, expected = compiled(head, labels), step(head, labels)
        torch.testing.assert_close(got, expected)
        if head.leaves:
            torch.testing.assert_close(*(torch.autograd.grad(x.sum(), head.leaves) for x in (got, expected)))

    def tokens(head: Head, targets: Tensor) -> Tensor:
        return linear_token_logps(head.hidden[0], head.weight, targets, head.bias, keep_bytes=keep_bytes).exp().sum()

    explained = torch._dynamo.explain(tokens)(head, torch.zeros(6, dtype=torch.int64))
    assert explained.graph_break_count == 0


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operators_are_what_they_say(with_bias: bool, softcap: float | None) -> None:
    """Their schemas, their shapes without data, and that they are differentiated nowhere but where we do."""
    head = random_head(1, 6, 8, 30, "bias" if with_bias else "")
    bias = None if head.bias is None else head.bias.detach()
    inputs = (head.hidden[0], head.weight, torch.arange(6), bias, torch.float64, 0.5, softcap)
    upstream = torch.randn(6, dtype=torch.float64)
    for keep_bytes in (0, 10**9):
        statistics = torch.ops.amapo_loss.head_statistics(*inputs, keep_bytes)
        torch.library.opcheck(torch.ops.amapo_loss.head_statistics.default, (*inputs, keep_bytes))
        for needs in ((True, True, with_bias), (True, False, False), (False, True, False)):
            arguments = (upstream, *inputs, *statistics, *needs)
            torch.library.opcheck(torch.ops.amapo_loss.head_gradients.default, arguments)
    torch.library.opcheck(torch.ops.amapo_loss.frozen_head.default, inputs)


def test_tied_embeddings() -> None:
    """The weight's gradient is that of both its uses."""
    embedding = torch.nn.Embedding(30, 8, dtype=torch.float64)
    ids, labels = torch.randint(30, (4, 6)), random_labels(4, 6, 30)

    def gradient(logps: Callable[[Tensor], Tensor]) -> Tensor:
        loss = amapo_loss(*logps(embedding(ids).tanh()).chunk(2)).loss
        return torch.autograd.grad(loss, embedding.weight)[0]

    torch.testing.assert_close(
        gradient(lambda hidden: linear_sequence_logps(hidden, embedding.weight, labels)),
        gradient(lambda hidden: naive(hidden @ embedding.weight.T, labels)),
    )


def test_never_holds_the_logits() -> None:
    """What PyTorch allocates at once, over what was there: inputs of 0.2 MB, logits of 33 MB."""
    head, labels = random_head(2, 512, 16, 8192, "hidden").to("cpu", torch.float32), random_labels(2, 512, 8192, 0.0)
    whole = 1024 * 8192 * 4

    def step(head: Head, logps: Callable[[Head], Tensor]) -> None:
        logps(head).sum().backward()

    through_logits = partial(step, logps=lambda head: naive(head.logits(), labels))
    assert peak_bytes(partial(through_logits, head)) > 2.9 * whole
    for needs in ("hidden", "hidden weight"):
        head = random_head(2, 512, 16, 8192, needs).to("cpu", torch.float32)
        with tiled("torch", 2**18):
            assert peak_bytes(partial(step, head, lambda head: head.sequence_logps(labels))) < whole / 8


def of_a_dtensor(rank: int, group: Any) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    head = random_head(1, 4, 8, 30, "bias")
    spread = partial(distribute_tensor, device_mesh=init_device_mesh("cpu", (1,)), placements=[Shard(0)])
    messages = []
    for weight, bias in ((spread(head.weight), None), (head.weight, spread(torch.zeros(30)))):
        with pytest.raises(TypeError) as raised:
            linear_token_logps(head.hidden[0], weight, torch.arange(4), bias)
        messages.append(str(raised.value))
    return messages


def test_a_weight_spread_over_devices_is_refused() -> None:
    (messages,) = on_ranks(1, of_a_dtensor)
    for name, message in zip(("weight", "bias"), messages):
        assert message.startswith(f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor()")


def test_the_product_that_only_a_gpu_takes_exists() -> None:
    """As we call it; a CPU, which has no such kernel, can at least be asked for its shapes."""
    half, single = (partial(torch.empty, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    out = _mm_out(single(4, 8)[:, :6], half(4, 5), half(6, 5).T)
    assert (out.dtype, out.shape) == (torch.float32, (4, 6))
    assert "dtype_out" in torch.ops.aten.addmm.overloads()


OUT_OF_RANGE = """
import torch
from amapo_loss import linear_token_logps
hidden = torch.zeros(3, 8, device="cuda", requires_grad=True)
linear_token_logps(hidden, torch.zeros(5, 8, device="cuda"), torch.tensor([0, {}, 4], device="cuda")).sum().item()
"""


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("keep_bytes", [0, 2**30, 2**40])
    @pytest.mark.parametrize("needs", ["hidden", "hidden weight"])
    def test_a_head_of_its_real_size(self, needs: str, keep_bytes: int) -> None:
        """2,000 tokens of 128,256 words, the tiles as they come: exact, and far below their logits' memory."""
        tokens, vocabulary = 2000, 128_256
        head, targets = confident_head(tokens, 1024, vocabulary, shared=1.0)
        targets, upstream = targets.cuda(), torch.randn(tokens, device="cuda")
        there = Head(*(x.to("cuda", torch.bfloat16).requires_grad_(name in needs)
                       for x, name in zip(head[:2], ("hidden", "weight"))))  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps = linear_token_logps(there.hidden, there.weight, targets, keep_bytes=keep_bytes)
        got = gradients(logps, there, upstream)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < 4 * tokens * vocabulary + min(keep_bytes, 2 * tokens * vocabulary)
        double = there.to("cuda", torch.float64)
        expected = double.logits().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        assert relative(logps, expected.cpu()) < 1e-5
        for gradient, right in zip(got, gradients(expected, double, upstream)):
            assert relative(gradient, right.cpu()) < 5e-3

    @pytest.mark.parametrize("needs", ["hidden", "hidden weight"])
    def test_no_token_waits(self, needs: str) -> None:
        head, targets = random_head(1, 64, 32, 1000, needs).to("cuda", torch.bfloat16), torch.arange(64, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        linear_token_logps(head.hidden[0], head.weight, targets, keep_bytes=10**6).sum().backward()
        sequence_logps(head.logits(), targets[None]).sum().backward()
        torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("target", [-1, 5, 2**32 + 3])
    def test_a_target_outside_the_vocabulary_is_asserted(self, target: int) -> None:
        result = subprocess.run([sys.executable, "-c", OUT_OF_RANGE.format(target)], capture_output=True, check=False)
        assert result.returncode != 0
        assert b"device-side assert" in result.stderr

    def test_more_logits_than_32_bits_count(self) -> None:
        logits = torch.zeros(1, 2**15, 2**16 + 8, dtype=torch.bfloat16, device="cuda")
        logits[0, -1, -1] = 3.0
        logits.requires_grad_()
        labels = torch.full((1, 2**15), IGNORED, device="cuda")
        labels[0, -1] = 2**16 + 7
        logps = sequence_logps(logits, labels, shift=False)
        logps.sum().backward()
        others = torch.tensor(2**16 + 7.0).log()
        torch.testing.assert_close(logps.cpu(), torch.nn.functional.logsigmoid(3 - others)[None])
        assert logits.grad is not None
        assert logits.grad[0, -1, -1].item() == pytest.approx(torch.sigmoid(others - 3).item(), rel=1e-2)
        assert not logits.grad[0, :-1].any()
