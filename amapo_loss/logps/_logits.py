"""Log-probs from logits that are there already; nothing else of their size is made but their gradient.

As in `amapo_loss.logps._linear_head`, operators that torch.compile does not look into, and an autograd function around them. Knows
tensors and `amapo_loss.logps._online_lse`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amapo_loss._checks import computing_dtype
from amapo_loss.logps import _online_lse
from amapo_loss.logps._online_lse import Finish, Rows


def logits_logps(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The log-prob [N * T] of each label, 0 where it does not count, from checked [N, T, V] and [N, T]."""
    if torch.is_grad_enabled() and logits.requires_grad:
        result: Tensor = _Logits.apply(logits, labels, ignore_index)[0]
        return result
    return _online_lse.token_logps(*_logit_statistics(logits, labels, ignore_index))


@torch.library.custom_op("amapo_loss::logit_statistics", mutates_args=())
def _logit_statistics(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The columns of `Rows`, target and others, of logits [N, T, V]."""
    _online_lse.require_within(torch.where(labels != ignore_index, labels, 0).flatten(), logits.shape[2])
    rows = Rows.of(_rows_that_count(labels, ignore_index), computing_dtype(logits))
    if _online_lse.in_triton(logits):
        _online_lse.add(rows, logits, 0, Finish())
        return rows.target, rows.others
    for at in _blocks(rows, logits):
        part = rows.part(at)
        _online_lse.add(part, _copied(logits, at, part.target.dtype), 0, Finish())
        rows.target[at], rows.others[at] = part.target, part.others
    return rows.target, rows.others


@_logit_statistics.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    target, others = (logits.new_empty(labels.numel(), dtype=computing_dtype(logits)) for _ in range(2))
    return target, others


@torch.library.custom_op("amapo_loss::logit_gradient", mutates_args=())
def _logit_gradient(
    upstream: Tensor, logits: Tensor, labels: Tensor, ignore_index: int, target: Tensor, others: Tensor
) -> Tensor:
    """In `logits`; the only tensor of their size."""
    rows = Rows(_rows_that_count(labels, ignore_index), target, others)
    of_others, of_target = _online_lse.coefficients(upstream, rows, Finish())
    if _online_lse.in_triton(logits):
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        _online_lse.gradient(out, logits, rows, 0, Finish(), of_others, of_target)
        return out
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    for at in _blocks(rows, logits):
        z = _copied(logits, at, target.dtype)
        _online_lse.gradient(z, z, rows.part(at), 0, Finish(), of_others[at], of_target[at])
        out.view(-1, out.shape[2])[at] = z.to(out.dtype)
    return out


@_logit_gradient.register_fake
def _(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


class _Logits(torch.autograd.Function):
    """Saves the logits, that is, nothing new."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
        target, others = _logit_statistics(logits, labels, ignore_index)
        return _online_lse.token_logps(target, others), target, others

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.ignore_index = inputs[2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> Any:
        if upstream is None:
            return None, None, None
        logits, labels, *statistics = ctx.saved_tensors
        return _logit_gradient(upstream, logits, labels, ctx.ignore_index, *statistics), None, None


def _rows_that_count(labels: Tensor, ignore_index: int) -> Tensor:
    """[N * T] the targets of `Rows`."""
    return torch.where(labels != ignore_index, labels, -1).flatten()


def _blocks(rows: Rows, logits: Tensor) -> Iterable[Tensor]:
    """The rows that count, as many at once as make a tile."""
    at = (rows.targets >= 0).nonzero().squeeze(1)
    blocks: Iterable[Tensor] = at.split(_online_lse.size(len(rows.targets), logits.shape[2], logits.device))
    return blocks


def _copied(logits: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    length = max(logits.shape[1], 1)
    return logits[at // length, at % length].to(dtype)
