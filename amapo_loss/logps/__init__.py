"""Log-probs of tokens and sequences, from a language model's logits or from the hidden states before its head.

This file has the public functions, their argument checks and the reduction over a sequence. `_linear_head` and
`_logits` compute the log-probs, both with the mathematics of `_online_lse`.
"""

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from amapo_loss import _checks
from amapo_loss.logps._linear_head import gather_rows, linear_logps
from amapo_loss.logps._logits import logits_logps
from amapo_loss.logps._online_lse import LogitTransform
from amapo_loss.logps._packing import Packing
from amapo_loss.logps._vocab_parallel import gather_hidden, local_shard


@overload
def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    average: bool = True,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    return_entropy: Literal[False] = False,
) -> Tensor: ...
@overload
def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    average: bool = True,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    average: bool = True,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return the log-prob of each sequence of labels, $\frac{1}{|y|} \sum_t \log \mathrm{softmax}(x_t)_{y_t}$.

    The only new tensor of the size of the logits is their gradient, in their dtype, in the backward pass.

    Each row is a sequence. If the rows are packed, `cu_seqlens` or `position_ids` says where sequences start. With
    `shift`, no label is then predicted from the sequence before it.

    Args:
        logits: [N, T, V] unnormalized log-probabilities, any floating dtype and any strides. They are computed in
            float32, or in float64 if they are float64. A DTensor may be sharded on V. The ranks then exchange only
            three numbers per token (four with the entropy).
        labels: [N, T] int64 token ids on the device of `logits`.
        ignore_index: the label of positions that do not count, which are the prompt and the padding.
        average: divide the sum by the number of counted tokens, as AMaPO and SimPO do. `False` returns the sums that
            DPO takes.
        shift: the logits at position t predict the label at t + 1, as causal language models return them. `False`: they
            predict the label at t.
        cu_seqlens: [S + 1] int32 or int64, for packed rows: sequence s has the positions `cu_seqlens[s]` to
            `cu_seqlens[s + 1]` of the N * T positions, as in FlashAttention. Positions behind the last offset count for
            no sequence.
        position_ids: [N, T] int32 or int64, for packed rows, in place of `cu_seqlens`: a sequence starts at the start
            of each row, and wherever a number is not one more than the number before it. At the end of a row, one-token
            sequences with the label `ignore_index` are padding, and so is a row that has nothing else. Padding on the
            left would be taken for sequences. This waits for a GPU once, to count the sequences.
        return_entropy: also return the entropy of the distributions that predict the counted tokens, summed or averaged
            like the log-probs. It comes from the same pass and has no gradient.

    Returns:
        [N] log-probs in nats, float32 (float64 for float64 logits), or [S] for packed rows. A sequence without a
        counted token gives 0, with gradient 0. With `return_entropy`, a tuple of them and of as many entropies in nats.

    Raises:
        TypeError: if `logits` is not a floating tensor or `labels` not an int64 tensor; if `labels` is a DTensor; if
            `cu_seqlens` or `position_ids` is not an integer tensor.
        ValueError: if shapes or devices do not match; if both `cu_seqlens` and `position_ids` are given; on a CPU, if
            `cu_seqlens` does not begin with 0, decreases or exceeds N * T (on a GPU, PyTorch's device-side assertion
            fails); if logits that are a DTensor are not sharded on V over a mesh of one dimension, or its ranks have
            different labels.
        IndexError: on a CPU, if a counted label is outside [0, V). On a GPU, PyTorch's device-side assertion fails.
        RuntimeError: in the backward pass, for a second derivative; in forward mode, as under `torch.func.jvp`. Inside
            `torch.compile`, both are 0 instead.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 4)  # uniform over a vocabulary of 4
        >>> sequence_logps(logits, torch.tensor([[-100, 2, 3]]))  # log(1/4) per token
        tensor([-1.3863])
        >>> sequence_logps(logits, torch.tensor([[-100, 2, 3]]), average=False)
        tensor([-2.7726])
        >>> packed = torch.tensor([[0, 1, 2, 3, 0, 1]])  # two sequences, with 3 and 1 predicted tokens
        >>> sequence_logps(torch.zeros(1, 6, 4), packed, position_ids=packed, average=False)
        tensor([-4.1589, -1.3863])

    Source: arXiv 2405.14734, equation 3.
    """
    _checks.floating_tensor("logits", logits)
    _check_labels("logits", logits, "V", labels)
    _checks.integer("ignore_index", ignore_index)
    advice = (
        "if each rank has sequences of its own, pass logits.to_local(), and if the vocabulary is split as well, put it "
        "on the mesh of the vocabulary with DTensor.from_local(logits.to_local(), mesh, [Shard(-1)])"
    )
    logits, group_name = local_shard("logits", logits, 2, None, advice)
    packing = Packing.of(labels, ignore_index, cu_seqlens, position_ids)
    labels = _predicted_labels(labels, ignore_index, packing, shift)
    logps, entropies = logits_logps(logits, labels, ignore_index, group_name, return_entropy)
    counted = labels != ignore_index
    logps = _reduce_tokens(logps, counted, packing, average)
    return (logps, _reduce_tokens(entropies, counted, packing, average)) if return_entropy else logps


@overload
def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    average: bool = True,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    keep_bytes: int = 0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    vocab_group: ProcessGroup | None = None,
    return_entropy: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    average: bool = True,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    keep_bytes: int = 0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    vocab_group: ProcessGroup | None = None,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    average: bool = True,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    keep_bytes: int = 0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    vocab_group: ProcessGroup | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return `sequence_logps` of the logits `hidden @ weight.T + bias`, without ever holding these logits.

    The head is applied only to positions that count. They are gathered first, which waits for a GPU once, to learn how
    many there are. Everything else is as in `linear_token_logps`.

    Args:
        hidden: [N, T, H] the last hidden states, which are the input of the language-model head. With a split
            vocabulary, it may be a DTensor with `Shard(0)` or `Shard(1)`, see `linear_token_logps`.
        weight: [V, H] weight of the head. See `linear_token_logps` for a vocabulary that is split over ranks.
        labels: [N, T] int64 token ids.
        bias: [V] bias of the head, if it has one.
        ignore_index: the label of positions that do not count, which are the prompt and the padding.
        average: divide the sum by the number of counted tokens, as AMaPO and SimPO do. `False` returns the sums that
            DPO takes.
        shift: the hidden states at position t predict the label at t + 1. `False`: they predict the label at t.
        cu_seqlens: see `sequence_logps`.
        position_ids: see `sequence_logps`.
        keep_bytes: see `linear_token_logps`.
        logit_scale: see `linear_token_logps`.
        final_logit_softcapping: see `linear_token_logps`.
        vocab_group: see `linear_token_logps`.
        return_entropy: see `sequence_logps`.

    Returns:
        [N] log-probs in nats, float32 (float64 for float64 input), or [S] for packed rows. A sequence without a counted
        token gives 0, with gradient 0. With `return_entropy`, a tuple of them and of as many entropies in nats.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `linear_token_logps` and `sequence_logps` do.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 4, bias=False)
        >>> hidden, labels = torch.zeros(1, 3, 8), torch.tensor([[-100, 2, 3]])  # the logits are 0: uniform
        >>> linear_sequence_logps(hidden, head.weight, labels)
        tensor([-1.3863], grad_fn=<DivBackward0>)

    Source: arXiv 2405.14734, equation 3.
    """
    _checks.floating_tensor("hidden", hidden)
    _check_labels("hidden", hidden, "H", labels)
    _checks.integer("ignore_index", ignore_index)
    hidden, weight, bias, group_name = _local_head(hidden, weight, bias, vocab_group)
    _check_head(hidden, "N, T, H", weight, bias)
    packing = Packing.of(labels, ignore_index, cu_seqlens, position_ids)
    labels = _predicted_labels(labels, ignore_index, packing, shift)
    counted = labels != ignore_index
    index = counted.flatten().nonzero().squeeze(1)
    hidden, targets = gather_rows(hidden.flatten(0, 1), index), labels.flatten().index_select(0, index)
    transform = _checked_transform(hidden, weight, targets, bias, keep_bytes, logit_scale, final_logit_softcapping)
    logps, entropies = linear_logps(hidden, weight, targets, transform, group_name, keep_bytes, return_entropy)

    def reduced(values: Tensor) -> Tensor:
        all_values = values.new_zeros(labels.numel()).index_copy(0, index, values)
        return _reduce_tokens(all_values, counted, packing, average)

    return (reduced(logps), reduced(entropies)) if return_entropy else reduced(logps)


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    keep_bytes: int = 0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    vocab_group: ProcessGroup | None = None,
    return_entropy: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    keep_bytes: int = 0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    vocab_group: ProcessGroup | None = None,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    keep_bytes: int = 0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    vocab_group: ProcessGroup | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return the log-prob of each target under a language-model head, $\log \mathrm{softmax}(f(W h_i + b))_{y_i}$.

    $$f(z) = c \tanh(s z / c) \text{ with } s = \mathtt{logit\_scale}, \; c = \mathtt{final\_logit\_softcapping};
      \qquad f(z) = s z \text{ without a softcap}$$

    The [n, V] logits are never held; tiles of them are computed and dropped. The gradient is exact, for any gradient
    per token from the loss, so that the loss may couple tokens and sequences in any way. Tiles and sums are float32,
    or float64 for float64 input, whatever the dtype of the inputs. Products of float32 tensors are as precise as
    `torch.set_float32_matmul_precision` says.

    The cost is counted in matrix products of size n x V x H:

    - 2 if `weight` and `bias` need no gradient. Forward then computes the direction of the gradient of `hidden` as
      well, and holds it in place of `hidden`. It is 3 if the weight has to be converted: from float32 under autocast,
      or to float32 on a CPU.
    - 4 otherwise, since backward computes the tiles again. Nothing of size V x H is held but the weight's gradient.
    - 1 if no gradient is needed.

    The vocabulary may be split over ranks that have the same tokens and hidden states, as in tensor parallelism. Each
    rank then passes its rows of the weight, and gets all log-probs and the whole gradient of `hidden`. No rank holds
    the logits or the weight of another. Each call has these collectives:

    - an all-gather of three integers per rank, for which the host waits: the size of the shard, the number of tokens,
      and a checksum of them;
    - all-gathers of three numbers per token (four with the entropy). A frozen head has one for each of its tiles, any
      other head has one;
    - for the gradient of `hidden`, all-reduces of [n, H] numbers in float32. A frozen head has one for each of its
      tiles, in the forward pass. Any other head has one, in the backward pass.

    Args:
        hidden: [n, H] hidden states, any floating dtype. With a split vocabulary, it may be a DTensor on the mesh of
            its ranks. If that has `Shard(0)`, as under sequence parallelism, the hidden states are gathered here, and
            each rank gets the gradient of its own ones.
        weight: [V, H] weight of the head, in the dtype of `hidden`. Under autocast, any floating dtype. A DTensor with
            `Shard(0)` on a mesh of one dimension is a split vocabulary. So is a plain tensor with `vocab_group`.
        targets: [n] int64 token ids of the whole vocabulary. All of them count.
        bias: [V] bias of the head, in the dtype of `weight`, if the head has one.
        keep_bytes: memory in bytes that a head with gradients may hold from forward to backward. Tiles that fit into it
            are not computed again, so that they cost 3 products. About V x n elements of the dtype of the products
            hold all tiles, where V counts the rows of this rank. Without gradients of `weight` or `bias`, and without
            conversion, it has no effect.
        logit_scale: $s$, the factor by which the model multiplies its logits (Cohere's `logit_scale`, 1 /
            `logits_scaling` of Granite).
        final_logit_softcapping: $c$, the bound at which the model caps its logits (Gemma), or None. The scale comes
            first.
        vocab_group: the ranks over which the vocabulary is split. `weight` and `bias` are then the rows of this rank,
            [V_r, H] and [V_r], in the order of `torch.distributed.get_rank(vocab_group)`. The ranks may have different
            numbers of rows, also 0.
        return_entropy: also return the entropy of each token's distribution. It comes from the same pass and has no
            gradient.

    Returns:
        [n] log-probs in nats, float32 (float64 for float64 input). With `return_entropy`, a tuple of them and of the
        entropies [n] in nats.

    Raises:
        TypeError: if `hidden`, `weight` or `bias` is not a floating tensor; if `targets` is not an int64 tensor, or is
            a DTensor; if `hidden` is a DTensor and the vocabulary is not split; if `vocab_group` is not a group that
            contains this rank; if one of the other arguments is not a number.
        ValueError: if shapes, dtypes or devices do not match; if `weight` or `bias` is empty, as under DeepSpeed
            ZeRO-3; if a DTensor has other placements than above, or if `vocab_group` is given in addition; if the ranks
            of a split vocabulary have different targets; if `keep_bytes` is negative; if the softcap is not above 0.
        IndexError: on a CPU, if a target is outside [0, V). On a GPU, PyTorch's device-side assertion fails.
        RuntimeError: in the backward pass, for a second derivative; in forward mode, as under `torch.func.jvp`. Inside
            `torch.compile`, both are 0 instead. With gloo, if another rank of the split vocabulary
            does not take part before the timeout of the group; NCCL's watchdog ends the process instead.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 4)
        >>> hidden, targets = torch.randn(3, 8), torch.tensor([0, 3, 1])
        >>> logps = linear_token_logps(hidden, head.weight, targets, head.bias)
        >>> expected = head(hidden).log_softmax(-1)[torch.arange(3), targets]
        >>> torch.allclose(logps, expected, atol=1e-5)
        True

    Source: cross-entropy of a language model; the method is this library's own, see `docs/logps.md`.
    """
    hidden, weight, bias, group_name = _local_head(hidden, weight, bias, vocab_group)
    _check_head(hidden, "n, H", weight, bias)
    transform = _checked_transform(hidden, weight, targets, bias, keep_bytes, logit_scale, final_logit_softcapping)
    logps, entropies = linear_logps(hidden, weight, targets, transform, group_name, keep_bytes, return_entropy)
    return (logps, entropies) if return_entropy else logps


def _predicted_labels(
    labels: Tensor,  # [N, T]
    ignore_index: int,
    packing: Packing | None,
    shift: bool,
) -> Tensor:
    """Return the label [N, T] that each position predicts."""
    if packing is not None:
        labels = packing.mask_labels(labels, ignore_index, shift)
    if not shift:
        return labels
    # Shifting the logits instead would copy them. A packed sequence may go on in the next row.
    rows = labels if packing is None else labels.reshape(1, -1)
    return F.pad(rows[:, 1:], (0, rows.shape[1] and 1), value=ignore_index).view_as(labels)


def _reduce_tokens(
    values: Tensor,  # [N * T], 0 where a token does not count
    counted: Tensor,  # [N, T]
    packing: Packing | None,
    average: bool,
) -> Tensor:
    """Return the sums or the averages over the counted tokens of each sequence, [N], or [S] for packed rows."""
    if packing is None:
        sums, counts = values.view_as(counted).sum(1), counted.sum(1)
    else:
        sums, counts = packing.sums(values), packing.sums(counted.flatten().long())
    return sums / counts.clamp(min=1) if average else sums


def _local_head(
    hidden: Tensor,  # [n, H] or [N, T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    vocab_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """Return the hidden states of all tokens, this rank's rows of the weight and the bias, and the group's name."""
    _checks.floating_tensor("hidden", hidden)
    _checks.floating_tensor("weight", weight)
    weight, group_name = local_shard("weight", weight, 0, vocab_group)
    if bias is not None:
        _checks.floating_tensor("bias", bias)
        bias, bias_group = local_shard("bias", bias, 0, vocab_group)
        if bias_group != group_name:
            raise ValueError(
                "bias must be split over ranks as weight is, got one that is not: pass "
                "distribute_tensor(bias, weight.device_mesh, weight.placements)"
            )
    return gather_hidden("hidden", hidden, group_name), weight, bias, group_name


def _check_labels(
    name: str,
    states: Tensor,  # [N, T, V] logits, or [N, T, H] hidden states
    last_dim: str,
    labels: Tensor,  # [N, T]
) -> None:
    _checks.token_ids("labels", labels)
    _checks.plain_activation("labels", labels)
    if states.ndim != 3 or labels.shape != states.shape[:2]:
        raise ValueError(
            f"{name} must be [N, T, {last_dim}] and labels [N, T], "
            f"got shapes {tuple(states.shape)} and {tuple(labels.shape)}"
        )
    _checks.same_device("labels", labels, name, states.device)


def _named_parameters(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _check_head(
    hidden: Tensor,
    dims: str,  # of the hidden states
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
) -> None:
    for name, parameter in _named_parameters(weight, bias).items():
        if name == "weight" or len(weight):  # beside an empty shard, an empty bias is right
            _checks.gathered_parameter(name, parameter)
    num_dims = dims.count(",") + 1
    if hidden.ndim != num_dims or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [{dims}] and weight [V, H], got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )


def _checked_transform(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [n]
    bias: Tensor | None,  # [V]
    keep_bytes: int,
    logit_scale: float,
    final_logit_softcapping: float | None,
) -> LogitTransform:
    """Check the arguments of a head without DTensors, and return how its logits follow from products."""
    _checks.token_ids("targets", targets)
    _checks.plain_activation("targets", targets)
    parameters = _named_parameters(weight, bias)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be {tuple(hidden.shape[:1])}, one entry per hidden state, got shape {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be {tuple(weight.shape[:1])}, one entry per vocabulary token, got shape {tuple(bias.shape)}"
        )
    for name, tensor in {**parameters, "targets": targets}.items():
        _checks.same_device(name, tensor, "hidden", hidden.device)
    for name, parameter in parameters.items():
        if parameter.dtype != hidden.dtype and not _checks.autocasts(hidden.device.type):
            raise ValueError(f"{name} is {parameter.dtype}, expected the dtype of hidden, {hidden.dtype}")
    _checks.integer("keep_bytes", keep_bytes, at_least=0)
    _checks.number("logit_scale", logit_scale)
    if final_logit_softcapping is not None:
        _checks.number("final_logit_softcapping", final_logit_softcapping, above=0)
    return LogitTransform(bias, logit_scale, final_logit_softcapping)
