"""Argument checks. Each error message is one sentence: the name of the argument, what is expected, and what came.

Depends only on torch. The checks look at types, shapes, dtypes and devices, and never at the values of a tensor, so
that none of them synchronizes with the device.
"""

from math import inf
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Formula = Literal["paper", "released"]
Scaling = Literal["exp", "linear"]
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "triton", "torch"]


def floating_tensor(name: str, value: object) -> Tensor:
    """Return `value` if it is a floating-point tensor, else raise TypeError."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {_describe(value)}")
    return value


def real_tensor(name: str, value: object) -> Tensor:
    """Return `value` if it is an integer or floating-point tensor, else raise TypeError."""
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer or floating tensor, got {_describe(value)}")
    return value


def weight_tensor(name: str, value: object) -> Tensor:
    """Return `value` if it is a bool, integer or floating-point tensor, else raise TypeError."""
    if not isinstance(value, Tensor) or value.is_complex():
        raise TypeError(f"{name} must be a bool, integer or floating tensor, got {_describe(value)}")
    return value


def bool_tensor(name: str, value: object) -> Tensor:
    """Return `value` if it is a bool tensor, else raise TypeError."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {_describe(value)}")
    return value


def token_ids(name: str, value: object) -> Tensor:
    """Return `value` if it is an int64 tensor, else raise TypeError."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {_describe(value)}")
    return value


def integer_tensor(name: str, value: object) -> Tensor:
    """Return `value` if it is an int32 or int64 tensor, else raise TypeError."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {_describe(value)}")
    return value


def plain_activation(name: str, value: Tensor) -> None:
    """Raise TypeError for a DTensor where an activation or its labels are expected."""
    if is_dtensor(value):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor(), or {name}.to_local() if each "
            "rank has sequences of its own"
        )


def gathered_parameter(name: str, value: Tensor) -> None:
    """Raise for a parameter that DeepSpeed ZeRO-3 has partitioned."""
    if value.shape == (0,):
        raise ValueError(
            f"{name} is empty, as DeepSpeed ZeRO-3 leaves a partitioned parameter: call this inside "
            f"deepspeed.zero.GatheredParameters({name}), or inside the forward of the module that holds it"
        )


def is_dtensor(value: Tensor) -> bool:
    """Return whether this is a DTensor."""
    return hasattr(value, "full_tensor")  # importing the class DTensor takes as long as importing this whole package


def scalar_tensor(name: str, value: object, device: torch.device) -> Tensor:
    """Return `value` if it is a 0-dim floating-point tensor on `device`, else raise."""
    tensor = floating_tensor(name, value)
    if tensor.ndim or tensor.device != device:
        raise ValueError(f"{name} must be 0-dim on {device}, got shape {tuple(tensor.shape)} on {tensor.device}")
    return tensor


def same_device(name: str, value: Tensor, other_name: str, device: torch.device) -> None:
    """Raise unless `value` is on the device of another argument."""
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected the device of {other_name}, {device}")


def one_entry_per_pair(tensors: dict[str, Tensor]) -> None:
    """Raise unless all tensors are 1-D, of one length and on one device. The keys are the argument names."""
    (first_name, first), *others = tensors.items()
    if first.ndim != 1:
        raise ValueError(f"{first_name} must be 1-D with one entry per pair, got shape {tuple(first.shape)}")
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected that of {first_name}, {tuple(first.shape)}"
            )
        same_device(name, tensor, first_name, first.device)


def number(
    name: str,
    value: object,
    *,
    above: float = -inf,
    at_least: float = -inf,
    below: float = inf,
    expected: str = "a Python number",
) -> None:
    """Raise unless `value` is a finite Python number in the range.

    A tensor is refused, because checking its value would wait for the device. `expected` says what else the caller of
    this function accepts.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {_describe(value)}")
    if not (value > above and value >= at_least and value < below):  # also raises for NaN
        limits = {"> ": above, ">= ": at_least, "< ": below}
        conditions = [f"{sign}{limit:g}" for sign, limit in limits.items() if abs(limit) < inf]
        if below == inf:
            conditions.append("finite")
        raise ValueError(f"{name} must be {' and '.join(conditions)}, got {value}")


def integer(name: str, value: object, *, at_least: int | None = None) -> None:
    """Raise unless `value` is an int, and not below `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {_describe(value)}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def boolean(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def function(name: str, value: object, expected: str) -> None:
    """Raise TypeError unless `value` can be called. A class is refused: it was given without the parentheses."""
    if isinstance(value, type):
        raise TypeError(f"{name} must be {expected}, got the class {value.__name__}")
    if not callable(value):
        raise TypeError(f"{name} must be {expected}, got {_describe(value)}")


def choice(name: str, value: object, options: object) -> None:
    """Raise unless `value` is one of the strings of the Literal type `options`."""
    if value not in get_args(options):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(options)))}, got {value!r}")


def process_group(name: str, value: object) -> None:
    """Raise unless `value` is a torch.distributed group that contains this rank.

    On other ranks, PyTorch's `new_group` returns an object of another type.
    """
    if not isinstance(value, torch.distributed.ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed group that this rank belongs to, got {_describe(value)}")


def autocasts(device_type: str) -> bool:
    """Return whether autocast is enabled for a type of device. PyTorch raises for "meta", for which it never is."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Return whether a derivative in forward mode is wanted, as under `torch.func.jvp`."""
    if torch.compiler.is_compiling():  # cannot trace this in torch 2.8
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any of the tensors is float64, else float32: the dtype to compute in. None is skipped."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _describe(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
