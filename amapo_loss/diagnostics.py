"""`Diagnostics`: what a loss call found out about its pairs, and the scalars that a trainer logs.

Depends only on torch, the reference mathematics, `Pairs` and `ScoreStatistics`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from amapo_loss import _reference
from amapo_loss._pairs import Pairs
from amapo_loss.statistics import ScoreStatistics

# The keys of `Diagnostics.summary`. The Triton kernel writes their values in this order.
_SUMMARY_KEYS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "amapo/margin_mean",
    "amapo/margin_active",
    "amapo/margin_accuracies",
    "amapo/gradient_weight_correct",
    "amapo/gradient_weight_misranked",
    "amapo/nonfinite",
    "amapo/margin_max",
    "amapo/score_mean",
    "amapo/score_std",
)


class Diagnostics(NamedTuple):
    r"""Results of one loss call for each pair, and a summary to log. A loss returns it; you do not construct it.

    All tensors are detached and on the device of the log-probs. They are float32, or float64 if a log-prob is float64.
    What the backend did not need for the loss is computed when you read it, so that it costs nothing otherwise.

    Attributes:
        pairs: the tensors that the loss was given.
        margins: [B] the margins $h_i$.
        statistics: the mean and the standard deviation that the margins were made from, in score units.
        beta: the scale of the ranking score.
        label_smoothing: the label smoothing $\epsilon$.
        rewards: [3, B] scores, chosen rewards and rejected rewards from the torch backend, None from Triton.
        summary_values: [15] the values of `summary` from the Triton backend, None from torch.

    """

    pairs: Pairs
    margins: Tensor
    statistics: ScoreStatistics
    beta: float
    label_smoothing: float
    rewards: Tensor | None = None
    summary_values: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        r"""[B] the ranking scores $r_i = \beta d_i$. A pair is ranked correctly where $r_i > 0$."""
        return self._rewards()[0]

    @property
    def chosen_rewards(self) -> Tensor:
        r"""[B] $\beta (\log\pi(y_w) - \log\mathrm{ref}(y_w)) / |y_w|$, with ref = 0 or |y| = 1 where not given."""
        return self._rewards()[1]

    @property
    def rejected_rewards(self) -> Tensor:
        """[B] the same for the rejected responses."""
        return self._rewards()[2]

    @property
    def gradient_weights(self) -> Tensor:
        r"""[B] $w_i = -\partial L_i / \partial r_i$, the gradient of the pair's loss, negated, before the reduction."""
        return _reference.gradient_weights(self.scores, self.margins, self.label_smoothing)

    def _rewards(self) -> Tensor:
        if self.rewards is not None:
            return self.rewards
        return _reference.log_ratio_differences(self.pairs.to_accumulation_dtype(), self.beta)[1]

    def summary(self, prefix: str = "") -> dict[str, Tensor]:
        """Return 15 scalars to log. The keys are TRL's where TRL logs the same value.

        Means and shares are taken over the pairs of this call on this rank. A mean over no pairs is 0.

        Args:
            prefix: string to put in front of every key, for example `"eval_"`.

        Returns:
            A dictionary of 0-dim tensors on the device. Reading one with `item()` synchronizes; nothing else does.

            - `rewards/chosen`, `rewards/rejected`: mean rewards.
            - `rewards/accuracies`: share of pairs with r > 0.
            - `rewards/margins`: mean score r. This is TRL's name; it has nothing to do with the margin h.
            - `logps/chosen`, `logps/rejected`: mean log-probs as they were passed, so sums where they are sums.
            - `amapo/score_mean`, `amapo/score_std`: the statistics that the margins were made from. With a process
              group, a window or supplied statistics, they cover other pairs than this call's.
            - `amapo/margin_mean`, `amapo/margin_max`: mean and maximum of the margins h.
            - `amapo/margin_active`: share of pairs with h > 0.
            - `amapo/margin_accuracies`: share of pairs with r above `amapo/score_mean`. The authors use this metric.
            - `amapo/gradient_weight_correct`: mean gradient weight of the pairs with r > 0.
            - `amapo/gradient_weight_misranked`: mean gradient weight of the pairs with r <= 0.
            - `amapo/nonfinite`: number of pairs whose score is NaN or infinite.

        Example:
            >>> import torch
            >>> from amapo_loss import amapo_loss
            >>> _, diagnostics = amapo_loss(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5]))
            >>> diagnostics.summary("eval_")["eval_rewards/accuracies"]
            tensor(0.5000)
        """
        if self.summary_values is None:
            values = self._summarize()
        else:
            values = dict(zip(_SUMMARY_KEYS, self.summary_values.unbind()))
        return {prefix + key: values[key] for key in _SUMMARY_KEYS}

    def _summarize(self) -> dict[str, Tensor]:
        scores, chosen_rewards, rejected_rewards = self._rewards()
        weights, zeros = self.gradient_weights, torch.zeros_like(scores)
        correct, misranked = scores > 0, scores <= 0
        columns = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": correct,
            "rewards/margins": scores,
            "logps/chosen": self.pairs.chosen_logps,
            "logps/rejected": self.pairs.rejected_logps,
            "amapo/margin_mean": self.margins,
            "amapo/margin_active": self.margins > 0,
            "amapo/margin_accuracies": scores > self.statistics.mean,
            "amapo/gradient_weight_correct": torch.where(correct, weights, zeros),
            "amapo/gradient_weight_misranked": torch.where(misranked, weights, zeros),
            "amapo/nonfinite": ~scores.isfinite(),
        }
        totals = torch.stack([column.to(zeros.dtype) for column in columns.values()]).sum(1)
        n = scores.shape[0]
        # What a total is divided by where it is not the number of pairs.
        denominators: dict[str, Tensor | int] = {
            "amapo/gradient_weight_correct": correct.sum().clamp(min=1),
            "amapo/gradient_weight_misranked": misranked.sum().clamp(min=1),
            "amapo/nonfinite": 1,
        }
        return {key: total / denominators.get(key, max(n, 1)) for key, total in zip(columns, totals)} | {
            "amapo/margin_max": self.margins.amax() if n else zeros.sum(),
            "amapo/score_mean": self.statistics.mean.to(zeros.dtype),
            "amapo/score_std": self.statistics.std.to(zeros.dtype),
        }
