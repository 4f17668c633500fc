"""`python -m amapo_loss`: what is installed, what can run here, and whether it computes the right thing."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import product

import torch

from amapo_loss import AdaptiveMargin, __version__, amapo_loss
from amapo_loss._checks import Backend
from amapo_loss.kernels import interpreted, unavailable_reason

SIZES = (1, 2, 7, 64, 1000)
MARGINS = (AdaptiveMargin(), AdaptiveMargin("released"))


def main() -> int:
    """Print the report; 0 if every usable backend agrees with the reference on every device, else 1."""
    print(f"amapo-loss {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"  torch   {torch.__version__}")
    for package in ("triton", "trl"):
        print(f"  {package:<8}{_version(package)}")

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    print("devices")
    for device in devices:
        print(
            f"  {device:<8}{platform.processor() or 'CPU' if device == 'cpu' else torch.cuda.get_device_name(device)}"
        )

    print("backends")
    reason = unavailable_reason()
    where = "interpreted, on the cpu" if interpreted() else "on every cuda device"
    print("  torch   can run on every device\n  triton  " + (f"cannot run: {reason}" if reason else f"can run {where}"))

    runs: list[tuple[Backend, str]] = [("torch", device) for device in devices]
    if not reason:
        runs += [("triton", device) for device in devices if (device == "cpu") == interpreted()]
    print("self-check: float32 against the float64 reference, loss and gradient, largest error relative to the batch")
    all_agree = True
    for backend, device in runs:
        error = largest_error(backend, device)
        all_agree &= (agrees := error < 1e-4)
        print(f"  {backend:<8}{device:<8}{error:.1e}  {'agrees' if agrees else 'DISAGREES'}")
    return 0 if all_agree else 1


def largest_error(backend: Backend, device: str) -> float:
    """Over generated batches, the error of loss and gradient of this backend in float32."""
    errors = [0.0]
    for n, margin, seed in product(SIZES, MARGINS, range(4)):
        logps = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)) - torch.tensor([[1.0], [1.5]])
        expected = _loss_and_gradient(logps.double(), margin, "torch")
        actual = _loss_and_gradient(logps.to(device), margin, backend)
        for got, want in zip(actual, expected):
            error = ((got.cpu().double() - want).norm() / want.norm()).item()
            errors.append(error if error == error else float("inf"))
    return max(errors)


def _loss_and_gradient(
    logps: torch.Tensor, margin: AdaptiveMargin, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor]:
    logps.requires_grad_()
    loss, _ = amapo_loss(*logps, margin=margin, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
