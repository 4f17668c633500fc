"""The GPU kernels, imported as `amapo_loss.kernels`. This file says whether they can run."""

import os
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch.torch_version import TorchVersion

OLDEST_TRITON = "3.4"  # comes with torch 2.8
OLDEST_CAPABILITY = (7, 0)  # older GPUs lack the memory ordering that the loss needs from 4,097 pairs on


def _why_no_triton() -> str | None:
    """Return why Triton cannot be used, as a sentence, or None. It imports no Triton, because that takes a second."""
    if find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`, or use backend='torch' or 'auto'"
    try:
        installed = version("triton")
    except PackageNotFoundError:  # under another name, as in PyTorch's builds for ROCm: assume that it is new enough
        return None
    if TorchVersion(installed) < OLDEST_TRITON:
        return f"Triton {installed} is older than {OLDEST_TRITON}: update PyTorch, or use backend='torch' or 'auto'"
    return None


WHY_NO_TRITON = _why_no_triton()


def unavailable_reason() -> str | None:
    """Return why no kernel can run here, as a sentence that says what to do, or None if kernels can run."""
    if WHY_NO_TRITON is not None:
        return WHY_NO_TRITON
    if not torch.cuda.is_available() and not interpreted():
        return "PyTorch sees no GPU: use backend='torch' or 'auto', or, to try it on a CPU, set TRITON_INTERPRET=1"
    return None


def chosen_for(device: torch.device) -> bool:
    """Return whether `backend="auto"` and the log-prob functions take the kernels for tensors on this device."""
    # ROCm is left out because the barrier within a block does not wait for loads there. A gradient that is written over
    # its logits could overwrite some that another thread has yet to read.
    if device.type != "cuda" or torch.version.hip is not None or WHY_NO_TRITON is not None:
        return False
    # torch.compile cannot trace the check, and needs a Triton that starts for its own kernels.
    return torch.compiler.is_compiling() or _triton_starts_on(device)


@cache
def _triton_starts_on(device: torch.device) -> bool:
    """Return whether Triton starts on a GPU and can compile the kernels for it. Warn if it does not start."""
    try:
        if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
            return False
        from triton.runtime import driver

        driver.active.get_current_target()  # compiles a module in C, unless a cache has it
    except Exception as error:  # without a C compiler, or without Python's headers
        warnings.warn(f"amapo_loss uses PyTorch, because Triton cannot start: {error}", stacklevel=3)
        return False
    return True


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n, and at least 1. Triton's function takes 8 microseconds."""
    return 1 << max(n - 1, 0).bit_length()


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU, by the words that it accepts."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
