"""A lower bound for the time of a fused loss: an autograd function that launches one empty Triton kernel.

Depends on torch, Triton and the bundles of arguments of the kernel.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from amapo_loss.kernels.pair_loss import Batch, Margins, Outputs, Responses, Statistics


@triton.jit
def _empty(batch, statistics, margins, beta_ptr, out, n, beta, label_smoothing, loss_scale):
    """Do nothing. The arguments are those of the kernel of `amapo_loss`, so that a launch costs the same."""


class _EmptyKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chosen_logps: Tensor,  # [n]
        rejected_logps: Tensor,  # [n]
    ) -> Tensor:
        loss, gradients = chosen_logps.new_empty(()), chosen_logps.new_empty((2, len(chosen_logps)))
        ctx.save_for_backward(gradients)
        sides = [Responses(logps, logps.stride(0), None, 0, None, 0) for logps in (chosen_logps, rejected_logps)]
        batch, statistics, margins = Batch(*sides, None, 0), Statistics(None, None, None, 1), Margins(None, 0, 0.0)
        out = Outputs(loss, gradients, gradients, loss, loss, loss)
        _empty[(1,)](batch, statistics, margins, None, out, len(chosen_logps), 2.0, 0.0, 1.0, num_warps=1)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients.unbind()


def empty_kernel(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """Return an uninitialized loss with uninitialized gradients; only its running time means anything."""
    loss: Tensor = _EmptyKernel.apply(chosen_logps, rejected_logps)
    return loss
