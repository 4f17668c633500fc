"""The options of a loss as one frozen value, which travels from the public function to the backends.

Depends on torch, the argument checks, the margin, the statistics, and `kernels.unavailable_reason`.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from amapo_loss import _checks, kernels
from amapo_loss._checks import Backend, Reduction
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import Estimator, ScoreStatistics

MarginFunction = Callable[[Tensor, ScoreStatistics], Tensor]  # (scores [B], statistics) -> margins [B]
Margin = AdaptiveMargin | float | Tensor | MarginFunction


class LossOptions(NamedTuple):
    """The arguments of `amapo_loss` other than the tensors of `Pairs`, in its order. See there for their meaning."""

    beta: float | Tensor
    label_smoothing: float
    margin: Margin
    statistics: ScoreStatistics | Estimator | None
    process_group: ProcessGroup | None
    reduction: Reduction
    backend: Backend

    def checked(self) -> "LossOptions":
        """Return the options unchanged, or raise for the first invalid one. These checks need no batch."""
        if isinstance(self.beta, Tensor):
            _checks.scalar_tensor("beta", self.beta, self.beta.device)
        else:
            _checks.number("beta", self.beta, above=0, expected="a Python number or a 0-dim tensor")
        _checks.number("label_smoothing", self.label_smoothing, at_least=0, below=0.5)
        if isinstance(self.margin, (int, float)):
            _checks.number("margin", self.margin)
        elif isinstance(self.margin, Tensor):
            _checks.plain_activation("margin", _checks.real_tensor("margin", self.margin))
        elif not isinstance(self.margin, AdaptiveMargin):
            expected = (
                "an AdaptiveMargin such as AdaptiveMargin('released'), a number, a tensor with one entry per pair, "
                "or a function"
            )
            _checks.function("margin", self.margin, expected)
        if not (self.statistics is None or isinstance(self.statistics, ScoreStatistics)):
            _checks.function(
                "statistics", self.statistics, "ScoreStatistics, or a callable estimator such as ScoreWindow(128)"
            )
        if self.process_group is not None:
            _checks.process_group("process_group", self.process_group)
        _checks.choice("reduction", self.reduction, Reduction)
        _checks.choice("backend", self.backend, Backend)
        if self.backend == "triton" and (reason := kernels.unavailable_reason()):
            raise RuntimeError(f"backend='triton' cannot run: {reason}")
        return self

    def gathers_moments(self) -> bool:
        """Return whether the moments of all ranks are needed: for the statistics, or for the mean over their pairs."""
        return self.process_group is not None and (self.statistics is None or self.reduction == "mean")

    def replaced(
        self, beta: float | Tensor, margin: Margin, statistics: ScoreStatistics | Estimator | None
    ) -> "LossOptions":
        """Return the options with other values of these three. torch.compile of torch 2.8 cannot trace `_replace`."""
        return LossOptions(
            beta, self.label_smoothing, margin, statistics, self.process_group, self.reduction, self.backend
        )
