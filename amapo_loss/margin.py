"""`AdaptiveMargin`: which of the published margin formulas to use, and which of its parts.

Depends only on the argument checks. `amapo_loss._reference` computes the margins.
"""

from dataclasses import dataclass

from amapo_loss import _checks
from amapo_loss._checks import Formula, Scaling


@dataclass(frozen=True)
class AdaptiveMargin:
    r"""How a pair's margin follows from the distance of its score to the batch mean.

    Let $d_i$ be the log-ratio difference of pair $i$, $r_i = \beta d_i$ its ranking score, and $\mu$ and $\sigma$ the
    mean and the standard deviation of the scores. The defaults give the paper's margin:

    $$z_i = (\mu - r_i) / \sigma, \qquad \gamma_i = \max(z_i\,\mu, 0), \qquad
      h_i = \begin{cases} 0 & \gamma_i = 0 \\ \beta\,e^{\gamma_i} & \text{else.} \end{cases}$$

    While the mean is positive, the pairs below the mean get a margin, and pairs at or above it get none.

    Args:
        formula: `"paper"` is the formula above. `"released"` is what the authors' published trainer computes: the
            exponent is $z_i$ times the mean of $d$, without $\beta$, and the margin is 0 unless $z_i > 0$. The two
            formulas differ most where the batch mean is negative. There the paper's formula gives a margin to the pairs
            that rank *better* than the mean, and the released formula to those that rank worse.
        normalize: `False` replaces $z_i$ by 1 for the pairs below the mean and by 0 for all others.
        scaling: `"exp"` is the formula above. `"linear"` takes $h_i = \gamma_i$ instead, and with
            `formula="released"` $h_i = \beta z_i \bar d$.
        clip: `False` gives every pair its margin, without the maximum with 0: $\gamma_i = z_i\,\mu$ keeps its sign.

    Raises:
        ValueError: if `formula` or `scaling` is unknown.
        TypeError: if `normalize` or `clip` is not a bool.

    Example:
        >>> AdaptiveMargin(formula="released", scaling="linear")
        AdaptiveMargin(formula='released', normalize=True, scaling='linear', clip=True)

    Source: arXiv 2511.09385, section 4 for the margin, and Table 5 for `normalize`, `scaling` and `clip`.

    """

    formula: Formula = "paper"
    normalize: bool = True
    scaling: Scaling = "exp"
    clip: bool = True

    def __post_init__(self) -> None:
        _checks.choice("formula", self.formula, Formula)
        _checks.choice("scaling", self.scaling, Scaling)
        _checks.boolean("normalize", self.normalize)
        _checks.boolean("clip", self.clip)
