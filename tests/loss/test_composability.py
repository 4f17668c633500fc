"""In other people's programs: compiled, transformed, without a graph, on strided tensors, never waiting."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from amapo_loss import AdaptiveMargin, AMaPOLoss, amapo_loss, dpo_loss, sequence_logps, simpo_loss
from tests.support.generators import COMPILERS, every_loss, every_margin, gradients, random_logps, statistics


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("formula", ["paper", "released"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
def test_compiles_without_a_graph_break(compiler: str, formula: Any) -> None:
    margin = AdaptiveMargin(formula=formula)

    def step(chosen: torch.Tensor, rejected: torch.Tensor, ref: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        loss, diagnostics = amapo_loss(chosen, rejected, ref, ref, margin=margin, label_smoothing=0.1)
        return loss, diagnostics.summary()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for n in (8, 33):
        chosen, rejected = random_logps(n)
        ref = torch.linspace(-2, -1, n)
        (loss, summary), (expected, expected_summary) = compiled(chosen, rejected, ref), step(chosen, rejected, ref)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(summary, expected_summary, rtol=1e-5, atol=1e-6)
        inputs = [chosen, rejected]
        got = torch.autograd.grad(loss, inputs)
        torch.testing.assert_close(got, torch.autograd.grad(expected, inputs))


@every_margin
def test_every_margin_compiles(margin: AdaptiveMargin) -> None:
    compiled = torch.compile(amapo_loss, fullgraph=True, backend="aot_eager")
    for given_statistics in (None, statistics(0.3, 1.0)):
        got = compiled(*random_logps(8), margin=margin, statistics=given_statistics)
        expected = amapo_loss(*random_logps(8), margin=margin, statistics=given_statistics)
        torch.testing.assert_close(got.loss, expected.loss)


def test_the_other_losses_and_the_module_compile() -> None:
    inputs = random_logps(8)
    for function, arguments in (
        (simpo_loss, inputs),
        (dpo_loss, inputs + random_logps(8, seed=1)),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments).loss, function(*arguments).loss)
    module = AMaPOLoss()
    expected = module(*inputs)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs), expected)
    assert module.diagnostics is not None


def test_a_new_batch_size_does_not_recompile() -> None:
    """Once the size is known to vary, one graph serves all of them."""
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(amapo_loss, fullgraph=True, backend=counting)
    for n in (8, 9, 10, 31, 64, 1000):
        compiled(*random_logps(n))
    assert graphs <= 2


@every_loss
def test_func_grad_agrees_with_backward(loss_fn: Any) -> None:
    inputs = random_logps(9)
    expected = gradients(loss_fn(*inputs), inputs)
    detached = [x.detach() for x in inputs]
    got = torch.func.grad(lambda *x: loss_fn(*x).loss, argnums=(0, 1))(*detached)
    torch.testing.assert_close(got, expected)


@every_loss
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_none_is_wanted(loss_fn: Any, context: Any) -> None:
    inputs = random_logps(9)
    with context():
        loss = loss_fn(*inputs).loss
    assert not loss.requires_grad
    assert torch.equal(loss, loss_fn(*inputs).loss)
    assert not loss_fn(*(x.detach() for x in inputs)).loss.requires_grad


@every_loss
def test_diagnostics_are_detached(loss_fn: Any) -> None:
    diagnostics = loss_fn(*random_logps(9)).diagnostics
    everything = [
        *diagnostics.pairs[:2], diagnostics.margins, diagnostics.scores, diagnostics.gradient_weights,
        *diagnostics.statistics,
        *diagnostics.summary().values(),
    ]  # fmt: skip
    assert not any(value.requires_grad for value in everything)


@every_loss
def test_strides_do_not_matter(loss_fn: Any) -> None:
    wide = torch.stack(random_logps(12), dim=1).detach().requires_grad_()
    strided = [wide[::2, 0], wide.flip(0)[::2, 1]]
    assert not strided[0].is_contiguous()
    packed = [x.detach().clone().requires_grad_() for x in strided]
    torch.testing.assert_close(loss_fn(*strided).loss, loss_fn(*packed).loss)
    got = torch.autograd.grad(loss_fn(*strided).loss, strided)
    torch.testing.assert_close(got, gradients(loss_fn(*packed), packed))
    expanded = torch.tensor(-1.0).expand(6)
    torch.testing.assert_close(loss_fn(expanded, packed[1]).loss, loss_fn(expanded.clone(), packed[1]).loss)


@every_margin
def test_nothing_waits_for_the_device(margin: AdaptiveMargin) -> None:
    """A meta tensor has no values: whoever looks at one, as a host synchronisation would, raises."""
    with torch.device("meta"):
        logps = [torch.empty(8, requires_grad=True) for _ in range(4)]
        lengths = {"chosen_lengths": torch.ones(8), "rejected_lengths": torch.ones(8)}
        for options in ({}, {"statistics": statistics(0.3, 1.0)}, lengths):
            for reduction in ("mean", "sum", "none"):
                loss, diagnostics = amapo_loss(
                    *logps, margin=margin, label_smoothing=0.1, reduction=reduction, **options
                )
                loss.sum().backward()
                assert all(value.is_meta for value in diagnostics.summary().values())
        sequence_logps(torch.empty(2, 5, 7, requires_grad=True), torch.ones(2, 5, dtype=torch.int64)).sum().backward()
    with pytest.raises(RuntimeError):
        loss.sum().item()
