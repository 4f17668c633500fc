"""`AdaptiveMargin`: which of the published margin formulas to use, and which of its parts.

Depends only on the argument checks. `amapo_loss._reference` computes the margins.
"""

from dataclasses import dataclass

from amapo_loss import _checks
from amapo_loss._checks import Formula, Scaling


@dataclass(frozen=True)
class AdaptiveMargin:
    r"""The adaptive margin of AMaPO: which formula, and which of its parts.

    Let $d_i$ be the log-ratio difference of pair $i$ and $r_i = \beta d_i$ its ranking score, see `amapo_loss`. Let
    $\mu$ and $\sigma$ be the mean and the standard deviation of the scores, $\bar d = \mu / \beta$, and
    $z_i = (\mu - r_i) / \sigma$. The margin of the pair is

    $$\text{paper:} \quad h_i = \beta\,e^{z_i \mu} \text{ if } z_i \mu > 0, \text{ else } f \qquad\qquad
      \text{released:} \quad h_i = \beta\,e^{z_i \bar d} \text{ if } z_i > 0, \text{ else } f$$

    where $f$ is `floor`, which is 0 in the paper. If the mean is positive, both formulas give a margin above $\beta$ to
    the pairs below the mean, and $f$ to the others. If the mean is negative, they pick opposite pairs: the paper's
    formula those above the mean, with a margin above $\beta$, and the released formula those below it, with a margin
    below $\beta$. At the mean, the margin jumps.

    If the scores are equal up to rounding, or the statistics are those of a single pair, every margin is $f$.

    Args:
        formula: `"paper"`, or `"released"`, which the trainer that the authors published computes.
        normalize: `False` replaces $z_i$ by 1 for the pairs below the mean and by 0 for all others, so that the
            distance to the mean does not matter.
        scaling: `"linear"` replaces the exponential by its exponent: $h_i = z_i \mu$ (paper) or $\beta z_i \bar d$
            (released). Such a margin is negative where $z_i \mu$ is.
        clip: `False` drops the condition: the formula applies to every pair.
        floor: the margin, in score units and at least 0, of the pairs that the condition excludes. 0 is the paper.
            Above 0, these pairs keep a constant margin, as all pairs do in SimPO. Without `clip` it must be 0.

    Raises:
        ValueError: if `formula` or `scaling` is unknown; if `floor` is negative, or above 0 with `clip=False`.
        TypeError: if `normalize` or `clip` is not a bool, or `floor` is not a number.

    Example:
        >>> AdaptiveMargin(formula="released", scaling="linear")
        AdaptiveMargin(formula='released', normalize=True, scaling='linear', clip=True, floor=0.0)

    Source: arXiv 2511.09385, section 4 for the paper's formula and Table 5 for `normalize`, `scaling` and `clip`; the
    authors' published trainer for the released formula. `floor` is an addition of this library.

    """

    formula: Formula = "paper"
    normalize: bool = True
    scaling: Scaling = "exp"
    clip: bool = True
    floor: float = 0.0

    def __post_init__(self) -> None:
        _checks.choice("formula", self.formula, Formula)
        _checks.choice("scaling", self.scaling, Scaling)
        _checks.boolean("normalize", self.normalize)
        _checks.boolean("clip", self.clip)
        _checks.number("floor", self.floor, at_least=0)
        if self.floor and not self.clip:
            raise ValueError(f"floor must be 0 with clip=False, which excludes no pair, got {self.floor}")
