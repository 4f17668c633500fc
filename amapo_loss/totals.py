"""`Totals`: what a summary is made of, in a form that adds up over micro-batches, ranks and log steps.

Depends only on torch, the moments and the collectives.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from amapo_loss._collectives import all_gather_row
from amapo_loss._moments import mean_std_count, merge_moments

# The entries of `Totals.values`. The Triton kernel writes them in this order. The first three are the moments of the
# scores, the last one is a maximum, and all others are sums over the pairs. Those from "scores" to "scores above mean"
# are weighted: each pair adds its value times its weight, which is 1 unless weights are given.
_ENTRIES = (
    "pairs",
    "score mean",
    "score M2",
    "weights",
    "scores",
    "correct",
    "misranked",
    "gradient weights of correct",
    "gradient weights of misranked",
    "chosen rewards",
    "rejected rewards",
    "chosen logps",
    "rejected logps",
    "margins",
    "active margins",
    "scores above mean",
    "nonfinite",
    "left out",
    "max margin",
)
_WEIGHTED, _GROUPS, _GRADIENT_WEIGHTS = slice(4, 16), slice(5, 7), slice(7, 9)


@dataclass(frozen=True, eq=False)
class Totals:
    r"""Sums, counts and maxima over a set of pairs, from which the summary of this set follows.

    `a + b` are the totals of both sets together, and `reduced(process_group)` those of all ranks. However a set of
    pairs is split over micro-batches, ranks and steps, the totals, and so the summary, are those of the whole set, up
    to rounding. `Diagnostics.totals()` returns those of one loss call.

    Attributes:
        values: [19] float64, on the device of the log-probs; empty for `Totals.none()`.

    Example:
        >>> import torch
        >>> from amapo_loss import Totals, amapo_loss
        >>> chosen_logps, rejected_logps = torch.tensor([-1.0, -2.0, -1.5]), torch.tensor([-2.0, -1.5, -2.5])
        >>> parts = [amapo_loss(chosen_logps[part], rejected_logps[part]) for part in (slice(2), slice(2, 3))]
        >>> totals = sum([part.diagnostics.totals() for part in parts], start=Totals.none())
        >>> totals.summary()["rewards/accuracies"]  # two of three pairs, and not the average of 1/2 and 1
        tensor(0.6667, dtype=torch.float64)

    """

    values: Tensor

    @classmethod
    def none(cls) -> "Totals":
        """Return the totals of no pairs, to start a sum with. They have no device, so that they add to any totals."""
        return cls(torch.empty(0, dtype=torch.float64))

    def __bool__(self) -> bool:
        """Return False for `Totals.none()` and True for the totals of any call."""
        return self.values.numel() > 0

    def __add__(self, other: "Totals") -> "Totals":
        """Return the totals of both sets of pairs together."""
        if not isinstance(other, Totals):
            return NotImplemented
        if not self or not other:
            return self or other
        return Totals(_merge(torch.stack((self.values, other.values))))

    def reduced(self, process_group: dist.ProcessGroup | None) -> "Totals":
        """Return the totals over all ranks of a group, with one all-gather of 19 numbers per rank.

        Every rank must call this. Without a group, nothing changes.

        Raises:
            ValueError: for `Totals.none()` with a group, because they have no device. A rank without pairs can add the
                totals of a call with 0 pairs.
            RuntimeError: if another rank does not take part before the timeout of the group; NCCL's watchdog ends the
                process instead.
        """
        if process_group is None:
            return self
        if not self:
            raise ValueError("Totals.none() has no device to gather on: add the totals of a loss call first")
        return Totals(_merge(all_gather_row(self.values, process_group, "the totals")))

    def summary(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the scalars to log, under the keys of `Diagnostics.summary`, as 0-dim tensors."""
        values = self.values if self else _of_no_pairs()
        count, _, _, weights, *_, nonfinite, left_out, max_margin = values.unbind()
        means = (values[_WEIGHTED] / _nonzero(weights)).unbind()
        mean, correct, _, _, _, chosen, rejected, logps_chosen, logps_rejected, margin, active, above_mean = means
        score_mean, score_std, _ = mean_std_count(values[:3])
        weight_correct, weight_misranked = (values[_GRADIENT_WEIGHTS] / _nonzero(values[_GROUPS])).unbind()
        summary = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": correct,
            "rewards/margins": mean,
            "logps/chosen": logps_chosen,
            "logps/rejected": logps_rejected,
            "amapo/margin_mean": margin,
            "amapo/margin_active": active,
            "amapo/margin_accuracies": above_mean,
            "amapo/gradient_weight_correct": weight_correct,
            "amapo/gradient_weight_misranked": weight_misranked,
            "amapo/nonfinite": nonfinite,
            "amapo/margin_max": torch.where(count > 0, max_margin, 0),
            "amapo/score_mean": score_mean,
            "amapo/score_std": score_std,
            "amapo/left_out": left_out,
        }
        return {prefix + key: value for key, value in summary.items()}


def _merge(
    rows: Tensor,  # [k, 19]
) -> Tensor:
    """Return the totals [19] of k disjoint sets of pairs together."""
    return torch.cat((merge_moments(rows[:, :3]), rows[:, 3:-1].sum(0), rows[:, -1:].amax(0)))


def _nonzero(divisors: Tensor) -> Tensor:
    """Return the divisors with 1 in place of 0, so that a mean over no pairs is 0."""
    return divisors.masked_fill(divisors == 0, 1)


def _of_no_pairs() -> Tensor:
    values = torch.zeros(len(_ENTRIES), dtype=torch.float64)
    values[-1] = -torch.inf
    return values
