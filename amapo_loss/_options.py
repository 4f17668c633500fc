"""The options of a loss as one frozen value, which travels from the public function to the backends.

Depends on the argument checks, the margin, the statistics, and `kernels.unavailable_reason`.
"""

from typing import NamedTuple

from torch.distributed import ProcessGroup

from amapo_loss import _checks, kernels
from amapo_loss._checks import Backend, Reduction
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import Estimator, ScoreStatistics


class ConstantMargin(NamedTuple):
    """The margin of SimPO, and with gamma = 0 that of DPO: the same number for every pair, in score units."""

    gamma: float


class LossOptions(NamedTuple):
    """The arguments of `amapo_loss` that are not tensors, in its order. See there for their meaning."""

    beta: float
    label_smoothing: float
    margin: AdaptiveMargin | ConstantMargin
    statistics: ScoreStatistics | Estimator | None = None
    process_group: ProcessGroup | None = None
    reduction: Reduction = "mean"
    backend: Backend = "torch"  # the only backend with a ConstantMargin

    def checked(self) -> "LossOptions":
        """Return the options unchanged, or raise for the first invalid one. These checks need no batch."""
        _checks.number("beta", self.beta, above=0)
        _checks.number("label_smoothing", self.label_smoothing, at_least=0, below=0.5)
        if isinstance(self.margin, ConstantMargin):
            _checks.number("gamma", self.margin.gamma)
        elif not isinstance(self.margin, AdaptiveMargin):
            raise TypeError(f"margin must be an AdaptiveMargin, got {type(self.margin).__name__}")
        if not (self.statistics is None or callable(self.statistics) or isinstance(self.statistics, ScoreStatistics)):
            raise TypeError(
                f"statistics must be ScoreStatistics or a callable estimator, got {type(self.statistics).__name__}"
            )
        if self.process_group is not None:
            _checks.process_group("process_group", self.process_group)
        _checks.choice("reduction", self.reduction, Reduction)
        _checks.choice("backend", self.backend, Backend)
        if self.backend == "triton" and (reason := kernels.unavailable_reason()):
            raise RuntimeError(f"backend='triton' cannot run: {reason}")
        return self
