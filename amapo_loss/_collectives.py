"""The all-gather and the all-reduce of this library, with errors that name what was sent.

Depends only on torch and the argument checks.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from amapo_loss import _checks

# torch 2.13 deprecates the name all_gather_into_tensor. A PyTorch that was built without distributed has neither.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def all_gather_row(
    row: Tensor,  # [k]
    process_group: dist.ProcessGroup | None,
    what: str = "the score statistics of process_group",
) -> Tensor:
    """Return the rows [ranks, k] of all ranks, with one all-gather; without a group, the one row [1, k].

    `what` names the rows in the message of an error.
    """
    if process_group is None:
        return row[None]
    _checks.process_group("process_group", process_group)
    ranks, k = dist.get_world_size(process_group), len(row)
    rows = row.new_empty(ranks * k)
    try:
        _all_gather(rows, row, group=process_group)
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} could not be gathered: {error}. Has another rank failed, or not made this call?"
        ) from error
    return rows.view(ranks, k)


def all_reduce_sum(
    tensor: Tensor,
    process_group: dist.ProcessGroup,
    what: str,
) -> None:
    """Add up the tensors of all ranks, in place. `what` names them in the message of an error."""
    try:
        dist.all_reduce(tensor, group=process_group)
    except RuntimeError as error:
        raise RuntimeError(f"{what} could not be added up: {error}. Has another rank failed?") from error
