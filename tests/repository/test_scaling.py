"""Check the formulas of benchmarks/speed/scaling.py against what small heads compute, hold and send."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from amapo_loss.logps import _linear_head, _online_lse
from benchmarks.speed import scaling
from benchmarks.speed.memory import peak_bytes
from benchmarks.speed.scaling import Head, gathered_logits_cost, recorded_collectives, vocab_parallel_cost
from tests.support.ranks import on_ranks

SMALL = Head(tokens=256, width=64, vocabulary=6000, element_bytes=4)


def flops_of_products(call: Callable[[], Any]) -> int:
    """Return the floating-point operations of the matrix products of a call, also of those inside the operators."""
    flops = 0

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
            nonlocal flops
            flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            return function(out, a, b)

        return product

    with (
        FlopCounterMode(display=False) as outside,
        patch.object(_linear_head, "_mm_out", counted(_linear_head._mm_out)),
        patch.object(_linear_head, "_addmm_out", counted(_linear_head._addmm_out)),
    ):
        call()
    return flops + int(outside.get_total_flops())


def measured_costs(rank: int, group: Any) -> dict[str, dict[str, float]]:
    """Return FLOPs, peak bytes and received bytes of a step of each kind."""
    ranks, costs = group.size(), {}
    for name, function in scaling.STEPS.items():
        for trainable in (False, True):
            # Transposed, so that results need memory of their own before they are copied, as in bfloat16.
            hidden = torch.randn(SMALL.width, SMALL.tokens).T.requires_grad_()
            weight = torch.randn(SMALL.width, SMALL.vocabulary // ranks).T.requires_grad_(trainable)
            targets = torch.arange(SMALL.tokens)
            grad_weight_bytes = weight.nbytes if trainable else 0

            def step(
                function: Any = function, hidden: Tensor = hidden, weight: Tensor = weight, targets: Tensor = targets
            ) -> None:
                function(hidden, weight, targets, group).sum().backward()

            with (
                patch.object(_online_lse, "TILE_ELEMENTS", {"cpu": 2**18, "cuda": 2**18}),
                patch.object(_online_lse, "CPU_LSE_ROWS", 1),
            ):
                flops = flops_of_products(step)
                with recorded_collectives() as contributed:
                    step()
                weight.grad = hidden.grad = None
                peak = peak_bytes(step)
                cost = (
                    vocab_parallel_cost(SMALL, ranks, trainable, "cpu")
                    if name == "split vocabulary"
                    else gathered_logits_cost(SMALL, ranks, trainable)
                )
            received = scaling.received_bytes(contributed, ranks)
            costs[f"{name}, {trainable=}"] = {
                "flops": flops / cost.flops,
                "weight_bytes": (weight.nbytes + grad_weight_bytes) / cost.weight_bytes,
                "workspace_bytes": (peak - grad_weight_bytes) / cost.workspace_bytes,
                "received_bytes": received / cost.received_bytes if ranks > 1 else 1.0,
            }
    return costs


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_formulas_hold_for_small_heads(ranks: int) -> None:
    for costs in on_ranks(ranks, measured_costs):
        for name, ratios in costs.items():
            print(name, ratios)
            assert ratios["flops"] == 1, name
            assert ratios["weight_bytes"] == 1, name
            assert ratios["received_bytes"] == pytest.approx(1, abs=1e-12), name
            # For a split vocabulary, the formula leaves out a few numbers per token. For gathered logits, it is a lower
            # bound: gloo and the copies around it take more.
            assert 1 <= ratios["workspace_bytes"] < (1.05 if name.startswith("split") else 2.5), name
