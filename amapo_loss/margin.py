"""Which adaptive margin to use: the two published formulas and their ablations, as one value.

Knows nothing of tensors. `amapo_loss._reference` turns this choice into numbers.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Formula = Literal["paper", "released"]
Scaling = Literal["exp", "linear"]


@dataclass(frozen=True)
class AdaptiveMargin:
    r"""How a pair's margin follows from its distance to the batch mean.

    With $d_i$ the log-ratio difference of pair $i$, $r_i = \beta d_i$ its ranking score, and $\mu, \sigma$ the mean and
    the standard deviation of the scores, the defaults give the paper's margin

    $$z_i = (\mu - r_i) / \sigma, \qquad \gamma_i = \max(z_i\,\mu, 0), \qquad
      h_i = \begin{cases} 0 & \gamma_i = 0 \\ \beta\,e^{\gamma_i} & \text{else.} \end{cases}$$

    Args:
        formula: `"paper"` as above. `"released"` is what the authors' published trainer computes: the mean in the
            exponent is that of $d$ (no $\beta$), and the gate is $z_i > 0$. The two differ most where the batch mean is
            negative: there the paper's gate opens for the pairs that rank *better* than the mean.
        normalize: `False` replaces $z_i$ by 1 for the pairs below the mean and by 0 for the others.
        scaling: `"linear"` takes $h_i = \gamma_i$ instead (released: $\beta z_i \bar d$).
        clip: `False` removes the gate: every pair gets its margin, $\gamma_i$ keeps its sign.

    Raises:
        ValueError: for an unknown formula or scaling.
        TypeError: for a `normalize` or `clip` that is no bool.

    Example:
        >>> AdaptiveMargin(formula="released", scaling="linear")
        AdaptiveMargin(formula='released', normalize=True, scaling='linear', clip=True)

    Source: arXiv 2511.09385, section 4 (the margin) and Table 5 (the switches).

    """

    formula: Formula = "paper"
    normalize: bool = True
    scaling: Scaling = "exp"
    clip: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("formula", Formula), ("scaling", Scaling)):
            if getattr(self, name) not in get_args(kind):
                options = " or ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name} must be {options}, got {getattr(self, name)!r}")
        for name in ("normalize", "clip"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
