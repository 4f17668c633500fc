"""`AMaPOLoss`: the loss as an nn.Module, with the signature and the return values of the DPO losses that it replaces.

Depends on the functional loss.
"""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from amapo_loss._checks import Backend, Reduction
from amapo_loss._options import LossOptions
from amapo_loss.diagnostics import Diagnostics
from amapo_loss.functional import amapo_loss
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import Estimator, ScoreStatistics


class AMaPOLoss(nn.Module):
    r"""`amapo_loss` with its options set once, and the signature and return values of OpenRLHF's `DPOLoss`.

    Args:
        beta: as in `amapo_loss`, like all arguments below.
        label_smoothing: as in `amapo_loss`.
        margin: as in `amapo_loss`.
        statistics: as in `amapo_loss`. A `ScoreWindow` becomes a submodule: the state, the device and the training
            mode of this module include it.
        process_group: as in `amapo_loss`.
        reduction: as in `amapo_loss`.
        backend: as in `amapo_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as `amapo_loss` does. Wrong options raise on construction.

    Example:
        >>> import torch
        >>> loss_fn = AMaPOLoss(beta=2.0)  # in place of DPOLoss(beta=0.1)
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
        beta: float = 2.0,
        label_smoothing: float = 0.0,
        margin: AdaptiveMargin = AdaptiveMargin(),
        statistics: ScoreStatistics | Estimator | None = None,
        process_group: ProcessGroup | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        LossOptions(beta, label_smoothing, margin, reduction, statistics, process_group, backend).checked()
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss and the detached rewards [B] of the chosen and of the rejected responses.

        The tensors are those of `amapo_loss`, under the names that OpenRLHF's `DPOLoss` gives them.
        """
        loss, self.diagnostics = amapo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            statistics=self.statistics,
            process_group=self.process_group,
            reduction=self.reduction,
            backend=self.backend,
        )
        return loss, self.diagnostics.chosen_rewards, self.diagnostics.rejected_rewards

    def extra_repr(self) -> str:
        """Return the options that `print(module)` shows."""
        return f"beta={self.beta}, label_smoothing={self.label_smoothing}, margin={self.margin}"
