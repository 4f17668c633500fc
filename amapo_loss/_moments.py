"""Count, mean and sum of squared deviations (M2) of scores, and how those of several parts or ranks are merged.

Depends only on torch. Everything is float64, so that a mean far larger than the standard deviation, or a large number
of ranks, costs no precision. Only on devices without float64 it is float32.
"""

import torch
from torch import Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype to sum scores in: float64, or float32 on Apple GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def moments(
    scores: Tensor,  # [B]
    mask: Tensor | None = None,  # [B] bool
) -> Tensor:
    """Return the moments (count, mean, M2) [3] of the scores, or of those for which `mask` is true."""
    dtype = sum_dtype(scores.device)
    scores = scores.detach().to(dtype)
    if mask is None:
        n = torch.full((), scores.shape[0], dtype=dtype, device=scores.device)
    else:
        n, scores = mask.sum().to(dtype), torch.where(mask, scores, 0)
    mean = scores.sum() / n.clamp(min=1)
    deviations = scores - mean if mask is None else torch.where(mask, scores - mean, 0)
    return torch.stack((n, mean, deviations.square().sum()))


def weighted_moments(
    scores: Tensor,  # [B]
    mask: Tensor | None,  # [B] bool
    weights: Tensor | None,  # [B], 0 where `mask` is False
) -> Tensor:
    """Return the moments and the sum of the weights (count, mean, M2, sum) [4]. Without weights, each weight is 1."""
    row = moments(scores, mask)
    total = row[:1] if weights is None else weights.sum(0, keepdim=True, dtype=row.dtype)
    return torch.cat((row, total))


def merge_moments(
    moments: Tensor,  # [k, 3]
) -> Tensor:
    """Return the moments [3] of k disjoint sets of scores together.

    This is Chan's formula for all sets at once: M2 = sum_i M2_i + sum_i n_i (mean_i - mean)^2.
    """
    counts, means, m2s = moments.unbind(1)
    n = counts.sum()
    mean = (counts * means).sum() / n.clamp(min=1)
    return torch.stack((n, mean, m2s.sum() + (counts * (means - mean).square()).sum()))


def mean_std_count(
    moments: Tensor,  # [3]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the standard deviation with Bessel's correction, and the count."""
    n, mean, m2 = moments.unbind()
    return mean, (m2 / (n - 1).clamp(min=1)).sqrt(), n.long()
