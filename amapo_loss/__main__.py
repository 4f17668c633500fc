"""`python -m amapo_loss`: report what is installed and what can run here, and check the results of every backend."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import inf, isnan

import torch
from torch import Tensor

from amapo_loss import AdaptiveMargin, __version__, amapo_loss
from amapo_loss._checks import Backend
from amapo_loss.kernels import chosen_for, interpreted, unavailable_reason

BATCH_SIZES = (1, 2, 7, 64, 1000)
MARGINS: tuple[AdaptiveMargin | float, ...] = (AdaptiveMargin(), AdaptiveMargin("released"), 0.5)
TOLERANCE = 1e-4


def main() -> int:
    """Print the report. Return 0 if every backend that can run agrees with backend="torch" in float64, else 1."""
    print(f"amapo-loss {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"  torch   {torch.__version__}")
    for package in ("triton", "trl"):
        print(f"  {package:<8}{_installed_version(package)}")

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    print("devices")
    for device in devices:
        name = torch.cuda.get_device_name(device) if device != "cpu" else (platform.processor() or "CPU")
        print(f"  {device:<8}{name}")

    print("backends")
    print("  torch   can run on every device")
    with_triton = list[str]()
    if reason := unavailable_reason():
        print(f"  triton  cannot run: {reason}")
    elif interpreted():
        with_triton = ["cpu"]
        print("  triton  can run interpreted, on the CPU")
    else:
        with_triton = [device for device in devices if chosen_for(torch.device(device))]  # warns if Triton cannot start
        print(f"  triton  can run on {', '.join(with_triton) or 'none of these devices'}")

    runs: list[tuple[Backend, str]] = [("torch", device) for device in devices]
    runs += [("triton", device) for device in with_triton]
    print("self-check: largest relative error of loss and gradient in float32, against backend='torch' in float64")
    all_agree = True
    for backend, device in runs:
        error = largest_error(backend, device)
        agrees = error < TOLERANCE
        all_agree &= agrees
        print(f"  {backend:<8}{device:<8}{error:.1e}  {'agrees' if agrees else 'DISAGREES'}")
    return 0 if all_agree else 1


def largest_error(backend: Backend, device: str) -> float:
    """Return the largest relative error of the loss or the gradient over generated batches; NaN counts as infinite."""
    errors = [0.0]
    for n, margin, seed in product(BATCH_SIZES, MARGINS, range(4)):
        logps = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)) - torch.tensor([[1.0], [1.5]])
        expected = _loss_and_gradient(logps.double(), margin, "torch")
        actual = _loss_and_gradient(logps.to(device), margin, backend)
        for x, expected_x in zip(actual, expected):
            error = ((x.cpu().double() - expected_x).norm() / expected_x.norm()).item()
            errors.append(inf if isnan(error) else error)
    return max(errors)


def _loss_and_gradient(
    logps: Tensor,  # [2, n]
    margin: AdaptiveMargin | float,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    logps.requires_grad_()
    loss, _ = amapo_loss(*logps, margin=margin, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
