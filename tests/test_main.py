"""`python -m amapo_loss`."""

import subprocess
import sys

import pytest
import torch

from amapo_loss import AdaptiveMargin, __main__, __version__, reference


def test_reports_and_exits_0() -> None:
    result = subprocess.run([sys.executable, "-m", "amapo_loss"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for expected in (
        f"amapo-loss {__version__}",
        f"torch   {torch.__version__}",
        "cpu",
        "triton  cannot run:",
        "agrees",
    ):
        assert expected in result.stdout


def test_exits_1_if_a_backend_disagrees(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A backend that is wrong in float32 only, by as little as a thousandth of each margin."""
    right = reference.adaptive_margins

    def slightly_wrong(d: torch.Tensor, *arguments: torch.Tensor | float | AdaptiveMargin) -> torch.Tensor:
        return right(d, *arguments) * (1.001 if d.dtype == torch.float32 else 1)

    monkeypatch.setattr(reference, "adaptive_margins", slightly_wrong)
    assert __main__.main() == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_exits_1_on_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "adaptive_margins", lambda d, *_: d * float("nan"))
    assert __main__.main() == 1
