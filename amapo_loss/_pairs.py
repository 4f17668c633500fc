"""The tensors that a loss is given, as one value that checks itself.

Depends only on torch and the argument checks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from amapo_loss import _checks


class Pairs(NamedTuple):
    """A batch of B preference pairs: log-probs of the policy and, if given, of the reference; lengths; weights.

    A pair is left out if its weight is 0 or False, or if one of its lengths is 0.
    """

    chosen_logps: Tensor  # [B]
    rejected_logps: Tensor  # [B]
    ref_chosen_logps: Tensor | None = None  # [B]
    ref_rejected_logps: Tensor | None = None  # [B]
    chosen_lengths: Tensor | None = None  # [B] tokens
    rejected_lengths: Tensor | None = None  # [B] tokens
    weights: Tensor | None = None  # [B] bool or numbers

    def checked(self) -> "Pairs":
        """Return the pairs with detached lengths and weights, or raise if the tensors do not fit together."""
        logps = {"chosen_logps": self.chosen_logps, "rejected_logps": self.rejected_logps}
        logps |= self._both_or_neither("ref_chosen_logps", "ref_rejected_logps")
        others = self._both_or_neither("chosen_lengths", "rejected_lengths")
        for name, tensor in logps.items():
            _checks.floating_tensor(name, tensor)
        for name, tensor in others.items():
            _checks.real_tensor(name, tensor)
        if self.weights is not None:
            others["weights"] = _checks.weight_tensor("weights", self.weights)
        for name, tensor in (logps | others).items():
            _checks.plain_activation(name, tensor)
        _checks.one_entry_per_pair(logps | others)
        # torch.compile of torch 2.8 can trace neither `_replace` nor slices of a named tuple.
        return Pairs(*self.logps(), **{name: tensor.detach() for name, tensor in others.items()})

    def _both_or_neither(self, first: str, second: str) -> dict[str, Tensor]:
        """Return the two tensors by name, or nothing if both are None; raise if one of them is None."""
        given = {name: getattr(self, name) for name in (first, second) if getattr(self, name) is not None}
        if len(given) == 1:
            present, missing = (first, second) if first in given else (second, first)
            raise ValueError(f"{present} was given without {missing}: pass both or neither")
        return given

    def logps(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the log-probs of the policy and of the reference."""
        return self.chosen_logps, self.rejected_logps, self.ref_chosen_logps, self.ref_rejected_logps

    def counted(self) -> Tensor | None:
        """Return which pairs are not left out [B], or None if there are neither weights nor lengths."""
        counted = None
        for tensor in (self.weights, self.chosen_lengths, self.rejected_lengths):
            if tensor is not None:
                counted = tensor != 0 if counted is None else counted & (tensor != 0)
        return counted

    def accumulation_dtype(self) -> torch.dtype:
        """Return the dtype to compute in: float64 if a log-prob is float64, else float32."""
        return _checks.accumulation_dtype(*self.logps())

    def prepared(self) -> "Pairs":
        """Return the pairs as the mathematics takes them: in the dtype to compute in, and without special cases.

        A pair that is left out has log-probs of 0, lengths of 1 and the weight 0. Its score is then 0, and no gradient
        reaches its log-probs, which may be anything. If there are no weights, and no lengths that could leave a pair
        out, the weights are None. A weight below 0 is NaN, and so is the loss: an error would need it on the host.
        """
        dtype, counted = self.accumulation_dtype(), self.counted()
        if counted is None:
            return self.map(lambda tensor: tensor if tensor.dtype == dtype else tensor.to(dtype))
        left_out, given = ~counted, {name: x for name, x in zip(Pairs._fields, self) if x is not None}
        neutral = {"chosen_lengths": 1, "rejected_lengths": 1}
        given = {"weights": counted} | given
        prepared = {name: x.to(dtype).masked_fill(left_out, neutral.get(name, 0)) for name, x in given.items()}
        prepared["weights"] = prepared["weights"].masked_fill(prepared["weights"] < 0, torch.nan)
        return Pairs(**prepared)

    def detached(self) -> "Pairs":
        """Return the pairs without their autograd graph."""
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Pairs":
        """Return the pairs with a function applied to each tensor."""
        chosen, rejected, *optional = self
        return Pairs(function(chosen), function(rejected), *(x if x is None else function(x) for x in optional))
