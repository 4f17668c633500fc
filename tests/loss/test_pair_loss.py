"""The fused kernel: held against the reference pair by pair, and what an operator of PyTorch has to do.

Its values are held against the oracle in test_oracle.py, its properties and edge cases beside the other backend's.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from amapo_loss import AdaptiveMargin, ScoreWindow, _reference, amapo_loss
from amapo_loss.kernels import pair_loss
from tests.support.backends import GPU, OnBackend, moved, on_gpu, triton_loss, two_launches
from tests.support.generators import (
    COMPILERS,
    MARGINS,
    as_float64,
    batches,
    gradients,
    options,
    random_logps,
    statistics,
    tensors,
)
from tests.support.oracle import Array, oracle

pytestmark = on_gpu
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
both_ways = pytest.mark.parametrize("loss_fn", [triton_loss, two_launches], ids=["one launch", "two launches"])


@both_ways
@settings(max_examples=200, deadline=None)
@given(batches(), st.sampled_from(MARGINS), options, st.booleans())
def test_margins_are_the_references(
    loss_fn: OnBackend, batch: tuple[Array, Array], margin: AdaptiveMargin, options: dict[str, float], supplied: bool
) -> None:
    """Pair by pair. The gate is a jump: a pair whose margin rounding may open or close, as the oracle says, may have
    either value in either backend, 0 or the one behind the open gate; no other pair is let off."""
    given_logps = tensors({"chosen_logps": batch[0], "rejected_logps": batch[1]}, torch.float32)
    scale = options["beta"] * float(np.abs(batch).max())
    own = (0.3 * scale, 0.5 * scale) if supplied else None
    given_statistics = statistics(*own) if own else None
    expected = oracle(*as_float64(given_logps).values(), **options, margin=margin, statistics=own, unit=2.0**-23)
    ours, theirs = (
        run(**given_logps, **options, margin=margin, statistics=given_statistics).diagnostics
        for run in (loss_fn, amapo_loss)
    )
    let_off = torch.tensor(expected.at_gate) & ((ours.margins == 0) | (theirs.margins == 0))
    # Each may be at one end of what rounding allows.
    width = torch.tensor(expected.margins.high - expected.margins.low)
    apart = (ours.margins.double() - theirs.margins.double()).abs()
    assert torch.all(let_off | (apart <= width * (1 + 1e-6)))
    assert ours.statistics.count == theirs.statistics.count


@pytest.mark.parametrize("n", [0, 1, 2, 127, 128, 129, 2047, 2049, 4096, 8191, 8192, 8193, 10240, 10241, 40000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_block_and_launch_boundary(n: int, reduction: Any) -> None:
    inputs = random_logps(n)
    ours, theirs = (run(*inputs, reduction=reduction, label_smoothing=0.1) for run in (triton_loss, amapo_loss))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.diagnostics.summary(), theirs.diagnostics.summary(), rtol=1e-4, atol=1e-5)
    assert ours.diagnostics.statistics.count == n


def test_has_the_references_constants() -> None:
    assert pair_loss.MAX_EXPONENT.value == _reference.MAX_EXPONENT
    assert pair_loss.EPS.value == torch.finfo(torch.float32).eps


@both_ways
def test_a_mean_far_larger_than_the_spread(loss_fn: OnBackend) -> None:
    """Mean 50, standard deviation 0.01: float32 sums would be 100% off, a float32 mean 5e-4."""
    chosen = 50 + 0.01 * torch.randn(3000, generator=torch.Generator().manual_seed(0))
    margin = AdaptiveMargin(scaling="linear")
    margins = loss_fn(chosen, torch.zeros(3000), beta=1.0, margin=margin).diagnostics.margins
    exact = amapo_loss(chosen.double(), torch.zeros(3000).double(), beta=1.0, margin=margin).diagnostics
    within_rounding = (exact.scores - exact.statistics.mean).abs() < 3 * torch.finfo(torch.float32).eps * 50
    assert within_rounding.sum() < 10  # those have none, see test_margins_are_the_references
    torch.testing.assert_close(margins.double()[~within_rounding], exact.margins[~within_rounding], rtol=1e-5, atol=0)


def test_offsets_beyond_32_bits() -> None:
    """Of one entry in 134 million, the last lies 2**31 from the first."""
    sparse = torch.empty(2**31 + 1, dtype=torch.bfloat16, device=triton_loss.device)[:: 2**27]
    with torch.no_grad():
        sparse.copy_(torch.linspace(-2, -1, 17))
    dense = torch.linspace(-2, -1, 17).bfloat16()
    ours, theirs = amapo_loss(sparse, -sparse, backend="triton"), amapo_loss(dense, -dense)
    torch.testing.assert_close(ours.loss.cpu(), theirs.loss)


def arguments(n: int = 9, **changed: Any) -> list[Any]:
    """Those of the operator."""
    chosen, rejected = (x.detach().to(triton_loss.device) for x in random_logps(n))
    values: dict[str, Any] = {
        "chosen_logps": chosen, "rejected_logps": rejected, "ref_chosen_logps": None, "ref_rejected_logps": None,
        "chosen_lengths": None, "rejected_lengths": None, "mean": None, "std": None, "rank_moments": None,
        "beta_tensor": None,
        "beta": 2.0, "label_smoothing": 0.1, "paper": True, "normalize": True, "exponential": True, "clip": True,
        "reduction": "mean", "with_gradient": True,
    }  # fmt: skip
    return list((values | changed).values())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"reduction": "none"},
        {"with_gradient": False},
        {"ref_chosen_logps": torch.zeros(9), "ref_rejected_logps": torch.ones(9).bfloat16()},
        {"chosen_lengths": torch.arange(9), "rejected_lengths": torch.ones(9)},
        {"mean": torch.tensor(0.3), "std": torch.tensor(1.0, dtype=torch.float64)},
        {"rank_moments": torch.tensor([[3, 0.1, 2.0], [6, 0.2, 3.0]], dtype=torch.float64)},
        {"beta_tensor": torch.tensor(3.0)},
    ],
    ids=lambda changed: "-".join(changed) or "plain",
)
def test_opcheck(changed: dict[str, Any]) -> None:
    torch.library.opcheck(torch.ops.amapo_loss.pair_loss.default, arguments(**moved(changed, triton_loss.device)))


def test_opcheck_moments() -> None:
    every = arguments()
    torch.library.opcheck(torch.ops.amapo_loss.moments.default, [*every[:6], *every[9:11]])


def test_computes_a_gradient_only_where_one_is_wanted() -> None:
    operator = torch.ops.amapo_loss.pair_loss.default
    assert operator(*arguments(with_gradient=True))[1].shape == (2, 9)
    assert operator(*arguments(with_gradient=False))[1].shape == (0,)
    inputs = [x.to(triton_loss.device) for x in random_logps(9)]
    with patch.object(pair_loss, "_PairLoss") as differentiable, torch.no_grad():
        amapo_loss(*inputs, backend="triton")
        amapo_loss(*(x.detach() for x in inputs), backend="triton")
    differentiable.apply.assert_not_called()


def test_a_second_derivative_is_refused() -> None:
    chosen, rejected = random_logps(9)
    for loss in (triton_loss(chosen, rejected).loss, triton_loss(chosen, rejected).loss ** 2):
        (gradient,) = torch.autograd.grad(loss, chosen, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative: use backend='torch'"):
            torch.autograd.grad(gradient.sum(), chosen)


def test_auto_takes_torch_on_the_cpu() -> None:
    """Even where Triton could interpret its kernels there."""
    assert amapo_loss(*random_logps(4)).diagnostics.summary_values is None


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
def test_compiles_once_for_every_batch_size_and_beta(compiler: str) -> None:
    def step(*inputs: torch.Tensor, beta: float) -> tuple[torch.Tensor, dict[str, Any]]:
        chosen, rejected = inputs
        loss, diagnostics = amapo_loss(chosen, rejected, beta=beta, backend="triton")
        return loss, diagnostics.summary()

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for n, beta in ((8, 2.0), (8, 2.5), (8, 0.1), (9, 3.0), (31, 1.0), (600, 1.5)):
        inputs = [x.to(triton_loss.device) for x in random_logps(n)]
        (loss, summary), (expected, expected_summary) = compiled(*inputs, beta=beta), step(*inputs, beta=beta)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(summary, expected_summary)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))
    # One for the first numbers, one for any beta, one for any number of pairs.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize(
    "given", [{"ref": True}, {"lengths": True}, {"statistics": True}, {"reduction": "none"}], ids=str
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
def test_every_argument_compiles(given: dict[str, Any]) -> None:
    inputs = [x.to(triton_loss.device) for x in random_logps(9) + random_logps(9, seed=1) * ("ref" in given)]
    lengths = torch.arange(1, 10, device=triton_loss.device)
    options: dict[str, Any] = {"reduction": given.get("reduction", "mean"), "backend": "triton"}
    if "lengths" in given:
        options |= {"chosen_lengths": lengths, "rejected_lengths": lengths}
    if "statistics" in given:
        options |= {"statistics": moved(statistics(0.3, 1.0), triton_loss.device)}
    torch.compiler.reset()
    compiled = torch.compile(amapo_loss, fullgraph=True, backend="aot_eager")
    got, expected = (run(*inputs, **options) for run in (compiled, amapo_loss))
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.diagnostics.summary(), expected.diagnostics.summary())
    torch.testing.assert_close(gradients(got, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_compiles_for_gpus_that_are_not_there(architecture: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.lowering", architecture], capture_output=True, text=True, check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    of_tiles = ["_update_kernel", "_gradient_kernel", "_gradient_kernel"] * 2 + ["_update_kernel", "_gradient_kernel"] * 3
    of_pairs = ["_one_launch_kernel"] * 6 + ["_statistics_kernel", "_loss_kernel"] * 2
    assert [line.split()[0] for line in lines] == of_tiles + of_pairs
    assert all(line.endswith(" 0 fusible") for line in lines[len(of_tiles) :])


# What only a GPU can show.


def on_device(n: int, seed: int = 0) -> list[torch.Tensor]:
    return [x.detach().to("cuda").requires_grad_() for x in random_logps(n, seed)]


@pytest.fixture
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


class TestOnAGpu:
    pytestmark = needs_gpu

    def test_auto_takes_the_kernel(self) -> None:
        assert amapo_loss(*on_device(4)).diagnostics.summary_values is not None
        assert amapo_loss(*(x.double() for x in on_device(4))).diagnostics.summary_values is None

    @pytest.mark.parametrize(("n", "launches"), [(2, 1), (8192, 1), (8193, 2), (100_000, 2)])
    def test_number_of_launches(self, n: int, launches: int) -> None:
        inputs = on_device(n)
        amapo_loss(*inputs).diagnostics.summary()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            amapo_loss(*inputs).diagnostics.summary()
            torch.cuda.synchronize()
        kernels = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
        assert len(kernels) == launches, kernels

    @pytest.mark.usefixtures("never_waiting")
    @pytest.mark.parametrize("backend", ["auto", "torch"])
    def test_nothing_waits(self, backend: Any) -> None:
        for n in (7, 20_000):
            inputs = on_device(n)
            loss, diagnostics = amapo_loss(*inputs, backend=backend)
            loss.backward()
            diagnostics.summary()
            _ = diagnostics.scores, diagnostics.gradient_weights, diagnostics.chosen_rewards

    @pytest.mark.parametrize("n", [33, 20_000])
    def test_in_a_cuda_graph(self, n: int) -> None:
        inputs = on_device(n)

        def step() -> tuple[torch.Tensor, ...]:
            loss, diagnostics = amapo_loss(*inputs)
            return loss, *torch.autograd.grad(loss, inputs), *diagnostics.summary().values()

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in (1, 2, 3):
            with torch.no_grad():
                for old, new in zip(inputs, on_device(n, seed)):
                    old.copy_(new)
            graph.replay()
            torch.testing.assert_close(captured, step(), rtol=0, atol=0)

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_compiled(self, mode: str) -> None:
        compiled = torch.compile(lambda *x: amapo_loss(*x).loss, fullgraph=True, mode=mode)
        for seed in range(4):
            inputs = on_device(64, seed)
            got, expected = (
                torch.autograd.grad(f(*inputs), inputs) for f in (compiled, lambda *x: amapo_loss(*x).loss)
            )
            torch.testing.assert_close(got, expected)

    def test_ten_million_pairs(self) -> None:
        inputs = on_device(10_000_001)
        loss, diagnostics = amapo_loss(*inputs, reduction="sum")
        exact = amapo_loss(*(x.double() for x in inputs), reduction="sum")
        torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(diagnostics.statistics.mean.double(), exact.diagnostics.statistics.mean)
        near = (exact.diagnostics.scores - exact.diagnostics.statistics.mean).abs() < 1e-5
        apart = (diagnostics.gradient_weights - exact.diagnostics.gradient_weights).abs()
        assert apart[~near].max() < 1e-5

    def test_equal_scores_by_the_ten_thousand(self) -> None:
        """A multiplication fused into a subtraction would give margins to 41% of these."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(10_000):
            n = int(torch.randint(2, 300, (), generator=generator))
            chosen, rejected = (torch.randn(2, generator=generator) * 300).tolist()
            beta = float(torch.rand((), generator=generator)) * 5 + 0.01
            pairs = (torch.full((n,), chosen, device="cuda"), torch.full((n,), rejected, device="cuda"))
            assert not amapo_loss(*pairs, beta=beta).diagnostics.margins.any()

    @pytest.mark.usefixtures("never_waiting")
    def test_nothing_waits_for_nccl(self, tmp_path: Path) -> None:
        inputs, window = on_device(33), ScoreWindow(64).to("cuda")
        dist.init_process_group("nccl", f"file://{tmp_path}/store", world_size=1, rank=0)
        group = dist.group.WORLD
        losses = [amapo_loss(*inputs, process_group=group, backend=backend).loss for backend in ("triton", "torch")]
        amapo_loss(*inputs, process_group=group, statistics=window).loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
        for loss in losses:
            torch.testing.assert_close(loss, amapo_loss(*inputs).loss)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_on_the_second_device(self) -> None:
        inputs = [x.detach().to("cuda:1").requires_grad_() for x in random_logps(9)]
        loss = amapo_loss(*inputs).loss
        assert loss.device == torch.device("cuda:1")
        torch.testing.assert_close(loss.cpu(), amapo_loss(*random_logps(9)).loss)
