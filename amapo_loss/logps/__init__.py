"""From a language model's logits, or from the hidden states before its head, to the log-probs of tokens and sequences.

Checks, and what a sequence is; `amapo_loss.logps._linear_head` and `amapo_loss.logps._logits` compute.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from amapo_loss import _checks
from amapo_loss.logps import _linear_head
from amapo_loss.logps._logits import logits_logps


def sequence_logps(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, average: bool = True, shift: bool = True
) -> Tensor:
    r"""The log-prob of each sequence of labels, $\frac{1}{|y|} \sum_t \log \mathrm{softmax}(x_t)_{y_t}$.

    Holds nothing of the size of the logits but them and, in the backward pass and in their dtype, their gradient.

    Args:
        logits: [N, T, V] unnormalized, any floating dtype and strides; computed in float32 at least.
        labels: [N, T] token ids, int64, on the device of `logits`.
        ignore_index: the label of positions that do not count: prompt and padding.
        average: divide the sum by the number of counted tokens, as AMaPO and SimPO train. `False` gives DPO's sums.
        shift: the logits at t predict the label at t + 1, as causal language models return them. `False`: at t.

    Returns:
        [N] in nats, float32 (float64 for float64 logits). A sequence without a counted token gives 0 and no gradient.

    Raises:
        TypeError: if `logits` is no floating tensor or `labels` no int64 tensor.
        ValueError: if their shapes or devices do not fit.
        IndexError: for a counted label outside [0, V) on the CPU; on a GPU, PyTorch's device-side assertion.
        RuntimeError: in the backward pass, for a second derivative.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 4)  # uniform over four words
        >>> sequence_logps(logits, torch.tensor([[-100, 2, 3]]))  # log(1/4) a token
        tensor([-1.3863])
        >>> sequence_logps(logits, torch.tensor([[-100, 2, 3]]), average=False)
        tensor([-2.7726])

    Source: arXiv 2405.14734, equation 3.
    """
    _checks.floating("logits", logits)
    _require_labels("logits", logits, "V", labels)
    if shift:
        labels = _shifted(labels, ignore_index)
    return _of_sequences(logits_logps(logits, labels, ignore_index), labels != ignore_index, average)


def linear_sequence_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *,
    ignore_index: int = -100, average: bool = True, shift: bool = True, keep_bytes: int = 0,
    logit_scale: float = 1.0, final_logit_softcapping: float | None = None,
) -> Tensor:  # fmt: skip
    r"""`sequence_logps` of the logits `hidden @ weight.T + bias`, which are never held.

    Only positions that count meet the head: they are gathered first, for which a GPU is waited for once, to know how
    many there are. Otherwise see `linear_token_logps`.

    Args:
        hidden: [N, T, H] the last hidden states, what the language-model head is applied to.
        weight: [V, H] that of the head.
        labels: [N, T] token ids, int64.
        bias: [V] that of the head, if it has one.
        ignore_index: the label of positions that do not count: prompt and padding.
        average: divide the sum by the number of counted tokens, as AMaPO and SimPO train. `False` gives DPO's sums.
        shift: the hidden states at t predict the label at t + 1. `False`: at t.
        keep_bytes: memory that a trainable head may use, from forward to backward, to be faster.
        logit_scale: as the model multiplies its logits.
        final_logit_softcapping: as the model caps them, after the scale.

    Returns:
        [N] in nats, float32 (float64 for float64 input). A sequence without a counted token gives 0 and no gradient.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `linear_token_logps` does.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 4, bias=False)
        >>> hidden, labels = torch.zeros(1, 3, 8), torch.tensor([[-100, 2, 3]])  # its logits are 0: uniform
        >>> linear_sequence_logps(hidden, head.weight, labels)
        tensor([-1.3863], grad_fn=<DivBackward0>)

    Source: arXiv 2405.14734, equation 3.
    """
    _checks.floating("hidden", hidden)
    _require_labels("hidden", hidden, "H", labels)
    if shift:
        labels = _shifted(labels, ignore_index)
    counted = labels != ignore_index
    at = counted.flatten().nonzero().squeeze(1)
    tokens = linear_token_logps(
        _linear_head.taken(hidden.flatten(0, 1), at), weight, labels.flatten().index_select(0, at), bias,
        keep_bytes=keep_bytes, logit_scale=logit_scale, final_logit_softcapping=final_logit_softcapping,
    )  # fmt: skip
    return _of_sequences(tokens.new_zeros(labels.numel()).index_copy(0, at, tokens), counted, average)


def linear_token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, keep_bytes: int = 0,
    logit_scale: float = 1.0, final_logit_softcapping: float | None = None,
) -> Tensor:  # fmt: skip
    r"""The log-prob of each target under a language model's head, $\log \mathrm{softmax}(f(W h_i + b))_{y_i}$.

    $$f(z) = c \tanh(s z / c), \quad s = \mathtt{logit\_scale}, \quad c = \mathtt{final\_logit\_softcapping};
      \qquad f(z) = s z \text{ without a cap}$$

    Without the [n, V] logits, whose tiles come and go, and with their exact gradient for any gradient from upstream:
    the loss may couple tokens and sequences as it likes. Tiles and sums are float32 at least, whatever the inputs are.

    With a `weight` and `bias` that need no gradient, forward makes that of `hidden` as well, and holds it instead of
    `hidden`: two matrix products of n x V x H in all. (It is three where tiles of the weight have to be converted, from
    float32 under autocast or on a CPU to float32.) Otherwise backward computes the tiles again: four products, and
    nothing of [V, H] but the gradient. Without gradients it is one.

    Args:
        hidden: [n, H] any floating dtype.
        weight: [V, H] in the dtype of `hidden`; under autocast, any.
        targets: [n] token ids, int64, all of which count.
        bias: [V] in the dtype of `weight`.
        keep_bytes: memory that a trainable head may use, from forward to backward, to be faster: three products for the
            tiles that it suffices for, in the dtype of the products; some V x n elements are all. A frozen head of that
            dtype computes nothing twice and keeps nothing.
        logit_scale: s, as Cohere's and Granite's models multiply their logits, which TRL calls by the same name.
        final_logit_softcapping: c, as Gemma's models cap them, after the scale.

    Returns:
        [n] in nats, float32 (float64 for float64 input).

    Raises:
        TypeError: for a `hidden`, `weight` or `bias` that is no floating tensor, `targets` that is no int64 tensor; a
            `weight` or `bias` that is a DTensor; a number that is none.
        ValueError: for shapes, dtypes or devices that do not fit, `keep_bytes` below 0, a softcap that is not above.
        IndexError: for a target outside [0, V) on the CPU; on a GPU, PyTorch's device-side assertion.
        RuntimeError: in the backward pass, for a second derivative.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 4)
        >>> hidden, targets = torch.randn(3, 8), torch.tensor([0, 3, 1])
        >>> logps = linear_token_logps(hidden, head.weight, targets, head.bias)
        >>> expected = head(hidden).log_softmax(-1)[torch.arange(3), targets]
        >>> torch.allclose(logps, expected, atol=1e-5)
        True
    """
    _require_head(hidden, weight, targets, bias)
    _checks.whole("keep_bytes", keep_bytes, at_least=0)
    _checks.number("logit_scale", logit_scale)
    if final_logit_softcapping is not None:
        _checks.number("final_logit_softcapping", final_logit_softcapping, above=0)
    return _linear_head.linear_logps(hidden, weight, targets, bias, logit_scale, final_logit_softcapping, keep_bytes)


def _shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """At t, the label at t + 1. The labels move, not what predicts them: a slice of that would be copied."""
    return F.pad(labels[:, 1:], (0, labels.shape[1] and 1), value=ignore_index)


def _of_sequences(token_logps: Tensor, counted: Tensor, average: bool) -> Tensor:
    """[N] from [N * T] log-probs, 0 where they do not count."""
    sums = token_logps.view_as(counted).sum(1)
    return sums / counted.sum(1).clamp(min=1) if average else sums


def _require_labels(name: str, states: Tensor, last: str, labels: Tensor) -> None:
    _checks.token_ids("labels", labels)
    if states.ndim != 3 or labels.shape != states.shape[:2]:
        raise ValueError(
            f"{name} must be [N, T, {last}] and labels [N, T], "
            f"got shapes {tuple(states.shape)} and {tuple(labels.shape)}"
        )
    if labels.device != states.device:
        raise ValueError(f"labels is on {labels.device}, expected the device of {name}, {states.device}")


def _require_head(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    _checks.floating("hidden", hidden)
    _checks.token_ids("targets", targets)
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, parameter in parameters.items():
        _checks.floating(name, parameter)
        _checks.no_dtensor(name, parameter)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [..., H] and weight [V, H], got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be {tuple(hidden.shape[:1])}, one entry a hidden state, got shape {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])}, one entry a word, got shape {tuple(bias.shape)}")
    for name, tensor in {**parameters, "targets": targets}.items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, expected the device of hidden, {hidden.device}")
    if torch.is_autocast_enabled(hidden.device.type):
        return
    for name, parameter in parameters.items():
        if parameter.dtype != hidden.dtype:
            raise ValueError(f"{name} is {parameter.dtype}, expected the dtype of hidden, {hidden.dtype}")
