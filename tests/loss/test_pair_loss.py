"""The fused kernel: its margins compared with the torch backend, its launches, and its behavior as an operator.

The tests of the other files run on this backend, too, among them the comparison with the oracle in test_oracle.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from amapo_loss import AdaptiveMargin, ScoreWindow, _reference, amapo_loss
from amapo_loss.kernels import pair_loss
from tests.support.backends import (
    OnBackend,
    needs_gpu,
    no_synchronization,
    on_gpu,
    to_device,
    triton_loss,
    two_launches,
)
from tests.support.generators import (
    COMPILERS,
    MARGINS,
    Batch,
    Options,
    as_float64,
    batches,
    examples,
    gradients,
    loss_options,
    random_logps,
    score_statistics,
    to_tensors,
)
from tests.support.oracle import oracle

pytestmark = on_gpu
every_number_of_launches = pytest.mark.parametrize(
    "loss_fn", [triton_loss, two_launches], ids=["one launch", "two launches"]
)


@every_number_of_launches
@examples(200)
@given(batches(), st.sampled_from(MARGINS), loss_options, st.booleans())
def test_every_pair_gets_the_margin_of_the_torch_backend(
    loss_fn: OnBackend, batch: Batch, margin: AdaptiveMargin, options: Options, with_statistics: bool
) -> None:
    """For pairs that the oracle puts at the gate, the margin may also be 0 in one of the backends."""
    logps = to_tensors({"chosen_logps": batch[0], "rejected_logps": batch[1]}, torch.float32)
    scale = options["beta"] * float(np.abs(batch).max())
    supplied = (0.3 * scale, 0.5 * scale) if with_statistics else None
    statistics = score_statistics(*supplied) if supplied else None
    expected = oracle(*as_float64(logps).values(), **options, margin=margin, statistics=supplied, unit=2.0**-23)
    triton, reference = (
        function(**logps, **options, margin=margin, statistics=statistics).diagnostics
        for function in (loss_fn, amapo_loss)
    )
    allowed_zero = torch.tensor(expected.at_gate) & ((triton.margins == 0) | (reference.margins == 0))
    # The two margins may lie at opposite ends of the interval that rounding allows.
    width = torch.tensor(expected.margins.high - expected.margins.low)
    difference = (triton.margins.double() - reference.margins.double()).abs()
    assert torch.all(allowed_zero | (difference <= width * (1 + 1e-6)))
    assert triton.statistics.count == reference.statistics.count


@pytest.mark.parametrize("n", [0, 1, 2, 31, 32, 33, 127, 128, 129, 2047, 2049, 4095, 4096, 4097, 5120, 5121, 40000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_backends_agree_at_every_boundary_of_blocks_and_launches(n: int, reduction: Any) -> None:
    inputs = random_logps(n)
    triton, reference = (
        function(*inputs, reduction=reduction, label_smoothing=0.1) for function in (triton_loss, amapo_loss)
    )
    torch.testing.assert_close(triton.loss, reference.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(triton, inputs), gradients(reference, inputs), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(triton.diagnostics.summary(), reference.diagnostics.summary(), rtol=1e-4, atol=1e-5)
    assert triton.diagnostics.statistics.count == n


def test_the_constants_are_those_of_the_reference() -> None:
    assert pair_loss.MAX_EXPONENT.value == _reference.MAX_EXPONENT
    assert pair_loss.MACHINE_EPS.value == torch.finfo(torch.float32).eps


def test_the_last_program_reads_the_totals_of_all_programs() -> None:
    """It reads as many rows as there may be programs in the first launch, so there must not be more in the second."""
    assert pair_loss.MAX_LOSS_PROGRAMS <= pair_loss.MAX_STATISTICS_PROGRAMS


@every_number_of_launches
def test_a_mean_far_larger_than_the_std_costs_no_precision(loss_fn: OnBackend) -> None:
    """The mean is 50 and the standard deviation 0.01.

    With sums in float32, the margins would have an error of 100%. With a mean rounded to float32, it would be 5e-4.
    """
    chosen = 50 + 0.01 * torch.randn(3000, generator=torch.Generator().manual_seed(0))
    margin = AdaptiveMargin(scaling="linear")
    margins = loss_fn(chosen, torch.zeros(3000), beta=1.0, margin=margin).diagnostics.margins
    exact = amapo_loss(chosen.double(), torch.zeros(3000).double(), beta=1.0, margin=margin).diagnostics
    # In float32, scores this close to the mean count as equal to it, and their margin is 0.
    at_gate = (exact.scores - exact.statistics.mean).abs() < 3 * torch.finfo(torch.float32).eps * 50
    assert at_gate.sum() < 10
    torch.testing.assert_close(margins.double()[~at_gate], exact.margins[~at_gate], rtol=1e-5, atol=0)


def test_offsets_may_exceed_32_bits() -> None:
    """The stride of the log-probs is 2**27, so the last of the 17 elements lies 2**31 elements behind the first."""
    strided = torch.empty(2**31 + 1, dtype=torch.bfloat16, device=triton_loss.device)[:: 2**27]
    with torch.no_grad():
        strided.copy_(torch.linspace(-2, -1, 17))
    contiguous = torch.linspace(-2, -1, 17).bfloat16()
    actual, expected = amapo_loss(strided, -strided, backend="triton"), amapo_loss(contiguous, -contiguous)
    torch.testing.assert_close(actual.loss.cpu(), expected.loss)


def operator_arguments(n: int = 9, **changed: Any) -> list[Any]:
    """Return the arguments of the operator `amapo_loss::pair_loss` in its order, with some of them changed."""
    chosen, rejected = (x.detach().to(triton_loss.device) for x in random_logps(n))
    values: dict[str, Any] = {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "ref_chosen_logps": None,
        "ref_rejected_logps": None,
        "chosen_lengths": None,
        "rejected_lengths": None,
        "weights": None,
        "given_margins": None,
        "mean": None,
        "std": None,
        "rank_moments": None,
        "beta_tensor": None,
        "beta": 2.0,
        "label_smoothing": 0.1,
        "formula": "paper",
        "normalize": True,
        "exponential": True,
        "clip": True,
        "constant_margin": 0.0,
        "reduction": "mean",
        "with_gradient": True,
    }
    return list((values | changed).values())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"reduction": "none"},
        {"with_gradient": False},
        {"ref_chosen_logps": torch.zeros(9), "ref_rejected_logps": torch.ones(9).bfloat16()},
        {"chosen_lengths": torch.arange(9), "rejected_lengths": torch.ones(9)},
        {"weights": torch.arange(9) > 3},
        {"weights": torch.linspace(0, 2, 9)},
        {"given_margins": torch.linspace(0, 2, 9), "formula": None},
        {"formula": None, "constant_margin": 0.5},
        {"mean": torch.tensor(0.3), "std": torch.tensor(1.0, dtype=torch.float64)},
        {"rank_moments": torch.tensor([[3, 0.1, 2, 3, 4, 5], [6, 0.2, 3, 6, 2, 9]], dtype=torch.float64)},
        {"beta_tensor": torch.tensor(3.0)},
    ],
    ids=lambda changed: "-".join(changed) or "plain",
)
def test_opcheck_accepts_the_loss_operator(changed: dict[str, Any]) -> None:
    arguments = operator_arguments(**to_device(changed, triton_loss.device))
    torch.library.opcheck(torch.ops.amapo_loss.pair_loss.default, arguments)


def test_opcheck_accepts_the_moments_operator() -> None:
    arguments = operator_arguments()
    pairs, beta_arguments = arguments[:7], arguments[11:13]
    torch.library.opcheck(torch.ops.amapo_loss.moments.default, [*pairs, *beta_arguments])


def test_the_gradient_is_computed_only_if_it_is_needed() -> None:
    operator = torch.ops.amapo_loss.pair_loss.default
    assert operator(*operator_arguments(with_gradient=True))[1].shape == (2, 9)
    assert operator(*operator_arguments(with_gradient=False))[1].shape == (0,)
    inputs = [x.to(triton_loss.device) for x in random_logps(9)]
    with patch.object(pair_loss, "_PairLoss") as differentiable, torch.no_grad():
        amapo_loss(*inputs, backend="triton")
        amapo_loss(*(x.detach() for x in inputs), backend="triton")
    differentiable.apply.assert_not_called()


def test_the_constant_log_probs_may_come_from_inference_mode() -> None:
    """Autograd cannot save such tensors. A loop that computes its reference in this mode runs on the CPU, too."""
    chosen, rejected = random_logps(9)
    with torch.inference_mode():
        references = [torch.randn(9), torch.randn(9)]
    expected = gradients(amapo_loss(chosen, rejected, *references), [chosen, rejected])
    actual = gradients(triton_loss(chosen, rejected, *references), [chosen, rejected])
    torch.testing.assert_close(actual, expected)
    with torch.inference_mode():
        frozen = torch.randn(9)
    expected = gradients(amapo_loss(chosen, frozen, *references), [chosen])
    torch.testing.assert_close(gradients(triton_loss(chosen, frozen, *references), [chosen]), expected)


def test_a_second_derivative_raises() -> None:
    chosen, rejected = random_logps(9)
    for loss in (triton_loss(chosen, rejected).loss, triton_loss(chosen, rejected).loss ** 2):
        (gradient,) = torch.autograd.grad(loss, chosen, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative: use backend='torch'"):
            torch.autograd.grad(gradient.sum(), chosen)


def test_auto_takes_torch_on_the_cpu() -> None:
    """It does so even if Triton could interpret its kernels there. Only the kernel fills `total_values`."""
    assert amapo_loss(*random_logps(4)).diagnostics.total_values is None


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the compiler
def test_one_compiled_graph_serves_every_batch_size_and_beta(compiler: str) -> None:
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
    # One graph is for the first batch size and beta, one for any beta, and one for any batch size.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize(
    "optional", [{"ref": True}, {"lengths": True}, {"statistics": True}, {"reduction": "none"}], ids=str
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the compiler
def test_every_optional_argument_compiles(optional: dict[str, Any]) -> None:
    logps = random_logps(9) + random_logps(9, seed=1) if "ref" in optional else random_logps(9)
    inputs = [x.to(triton_loss.device) for x in logps]
    lengths = torch.arange(1, 10, device=triton_loss.device)
    options: dict[str, Any] = {"reduction": optional.get("reduction", "mean"), "backend": "triton"}
    if "lengths" in optional:
        options |= {"chosen_lengths": lengths, "rejected_lengths": lengths}
    if "statistics" in optional:
        options |= {"statistics": to_device(score_statistics(0.3, 1.0), triton_loss.device)}
    torch.compiler.reset()
    compiled = torch.compile(amapo_loss, fullgraph=True, backend="aot_eager")
    actual, expected = (function(*inputs, **options) for function in (compiled, amapo_loss))
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.diagnostics.summary(), expected.diagnostics.summary())
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("targets", [["80", "89"], ["90", "100"], ["120"], ["gfx942"]], ids=str)
def test_all_kernels_compile_for_gpus_that_are_not_present(targets: list[str], tmp_path: Path) -> None:
    """The bounds are a little above what the compilers of Triton 3.4 to 3.9 make."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.sass", *targets, "--out", str(tmp_path / "sass.json")],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
    )
    if "ROCm linker" in result.stderr:
        pytest.skip("this version of Triton needs the linker of ROCm")
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = json.loads((tmp_path / "sass.json").read_text())["kernels"]
    linear_head_kernels = ["_update_kernel", "_update_kernel", "_gradient_kernel", "_gradient_kernel"] * 2
    online_lse_kernels = linear_head_kernels + ["_update_kernel", "_gradient_kernel"] * 3
    pair_loss_kernels = ["_one_launch_kernel"] * 9 + ["_statistics_kernel", "_loss_kernel"] * 3
    pair_loss_kernels += ["_moments_kernel"]
    launches = online_lse_kernels + pair_loss_kernels
    assert [(kernel["target"], kernel["name"]) for kernel in kernels] == [
        (t, name) for t in targets for name in launches
    ]
    counts = {json.dumps([list(k.values())[1:] for k in kernels if k["target"] == t]) for t in targets}
    assert len(counts) == len(targets), "the kernels were not compiled again for the second target"
    most_barriers = {"_one_launch_kernel": 26, "_statistics_kernel": 6, "_loss_kernel": 30, "_moments_kernel": 6}
    for kernel in kernels:
        if kernel["name"] in most_barriers:
            assert kernel["fusible"] in (0, None), "a fused multiply-add could give margins to equal scores"
            assert kernel["barriers"] <= most_barriers[kernel["name"]]
            assert kernel["shuffles"] <= 250
            assert kernel["stack"] <= 32
        else:
            assert kernel["barriers"] <= 8
            assert kernel["shuffles"] <= 32
            # Triton 3.6 gives the kernel with the entropy and a softcap 128 registers for 12.0, and spills four others.
            assert kernel["stack"] <= 16


# The following tests need a GPU.


def gpu_logps(n: int, seed: int = 0) -> list[torch.Tensor]:
    """Return the same log-probs [n] as `random_logps`, on the GPU."""
    return [x.detach().to("cuda").requires_grad_() for x in random_logps(n, seed)]


class TestOnAGpu:
    pytestmark = needs_gpu

    def test_auto_takes_triton_except_for_float64(self) -> None:
        assert amapo_loss(*gpu_logps(4)).diagnostics.total_values is not None
        assert amapo_loss(*(x.double() for x in gpu_logps(4))).diagnostics.total_values is None

    @pytest.mark.parametrize(("n", "launches"), [(2, 1), (4096, 1), (4097, 2), (100_000, 2)])
    @pytest.mark.parametrize("margin", ["adaptive", "number", "tensor"])
    def test_a_call_launches_only_the_kernels_of_the_loss(self, n: int, launches: int, margin: str) -> None:
        inputs, numbers = gpu_logps(n), torch.ones(n, device="cuda")
        given: dict[str, dict[str, Any]] = {
            "adaptive": {},
            "number": {"margin": 0.5},
            "tensor": {"margin": numbers, "weights": numbers},
        }
        options = given[margin]
        amapo_loss(*inputs, **options).diagnostics.totals()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            amapo_loss(*inputs, **options).diagnostics.totals()
            torch.cuda.synchronize()
        kernels = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
        assert len(kernels) == launches, kernels

    @pytest.mark.parametrize("backend", ["auto", "torch"])
    @pytest.mark.parametrize("n", [7, 20_000])
    def test_the_loss_does_not_synchronize_with_the_device(self, n: int, backend: Any) -> None:
        inputs = gpu_logps(n)
        with no_synchronization():
            loss, diagnostics = amapo_loss(*inputs, backend=backend)
            loss.backward()
            diagnostics.summary()
            _ = diagnostics.scores, diagnostics.gradient_weights, diagnostics.chosen_rewards

    @pytest.mark.parametrize("n", [33, 20_000])
    def test_a_cuda_graph_replays_the_loss_on_new_log_probs(self, n: int) -> None:
        inputs = gpu_logps(n)

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
                for old, new in zip(inputs, gpu_logps(n, seed)):
                    old.copy_(new)
            graph.replay()
            torch.testing.assert_close(captured, step(), rtol=0, atol=0)

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_inductor_compiles_the_loss(self, mode: str) -> None:
        compiled = torch.compile(lambda *x: amapo_loss(*x).loss, fullgraph=True, mode=mode)
        for seed in range(4):
            inputs = gpu_logps(64, seed)
            actual = torch.autograd.grad(compiled(*inputs), inputs)
            torch.testing.assert_close(actual, torch.autograd.grad(amapo_loss(*inputs).loss, inputs))

    def test_ten_million_pairs_cost_no_precision(self) -> None:
        inputs = gpu_logps(10_000_001)
        loss, diagnostics = amapo_loss(*inputs, reduction="sum")
        exact = amapo_loss(*(x.double() for x in inputs), reduction="sum")
        torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(diagnostics.statistics.mean.double(), exact.diagnostics.statistics.mean)
        # The gate of pairs this close to the mean may be open in one dtype and closed in the other.
        at_gate = (exact.diagnostics.scores - exact.diagnostics.statistics.mean).abs() < 1e-5
        difference = (diagnostics.gradient_weights - exact.diagnostics.gradient_weights).abs()
        assert difference[~at_gate].max() < 1e-5

    def test_ten_thousand_batches_of_equal_scores_get_no_margin(self) -> None:
        """If a multiplication and a subtraction were fused, 41% of these batches would get margins."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(10_000):
            n = int(torch.randint(2, 300, (), generator=generator))
            chosen, rejected = (torch.randn(2, generator=generator) * 300).tolist()
            beta = float(torch.rand((), generator=generator)) * 5 + 0.01
            pairs = (torch.full((n,), chosen, device="cuda"), torch.full((n,), rejected, device="cuda"))
            assert not amapo_loss(*pairs, beta=beta).diagnostics.margins.any()

    def test_the_loss_does_not_synchronize_with_a_process_group(self, tmp_path: Path) -> None:
        inputs, window = gpu_logps(33), ScoreWindow(64).to("cuda")
        dist.init_process_group("nccl", f"file://{tmp_path}/store", world_size=1, rank=0)
        group = dist.group.WORLD
        amapo_loss(*inputs, process_group=group)  # the first collective connects the ranks
        with no_synchronization():
            losses = [amapo_loss(*inputs, process_group=group, backend=backend).loss for backend in ("triton", "torch")]
            amapo_loss(*inputs, process_group=group, statistics=window).loss.backward()
        dist.destroy_process_group()
        for loss in losses:
            torch.testing.assert_close(loss, amapo_loss(*inputs).loss)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_the_kernel_runs_on_the_device_of_the_log_probs(self) -> None:
        inputs = [x.detach().to("cuda:1").requires_grad_() for x in random_logps(9)]
        loss = amapo_loss(*inputs).loss
        assert loss.device == torch.device("cuda:1")
        torch.testing.assert_close(loss.cpu(), amapo_loss(*random_logps(9)).loss)
