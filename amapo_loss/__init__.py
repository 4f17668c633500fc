"""AMaPO: preference optimization with a margin for every pair, adapted from the batch.

The whole public surface. `amapo_loss.functional` is the place to start reading.
"""

from amapo_loss.diagnostics import Diagnostics
from amapo_loss.functional import AMaPOOutput, amapo_loss, dpo_loss, simpo_loss
from amapo_loss.logps import linear_sequence_logps, linear_token_logps, sequence_logps
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.module import AMaPOLoss
from amapo_loss.statistics import Estimator, ScoreStatistics, ScoreWindow

__version__ = "0.1.0"

__all__ = [
    "AMaPOLoss",
    "AMaPOOutput",
    "AdaptiveMargin",
    "Diagnostics",
    "Estimator",
    "ScoreStatistics",
    "ScoreWindow",
    "amapo_loss",
    "dpo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "sequence_logps",
    "simpo_loss",
]
