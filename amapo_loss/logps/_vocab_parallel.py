"""A vocabulary that is split over the ranks of a group: what the ranks tell each other.

Each rank holds adjacent rows of the head's weight, in the order of the ranks, and all ranks hold the same tokens. A
rank computes the columns of the logits that belong to its rows, and the online log-sum-exp of these columns. Merging
the states of all ranks takes three numbers per token and rank. From then on, each rank can write the gradient of its
own columns. Depends on torch, the argument checks, the collectives and `amapo_loss.logps._online_lse`.

A group travels by its name, because an operator takes no process group. Without a group, the name is empty.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from amapo_loss import _checks
from amapo_loss._collectives import all_gather_row, all_reduce_sum
from amapo_loss.logps import _online_lse
from amapo_loss.logps._online_lse import OnlineLSE

FSDP_ADVICE = "If FSDP2 has sharded the weight, call this inside the forward of the module that holds it."


class VocabShard(NamedTuple):
    """The token ids from `start` to `start + size`, whose columns this rank computes."""

    start: int
    size: int
    vocab_size: int  # of all ranks
    largest: int  # the size of the largest shard, from which all ranks take the same number of tiles

    def localize(self, target_ids: Tensor) -> Tensor:
        """Return the target ids counted from `start`, `size` for those of other ranks, and -1 where nothing counts."""
        local_ids = target_ids - self.start
        elsewhere = (local_ids < 0) | (local_ids >= self.size)
        return local_ids.masked_fill(elsewhere, self.size).masked_fill(target_ids < 0, -1)


class Split(NamedTuple):
    """How a head is split over ranks."""

    group_name: str = ""  # empty: it is not split
    sum_grad_hidden: bool = True  # add up the gradients of `hidden` here; False: the caller's graph does it


def local_shard(
    name: str,
    value: Tensor,
    dim: int,
    vocab_group: dist.ProcessGroup | None,
    advice: str,
) -> tuple[Tensor, str]:
    """Return this rank's shard of a tensor whose dimension `dim` is the vocabulary, and the name of the group.

    `advice` says what to do with a DTensor that is split in another way.

    Raises:
        TypeError: if `vocab_group` is not a group that contains this rank.
        ValueError: if a DTensor has other placements, or if both it and `vocab_group` name a group.
    """
    if not _checks.is_dtensor(value):
        if vocab_group is None:
            return value, ""
        _checks.process_group("vocab_group", vocab_group)
        return value, vocab_group.group_name
    if vocab_group is not None:
        raise ValueError(f"vocab_group must be None for a DTensor, whose mesh has the group, and {name} is a DTensor")
    dtensor: Any = value
    split = [i for i, placement in enumerate(dtensor.placements) if not placement.is_replicate()]
    if len(split) != 1 or not dtensor.placements[split[0]].is_shard(dim):
        raise ValueError(
            f"{name} must be a plain tensor or a DTensor that one dimension of its mesh shards on the vocabulary, "
            f"got the placements {tuple(dtensor.placements)}: pass {name}.full_tensor(), or {advice}"
        )
    return dtensor.to_local(), dtensor.device_mesh.get_group(split[0]).group_name


def replicated(
    name: str,
    hidden: Tensor,
    group_name: str,
) -> tuple[Tensor, Split]:
    """Return the hidden states of all tokens, and how the head that follows is split.

    A DTensor that is sharded on its tokens is gathered. The backward pass of this reduces and scatters the gradients of
    all ranks, so that the head does not add them up.

    Raises:
        TypeError: if the head is not split and `hidden` is a DTensor.
        ValueError: if the DTensor is on another mesh.
    """
    if not _checks.is_dtensor(hidden):
        return hidden, Split(group_name)
    if not group_name:
        _checks.plain_activation(name, hidden)
    from torch.distributed.tensor import Partial, Replicate

    dtensor: Any = hidden
    mesh = dtensor.device_mesh
    if mesh.ndim != 1 or mesh.get_group(0).group_name != group_name:
        raise ValueError(
            f"{name} must be a plain tensor or a DTensor on a mesh of the ranks that share the vocabulary, got {mesh}"
        )
    if dtensor.placements[0].is_replicate():
        return dtensor.to_local(), Split(group_name)
    gathered = dtensor.redistribute(placements=[Replicate()])
    return gathered.to_local(grad_placements=[Partial()]), Split(group_name, sum_grad_hidden=False)


def vocab_shard(size: int, token_ids: Tensor, group_name: str) -> VocabShard:
    """Return the shard of this rank, which has `size` tokens of the vocabulary.

    With a group, this gathers three numbers per rank and waits for the device once.

    Raises:
        ValueError: if the ranks have different token ids.
    """
    if not group_name:
        return VocabShard(0, size, size, size)
    group = _resolve(group_name)
    flat_ids = token_ids.flatten()
    # Different tokens hardly ever have the same sum of products with odd numbers, which wraps around.
    checksum = (flat_ids * (2 * torch.arange(len(flat_ids), device=flat_ids.device) + 1)).sum()
    row = torch.stack([checksum, checksum.new_tensor(size), checksum.new_tensor(len(flat_ids))])
    rows = all_gather_row(row, group, "the sizes of the shards of the vocabulary").tolist()
    rank = dist.get_rank(group)
    for other, (other_checksum, _, other_length) in enumerate(rows):
        if (other_checksum, other_length) != (rows[rank][0], rows[rank][2]):
            raise ValueError(
                "the vocabulary is split over ranks, so that all of them must have the same tokens, got "
                f"{len(flat_ids)} tokens on rank {rank} and {other_length} others on rank {other}. {FSDP_ADVICE}"
            )
    sizes = [row[1] for row in rows]
    return VocabShard(sum(sizes[:rank]), size, sum(sizes), max(sizes))


def merge_ranks(state: OnlineLSE, group_name: str) -> None:
    """Add the columns of the other ranks to the state, in place, with one all-gather. Without a group, do nothing."""
    if group_name:
        numbers = torch.stack(state.numbers())
        rows = all_gather_row(numbers.flatten(), _resolve(group_name), "the log-sum-exp of the split vocabulary")
        _online_lse.merge(rows.view(len(rows), *numbers.shape), state)


def sum_ranks(grad_hidden: Tensor, split: Split) -> Tensor:
    """Return the gradient with those of the other ranks added in place, with one all-reduce if that is wanted."""
    if split.group_name and split.sum_grad_hidden:
        all_reduce_sum(grad_hidden, _resolve(split.group_name), "the gradients of the hidden states")
    return grad_hidden


def _resolve(group_name: str) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d  # the only function that finds a group by its name is private
    group: dist.ProcessGroup = c10d._resolve_process_group(group_name)
    return group
