"""From a language model's logits to the log-probs of sequences. Knows tensors, and of the package only the checks."""

import torch.nn.functional as F
from torch import Tensor

from amapo_loss import checks


def sequence_logps(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, average: bool = True, shift: bool = True
) -> Tensor:
    r"""The log-prob of each sequence of labels, $\frac{1}{|y|} \sum_t \log \mathrm{softmax}(x_t)_{y_t}$.

    Args:
        logits: [N, T, V] unnormalized, any floating dtype; computed in float32 at least.
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

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 4)  # uniform over four words
        >>> sequence_logps(logits, torch.tensor([[-100, 2, 3]]))  # log(1/4) a token
        tensor([-1.3863])
        >>> sequence_logps(logits, torch.tensor([[-100, 2, 3]]), average=False)
        tensor([-2.7726])

    Source: arXiv 2405.14734, equation 3.
    """
    checks.floating("logits", logits)
    checks.token_ids("labels", labels)
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be [N, T, V] and labels [N, T], got shapes {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device}, expected the device of logits, {logits.device}")
    if shift:  # the labels move, not the logits: a slice of those would be copied
        labels = F.pad(labels[:, 1:], (0, labels.shape[1] and 1), value=ignore_index)
    # In bfloat16 a log-prob of -401 would round to -400, and a mean over tokens would average such errors.
    logits = logits.to(checks.computing_dtype(logits))
    token_losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction="none")
    sums = -token_losses.view_as(labels).sum(1)
    return sums / (labels != ignore_index).sum(1).clamp(min=1) if average else sums
