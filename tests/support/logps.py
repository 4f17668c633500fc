"""The log-probs of sequences by PyTorch's own functions, which the tests compare with, and a measure of errors."""

import torch
from torch import Tensor

IGNORE_INDEX = -100


def reference_logps(
    logits: Tensor,  # [N, T, V]
    labels: Tensor,  # [N, T]
    average: bool = True,
    shift: bool = True,
) -> Tensor:
    """Return the log-prob of each sequence [N] by `log_softmax` and `gather`."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORE_INDEX
    token_logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counted
    return token_logps.sum(1) / (counted.sum(1).clamp(min=1) if average else 1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the error relative to the norm of the expected values. Two zeros have the error 0."""
    actual, expected = (x.detach().cpu().double() for x in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))
