"""What happened in a batch: per pair, and as the scalars that a trainer logs."""

from typing import NamedTuple

import torch
from torch import Tensor

from amapo_loss import _reference
from amapo_loss._pairs import Pairs
from amapo_loss.statistics import ScoreStatistics

SUMMARY = (  # in the order in which the kernel stores them
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
    r"""What a loss call found out about each pair, detached, on the device of the log-probs.

    Beyond the margins, which made the loss, everything is computed when it is read: what nobody looks at costs nothing.

    Args:
        pairs: the log-probs, and the reference's and the lengths where there are any; as passed, or as converted to be
            computed with.
        margins: [B] margins $h_i$.
        statistics: the mean and standard deviation that the margins were made from, in score units.
        beta: scale of the ranking score.
        label_smoothing: $\epsilon$.
        rewards: [3, B] scores, chosen and rejected rewards, and
        entries: [15] those of `summary`, in the order of `SUMMARY`; each where the backend had them anyway.

    What the properties return is float32, or float64 where a log-prob is; so are the margins.

    """

    pairs: Pairs
    margins: Tensor
    statistics: ScoreStatistics
    beta: float
    label_smoothing: float
    rewards: Tensor | None = None
    entries: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        r"""[B] ranking scores $r_i = \beta d_i$; a pair is ranked correctly where $r_i > 0$."""
        return self._rewards()[0]

    @property
    def chosen_rewards(self) -> Tensor:
        r"""[B] $\beta \log\frac{\pi(y_w)}{\mathrm{ref}(y_w)} / |y_w|$, reference and length where given."""
        return self._rewards()[1]

    @property
    def rejected_rewards(self) -> Tensor:
        """[B] the same of the rejected responses."""
        return self._rewards()[2]

    @property
    def gradient_weights(self) -> Tensor:
        r"""[B] $w_i = -\partial L_i / \partial r_i$, how hard the loss pulls on each pair."""
        return _reference.gradient_weights(self.scores, self.margins, self.label_smoothing)

    def _rewards(self) -> Tensor:
        return _reference.differences(self.pairs.computable(), self.beta)[1] if self.rewards is None else self.rewards

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
        if self.entries is None:
            values = self._entries()
        else:
            values = dict(zip(SUMMARY, self.entries.unbind()))
        return {prefix + name: values[name] for name in SUMMARY}

    def _entries(self) -> dict[str, Tensor]:
        scores, chosen_rewards, rejected_rewards = self._rewards()
        weights, zero = self.gradient_weights, torch.zeros_like(scores)
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
            "amapo/gradient_weight_correct": torch.where(correct, weights, zero),
            "amapo/gradient_weight_misranked": torch.where(misranked, weights, zero),
            "amapo/nonfinite": ~scores.isfinite(),
        }
        totals = torch.stack([column.to(zero.dtype) for column in columns.values()]).sum(1)
        n = scores.shape[0]
        group_sizes: dict[str, Tensor | int] = {
            "amapo/gradient_weight_correct": correct.sum().clamp(min=1),
            "amapo/gradient_weight_misranked": misranked.sum().clamp(min=1),
            "amapo/nonfinite": 1,
        }
        return {name: total / group_sizes.get(name, max(n, 1)) for name, total in zip(columns, totals)} | {
            "amapo/margin_max": self.margins.amax() if n else zero.sum(),
            "amapo/score_mean": self.statistics.mean.to(zero.dtype),
            "amapo/score_std": self.statistics.std.to(zero.dtype),
        }
