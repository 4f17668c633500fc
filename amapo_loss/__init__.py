"""AMaPO: preference optimization with a margin for each pair, which is adapted to the batch.

The names in `__all__` and the module `amapo_loss.trl` are the public interface. To read the code, start with
`amapo_loss.functional`.
"""

from importlib.util import find_spec
from pathlib import Path

if find_spec("amapo_loss.kernels") is None:
    # Python was started in a checkout, and imports this folder in place of an installed package. The kernels are in the
    # folder next to it.
    __path__.append(str(Path(__path__[0]).parent))

from amapo_loss.diagnostics import Diagnostics
from amapo_loss.functional import AMaPOOutput, amapo_loss, dpo_loss, simpo_loss
from amapo_loss.logps import linear_sequence_logps, linear_token_logps, sequence_logps
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.module import AMaPOLoss
from amapo_loss.statistics import Estimator, ScoreStatistics, ScoreWindow
from amapo_loss.totals import Totals

__version__ = "0.1.0"

__all__ = [
    "AMaPOLoss",
    "AMaPOOutput",
    "AdaptiveMargin",
    "Diagnostics",
    "Estimator",
    "ScoreStatistics",
    "ScoreWindow",
    "Totals",
    "amapo_loss",
    "dpo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "sequence_logps",
    "simpo_loss",
]
