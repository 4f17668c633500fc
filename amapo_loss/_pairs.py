"""The tensors that a loss is given, as one value that checks itself.

Depends only on torch and the argument checks.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from amapo_loss import _checks


class Pairs(NamedTuple):
    """A batch of B preference pairs: log-probs of the policy and, if given, of the reference; lengths; weights.

    A pair is left out if its weight is False or one of its lengths is 0.
    """

    chosen_logps: Tensor  # [B]
    rejected_logps: Tensor  # [B]
    ref_chosen_logps: Tensor | None = None  # [B]
    ref_rejected_logps: Tensor | None = None  # [B]
    chosen_lengths: Tensor | None = None  # [B] tokens
    rejected_lengths: Tensor | None = None  # [B] tokens
    weights: Tensor | None = None  # [B] bool

    def checked(self) -> "Pairs":
        """Return the pairs with detached lengths, or raise if the tensors do not fit together."""
        logps = {"chosen_logps": self.chosen_logps, "rejected_logps": self.rejected_logps}
        logps |= self._both_or_neither("ref_chosen_logps", "ref_rejected_logps")
        lengths = self._both_or_neither("chosen_lengths", "rejected_lengths")
        for name, tensor in logps.items():
            _checks.floating_tensor(name, tensor)
        for name, tensor in lengths.items():
            _checks.real_tensor(name, tensor)
        weights = {} if self.weights is None else {"weights": _checks.bool_tensor("weights", self.weights)}
        _checks.one_entry_per_pair(logps | lengths | weights)
        return self._replace(**{name: tensor.detach() for name, tensor in lengths.items()})

    def _both_or_neither(self, first: str, second: str) -> dict[str, Tensor]:
        """Return the two tensors by name, or nothing if both are None; raise if one of them is None."""
        given = {name: getattr(self, name) for name in (first, second) if getattr(self, name) is not None}
        if len(given) == 1:
            present, missing = (first, second) if first in given else (second, first)
            raise ValueError(f"{present} was given without {missing}: pass both or neither")
        return given

    def counted(self) -> Tensor | None:
        """Return which pairs are not left out [B], or None if there are neither weights nor lengths."""
        counted = self.weights
        for lengths in (self.chosen_lengths, self.rejected_lengths):
            if lengths is not None:
                counted = lengths != 0 if counted is None else counted & (lengths != 0)
        return counted

    def neutralized(self) -> "Pairs":
        """Return the pairs with log-probs of 0 and lengths of 1 in place of those of the pairs that are left out.

        Their scores are then 0, and no gradient reaches their log-probs, which may be anything.
        """
        counted = self.counted()
        if counted is None:
            return self
        left_out = ~counted
        logps = {name: getattr(self, name) for name in self._fields[:4]}
        lengths = {name: getattr(self, name) for name in self._fields[4:6]}
        neutral = {name: x.masked_fill(left_out, 0) for name, x in logps.items() if x is not None}
        neutral |= {name: x.masked_fill(left_out, 1) for name, x in lengths.items() if x is not None}
        return self._replace(**neutral)

    def to_accumulation_dtype(self) -> "Pairs":
        """Return the pairs with log-probs and lengths in float32, or in float64 if a log-prob is float64."""
        dtype = _checks.accumulation_dtype(*self[:4])
        return self._map(lambda tensor: tensor if tensor.dtype == dtype else tensor.to(dtype))

    def detached(self) -> "Pairs":
        """Return the pairs without their autograd graph."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Pairs":
        """Return the pairs with a function applied to the log-probs and the lengths."""
        chosen, rejected, *optional = self[:6]
        rest = [x if x is None else function(x) for x in optional] + [self.weights]
        # Not `_replace`: torch.compile of torch 2.11 cannot store its result in a module.
        return Pairs(function(chosen), function(rejected), *rest)
