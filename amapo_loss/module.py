"""`AMaPOLoss`: the loss as an nn.Module, whose `forward` takes and returns what that of OpenRLHF's `DPOLoss` does.

Depends on `functional`, the types of its arguments and the argument checks.
"""

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from amapo_loss import _checks
from amapo_loss._checks import Backend, Formula, Reduction, Scaling
from amapo_loss._options import LossOptions, Margin
from amapo_loss.diagnostics import Diagnostics
from amapo_loss.functional import amapo_loss
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import Estimator, ScoreStatistics, ScoreWindow


class AMaPOLoss(nn.Module):
    r"""`amapo_loss` as a module: options in the constructor, tensors in `forward`, as in OpenRLHF's `DPOLoss`.

    Args:
        beta: scale of the ranking score; this and the others are options of `amapo_loss`, which says more about them.
            For a beta that changes during training, assign to the attribute `beta`, and call `reset` of a window, whose
            scores have the old beta. Tensors among the options stay on their device: `to` does not move them.
        label_smoothing: expected share of pairs whose labels are swapped.
        ipo: must be False. OpenRLHF's `DPOLoss` has it as its third argument.
        margin: an `AdaptiveMargin`, a number, or a function. None: the `AdaptiveMargin` that the five options below
            describe. Margins [B] are an argument of `forward`.
        formula, normalize, scaling, clip, floor: the options of `AdaptiveMargin`, for configuration files, which cannot
            build one. None: its default. They cannot be given beside `margin`.
        statistics: what the margins are made from, in place of the statistics of each batch. A `ScoreWindow` becomes a
            submodule, so that `state_dict`, `to`, `train` and `eval` act on it as well.
        statistics_window: the module builds a `ScoreWindow` of this size. It cannot be given beside `statistics`.
        process_group: the data-parallel group, to take the statistics over the pairs of all its ranks. Until
            `init_process_group`, `torch.distributed.group.WORLD` is None, which means no group.
        reduction: `"mean"`, `"sum"` or `"none"`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Raises:
        TypeError, ValueError, RuntimeError: as `amapo_loss` does; for invalid options, in the constructor.
        ValueError: if `ipo` is True; if options exclude each other.

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
        ipo: bool = False,
        *,
        margin: Margin | None = None,
        formula: Formula | None = None,
        normalize: bool | None = None,
        scaling: Scaling | None = None,
        clip: bool | None = None,
        floor: float | None = None,
        statistics: ScoreStatistics | Estimator | None = None,
        statistics_window: int | None = None,
        process_group: ProcessGroup | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if ipo is not False:
            raise ValueError(f"ipo must be False, because IPO is another loss, got {ipo!r}")
        flat = {"formula": formula, "normalize": normalize, "scaling": scaling, "clip": clip, "floor": floor}
        flat = {name: value for name, value in flat.items() if value is not None}
        if margin is None:
            margin = AdaptiveMargin(**flat)  # type: ignore[arg-type]
        elif flat:
            raise ValueError(f"{next(iter(flat))} was given beside margin: pass one of the two")
        if statistics_window is not None:
            if statistics is not None:
                raise ValueError("statistics_window was given beside statistics: pass one of the two")
            _checks.integer("statistics_window", statistics_window, at_least=1)
            statistics = ScoreWindow(statistics_window)
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
        `amapo_loss`, under the names that OpenRLHF's `DPOLoss` gives them. Pass averages, for which the default beta is
        meant, or sums together with the lengths. For sums without lengths, which OpenRLHF passes, take a beta of about
        0.1. The lengths and the weights are those of `amapo_loss`. `margin` [B], such as a column of a data set, takes
        the place of the module's own margin in this call.
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

    if TYPE_CHECKING:  # nn.Module gives its calls the type Any
        __call__ = forward

    def __deepcopy__(self, memo: dict[int, Any]) -> "AMaPOLoss":
        """Copy everything but the process group, which is a handle and cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(super().__getstate__(), memo))  # type: ignore[no-untyped-call]
        return clone

    def __copy__(self) -> "AMaPOLoss":
        """Return a module that shares everything, also the process group."""
        clone = type(self).__new__(type(self))
        clone.__dict__.update(super().__getstate__())  # type: ignore[no-untyped-call]
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
