"""Rows that hold several sequences one after the other, as padding-free batches do.

Depends on torch, the argument checks and the moments, which have the dtype of sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from amapo_loss import _checks
from amapo_loss._moments import sum_dtype


class Packing(NamedTuple):
    """Which sequence each position belongs to."""

    sequence_of: Tensor  # [N * T] int64, `num_sequences` for positions that belong to none
    num_sequences: int

    @classmethod
    def of(
        cls,
        labels: Tensor,  # [N, T]
        ignore_index: int,
        cu_seqlens: Tensor | None,  # [S + 1]
        position_ids: Tensor | None,  # [N, T]
    ) -> "Packing | None":
        """Return the packing that one of the last two arguments describes; None if each row is a sequence."""
        if position_ids is not None:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens must be None if position_ids is given: both say where sequences start")
            _check_integers("position_ids", position_ids, labels.device)
            if position_ids.shape != labels.shape:
                raise ValueError(
                    f"position_ids must have the shape of labels, {tuple(labels.shape)}, "
                    f"got {tuple(position_ids.shape)}"
                )
            return cls._of_position_ids(position_ids, labels == ignore_index)
        if cu_seqlens is None:
            return None
        _check_integers("cu_seqlens", cu_seqlens, labels.device)
        if cu_seqlens.ndim != 1 or not len(cu_seqlens):
            raise ValueError(f"cu_seqlens must be [S + 1], which begins with 0, got shape {tuple(cu_seqlens.shape)}")
        return cls(_sequence_of_positions(cu_seqlens, labels.numel()), cu_seqlens.shape[0] - 1)

    @classmethod
    def _of_position_ids(
        cls,
        position_ids: Tensor,  # [N, T]
        is_ignored: Tensor,  # [N, T]
    ) -> "Packing":
        """Return the packing in which a sequence starts wherever a position does not follow the one before it.

        At the end of a row, one-token sequences with an ignored label are padding, which belongs to no sequence.
        """
        is_start = torch.ones_like(is_ignored)
        is_start[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        is_padding = (is_start & is_ignored).flip(1).cumprod(1).flip(1).bool()
        starts = (is_start & ~is_padding).flatten()
        num_sequences = starts.nonzero().shape[0]
        return cls((starts.cumsum(0) - 1).masked_fill(is_padding.flatten(), num_sequences), num_sequences)

    def mask_labels(
        self,
        labels: Tensor,  # [N, T]
        ignore_index: int,
        shift: bool,
    ) -> Tensor:
        """Return the labels [N, T] without those that no position of the same sequence predicts."""
        sequence_of = self.sequence_of.view_as(labels)
        unpredicted = sequence_of == self.num_sequences
        if shift:
            is_first = self.sequence_of != self.sequence_of.roll(1)  # the shift drops the very first label anyway
            unpredicted = unpredicted | is_first.view_as(labels)
        return labels.masked_fill(unpredicted, ignore_index)

    def sums(
        self,
        values: Tensor,  # [N * T]
    ) -> Tensor:
        """Return the sum over each sequence [S]."""
        # On a GPU, the order of the additions changes from run to run. In float64 this hardly ever changes the result.
        dtype = sum_dtype(values.device) if values.is_floating_point() else values.dtype
        sums = values.new_zeros(self.num_sequences + 1, dtype=dtype).index_add(0, self.sequence_of, values.to(dtype))
        return sums[:-1].to(values.dtype)


@torch.library.custom_op("amapo_loss::sequence_of_positions", mutates_args=())
def _sequence_of_positions(
    cu_seqlens: Tensor,  # [S + 1]
    num_positions: int,
) -> Tensor:
    """Return the sequence [num_positions] of each position, S behind the last offset. Raise for wrong offsets."""
    steps = torch.cat([cu_seqlens[:1], cu_seqlens.diff(), num_positions - cu_seqlens[-1:]])
    is_valid = (steps >= 0).all() & (cu_seqlens[0] == 0)
    if cu_seqlens.device.type != "cpu":
        torch._assert_async(is_valid, "cu_seqlens must begin with 0 and must not decrease or exceed the positions")
    elif not is_valid:
        raise ValueError(
            f"cu_seqlens must begin with 0, not decrease, and not exceed the {num_positions} positions, "
            f"got {cu_seqlens.tolist()}"
        )
    positions = torch.arange(num_positions, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


@_sequence_of_positions.register_fake
def _(cu_seqlens: Tensor, num_positions: int) -> Tensor:
    return cu_seqlens.new_empty(num_positions, dtype=torch.int64)


def _check_integers(name: str, value: object, device: torch.device) -> None:
    """Raise unless this is a plain tensor of integers on the device of `labels`."""
    tensor = _checks.integer_tensor(name, value)
    _checks.plain_activation(name, tensor)
    _checks.same_device(name, tensor, "labels", device)
