"""`AMaPOLoss`: the loss as an nn.Module, whose `forward` takes and returns what that of OpenRLHF's `DPOLoss` does.

Depends on `functional` and the types of its arguments.
"""

import copy
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from amapo_loss._checks import Backend, Reduction
from amapo_loss._options import LossOptions, Margin
from amapo_loss.diagnostics import Diagnostics
from amapo_loss.functional import amapo_loss
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import Estimator, ScoreStatistics


class AMaPOLoss(nn.Module):
    r"""`amapo_loss` as a module: options in the constructor, tensors in `forward`, as in OpenRLHF's `DPOLoss`.

    Args:
        beta: scale of the ranking score; this and the others are options of `amapo_loss`, which says more about them.
            For a beta that changes during training, assign to the attribute `beta`.
        label_smoothing: expected share of pairs whose labels are swapped.
        margin: the adaptive margin and its options, a number, or a function. Margins [B] are an argument of `forward`.
        statistics: what the margins are made from, in place of the statistics of each batch. A `ScoreWindow` becomes a
            submodule, so that `state_dict`, `to`, `train` and `eval` act on it as well.
        process_group: the data-parallel group, to take the statistics over the pairs of all its ranks.
        reduction: `"mean"`, `"sum"` or `"none"`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Raises:
        TypeError, ValueError, RuntimeError: as `amapo_loss` does; for invalid options, in the constructor.

    Example:
        >>> import torch
        >>> loss_fn = AMaPOLoss(beta=2.0)  # averaged log-probs, no reference
        >>> loss, chosen_rewards, rejected_rewards = loss_fn(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5]))
        >>> loss
        tensor(1.9981)
        >>> loss_fn.diagnostics.summary()["rewards/margins"]
        tensor(0.5000)

    Source: arXiv 2511.09385, section 4.

    """

    diagnostics: Diagnostics | None
    """The diagnostics of the last call, or None before the first call."""

    def __init__(
        self,
        beta: float | Tensor = 2.0,
        label_smoothing: float = 0.0,
        margin: Margin = AdaptiveMargin(),
        statistics: ScoreStatistics | Estimator | None = None,
        process_group: ProcessGroup | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        LossOptions(beta, label_smoothing, margin, statistics, process_group, reduction, backend).checked()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.margin = margin
        self.statistics = statistics
        self.process_group = process_group
        self.reduction = reduction
        self.backend = backend
        self.diagnostics = None

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        weights: Tensor | None = None,
        margin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the chosen rewards [B] and the rejected rewards [B], the latter two detached.

        The first four tensors are `chosen_logps`, `rejected_logps`, `ref_chosen_logps` and `ref_rejected_logps` of
        `amapo_loss`, under the names that OpenRLHF's `DPOLoss` gives them. The lengths and the weights are those of
        `amapo_loss`. Margins [B], such as those of a data set, take the place of the module's own margin in this call.
        """
        loss, self.diagnostics = amapo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            weights=weights,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            margin=self.margin if margin is None else margin,
            statistics=self.statistics,
            process_group=self.process_group,
            reduction=self.reduction,
            backend=self.backend,
        )
        return loss, self.diagnostics.chosen_rewards, self.diagnostics.rejected_rewards

    def __deepcopy__(self, memo: dict[int, Any]) -> "AMaPOLoss":
        """Copy everything but the process group, which is a handle and cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(super().__getstate__(), memo))  # type: ignore[no-untyped-call]
        return clone

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "AMaPOLoss with a process_group cannot be pickled: save its state_dict(), or set process_group to None"
            )
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state

    def extra_repr(self) -> str:
        """Return beta, label smoothing and margin, for `print(module)`."""
        return f"beta={self.beta}, label_smoothing={self.label_smoothing}, margin={self.margin}"
