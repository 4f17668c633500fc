"""The batch statistics behind the margin: of one batch, across ranks, over a window. Knows tensors and the _checks."""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from amapo_loss import _checks


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of the ranking scores of `count` pairs, in score units (beta included).

    Args:
        mean: 0-dim floating tensor; float64 from Triton, from several ranks and from a window, as its rounding shows
            where it is far larger than the std.
        std: 0-dim floating tensor with Bessel's correction; 0 where fewer than two pairs leave it undefined.
        count: 0-dim tensor, the number of pairs.

    Hand one to `amapo_loss(..., statistics=)` to decide yourself which pairs define the margin, for example those of a
    whole optimizer batch while the gradient accumulates over its micro-batches.

    """

    mean: Tensor
    std: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls

    @classmethod
    def of(cls, scores: Tensor, process_group: dist.ProcessGroup | None = None) -> "ScoreStatistics":
        r"""The statistics of these scores, $\mu = \frac1n \sum r_i$ and $\sigma^2 = \frac1{n-1} \sum (r_i - \mu)^2$.

        Args:
            scores: [B] ranking scores, any floating dtype; computed in float32 at least. No gradient flows through.
            process_group: take them over the scores of all its ranks, each with as many as it has, 0 included. One
                collective, of three numbers a rank; every rank gets bitwise the same statistics.

        Returns:
            `ScoreStatistics` on the device of `scores`; of no scores at all, three zeros.

        Raises:
            TypeError: if `scores` is no floating tensor, or `process_group` no group that this rank belongs to.
            ValueError: if `scores` is not 1-D.
            RuntimeError: if another rank does not take part, at the latest after the timeout of the group.

        Example:
            >>> import torch
            >>> ScoreStatistics.of(torch.tensor([1.0, 2.0, 3.0]))
            ScoreStatistics(mean=tensor(2.), std=tensor(1.), count=tensor(3))
        """
        _checks.aligned({"scores": _checks.floating("scores", scores)})
        scores = scores.detach()
        if process_group is not None:
            return merged(gathered(moments(scores), process_group))
        n = scores.shape[0]
        count = torch.full((), n, device=scores.device)
        scores = scores.to(_checks.computing_dtype(scores))
        if n == 0:
            return cls(scores.sum(), scores.sum(), count)
        # Welford's recurrence: equal scores deviate by exactly 0, as they need not from mean(). The larger n is, the
        # more its mean rounds, and a pair at the mean must be seen there: add the mean of what is left.
        std, mean = torch.std_mean(scores, correction=min(n - 1, 1))
        return cls(torch.add(mean, (scores - mean).sum(), alpha=1 / n), std, count)


class Estimator(Protocol):
    """Whatever decides on the statistics of each batch: `ScoreStatistics.of`, a `ScoreWindow`, or your own."""

    def __call__(self, scores: Tensor, process_group: dist.ProcessGroup | None, /) -> ScoreStatistics:
        """From detached scores [B] of this rank's pairs, 0-dim statistics on their device, alike on all ranks."""


class ScoreWindow(nn.Module):
    r"""The statistics of the last `size` scores: for gradient accumulation, where one micro-batch has too few.

    Of each batch it gives the statistics over that batch and, before it, as many of the latest scores as make `size` in
    all; a batch of more is taken whole. Then, in training mode, it remembers the batch, or the last `size` scores of a
    larger one, except what is not finite. In evaluation mode it gives the same statistics and remembers nothing. Scores
    of earlier batches come from an earlier policy: let `size` be about your optimizer's batch.

    With a process group the batch is that of all ranks, and so is what every rank remembers, in the order of the ranks:
    the windows of all ranks stay bitwise the same, and the state of any rank restores all of them.

    Args:
        size: number of scores, at least 1.

    Raises:
        TypeError, ValueError: for a `size` that is no positive int.
        RuntimeError: from `load_state_dict`, for the state of a window of another size.

    Example:
        >>> import torch
        >>> window = ScoreWindow(4)
        >>> window(torch.tensor([1.0, 2.0, 3.0])).mean
        tensor(2., dtype=torch.float64)
        >>> window(torch.tensor([5.0, 7.0])).mean  # of 2, 3, 5 and 7
        tensor(4.2500, dtype=torch.float64)

    Its buffers are float32 and int64, on the device that `to` moves them to, where the scores must be; a state from
    another device is loaded onto that one. Nothing waits for the device.

    """

    scores: Tensor
    """[size] a ring: the score written as number k, from 0, is at k modulo size."""
    seen: Tensor
    """0-dim int64, how many have been written since the last reset."""

    def __init__(self, size: int) -> None:
        super().__init__()
        _checks.whole("size", size, at_least=1)
        self.register_buffer("scores", torch.zeros(size))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, scores: Tensor, process_group: dist.ProcessGroup | None = None) -> ScoreStatistics:
        """The statistics of these scores [B] and of those before them; remembers them in training mode."""
        _checks.aligned({"scores": _checks.floating("scores", scores)})
        if scores.device != self.scores.device:
            raise ValueError(f"scores is on {scores.device}, expected the device of the window, {self.scores.device}")
        size = len(self.scores)
        latest = F.pad(scores[-size:].double(), (max(size - len(scores), 0), 0), value=torch.nan)
        rows = gathered(torch.cat([moments(scores), latest]), process_group)
        batches, latest = rows[:, :3], rows[:, 3:].flatten()

        age = (self.seen - 1 - torch.arange(size, device=scores.device)) % size  # 0: the latest
        fits = (age < self.seen) & (age < size - batches[:, 0].sum())
        statistics = merged(torch.cat([batches, moments(self.scores, fits)[None]]))
        if self.training:
            self._remember(latest)
        return statistics

    def _remember(self, latest: Tensor) -> None:
        size = len(self.scores)
        finite = latest.isfinite()
        order = finite.cumsum(0)  # of the finite ones, from 1
        kept = finite & (order > order[-1] - size)
        place = torch.where(kept, (self.seen + order - 1) % size, size)  # what is not kept goes behind the ring
        ring = F.pad(self.scores, (0, 1)).scatter(0, place, latest.to(self.scores.dtype))
        self.scores.copy_(ring[:size])
        self.seen.add_(order[-1])

    def reset(self) -> None:
        """Forget everything."""
        self.scores.zero_()
        self.seen.zero_()

    def extra_repr(self) -> str:
        """The size, for `print(model)`."""
        return f"size={len(self.scores)}"


def moments(scores: Tensor, where: Tensor | None = None) -> Tensor:
    """[3] float64: the number of scores [B], or of those where a mask is true, their mean, and the squares about it.

    In float64, a mean far larger than the spread, and many ranks, cost no precision.
    """
    scores = scores.detach().double()
    if where is None:
        n = torch.full((), scores.shape[0], dtype=torch.float64, device=scores.device)
    else:
        n, scores = where.sum().double(), scores.masked_fill(~where, 0)
    mean = scores.sum() / n.clamp(min=1)
    deviations = scores - mean if where is None else (scores - mean).masked_fill(~where, 0)
    return torch.stack((n, mean, deviations.square().sum()))


def gathered(row: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, k]: this [k] of every rank; the one collective of this package, and none without a group."""
    if process_group is None:
        return row[None]
    _checks.process_group("process_group", process_group)
    rows = row.new_empty(dist.get_world_size(process_group) * len(row))
    try:
        dist.all_gather_into_tensor(rows, row, group=process_group)
    except RuntimeError as error:
        raise RuntimeError(
            "the score statistics of process_group could not be gathered: has another rank failed, or not called "
            f"amapo_loss? ({error})"
        ) from error
    return rows.view(-1, len(row))


def merged(rows: Tensor) -> ScoreStatistics:
    """The statistics of all scores behind some moments [k, 3], by Chan's formula for k parts at once; float64."""
    counts, means, squares = rows.unbind(1)
    n = counts.sum()
    mean = (counts * means).sum() / n.clamp(min=1)
    about_mean = squares.sum() + (counts * (means - mean).square()).sum()
    return ScoreStatistics(mean, (about_mean / (n - 1).clamp(min=1)).sqrt(), n.long())
