"""Log-probs from logits that exist already. The only new tensor of their size is their gradient.

As in `amapo_loss.logps._linear_head`, the work is done in operators that torch.compile does not look into, with an
autograd function around them. Depends on torch, the argument checks and `amapo_loss.logps._online_lse`.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amapo_loss._checks import accumulation_dtype
from amapo_loss.logps import _online_lse
from amapo_loss.logps._online_lse import LogitTransform, OnlineLSE

NO_TRANSFORM = LogitTransform()


def logits_logps(
    logits: Tensor,  # [N, T, V]
    labels: Tensor,  # [N, T]
    ignore_index: int,
) -> Tensor:
    """Return the log-prob [N * T] of each label, 0 where the label is `ignore_index`."""
    if torch.is_grad_enabled() and logits.requires_grad:
        result: Tensor = _LogitsLogps.apply(logits, labels, ignore_index)[0]
        return result
    return _online_lse.token_logps(*_logit_statistics(logits, labels, ignore_index))


@torch.library.custom_op("amapo_loss::logit_statistics", mutates_args=())
def _logit_statistics(
    logits: Tensor,  # [N, T, V]
    labels: Tensor,  # [N, T]
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return target_logit, max_rest and sum_rest [N * T]."""
    _online_lse.check_target_ids(torch.where(labels != ignore_index, labels, 0).flatten(), logits.shape[2])
    state = OnlineLSE.start(_target_ids(labels, ignore_index), accumulation_dtype(logits))
    if _online_lse.uses_triton(logits):
        _online_lse.update(state, logits, 0, NO_TRANSFORM)
        return state[1:]
    for rows in _counted_blocks(state, logits):
        block_state = state.select(rows)
        _online_lse.update(block_state, _copy_rows(logits, rows, state.sum_rest.dtype), 0, NO_TRANSFORM)
        for x, block_x in zip(state[1:], block_state[1:]):
            x[rows] = block_x
    return state[1:]


@_logit_statistics.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    empty = partial(logits.new_empty, labels.numel(), dtype=accumulation_dtype(logits))
    return empty(), empty(), empty()


@torch.library.custom_op("amapo_loss::logit_gradient", mutates_args=())
def _logit_gradient(
    grad_output: Tensor,  # [N * T]
    logits: Tensor,  # [N, T, V]
    labels: Tensor,  # [N, T]
    ignore_index: int,
    target_logit: Tensor,  # [N * T]
    max_rest: Tensor,  # [N * T]
    sum_rest: Tensor,  # [N * T]
) -> Tensor:
    """Return the gradient with respect to the logits."""
    state = OnlineLSE(_target_ids(labels, ignore_index), target_logit, max_rest, sum_rest)
    factor = _online_lse.gradient_factor(state, NO_TRANSFORM) * grad_output
    a, b = _online_lse.gradient_coefficients(factor, state, NO_TRANSFORM)
    if _online_lse.uses_triton(logits):
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        _online_lse.write_gradient(out, logits, state, 0, NO_TRANSFORM, (a, b))
        return out
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _counted_blocks(state, logits):
        z = _copy_rows(logits, rows, sum_rest.dtype)
        _online_lse.write_gradient(z, z, state.select(rows), 0, NO_TRANSFORM, (a[rows], b[rows]))
        out.view(-1, out.shape[2])[rows] = z.to(out.dtype)
    return out


@_logit_gradient.register_fake
def _(grad_output: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


class _LogitsLogps(torch.autograd.Function):
    """Saves the logits, which exist anyway, and three numbers per label."""

    @staticmethod
    def forward(
        logits: Tensor,  # [N, T, V]
        labels: Tensor,  # [N, T]
        ignore_index: int,
    ) -> Any:
        statistics = _logit_statistics(logits, labels, ignore_index)
        return _online_lse.token_logps(*statistics), *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.ignore_index = inputs[2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> Any:
        if grad_output is None:
            return None, None, None
        logits, labels, *saved = ctx.saved_tensors
        return _logit_gradient(grad_output, logits, labels, ctx.ignore_index, *saved), None, None


def _target_ids(labels: Tensor, ignore_index: int) -> Tensor:
    """Return the target ids [N * T], with -1 for a label that does not count."""
    return torch.where(labels != ignore_index, labels, -1).flatten()


def _counted_blocks(
    state: OnlineLSE,
    logits: Tensor,  # [N, T, V]
) -> Iterable[Tensor]:
    """Return the indices of the rows that count, in blocks of as many rows as a tile has."""
    counted = (state.target_ids >= 0).nonzero().squeeze(1)
    block_n = _online_lse.block_length(len(state.target_ids), logits.shape[2], logits.device)
    blocks: Iterable[Tensor] = counted.split(block_n)
    return blocks


def _copy_rows(
    logits: Tensor,  # [N, T, V]
    rows: Tensor,  # [n] indices below N * T
    dtype: torch.dtype,
) -> Tensor:
    """Return a copy [n, V] of some rows, which may be overwritten."""
    length = max(logits.shape[1], 1)
    return logits[rows // length, rows % length].to(dtype)
