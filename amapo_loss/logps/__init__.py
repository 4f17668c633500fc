"""Log-probs of tokens and sequences, from a language model's logits or from the hidden states before its head.

This file has the public functions, their argument checks and the reduction over a sequence. `_linear_head` and
`_logits` compute the log-probs, both with the mathematics of `_online_lse`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from amapo_loss import _checks
from amapo_loss.logps._linear_head import gather_rows, linear_logps
from amapo_loss.logps._logits import logits_logps
from amapo_loss.logps._online_lse import LogitTransform


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    average: bool = True,
    shift: bool = True,
) -> Tensor:
    r"""Return the log-prob of each sequence of labels, $\frac{1}{|y|} \sum_t \log \mathrm{softmax}(x_t)_{y_t}$.

    The only new tensor of the size of the logits is their gradient, in their dtype, in the backward pass.

    Args:
        logits: [N, T, V] unnormalized log-probabilities, any floating dtype and any strides. They are computed in
            float32, or in float64 if they are float64.
        labels: [N, T] int64 token ids on the device of `logits`.
        ignore_index: the label of positions that do not count, which are the prompt and the padding.
        average: divide the sum by the number of counted tokens, as AMaPO and SimPO do. `False` returns the sums that
            DPO takes.
        shift: the logits at position t predict the label at t + 1, as causal language models return them. `False`: they
            predict the label at t.

    Returns:
        [N] log-probs in nats, float32 (float64 for float64 logits). A sequence without a counted token gives 0, with
        gradient 0.

    Raises:
        TypeError: if `logits` is not a floating tensor or `labels` not an int64 tensor; if one of them is a DTensor.
        ValueError: if their shapes or devices do not match.
        IndexError: on a CPU, if a counted label is outside [0, V). On a GPU, PyTorch's device-side assertion fails.
        RuntimeError: in the backward pass, for a second derivative.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 4)  # uniform over a vocabulary of 4
        >>> sequence_logps(logits, torch.tensor([[-100, 2, 3]]))  # log(1/4) per token
        tensor([-1.3863])
        >>> sequence_logps(logits, torch.tensor([[-100, 2, 3]]), average=False)
        tensor([-2.7726])

    Source: arXiv 2405.14734, equation 3.
    """
    _checks.floating_tensor("logits", logits)
    _check_labels("logits", logits, "V", labels)
    if shift:
        labels = _shift_labels(labels, ignore_index)
    return _reduce_tokens(logits_logps(logits, labels, ignore_index), labels != ignore_index, average)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    average: bool = True,
    shift: bool = True,
    keep_bytes: int = 0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
) -> Tensor:
    r"""Return `sequence_logps` of the logits `hidden @ weight.T + bias`, without ever holding these logits.

    Only positions that count meet the head. They are gathered first, which waits for a GPU once, to learn how many
    there are. Everything else is as in `linear_token_logps`.

    Args:
        hidden: [N, T, H] the last hidden states, which are the input of the language-model head.
        weight: [V, H] weight of the head.
        labels: [N, T] int64 token ids.
        bias: [V] bias of the head, if it has one.
        ignore_index: the label of positions that do not count, which are the prompt and the padding.
        average: divide the sum by the number of counted tokens, as AMaPO and SimPO do. `False` returns the sums that
            DPO takes.
        shift: the hidden states at position t predict the label at t + 1. `False`: they predict the label at t.
        keep_bytes: see `linear_token_logps`.
        logit_scale: see `linear_token_logps`.
        final_logit_softcapping: see `linear_token_logps`.

    Returns:
        [N] log-probs in nats, float32 (float64 for float64 input). A sequence without a counted token gives 0, with
        gradient 0.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `linear_token_logps` does.

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
    if shift:
        labels = _shift_labels(labels, ignore_index)
    counted = labels != ignore_index
    index = counted.flatten().nonzero().squeeze(1)
    token_logps = linear_token_logps(
        gather_rows(hidden.flatten(0, 1), index),
        weight,
        labels.flatten().index_select(0, index),
        bias,
        keep_bytes=keep_bytes,
        logit_scale=logit_scale,
        final_logit_softcapping=final_logit_softcapping,
    )
    all_logps = token_logps.new_zeros(labels.numel()).index_copy(0, index, token_logps)
    return _reduce_tokens(all_logps, counted, average)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    keep_bytes: int = 0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
) -> Tensor:
    r"""Return the log-prob of each target under a language-model head, $\log \mathrm{softmax}(f(W h_i + b))_{y_i}$.

    $$f(z) = c \tanh(s z / c) \text{ with } s = \mathtt{logit\_scale}, \; c = \mathtt{final\_logit\_softcapping};
      \qquad f(z) = s z \text{ without a softcap}$$

    The [n, V] logits are never held; tiles of them are computed and dropped. The gradient is exact, for any gradient
    per token from the loss, so that the loss may couple tokens and sequences in any way. Tiles and sums are float32,
    or float64 for float64 input, whatever the dtype of the inputs.

    The cost is counted in matrix products of size n x V x H:

    - 2 if `weight` and `bias` need no gradient. Forward then computes the direction of the gradient of `hidden` as
      well, and holds it in place of `hidden`. It is 3 if the weight has to be converted: from float32 under autocast,
      or to float32 on a CPU.
    - 4 otherwise, since backward computes the tiles again. Nothing of size V x H is held but the weight's gradient.
    - 1 if no gradient is needed.

    Args:
        hidden: [n, H] hidden states, any floating dtype.
        weight: [V, H] weight of the head, in the dtype of `hidden`. Under autocast, any floating dtype.
        targets: [n] int64 token ids. All of them count.
        bias: [V] bias of the head, in the dtype of `weight`, if the head has one.
        keep_bytes: memory in bytes that a head with gradients may hold from forward to backward. Tiles that fit into it
            are not computed again, so that they cost 3 products. About V x n elements of the dtype of the products
            hold all tiles. Without gradients of `weight` or `bias`, and without conversion, it has no effect.
        logit_scale: $s$, the factor by which the model multiplies its logits (Cohere's `logit_scale`, 1 /
            `logits_scaling` of Granite).
        final_logit_softcapping: $c$, the bound at which the model caps its logits (Gemma), or None. The scale comes
            first.

    Returns:
        [n] log-probs in nats, float32 (float64 for float64 input).

    Raises:
        TypeError: if `hidden`, `weight` or `bias` is not a floating tensor; if `targets` is not an int64 tensor; if one
            of them is a DTensor; if one of the other arguments is not a number.
        ValueError: if shapes, dtypes or devices do not match; if `weight` or `bias` is empty, as under DeepSpeed
            ZeRO-3; if `keep_bytes` is negative; if the softcap is not above 0.
        IndexError: on a CPU, if a target is outside [0, V). On a GPU, PyTorch's device-side assertion fails.
        RuntimeError: in the backward pass, for a second derivative.

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
    _check_head(hidden, weight, targets, bias)
    _checks.integer("keep_bytes", keep_bytes, at_least=0)
    _checks.number("logit_scale", logit_scale)
    if final_logit_softcapping is not None:
        _checks.number("final_logit_softcapping", final_logit_softcapping, above=0)
    transform = LogitTransform(bias, logit_scale, final_logit_softcapping)
    return linear_logps(hidden, weight, targets, transform, keep_bytes)


def _shift_labels(
    labels: Tensor,  # [N, T]
    ignore_index: int,
) -> Tensor:
    """Return labels with the label of t + 1 at t. Shifting the logits instead would copy them."""
    return F.pad(labels[:, 1:], (0, labels.shape[1] and 1), value=ignore_index)


def _reduce_tokens(
    token_logps: Tensor,  # [N * T], 0 where a token does not count
    counted: Tensor,  # [N, T]
    average: bool,
) -> Tensor:
    """Return the sums or the averages [N] over the counted tokens of each sequence."""
    sums = token_logps.view_as(counted).sum(1)
    return sums / counted.sum(1).clamp(min=1) if average else sums


def _check_labels(
    name: str,
    states: Tensor,  # [N, T, V] logits, or [N, T, H] hidden states
    last_dim: str,
    labels: Tensor,  # [N, T]
) -> None:
    _checks.token_ids("labels", labels)
    _checks.plain_activation(name, states)
    _checks.plain_activation("labels", labels)
    if states.ndim != 3 or labels.shape != states.shape[:2]:
        raise ValueError(
            f"{name} must be [N, T, {last_dim}] and labels [N, T], "
            f"got shapes {tuple(states.shape)} and {tuple(labels.shape)}"
        )
    if labels.device != states.device:
        raise ValueError(f"labels is on {labels.device}, expected the device of {name}, {states.device}")


def _check_head(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [n]
    bias: Tensor | None,  # [V]
) -> None:
    _checks.floating_tensor("hidden", hidden)
    _checks.token_ids("targets", targets)
    _checks.plain_activation("hidden", hidden)
    _checks.plain_activation("targets", targets)
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, parameter in parameters.items():
        _checks.floating_tensor(name, parameter)
        _checks.plain_parameter(name, parameter)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [..., H] and weight [V, H], got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be {tuple(hidden.shape[:1])}, one entry per hidden state, got shape {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be {tuple(weight.shape[:1])}, one entry per vocabulary token, got shape {tuple(bias.shape)}"
        )
    for name, tensor in {**parameters, "targets": targets}.items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, expected the device of hidden, {hidden.device}")
    if torch.is_autocast_enabled(hidden.device.type):
        return
    for name, parameter in parameters.items():
        if parameter.dtype != hidden.dtype:
            raise ValueError(f"{name} is {parameter.dtype}, expected the dtype of hidden, {hidden.dtype}")
