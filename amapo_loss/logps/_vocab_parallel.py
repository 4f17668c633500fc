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

FSDP_ADVICE = "call this inside the forward of the module that holds the weight, where FSDP2 has gathered it"


class VocabShard(NamedTuple):
    """The token ids from `start` to `start + size`, whose columns this rank computes."""

    start: int
    size: int
    vocab_size: int  # of all ranks
    largest: int  # the size of the largest shard, from which all ranks derive the same number of tiles of tokens

    def localize(self, target_ids: Tensor) -> Tensor:
        """Return the target ids counted from `start`, `size` for those of other ranks, and -1 where nothing counts."""
        local_ids = target_ids - self.start
        elsewhere = (local_ids < 0) | (local_ids >= self.size)
        return local_ids.masked_fill(elsewhere, self.size).masked_fill(target_ids < 0, -1)


def local_shard(
    name: str,
    value: Tensor,
    dim: int,
    vocab_group: dist.ProcessGroup | None,
    advice: str = FSDP_ADVICE,
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
    # On a further dimension of the mesh, ranks have other tokens, and nobody would add up their gradients.
    if dtensor.device_mesh.ndim != 1 or not dtensor.placements[0].is_shard(dim):
        raise ValueError(
            f"{name} must be a plain tensor or a DTensor that is sharded on the vocabulary over a mesh of one "
            f"dimension, got the placements {tuple(dtensor.placements)} on {dtensor.device_mesh}: {advice}"
        )
    return dtensor.to_local(), _group(dtensor.device_mesh).group_name


def gather_hidden(
    name: str,
    hidden: Tensor,
    group_name: str,
) -> Tensor:
    """Return the hidden states of all tokens. Those of a DTensor that is sharded on its tokens are gathered.

    The head gives each rank the whole gradient. In backward, the rank keeps the part of its own tokens.

    Raises:
        TypeError: if the head is not split and `hidden` is a DTensor.
        ValueError: if the DTensor is on another mesh.
    """
    if not _checks.is_dtensor(hidden):
        return hidden
    if not group_name:
        _checks.plain_activation(name, hidden)
    from torch.distributed.tensor import Replicate

    dtensor: Any = hidden
    mesh = dtensor.device_mesh
    if mesh.ndim != 1 or _group(mesh).group_name != group_name:
        raise ValueError(
            f"{name} must be a plain tensor or a DTensor on a mesh of the ranks that share the vocabulary, got {mesh}"
        )
    whole: Tensor = dtensor.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
    return whole


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
    # A sum weighted with odd numbers, modulo 2^64: a single token that differs always changes it.
    checksum = (flat_ids * (2 * torch.arange(len(flat_ids), device=flat_ids.device) + 1)).sum()
    row = torch.stack([checksum, checksum.new_tensor(size), checksum.new_tensor(len(flat_ids))])
    rows = all_gather_row(row, group, "the sizes of the shards of the vocabulary").tolist()
    rank = dist.get_rank(group)
    for other, (other_checksum, _, other_length) in enumerate(rows):
        if (other_checksum, other_length) != (rows[rank][0], rows[rank][2]):
            raise ValueError(
                "all ranks that share the vocabulary must have the same tokens, got different ones on the ranks "
                f"{rank} and {other} of the group ({len(flat_ids)} and {other_length} tokens): give them the same "
                f"batch, or, if FSDP2 has sharded the weight, {FSDP_ADVICE}"
            )
    sizes = [row[1] for row in rows]
    return VocabShard(sum(sizes[:rank]), size, sum(sizes), max(sizes))


def merge_ranks(state: OnlineLSE, group_name: str) -> None:
    """Add the columns of the other ranks to the state, in place, with one all-gather. Without a group, do nothing."""
    if group_name:
        numbers = torch.stack(state.numbers())
        rows = all_gather_row(numbers.flatten(), _resolve(group_name), "the log-sum-exp of the split vocabulary")
        _online_lse.merge(rows.view(len(rows), *numbers.shape), state)


def sum_ranks(grad_hidden: Tensor, group_name: str) -> None:
    """Add up the gradients of all ranks, in place, with one all-reduce. Without a group, do nothing.

    The rows of a trained head share a large mean, which cancels only in this sum. Gradients that are rounded before it
    would lose digits.
    """
    if group_name:
        all_reduce_sum(grad_hidden, _resolve(group_name), "the gradients of the hidden states")


def _group(mesh: Any) -> dist.ProcessGroup:
    """Return the group of a mesh of one dimension."""
    group: dist.ProcessGroup = mesh.get_group()
    if mesh.get_coordinate()[0] != dist.get_rank(group):  # shards are in the order of the mesh, sizes in the group's
        raise ValueError(f"the ranks of a mesh must be in ascending order, got {mesh}")
    return group


def _resolve(group_name: str) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d  # the only function that finds a group by its name is private
    group: dist.ProcessGroup = c10d._resolve_process_group(group_name)
    return group
