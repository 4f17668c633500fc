"""The batch statistics that a margin is made from: of one batch, of all ranks, or of the latest scores.

Depends only on torch, the argument checks and the moments.
"""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from amapo_loss import _checks
from amapo_loss._moments import all_gather_row, merge_moments, moments


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of the ranking scores of `count` pairs, in score units (beta is included).

    Pass it as `amapo_loss(..., statistics=)` to decide yourself which pairs the margins are made from. With gradient
    accumulation, for example, score all micro-batches under `no_grad` first, and pass the statistics of all scores.

    Attributes:
        mean: 0-dim floating tensor. It is float64 from the Triton backend, from several ranks and from a window,
            because rounding a mean far larger than the standard deviation to float32 would change z.
        std: 0-dim floating tensor, the standard deviation with Bessel's correction. It is 0 for fewer than two pairs,
            and all margins are then 0.
        count: 0-dim int64 tensor, the number of pairs.

    """

    mean: Tensor
    std: Tensor
    count: Tensor  # type: ignore[assignment]  # hides the method tuple.count, which nobody calls here

    @classmethod
    def of(cls, scores: Tensor, process_group: dist.ProcessGroup | None = None) -> "ScoreStatistics":
        r"""Return the statistics of the given scores.

        $$\mu = \frac1n \sum_i r_i, \qquad \sigma^2 = \frac1{n-1} \sum_i (r_i - \mu)^2$$

        Args:
            scores: [B] ranking scores of any floating dtype. No gradient flows through the statistics.
            process_group: take the statistics over the scores of all ranks of this group. The ranks may have different
                numbers of scores, including 0. This adds one all-gather of three float64 numbers per rank, and every
                rank gets bitwise the same statistics.

        Returns:
            `ScoreStatistics` on the device of `scores`, in float32, or in float64 for float64 scores and with a group.
            For empty scores, all fields are 0.

        Raises:
            TypeError: if `scores` is not a floating tensor; if `process_group` is not a group that contains this rank.
            ValueError: if `scores` is not 1-D.
            RuntimeError: if another rank does not take part before the timeout of the group.

        Example:
            >>> import torch
            >>> ScoreStatistics.of(torch.tensor([1.0, 2.0, 3.0]))
            ScoreStatistics(mean=tensor(2.), std=tensor(1.), count=tensor(3))
        """
        _checks.one_entry_per_pair({"scores": _checks.floating_tensor("scores", scores)})
        scores = scores.detach()
        if process_group is not None:
            return cls(*merge_moments(all_gather_row(moments(scores), process_group)))
        n = scores.shape[0]
        count = torch.full((), n, device=scores.device)
        scores = scores.to(_checks.accumulation_dtype(scores))
        if n == 0:
            return cls(scores.sum(), scores.sum(), count)
        # std_mean runs Welford's recurrence, in which equal scores deviate from their mean by exactly 0. From mean()
        # they may deviate by its rounding error, which would become a spurious margin.
        std, mean = torch.std_mean(scores, correction=min(n - 1, 1))  # no correction for one score: 0 instead of NaN
        # The rounding error of the mean grows with n. The mean of the deviations from it is that error, so adding it
        # makes sure that a pair whose score equals the mean is recognized as such.
        return cls(torch.add(mean, (scores - mean).sum(), alpha=1 / n), std, count)


class Estimator(Protocol):
    """A callable `(scores, process_group) -> ScoreStatistics`, which `amapo_loss(..., statistics=)` accepts.

    `ScoreStatistics.of` and `ScoreWindow` are such callables, and so is a function of your own.
    """

    def __call__(self, scores: Tensor, process_group: dist.ProcessGroup | None, /) -> ScoreStatistics:
        """Return the statistics that the margins are made from.

        Args:
            scores: [B] detached scores of this rank's pairs.
            process_group: the group that `amapo_loss` was given. Every rank of it must return the same statistics.
        """


class ScoreWindow(nn.Module):
    r"""An nn.Module that returns the statistics of the newest `size` scores, for small micro-batches.

    For each batch, it returns the statistics over the batch and over the newest stored scores, together `size` scores.
    If the batch alone has more than `size` scores, the statistics are those of the batch. In training mode, the window
    then stores the scores of the batch, except those that are NaN or infinite. In evaluation mode it stores nothing.
    Stored scores come from an earlier policy, so choose `size` near the number of pairs per optimizer step, summed over
    all ranks.

    With a process group, the scores of all ranks are gathered and ordered by rank. This adds one all-gather of
    `size` + 3 numbers per rank. Every rank stores the same scores, so that the windows of all ranks stay bitwise equal
    and saving the state of one rank is enough.

    The window must be on the device of the scores, so move it with `to`. A saved state is loaded onto the device that
    the window is on. There is no host-device synchronization.

    Args:
        size: number of scores, at least 1.

    Raises:
        TypeError: if `size` is not an int.
        ValueError: if `size` is below 1.
        RuntimeError: from `load_state_dict`, if the saved size differs.

    Example:
        >>> import torch
        >>> window = ScoreWindow(4)
        >>> window(torch.tensor([1.0, 2.0, 3.0])).mean
        tensor(2., dtype=torch.float64)
        >>> window(torch.tensor([5.0, 7.0])).mean  # the mean of 2, 3, 5 and 7
        tensor(4.2500, dtype=torch.float64)

    """

    scores: Tensor
    """[size] float32 ring buffer: score number k, counted from 0, is stored at index k modulo size."""
    seen: Tensor
    """0-dim int64, the number of scores that were stored since the last reset."""

    def __init__(self, size: int) -> None:
        super().__init__()
        _checks.integer("size", size, at_least=1)
        self.register_buffer("scores", torch.zeros(size))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, scores: Tensor, process_group: dist.ProcessGroup | None = None) -> ScoreStatistics:
        """Return the statistics over `scores` [B] and the newest stored scores; in training mode, store `scores`."""
        _checks.one_entry_per_pair({"scores": _checks.floating_tensor("scores", scores)})
        if scores.device != self.scores.device:
            raise ValueError(f"scores is on {scores.device}, expected the device of the window, {self.scores.device}")
        size = len(self.scores)
        latest = F.pad(scores[-size:].double(), (max(size - len(scores), 0), 0), value=torch.nan)
        rows = all_gather_row(torch.cat([moments(scores), latest]), process_group)
        batch_moments, latest = rows[:, :3], rows[:, 3:].flatten()

        age = (self.seen - 1 - torch.arange(size, device=scores.device)) % size  # 0 is the latest score
        in_window = (age < self.seen) & (age < size - batch_moments[:, 0].sum())
        earlier_moments = moments(self.scores, in_window)
        statistics = ScoreStatistics(*merge_moments(torch.cat([batch_moments, earlier_moments[None]])))
        if self.training:
            self._remember(latest)
        return statistics

    def _remember(
        self,
        latest: Tensor,  # [ranks * size] float64, NaN where a rank has fewer than `size` scores
    ) -> None:
        size = len(self.scores)
        finite = latest.isfinite()
        order = finite.cumsum(0)  # 1 for the first finite score, 2 for the second, ...
        kept = finite & (order > order[-1] - size)
        # Dropped scores are written to a dummy slot at index `size`: selecting the others would need their number on
        # the host.
        index = torch.where(kept, (self.seen + order - 1) % size, size)
        ring = F.pad(self.scores, (0, 1)).scatter(0, index, latest.to(self.scores.dtype))
        self.scores.copy_(ring[:size])
        self.seen.add_(order[-1])

    def reset(self) -> None:
        """Forget all scores."""
        self.scores.zero_()
        self.seen.zero_()

    def extra_repr(self) -> str:
        """Return the size, for `print(module)`."""
        return f"size={len(self.scores)}"
