"""`Diagnostics`: what a loss call found out about its pairs, and the scalars that a trainer logs.

Depends only on torch, the reference mathematics, the moments, `Pairs`, `ScoreStatistics` and `Totals`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from amapo_loss import _reference
from amapo_loss._moments import weighted_moments
from amapo_loss._pairs import Pairs
from amapo_loss.statistics import ScoreStatistics
from amapo_loss.totals import Totals


class Diagnostics(NamedTuple):
    r"""Results of one loss call for each pair, and a summary to log. A loss returns it; you do not construct it.

    All tensors are detached and on the device of the log-probs. They are float32, or float64 if a log-prob is float64.
    What the backend did not need for the loss is computed when you read it, so that it costs nothing otherwise. Until
    then, do not change the inputs of the loss in place.

    Attributes:
        pairs: the tensors that the loss was given.
        margins: [B] the margins $h_i$.
        statistics: the mean and the standard deviation that the margins were made from, in score units.
        beta: the scale of the ranking score, a 0-dim tensor if the loss was given one.
        label_smoothing: the label smoothing $\epsilon$.
        rewards: [3, B] scores, chosen rewards and rejected rewards from the torch backend, None from Triton.
        total_values: [19] the values of `totals` from the Triton backend, None from torch.

    """

    pairs: Pairs
    margins: Tensor
    statistics: ScoreStatistics
    beta: float | Tensor
    label_smoothing: float
    rewards: Tensor | None = None
    total_values: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        r"""[B] the ranking scores $r_i = \beta d_i$. A pair is ranked correctly where $r_i > 0$."""
        return self._rewards()[0]

    @property
    def chosen_rewards(self) -> Tensor:
        r"""[B] $\beta (\log\pi(y_w) - \log\mathrm{ref}(y_w)) / |y_w|$, with ref = 1 and |y| = 1 where not given."""
        return self._rewards()[1]

    @property
    def rejected_rewards(self) -> Tensor:
        """[B] the same for the rejected responses."""
        return self._rewards()[2]

    @property
    def gradient_weights(self) -> Tensor:
        r"""[B] $w_i = -\partial (a_i L_i) / \partial r_i$, with the weight $a_i$ of the pair, before the reduction."""
        gradient_weights = _reference.gradient_weights(self.scores, self.margins, self.label_smoothing)
        weights = None if self.pairs.counted() is None else self.pairs.prepared().weights
        return gradient_weights if weights is None else weights * gradient_weights

    def _rewards(self) -> Tensor:
        if self.rewards is not None:
            return self.rewards
        return _reference.log_ratio_differences(self.pairs.prepared(), self.beta)[1]

    def summary(self, prefix: str = "") -> dict[str, Tensor]:
        """Return 16 scalars to log. The keys are TRL's where TRL logs the same value.

        The summary is that of the pairs of this call on this rank. With `weights`, means and shares are weighted by
        them, except the mean and the standard deviation of the scores. A mean over no pairs is 0.

        Args:
            prefix: string to put in front of every key, for example `"eval_"`.

        Returns:
            A dictionary of 0-dim tensors on the device. Reading one with `item()` synchronizes; nothing else does.

            - `rewards/chosen`, `rewards/rejected`: mean rewards.
            - `rewards/accuracies`: share of pairs with r > 0.
            - `rewards/margins`: mean score r. This is TRL's name; it has nothing to do with the margin h.
            - `logps/chosen`, `logps/rejected`: mean log-probs as they were passed, so sums where they are sums.
            - `amapo/score_mean`, `amapo/score_std`: mean and standard deviation of the scores r, never weighted. The
              statistics that the margins were made from are in `statistics`.
            - `amapo/margin_mean`, `amapo/margin_max`: mean and maximum of the margins h.
            - `amapo/margin_active`: share of pairs with h > 0.
            - `amapo/margin_accuracies`: share of pairs with r above `statistics.mean`. The authors use this metric.
            - `amapo/gradient_weight_correct`: mean of sigmoid(h - r) - eps over the pairs with r > 0.
            - `amapo/gradient_weight_misranked`: the same over the pairs with r <= 0.
            - `amapo/nonfinite`: number of pairs whose score is NaN or infinite, or whose weight is invalid. If there is
              one, the other values are undefined, and may differ between backends.
            - `amapo/left_out`: number of pairs that are left out. No other value includes them.

        Example:
            >>> import torch
            >>> from amapo_loss import amapo_loss
            >>> _, diagnostics = amapo_loss(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5]))
            >>> diagnostics.summary("eval_")["eval_rewards/accuracies"]
            tensor(0.5000)
        """
        return Totals(self.totals().values.to(self.margins.dtype)).summary(prefix)

    def totals(self) -> Totals:
        """Return the sums, counts and maxima behind `summary`. Add those of several calls to get their common summary.

        Example:
            >>> import torch
            >>> from amapo_loss import amapo_loss
            >>> logps = torch.tensor([-1.0, -2.0])
            >>> _, first = amapo_loss(logps, logps - 1)
            >>> _, second = amapo_loss(logps[:1], logps[:1] + 1)
            >>> (first.totals() + second.totals()).summary()["rewards/accuracies"]  # two of three pairs
            tensor(0.6667, dtype=torch.float64)
        """
        if self.total_values is not None:
            return Totals(self.total_values)
        pairs, counted = self.pairs.prepared(), self.pairs.counted()
        scores, chosen_rewards, rejected_rewards = self._rewards()
        n, correct, misranked = scores.shape[0], scores > 0, scores <= 0
        gradient_weights = _reference.gradient_weights(scores, self.margins, self.label_smoothing)
        columns = (
            scores,
            correct,
            misranked,
            torch.where(correct, gradient_weights, 0),
            torch.where(misranked, gradient_weights, 0),
            chosen_rewards,
            rejected_rewards,
            pairs.chosen_logps,
            pairs.rejected_logps,
            self.margins,
            self.margins > 0,
            scores > self.statistics.mean,
        )
        stacked = torch.stack([column.to(scores.dtype) for column in columns])
        nonfinite, margins = ~scores.isfinite(), self.margins
        if counted is not None and pairs.weights is not None:
            stacked = stacked * pairs.weights
            nonfinite, margins = ~(scores * pairs.weights).isfinite(), margins.masked_fill(~counted, -torch.inf)
        own_moments = weighted_moments(scores, counted, pairs.weights)
        max_margin = margins.amax(0, keepdim=True) if n else own_moments.new_full((1,), -torch.inf)
        # In the order of the entries of `Totals`.
        parts = (own_moments, stacked.sum(1), nonfinite.sum(0, keepdim=True), n - own_moments[:1], max_margin)
        return Totals(torch.cat([part.to(own_moments.dtype) for part in parts]))
