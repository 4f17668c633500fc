"""The GPU kernels, imported as `amapo_loss.kernels`. This file says whether they can run, without importing Triton."""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch.torch_version import TorchVersion

OLDEST_TRITON = "3.4"  # comes with torch 2.8


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


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"
