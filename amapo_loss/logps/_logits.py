"""Log-probs from logits that exist already. The only new tensor of their size is their gradient.

As in `amapo_loss.logps._linear_head`, the work is done in operators that torch.compile does not look into, with an
autograd function around them. Depends on torch, the argument checks, `amapo_loss._autograd`,
`amapo_loss.logps._online_lse` and `amapo_loss.logps._vocab_parallel`.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amapo_loss._autograd import once_differentiable, raise_in_forward_mode, view_if_compiling
from amapo_loss._checks import accumulation_dtype
from amapo_loss.logps import _online_lse
from amapo_loss.logps._online_lse import LogitTransform, OnlineLSE
from amapo_loss.logps._vocab_parallel import merge_ranks, vocab_shard

NO_TRANSFORM = LogitTransform()


def logits_logps(
    logits: Tensor,  # [N, T, V]
    labels: Tensor,  # [N, T]
    ignore_index: int,
    group_name: str,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Return the log-prob [N * T] of each label and the entropy [N * T] there, 0 where the label is `ignore_index`.

    Without `with_entropy`, the entropies are [0].
    """
    raise_in_forward_mode(logits)
    logits = view_if_compiling(logits)
    arguments = (logits, labels, ignore_index, group_name, with_entropy)
    if torch.is_grad_enabled() and logits.requires_grad:
        logps, entropy, *_ = _LogitsLogps.apply(*arguments)
        return logps, entropy
    entropy, _, *numbers = _logit_statistics(*arguments)
    return _online_lse.token_logps(*numbers), entropy


@torch.library.custom_op("amapo_loss::logit_statistics", mutates_args=())
def _logit_statistics(
    logits: Tensor,  # [N, T, V]
    labels: Tensor,  # [N, T]
    ignore_index: int,
    group_name: str,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the entropies [N * T] or [0], the local target ids, target_logit, max_rest and sum_rest [N * T]."""
    target_ids = _target_ids(labels, ignore_index)
    shard = vocab_shard(logits.shape[2], target_ids, group_name)
    _online_lse.check_target_ids(torch.where(labels != ignore_index, labels, 0).flatten(), shard.vocab_size)
    local_ids = shard.localize(target_ids)
    state = OnlineLSE.start(local_ids, accumulation_dtype(logits), with_entropy)
    if _online_lse.uses_triton(logits):
        _online_lse.update(state, logits, 0, NO_TRANSFORM)
    else:
        for rows in _counted_blocks(local_ids, logits):
            block_state = state.select(rows)
            _online_lse.update(block_state, _copy_rows(logits, rows, state.sum_rest.dtype), 0, NO_TRANSFORM)
            for x, block_x in zip(state.numbers(), block_state.numbers()):
                x[rows] = block_x
    merge_ranks(state, group_name)
    entropies = _online_lse.entropies(state)
    if with_entropy:
        entropies.masked_fill_(local_ids < 0, 0)
    return entropies, *state[:4]


@_logit_statistics.register_fake
def _(
    logits: Tensor, labels: Tensor, ignore_index: int, group_name: str, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = labels.numel()
    empty = partial(logits.new_empty, dtype=accumulation_dtype(logits))
    return empty(n if with_entropy else 0), labels.new_empty(n), empty(n), empty(n), empty(n)


@torch.library.custom_op("amapo_loss::logit_gradient", mutates_args=())
def _logit_gradient(
    grad_output: Tensor,  # [N * T]
    logits: Tensor,  # [N, T, V]
    local_ids: Tensor,  # [N * T]
    target_logit: Tensor,  # [N * T]
    max_rest: Tensor,  # [N * T]
    sum_rest: Tensor,  # [N * T]
) -> Tensor:
    """Return the gradient with respect to the logits."""
    state = OnlineLSE(local_ids, target_logit, max_rest, sum_rest)
    factor = _online_lse.gradient_factor(state, NO_TRANSFORM) * grad_output
    a, b = _online_lse.gradient_coefficients(factor, state, NO_TRANSFORM)
    if _online_lse.uses_triton(logits):
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        _online_lse.write_gradient(out, logits, state, 0, NO_TRANSFORM, (a, b))
        return out
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _counted_blocks(local_ids, logits):
        z = _copy_rows(logits, rows, sum_rest.dtype)
        _online_lse.write_gradient(z, z, state.select(rows), 0, NO_TRANSFORM, (a[rows], b[rows]))
        out.flatten(0, 1)[rows] = z.to(out.dtype)
    return out


@_logit_gradient.register_fake
def _(grad_output: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


class _LogitsLogps(torch.autograd.Function):
    """Saves the logits, which exist anyway, and the target and three numbers per label."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        entropy, local_ids, *numbers = _logit_statistics(*inputs)
        return _online_lse.token_logps(*numbers), entropy, local_ids, *numbers

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], *output[2:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_output: Tensor | None, *_: None) -> Any:
        grad_logits = None if grad_output is None else _logit_gradient(grad_output, *saved)
        return grad_logits, *(None,) * 4


def _target_ids(labels: Tensor, ignore_index: int) -> Tensor:
    """Return the target ids [N * T], with -1 for a label that does not count."""
    return torch.where(labels != ignore_index, labels, -1).flatten()


def _counted_blocks(
    local_ids: Tensor,  # [N * T]
    logits: Tensor,  # [N, T, V]
) -> Iterable[Tensor]:
    """Return the indices of the rows that count, in blocks of as many rows as a tile has."""
    counted = (local_ids >= 0).nonzero().squeeze(1)
    block_n = _online_lse.block_length(len(local_ids), logits.shape[2], logits.device)
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
