"""The GPU kernels, imported as `amapo_loss.kernels`. This file says whether they can run, without importing Triton."""

import os
from importlib.util import find_spec

import torch

# Importing Triton takes a second, and not everyone needs it: only look whether it is there.
HAS_TRITON = find_spec("triton") is not None


def unavailable_reason() -> str | None:
    """Return why no kernel can run here, as a sentence that says what to do, or None if kernels can run."""
    if not HAS_TRITON:
        return "Triton is not installed: `pip install triton`, or use backend='torch' or 'auto'"
    if not torch.cuda.is_available() and not interpreted():
        return "PyTorch sees no GPU: use backend='torch' or 'auto', or, to try it on a CPU, set TRITON_INTERPRET=1"
    return None


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"
