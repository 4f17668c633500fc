"""The batch statistics that a margin is made from: of one batch, of all ranks, or of the latest scores.

Depends only on torch, the argument checks, the moments and the collectives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amapo_loss import _checks
from amapo_loss._collectives import all_gather_row
from amapo_loss._moments import mean_std_count, merge_moments, moments, sum_dtype


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of the ranking scores of `count` pairs, in score units (beta is included).

    Pass it as `amapo_loss(..., statistics=)` to decide yourself which pairs the margins are made from. With gradient
    accumulation, for example, score all micro-batches under `no_grad` first, and pass the statistics of all scores.

    Attributes:
        mean: 0-dim floating tensor. It is float64 from the Triton backend, from several ranks, from a window, and
            with weights or lengths, because rounding a mean far larger than the standard deviation to float32 would
            change z.
        std: 0-dim floating tensor, the standard deviation with Bessel's correction. It is 0 for fewer than two pairs,
            and all margins are then 0.
        count: 0-dim int64 tensor, the number of pairs.

    """

    mean: Tensor
    std: Tensor
    count: Tensor  # type: ignore[assignment]  # hides the method tuple.count, which nobody calls here

    @classmethod
    def of(
        cls,
        scores: Tensor,
        process_group: dist.ProcessGroup | None = None,
        mask: Tensor | None = None,
    ) -> "ScoreStatistics":
        r"""Return the statistics of the given scores.

        $$\mu = \frac1n \sum_i r_i, \qquad \sigma^2 = \frac1{n-1} \sum_i (r_i - \mu)^2$$

        Args:
            scores: [B] ranking scores of any floating dtype. No gradient flows through the statistics.
            process_group: take the statistics over the scores of all ranks of this group. The ranks may have different
                numbers of scores, including 0. This adds one all-gather of three float64 numbers per rank, and every
                rank gets bitwise the same statistics.
            mask: [B] bool. Where it is False, the score is left out.

        Returns:
            `ScoreStatistics` on the device of `scores`, in float32, or in float64 for float64 scores, with a group and
            with a mask. For empty scores, all fields are 0.

        Raises:
            TypeError: if `scores` is not a floating tensor; if `process_group` is not a group that contains this rank.
            ValueError: if `scores` is not 1-D, or `mask` has another shape or device.
            RuntimeError: if another rank does not take part before the timeout of the group; NCCL's watchdog ends the
                process instead.

        Example:
            >>> import torch
            >>> ScoreStatistics.of(torch.tensor([1.0, 2.0, 3.0]))
            ScoreStatistics(mean=tensor(2.), std=tensor(1.), count=tensor(3))
        """
        masks = {} if mask is None else {"mask": _checks.bool_tensor("mask", mask)}
        _checks.one_entry_per_pair({"scores": _checks.floating_tensor("scores", scores)} | masks)
        scores = scores.detach()
        if process_group is not None or mask is not None:
            return cls(*mean_std_count(merge_moments(all_gather_row(moments(scores, mask), process_group))))
        n = scores.shape[0]
        count = torch.full((), n, device=scores.device)
        scores = scores.to(_checks.accumulation_dtype(scores))
        if n == 0:
            return cls(scores.sum(), scores.sum(), count)
        # std_mean runs Welford's recurrence, so that equal scores have a std of exactly 0. With mean(), the rounding
        # error of the mean would become a spurious std, and with it spurious margins.
        std, mean = torch.std_mean(scores, correction=min(n - 1, 1))  # no correction for one score: 0 instead of NaN
        # The rounding error of the mean grows with n. The mean of (scores - mean) estimates it. Adding it makes sure
        # that a pair whose score equals the mean is recognized as such.
        return cls(torch.add(mean, (scores - mean).sum(), alpha=1 / n), std, count)


class Estimator(Protocol):
    """A callable `(scores, process_group) -> ScoreStatistics`, which `amapo_loss(..., statistics=)` accepts.

    `ScoreStatistics.of` and `ScoreWindow` are such callables, and so is a function of your own. Pairs that are left out
    have the score NaN. A window ignores them, and `amapo_loss` passes a mask to `ScoreStatistics.of`. A function of
    your own has to ignore them itself.
    """

    def __call__(self, scores: Tensor, process_group: dist.ProcessGroup | None, /) -> ScoreStatistics:
        """Return the statistics that the margins are made from.

        Args:
            scores: [B] scores of this rank's pairs, NaN for those that are left out. `scores.requires_grad` is True
                where a gradient is wanted, and False under `no_grad`, which an estimator with a memory can test. No
                gradient flows through the result: estimators are called under `no_grad`, so that averages of scores do
                not hold on to autograd graphs.
            process_group: the group that `amapo_loss` was given. Every rank of it must return the same statistics.
        """


WINDOWS_DIFFER = (
    "the windows of the ranks differ, and so would their margins: call load_state_dict or reset on every rank"
)


class ScoreWindow(nn.Module):
    r"""An nn.Module that returns the statistics of the newest `size` scores, for small micro-batches.

    For each batch, it returns the statistics over the batch and over the newest stored scores, together `size` scores.
    If the batch alone has more than `size` scores, the statistics are those of the batch. Scores that are NaN or
    infinite are ignored, and so are those that would be infinite in float32, in which scores are stored.

    The window then stores the scores of the batch, but only in training mode and if a gradient is wanted for them
    (`scores.requires_grad`). Evaluation and reference passes leave it as it is. Stored scores come from an earlier
    policy, so choose `size` near the number of pairs per optimizer step, summed over all ranks. Each forward pass with
    gradients stores its scores, so keep the loss out of what runs forward again: a region under activation
    checkpointing, or the closure of an optimizer such as LBFGS. A batch that is tried again after an error, as when
    memory ran out, is stored twice.

    With a process group, the scores of all ranks are gathered and ordered by rank. This adds one all-gather of
    `size` + 6 numbers per rank. Every rank stores the same scores, those of the ranks that want a gradient, so that the
    windows of all ranks stay bitwise equal and saving the state of one rank is enough. They must have the same size.

    The stored scores are state of the run and not weights. They are the extra state of the module, a tensor in
    `state_dict`. They are not registered as buffers, so that `to` does not change their dtype and DDP does not
    broadcast them. The window moves to the device of the scores that it is called with, and `to` moves it as well. A
    window that moves to the meta device, which has no values, loses its scores.
    `load_state_dict` accepts the state of a window of another size, and keeps its newest scores. There is no
    host-device synchronization, except when the window moves and in `load_state_dict`.

    Args:
        size: number of scores, at least 1.

    Raises:
        TypeError: if `size` is not an int.
        ValueError: if `size` is below 1.
        RuntimeError: from `load_state_dict`, if the state has no window; from a call with a group, on a CPU, if the
            windows of the ranks differ. On a GPU, PyTorch's device-side assertion fails.

    Example:
        >>> import torch
        >>> window = ScoreWindow(4)
        >>> window(torch.tensor([1.0, 2.0, 3.0], requires_grad=True)).mean
        tensor(2., dtype=torch.float64)
        >>> window(torch.tensor([5.0, 7.0], requires_grad=True)).mean  # the mean of 2, 3, 5 and 7
        tensor(4.2500, dtype=torch.float64)

    """

    scores: Tensor
    """[size] float32, the newest scores in their order, behind zeros if there are fewer than `size`."""
    seen: Tensor
    """0-dim int64, the number of scores to store that came since the last reset, or since another size was loaded."""

    @torch.inference_mode(False)  # tensors that are made in this mode could not be written to outside of it
    def __init__(self, size: int) -> None:
        super().__init__()
        _checks.integer("size", size, at_least=1)
        # Plain attributes. As buffers they would be rounded by `.to(torch.bfloat16)`, and overwritten by DDP, which
        # broadcasts buffers from rank 0. A default device or dtype, as while a model is built, is not for them.
        self.scores = torch.zeros(size, dtype=torch.float32, device="cpu")
        self.seen = torch.zeros((), dtype=torch.int64, device="cpu")

    @torch.no_grad()
    def forward(self, scores: Tensor, process_group: dist.ProcessGroup | None = None) -> ScoreStatistics:
        """Return the statistics over `scores` [B] and the newest stored scores; store `scores` if training."""
        _checks.one_entry_per_pair({"scores": _checks.floating_tensor("scores", scores)})
        self._move(scores.device)
        size, values = len(self.scores), scores.detach().to(sum_dtype(scores.device))
        finite = values.abs() <= torch.finfo(self.scores.dtype).max  # False for NaN
        # All ranks must store the same scores. They may differ in whether a gradient is wanted, because a rank without
        # pairs may have no graph. So each sends whether its own scores are to be stored.
        stores = self.training and scores.requires_grad
        flag = values.new_full((1,), float(stores))
        # An integer sum is exact in any order. A float sum could differ between devices, and raise a false alarm.
        checksum = torch.stack([self.seen, self.scores.view(torch.int32).sum()]).to(values)
        row = torch.cat([moments(values, finite), flag, checksum, _newest(values, finite, size)])
        rows = all_gather_row(row, process_group)
        moments_of_ranks, flags, checksums, newest_of_ranks = rows[:, :3], rows[:, 3], rows[:, 4:6], rows[:, 6:]
        if process_group is not None:
            torch._assert_async((checksums == checksums[0]).all(), WINDOWS_DIFFER)
        counts = moments_of_ranks[:, 0]

        age = torch.arange(size - 1, -1, -1, device=scores.device)  # 0 for the newest stored score
        in_window = age < torch.minimum(self.seen, size - counts.sum())
        stored_moments = moments(self.scores, in_window)
        merged = merge_moments(torch.cat([moments_of_ranks, stored_moments[None]]))
        if stores or process_group is not None:  # another rank's scores may be stored even if this rank's are not
            kept = counts * flags
            candidates = torch.cat([self.scores[None], newest_of_ranks])
            present = age < torch.cat([self.seen[None], kept]).unsqueeze(1)
            self.scores.copy_(_newest(candidates.flatten(), present.flatten(), size))
            self.seen.add_(kept.sum().long())
        return ScoreStatistics(*mean_std_count(merged))

    def reset(self) -> None:
        """Forget all scores."""
        self.scores.zero_()
        self.seen.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScoreWindow":
        """Apply only the change of device of `fn`, which is from `to`, `cuda` or `cpu`, and not its change of dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._move(fn(torch.empty(0, device=self.scores.device)).device)
        return self

    @torch.inference_mode(False)  # a tensor that moves in this mode could not be written to outside of it
    def _move(self, device: torch.device) -> None:
        if device == self.scores.device:
            return
        if self.scores.is_meta:  # as in a model that was built there
            self.scores, self.seen = (torch.zeros_like(x, device=device) for x in (self.scores, self.seen))
        else:
            self.scores, self.seen = self.scores.to(device), self.seen.to(device)

    @torch.inference_mode(False)  # as above, for a copy that is made in this mode, or loaded with `torch.load`
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.scores, self.seen = self.scores.clone(), self.seen.clone()

    def get_extra_state(self) -> Tensor:
        """Return the state [size + 1]: `scores`, and `seen` behind them.

        PyTorch's functions for the state of distributed modules know parameters, buffers and this.
        """
        dtype = sum_dtype(self.scores.device)
        return torch.cat([self.scores.to(dtype), self.seen[None].to(dtype)])

    def set_extra_state(
        self,
        state: Tensor,  # [size of the saved window + 1]
    ) -> None:
        """Restore a state. If it is that of a window of another size, keep its newest scores."""
        scores, seen = state[:-1], state[-1]
        if len(scores) == len(self.scores):
            self.scores.copy_(scores)
            self.seen.copy_(seen)
            return
        kept = min(int(seen), len(scores), len(self.scores))
        self.reset()
        self.scores[len(self.scores) - kept :].copy_(scores[len(scores) - kept :])
        self.seen.fill_(kept)

    def extra_repr(self) -> str:
        """Return the size, for `print(module)`."""
        return f"size={len(self.scores)}"


def _newest(
    values: Tensor,  # [n]
    present: Tensor,  # [n] bool
    size: int,
) -> Tensor:
    """Return the last `size` values that are present [size], in their order and behind zeros if there are fewer."""
    rank = present.flip(0).cumsum(0).flip(0)  # 1 for the last value that is present
    # Other values are written to a dummy slot at index `size`: boolean indexing would synchronize with the device.
    index = torch.where(present & (rank <= size), size - rank, size)
    return values.new_zeros(size + 1).scatter(0, index, values)[:size]
