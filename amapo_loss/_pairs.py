"""The tensors that a loss is given, as one value that checks itself.

Depends only on torch and the argument checks.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from amapo_loss import _checks


class Pairs(NamedTuple):
    """A batch of B preference pairs: policy log-probs, optional reference log-probs, optional lengths."""

    chosen_logps: Tensor  # [B]
    rejected_logps: Tensor  # [B]
    ref_chosen_logps: Tensor | None = None  # [B]
    ref_rejected_logps: Tensor | None = None  # [B]
    chosen_lengths: Tensor | None = None  # [B] tokens
    rejected_lengths: Tensor | None = None  # [B] tokens

    def checked(self) -> "Pairs":
        """Return the pairs with detached lengths, or raise if the tensors do not fit together."""
        logps = {"chosen_logps": self.chosen_logps, "rejected_logps": self.rejected_logps}
        logps |= self._both_or_neither("ref_chosen_logps", "ref_rejected_logps")
        lengths = self._both_or_neither("chosen_lengths", "rejected_lengths")
        for name, tensor in logps.items():
            _checks.floating_tensor(name, tensor)
        for name, tensor in lengths.items():
            _checks.real_tensor(name, tensor)
        _checks.one_entry_per_pair(logps | lengths)
        return self._replace(**{name: tensor.detach() for name, tensor in lengths.items()})

    def _both_or_neither(self, first: str, second: str) -> dict[str, Tensor]:
        """Return the two tensors by name, or nothing if both are None; raise if one of them is None."""
        given = {name: getattr(self, name) for name in (first, second) if getattr(self, name) is not None}
        if len(given) == 1:
            present, missing = (first, second) if first in given else (second, first)
            raise ValueError(f"{present} was given without {missing}: pass both or neither")
        return given

    def to_accumulation_dtype(self) -> "Pairs":
        """Return the pairs with every tensor in float32, or in float64 if a log-prob is float64."""
        dtype = _checks.accumulation_dtype(*self[:4])
        return self._map(lambda tensor: tensor if tensor.dtype == dtype else tensor.to(dtype))

    def detached(self) -> "Pairs":
        """Return the pairs without their autograd graph."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Pairs":
        chosen, rejected, *optional = self
        return Pairs(function(chosen), function(rejected), *(x if x is None else function(x) for x in optional))
