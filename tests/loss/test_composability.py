"""The losses inside larger programs: under torch.compile and torch.func, without gradients, and on strided tensors."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from amapo_loss import (
    AdaptiveMargin,
    AMaPOLoss,
    ScoreWindow,
    Totals,
    amapo_loss,
    dpo_loss,
    sequence_logps,
    simpo_loss,
)
from tests.support.backends import on_gpu, to_device, triton_loss, two_launches
from tests.support.generators import (
    COMPILERS,
    compiled_gradient,
    every_loss,
    every_margin,
    gradients,
    random_logps,
    score_statistics,
)


@pytest.fixture(autouse=True)
def _reset_compiler() -> Iterator[None]:
    """Drop the compiled code of a test, so that it does not count towards the recompilations of the next one."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("formula", ["paper", "released"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the compiler
def test_amapo_loss_compiles_without_a_graph_break(compiler: str, formula: Any) -> None:
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
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


@every_margin
def test_every_margin_compiles(margin: AdaptiveMargin) -> None:
    compiled = torch.compile(amapo_loss, fullgraph=True, backend="aot_eager")
    for supplied in (None, score_statistics(0.3, 1.0)):
        actual = compiled(*random_logps(8), margin=margin, statistics=supplied)
        expected = amapo_loss(*random_logps(8), margin=margin, statistics=supplied)
        torch.testing.assert_close(actual.loss, expected.loss)


GIVEN: dict[str, dict[str, Any]] = {
    "number": {"margin": 0.5},
    "tensor": {"margin": torch.linspace(0, 1, 8)},
    "function": {"margin": lambda scores, statistics: scores - statistics.mean.to(scores.dtype)},
    "weights": {"weights": torch.arange(8)},
    "beta": {"beta": torch.tensor(0.7)},
}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=on_gpu)])
@pytest.mark.parametrize("options", GIVEN.values(), ids=GIVEN)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the compiler
def test_given_margins_weights_and_beta_compile(backend: Any, options: dict[str, Any]) -> None:
    device = triton_loss.device if backend == "triton" else "cpu"
    inputs = [x.to(device) for x in random_logps(8)]
    arguments: dict[str, Any] = {"backend": backend} | to_device(options, device)
    actual, expected = (
        function(*inputs, **arguments)
        for function in (torch.compile(amapo_loss, fullgraph=True, backend="aot_eager"), amapo_loss)
    )
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))
    torch.testing.assert_close(actual.diagnostics.summary(), expected.diagnostics.summary())


def test_the_other_losses_and_the_module_compile() -> None:
    inputs = random_logps(8)
    for function, arguments in ((simpo_loss, inputs), (dpo_loss, inputs + random_logps(8, seed=1))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments).loss, function(*arguments).loss)
    module = AMaPOLoss()
    expected = module(*inputs)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs), expected)
    assert module.diagnostics is not None


def test_two_graphs_serve_every_batch_size() -> None:
    """The first graph is for the first size alone. The second size makes torch.compile treat the size as dynamic."""
    num_graphs = 0

    def counting_backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    compiled = torch.compile(amapo_loss, fullgraph=True, backend=counting_backend)
    for n in (8, 9, 10, 31, 64, 1000):
        compiled(*random_logps(n))
    assert num_graphs <= 2


def test_an_exported_loss_takes_any_batch_size() -> None:
    class Loss(torch.nn.Module):
        def forward(self, chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> dict[str, torch.Tensor]:
            loss, diagnostics = amapo_loss(chosen_logps, rejected_logps)
            return {"loss": loss} | diagnostics.summary()

    example, other = ([x.detach() for x in random_logps(n)] for n in (8, 13))
    exported = torch.export.export(Loss(), tuple(example), dynamic_shapes=({0: torch.export.Dim("B", min=3)},) * 2)
    torch.testing.assert_close(exported.module()(*other), Loss()(*other))


@every_loss
def test_func_grad_agrees_with_backward(loss_fn: Any) -> None:
    inputs = random_logps(9)
    expected = gradients(loss_fn(*inputs), inputs)
    detached = [x.detach() for x in inputs]
    actual = torch.func.grad(lambda *x: loss_fn(*x).loss, argnums=(0, 1))(*detached)
    torch.testing.assert_close(actual, expected)


@every_loss
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the compiler
def test_func_grad_inside_compile_agrees_with_backward(loss_fn: Any) -> None:
    """Inside torch.compile, the arguments of such a function have `requires_grad=False` by mistake."""
    if loss_fn is two_launches:
        pytest.skip("the compiler cannot trace the patch that makes two launches")
    inputs = random_logps(9)
    expected = gradients(loss_fn(*inputs), inputs)
    gradient = torch.func.grad(lambda *x: loss_fn(*x).loss, argnums=(0, 1))
    torch.testing.assert_close(compiled_gradient(gradient, *(x.detach() for x in inputs)), expected)


@every_loss
def test_jacrev_agrees_with_backward(loss_fn: Any) -> None:
    chosen, rejected = random_logps(5)
    expected = torch.autograd.functional.jacobian(lambda x: loss_fn(x, rejected, reduction="none").loss, chosen)
    actual = torch.func.jacrev(lambda x: loss_fn(x, rejected.detach(), reduction="none").loss)(chosen.detach())
    torch.testing.assert_close(actual, expected)
    assert expected.diagonal().all()


@every_loss
def test_the_gradient_of_a_vmap_is_right_or_raises(loss_fn: Any) -> None:
    chosen, rejected = (torch.stack([x.detach(), x.detach() + 0.1]) for x in random_logps(9))
    losses = torch.func.vmap(lambda *x: loss_fn(*x).loss)

    def gradient() -> Any:
        return torch.func.grad(lambda x: losses(x, rejected).sum())(chosen)

    rows = [loss_fn(c, r) for c, r in zip(chosen, rejected)]
    torch.testing.assert_close(losses(chosen, rejected), torch.stack([row.loss for row in rows]))
    if loss_fn in (triton_loss, two_launches):
        with pytest.raises(NotImplementedError, match=r"no gradient under torch\.func\.vmap: use backend='torch'"):
            gradient()
        return
    expected = torch.func.grad(lambda x: sum(loss_fn(c, r).loss for c, r in zip(x, rejected)))(chosen)
    torch.testing.assert_close(gradient(), expected)


@every_loss
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_graph_is_built_without_gradients(loss_fn: Any, context: Any) -> None:
    inputs = random_logps(9)
    with context():
        loss = loss_fn(*inputs).loss
    assert not loss.requires_grad
    assert torch.equal(loss, loss_fn(*inputs).loss)
    assert not loss_fn(*(x.detach() for x in inputs)).loss.requires_grad


@every_loss
def test_diagnostics_are_detached(loss_fn: Any) -> None:
    diagnostics = loss_fn(*random_logps(9)).diagnostics
    tensors = [
        *diagnostics.pairs[:2],
        diagnostics.margins,
        diagnostics.scores,
        diagnostics.gradient_weights,
        *diagnostics.statistics,
        *diagnostics.summary().values(),
    ]
    assert not any(tensor.requires_grad for tensor in tensors)


@every_loss
def test_strides_do_not_matter(loss_fn: Any) -> None:
    both = torch.stack(random_logps(12), dim=1).detach().requires_grad_()
    strided = [both[::2, 0], both.flip(0)[::2, 1]]
    assert not strided[0].is_contiguous()
    contiguous = [x.detach().clone().requires_grad_() for x in strided]
    torch.testing.assert_close(loss_fn(*strided).loss, loss_fn(*contiguous).loss)
    actual = torch.autograd.grad(loss_fn(*strided).loss, strided)
    torch.testing.assert_close(actual, gradients(loss_fn(*contiguous), contiguous))
    expanded = torch.tensor(-1.0).expand(6)  # stride 0
    torch.testing.assert_close(loss_fn(expanded, contiguous[1]).loss, loss_fn(expanded.clone(), contiguous[1]).loss)


@every_margin
def test_nothing_synchronizes_with_the_device(margin: AdaptiveMargin) -> None:
    """A meta tensor has no values, so code that reads a value on the host, and thus would synchronize, raises here."""
    with torch.device("meta"):
        logps = [torch.empty(8, requires_grad=True) for _ in range(4)]
        lengths = {"chosen_lengths": torch.ones(8), "rejected_lengths": torch.ones(8)}
        weights = {"weights": torch.ones(8, dtype=torch.bool)}
        numbers = {"weights": torch.ones(8), "beta": torch.tensor(2.0)}
        for options in (
            {},
            {"statistics": score_statistics(0.3, 1.0)},
            {"statistics": ScoreWindow(4)},
            lengths,
            weights,
            numbers,
            {"margin": torch.ones(8)},
            {"margin": lambda scores, statistics: scores - statistics.mean},
        ):
            for reduction in ("mean", "sum", "none"):
                arguments: dict[str, Any] = {"margin": margin, "label_smoothing": 0.1, "reduction": reduction} | options
                loss, diagnostics = amapo_loss(*logps, **arguments)
                loss.sum().backward()
                totals = diagnostics.totals() + diagnostics.totals() + Totals.none()
                for summary in (diagnostics.summary(), totals.summary()):
                    assert all(value.is_meta for value in summary.values())
        sequence_logps(torch.empty(2, 5, 7, requires_grad=True), torch.ones(2, 5, dtype=torch.int64)).sum().backward()
    with pytest.raises(RuntimeError):  # reading a value does raise
        loss.sum().item()
