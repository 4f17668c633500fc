"""The options of a loss as one frozen value, which travels from the public function to the backends.

Depends on the checks, the margin, the statistics and on whether the kernels can run.
"""

from typing import NamedTuple

from torch.distributed import ProcessGroup

from amapo_loss import _checks, kernels
from amapo_loss._checks import Backend, Reduction
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import Estimator, ScoreStatistics


class ConstantMargin(NamedTuple):
    """The margin of DPO (0) and SimPO (gamma): the same number for every pair, in score units."""

    value: float


class LossOptions(NamedTuple):
    """What `amapo_loss`, `dpo_loss` and `simpo_loss` take beside tensors; the names mean what they mean there."""

    beta: float
    label_smoothing: float
    margin: AdaptiveMargin | ConstantMargin
    reduction: Reduction
    statistics: ScoreStatistics | Estimator | None = None
    process_group: ProcessGroup | None = None
    backend: Backend = "torch"

    def checked(self) -> "LossOptions":
        """Return the options unchanged, or raise for the first one that no loss accepts, whatever the batch."""
        _checks.number("beta", self.beta, above=0)
        _checks.number("label_smoothing", self.label_smoothing, at_least=0, below=0.5)
        _checks.choice("reduction", self.reduction, Reduction)
        if not isinstance(self.margin, (AdaptiveMargin, ConstantMargin)):
            raise TypeError(f"margin must be an AdaptiveMargin, got {type(self.margin).__name__}")
        if not (self.statistics is None or callable(self.statistics) or isinstance(self.statistics, ScoreStatistics)):
            raise TypeError(
                f"statistics must be ScoreStatistics or a callable estimator, got {type(self.statistics).__name__}"
            )
        if self.process_group is not None:
            _checks.process_group("process_group", self.process_group)
        _checks.choice("backend", self.backend, Backend)
        if self.backend == "triton" and (reason := kernels.unavailable_reason()):
            raise RuntimeError(f"backend='triton' cannot run: {reason}")
        return self
