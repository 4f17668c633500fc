"""The pairs that a loss is given, as one checked value. Knows tensors, and of the package only the _checks."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from amapo_loss import _checks


class Pairs(NamedTuple):
    """Log-probs and, where there are any, the reference's and the lengths: [B] each, on one device."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None

    def checked(self) -> "Pairs":
        """The same, after raising for what does not fit together; no gradient flows into the lengths."""
        logps = {"chosen_logps": self.chosen_logps, "rejected_logps": self.rejected_logps}
        logps |= self._both_or_neither("ref_chosen_logps", "ref_rejected_logps")
        lengths = self._both_or_neither("chosen_lengths", "rejected_lengths")
        for name, tensor in logps.items():
            _checks.floating(name, tensor)
        for name, tensor in lengths.items():
            _checks.real(name, tensor)
        _checks.aligned(logps | lengths)
        return self._replace(**{name: tensor.detach() for name, tensor in lengths.items()})

    def _both_or_neither(self, first: str, second: str) -> dict[str, Tensor]:
        given = {name: getattr(self, name) for name in (first, second) if getattr(self, name) is not None}
        if len(given) == 1:
            (there,), (missing,) = given, {first, second} - set(given)
            raise ValueError(f"{there} was given without {missing}: pass both or neither")
        return given

    def computable(self) -> "Pairs":
        """The same, all in the floating dtype that they are computed in."""
        dtype = _checks.computing_dtype(*self[:4])
        return self._each(lambda tensor: tensor if tensor.dtype == dtype else tensor.to(dtype))

    def detached(self) -> "Pairs":
        """The same without their graph."""
        return self._each(Tensor.detach)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Pairs":
        chosen, rejected, *optional = self
        return Pairs(function(chosen), function(rejected), *(x if x is None else function(x) for x in optional))
