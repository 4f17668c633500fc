"""One clear sentence for every wrong argument. Looks at types, shapes and devices, never at a tensor's values."""

from math import inf
from typing import get_args

import torch
from torch import Tensor


def floating(name: str, value: object) -> Tensor:
    """`value`, if it is a floating tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {_kind(value)}")
    return value


def computing_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What floating tensors, where there are any, are computed in: float64 where one of them is, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def real(name: str, value: object) -> Tensor:
    """`value`, if it is an integer or floating tensor."""
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer or floating tensor, got {_kind(value)}")
    return value


def token_ids(name: str, value: object) -> Tensor:
    """`value`, if it is an int64 tensor."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {_kind(value)}")
    return value


def no_dtensor(name: str, value: Tensor) -> None:
    """A plain tensor, not one that is spread over devices."""
    if hasattr(value, "full_tensor"):  # DTensor; to import its class takes as long as the whole package
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor(), or call this inside the forward "
            f"of the module that holds it, where FSDP2 has gathered it"
        )


def scalar(name: str, value: object, device: torch.device) -> None:
    """A 0-dim floating tensor on that device."""
    tensor = floating(name, value)
    if tensor.ndim or tensor.device != device:
        raise ValueError(f"{name} must be 0-dim on {device}, got shape {tuple(tensor.shape)} on {tensor.device}")


def aligned(tensors: dict[str, Tensor]) -> None:
    """All of them 1-D, as long as the first, and on its device."""
    (first_name, first), *others = tensors.items()
    if first.ndim != 1:
        raise ValueError(f"{first_name} must be 1-D, one entry a pair, got shape {tuple(first.shape)}")
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected that of {first_name}, {tuple(first.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, expected the device of {first_name}, {first.device}")


def number(name: str, value: object, *, above: float = -inf, at_least: float = -inf, below: float = inf) -> None:
    """A finite Python number in the given range; a tensor would have to be waited for."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python number, got {_kind(value)}")
    if not (value > above and value >= at_least and value < below):  # false for NaN, too
        limits = {"> ": above, ">= ": at_least, "< ": below}
        expected = [f"{sign}{limit:g}" for sign, limit in limits.items() if abs(limit) < inf]
        raise ValueError(f"{name} must be {' and '.join(expected + ['finite'] * (below == inf))}, got {value}")


def choice(name: str, value: object, options: object) -> None:
    """One of the strings of a `Literal`."""
    if value not in get_args(options):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(options)))}, got {value!r}")


def instance(name: str, value: object, kind: type) -> None:
    """An instance of a class of this package."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {_kind(value)}")


def whole(name: str, value: object, *, at_least: int) -> None:
    """An int of that or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {_kind(value)}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def process_group(name: str, value: object) -> None:
    """A group of torch.distributed that this rank belongs to."""
    if not isinstance(value, torch.distributed.ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed group that this rank belongs to, got {_kind(value)}")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
