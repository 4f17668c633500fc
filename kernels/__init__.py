"""GPU kernels of amapo_loss, imported as `amapo_loss.kernels`. Knows torch and Triton, nothing else of the package."""

import os
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None  # looked for, not imported: that takes a second, and not everyone needs it


def unavailable_reason() -> str | None:
    """Why no kernel can run here, as a sentence that says what to do; None where they can."""
    if not HAS_TRITON:
        return "Triton is not installed: `pip install triton`, or use backend='torch' or 'auto'"
    if not torch.cuda.is_available() and not interpreted():
        return "PyTorch sees no GPU: use backend='torch' or 'auto', or, to try it on a CPU, set TRITON_INTERPRET=1"
    return None


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on the CPU, rather than to compile them."""
    return os.environ.get("TRITON_INTERPRET") == "1"
