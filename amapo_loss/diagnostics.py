"""What happened in a batch: per pair, and as the scalars that a trainer logs. Knows tensors and `ScoreStatistics`."""

from typing import NamedTuple

import torch
from torch import Tensor

from amapo_loss.statistics import ScoreStatistics


class Diagnostics(NamedTuple):
    r"""Everything a loss call computed on its way, detached, on the device of the log-probs.

    Args:
        scores: [B] ranking scores $r_i = \beta d_i$; a pair is ranked correctly where $r_i > 0$.
        margins: [B] margins $h_i$.
        gradient_weights: [B] $w_i = -\partial L_i / \partial r_i$, how hard the loss pulls on each pair.
        chosen_rewards: [B] $\beta \log\frac{\pi(y_w)}{\mathrm{ref}(y_w)} / |y_w|$, reference and length where given.
        rejected_rewards: [B] the same of the rejected responses.
        chosen_logps: [B] the policy's log-probs of the chosen responses, as they were passed.
        rejected_logps: [B] those of the rejected responses.
        statistics: the mean and standard deviation that the margins were made from, in score units.

    All but `statistics.count` are float32, or float64 where an input was.

    """

    scores: Tensor
    margins: Tensor
    gradient_weights: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    statistics: ScoreStatistics

    def summary(self, prefix: str = "") -> dict[str, Tensor]:
        """The batch in 15 scalars, under TRL's names where TRL has one.

        Args:
            prefix: put before every key, for example `"eval_"`.

        Returns:
            0-dim tensors on the device, so that nothing waits for it before you log them. Over the local batch
            (0 if it is empty, and the mean of an empty group is 0):
            `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `logps/chosen`, `logps/rejected`: means;
            `rewards/accuracies`: share of pairs with r > 0;
            `amapo/score_mean`, `amapo/score_std`: the statistics behind the margins;
            `amapo/margin_mean`, `amapo/margin_max`, `amapo/margin_active`: of h, and the share of pairs with h > 0;
            `amapo/margin_accuracies`: share of pairs with r above the score mean (the authors' metric);
            `amapo/gradient_weight_correct`, `amapo/gradient_weight_misranked`: mean w where r > 0, and where r <= 0;
            `amapo/nonfinite`: number of pairs whose score is NaN or infinite.

        Example:
            >>> import torch
            >>> from amapo_loss import amapo_loss
            >>> _, diagnostics = amapo_loss(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5]))
            >>> diagnostics.summary("eval_")["eval_rewards/accuracies"]
            tensor(0.5000)
        """
        correct, misranked = self.scores > 0, self.scores <= 0
        zero = torch.zeros_like(self.scores)
        columns = {
            "rewards/chosen": self.chosen_rewards,
            "rewards/rejected": self.rejected_rewards,
            "rewards/accuracies": correct,
            "rewards/margins": self.scores,
            "logps/chosen": self.chosen_logps,
            "logps/rejected": self.rejected_logps,
            "amapo/margin_mean": self.margins,
            "amapo/margin_active": self.margins > 0,
            "amapo/margin_accuracies": self.scores > self.statistics.mean,
            "amapo/gradient_weight_correct": torch.where(correct, self.gradient_weights, zero),
            "amapo/gradient_weight_misranked": torch.where(misranked, self.gradient_weights, zero),
            "amapo/nonfinite": ~self.scores.isfinite(),
        }
        totals = torch.stack([column.to(zero.dtype) for column in columns.values()]).sum(1)
        n = self.scores.shape[0]
        group_sizes: dict[str, Tensor | int] = {
            "amapo/gradient_weight_correct": correct.sum().clamp(min=1),
            "amapo/gradient_weight_misranked": misranked.sum().clamp(min=1),
            "amapo/nonfinite": 1,
        }
        summary = {name: total / group_sizes.get(name, max(n, 1)) for name, total in zip(columns, totals)} | {
            "amapo/score_mean": self.statistics.mean,
            "amapo/score_std": self.statistics.std,
            "amapo/margin_max": self.margins.amax() if n else zero.sum(),
        }
        return {prefix + name: value for name, value in summary.items()}
