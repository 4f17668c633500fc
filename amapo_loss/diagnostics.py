"""`Diagnostics`: what a loss call found out about its pairs, and the scalars that a trainer logs.

Depends only on torch, the reference mathematics, the dtype of sums, `Pairs`, `ScoreStatistics` and `Totals`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from amapo_loss import _reference
from amapo_loss._moments import sum_dtype
from amapo_loss._pairs import Pairs
from amapo_loss.statistics import ScoreStatistics
from amapo_loss.totals import Totals


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
        total_values: [17] the values of `totals` from the Triton backend, None from torch.

    """

    pairs: Pairs
    margins: Tensor
    statistics: ScoreStatistics
    beta: float
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
        r"""[B] $w_i = -\partial L_i / \partial r_i$, the gradient of the pair's loss, negated, before the reduction."""
        weights = _reference.gradient_weights(self.scores, self.margins, self.label_smoothing)
        counted = self.pairs.counted()
        return weights if counted is None else weights.masked_fill(~counted, 0)

    def _rewards(self) -> Tensor:
        if self.rewards is not None:
            return self.rewards
        pairs = self.pairs.neutralized().to_accumulation_dtype()
        return _reference.log_ratio_differences(pairs, self.beta)[1]

    def summary(self, prefix: str = "") -> dict[str, Tensor]:
        """Return 16 scalars to log. The keys are TRL's where TRL logs the same value.

        Means and shares are taken over the pairs of this call on this rank. A mean over no pairs is 0.

        Args:
            prefix: string to put in front of every key, for example `"eval_"`.

        Returns:
            A dictionary of 0-dim tensors on the device. Reading one with `item()` synchronizes; nothing else does.

            - `rewards/chosen`, `rewards/rejected`: mean rewards.
            - `rewards/accuracies`: share of pairs with r > 0.
            - `rewards/margins`: mean score r. This is TRL's name; it has nothing to do with the margin h.
            - `logps/chosen`, `logps/rejected`: mean log-probs as they were passed, so sums where they are sums.
            - `amapo/score_mean`, `amapo/score_std`: mean and standard deviation of the scores r. The former equals
              `rewards/margins`. The statistics that the margins were made from are in `statistics`.
            - `amapo/margin_mean`, `amapo/margin_max`: mean and maximum of the margins h.
            - `amapo/margin_active`: share of pairs with h > 0.
            - `amapo/margin_accuracies`: share of pairs with r above `statistics.mean`. The authors use this metric.
            - `amapo/gradient_weight_correct`: mean gradient weight of the pairs with r > 0.
            - `amapo/gradient_weight_misranked`: mean gradient weight of the pairs with r <= 0.
            - `amapo/nonfinite`: number of pairs whose score is NaN or infinite.
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
        scores, chosen_rewards, rejected_rewards = self._rewards()
        n, dtype, counted = scores.shape[0], sum_dtype(scores.device), self.pairs.counted()
        weights, correct, misranked = self.gradient_weights, scores > 0, scores <= 0
        columns = (
            scores,
            correct,
            misranked,
            torch.where(correct, weights, 0),
            torch.where(misranked, weights, 0),
            chosen_rewards,
            rejected_rewards,
            self.pairs.chosen_logps,
            self.pairs.rejected_logps,
            self.margins,
            self.margins > 0,
            scores > self.statistics.mean,
            ~scores.isfinite(),
        )
        stacked, margins = torch.stack([column.to(scores.dtype) for column in columns]), self.margins
        if counted is not None:
            left_out = ~counted
            stacked, margins = stacked.masked_fill(left_out, 0), margins.masked_fill(left_out, -torch.inf)
        sums = stacked.sum(1).to(dtype)
        own_count = sums.new_full((1,), n) if counted is None else counted.sum(0, keepdim=True, dtype=dtype)
        mean = sums[:1] / own_count.clamp(min=1)
        deviations = scores.to(dtype) - mean
        if counted is not None:
            deviations = deviations.masked_fill(left_out, 0)
        max_margin = margins.amax(0, keepdim=True) if n else torch.full_like(sums[:1], -torch.inf)
        # In the order of the entries of `Totals`.
        m2 = deviations.square().sum(0, keepdim=True)
        return Totals(torch.cat((own_count, mean, m2, sums[1:], n - own_count, max_margin.to(dtype))))
