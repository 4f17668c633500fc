"""The batch statistics behind the margin. Knows tensors, and of the package only the checks."""

from typing import NamedTuple

import torch
from torch import Tensor

from amapo_loss import checks


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of the ranking scores of `count` pairs, in score units (beta included).

    Args:
        mean: 0-dim floating tensor; from Triton in float64, as its rounding shows where it is far larger than the std.
        std: 0-dim floating tensor with Bessel's correction; 0 where fewer than two pairs leave it undefined.
        count: 0-dim tensor, the number of pairs.

    Hand one to `amapo_loss(..., statistics=)` to decide yourself which pairs define the margin, for example those of a
    whole optimizer batch while the gradient accumulates over its micro-batches.

    """

    mean: Tensor
    std: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls

    @classmethod
    def of(cls, scores: Tensor) -> "ScoreStatistics":
        r"""The statistics of these scores, $\mu = \frac1n \sum r_i$ and $\sigma^2 = \frac1{n-1} \sum (r_i - \mu)^2$.

        Args:
            scores: [B] ranking scores, any floating dtype; computed in float32 at least. No gradient flows through.

        Returns:
            `ScoreStatistics` on the device of `scores`; of no scores at all, three zeros.

        Raises:
            TypeError: if `scores` is no floating tensor.
            ValueError: if `scores` is not 1-D.

        Example:
            >>> import torch
            >>> ScoreStatistics.of(torch.tensor([1.0, 2.0, 3.0]))
            ScoreStatistics(mean=tensor(2.), std=tensor(1.), count=tensor(3))
        """
        checks.aligned({"scores": checks.floating("scores", scores)})
        n = scores.shape[0]
        count = torch.full((), n, device=scores.device)
        scores = scores.detach().to(checks.computing_dtype(scores))
        if n == 0:
            return cls(scores.sum(), scores.sum(), count)
        # Welford's recurrence: equal scores deviate by exactly 0, as they need not from mean(). The larger n is, the
        # more its mean rounds, and a pair at the mean must be seen there: add the mean of what is left.
        std, mean = torch.std_mean(scores, correction=min(n - 1, 1))
        return cls(torch.add(mean, (scores - mean).sum(), alpha=1 / n), std, count)
