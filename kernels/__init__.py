"""GPU kernels of amapo_loss, imported as `amapo_loss.kernels`. Knows torch and Triton, nothing else of the package."""


def unavailable_reason() -> str | None:
    """Why the Triton backend cannot run here, as a sentence that says what to do; None where it can."""
    return "this version of amapo_loss has no Triton kernel yet: use backend='torch' or 'auto'"
