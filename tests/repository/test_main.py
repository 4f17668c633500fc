"""`python -m amapo_loss`."""

import os
import subprocess
import sys

import pytest
import torch

from amapo_loss import AdaptiveMargin, __main__, __version__, _reference


@pytest.mark.parametrize(
    ("environment", "triton"),
    [
        pytest.param(
            {}, "can run on every cuda device" if torch.cuda.is_available() else "cannot run: PyTorch sees no"
        ),
        pytest.param({"TRITON_INTERPRET": "1"}, "can run interpreted, on the cpu"),
    ],
)
def test_reports_and_exits_0(environment: dict[str, str], triton: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "amapo_loss"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    for expected in (f"amapo-loss {__version__}", f"torch   {torch.__version__}", "cpu", f"triton  {triton}"):
        assert expected in result.stdout
    checked = [line.split()[0] for line in result.stdout.splitlines() if line.endswith("agrees")]
    assert set(checked) == ({"torch"} if "cannot" in triton else {"torch", "triton"})


def test_exits_1_if_a_backend_disagrees(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A backend that is wrong in float32 only, by as little as a thousandth of each margin."""
    right = _reference.adaptive_margins

    def slightly_wrong(d: torch.Tensor, *arguments: torch.Tensor | float | AdaptiveMargin) -> torch.Tensor:
        return right(d, *arguments) * (1.001 if d.dtype == torch.float32 else 1)

    monkeypatch.setattr(_reference, "adaptive_margins", slightly_wrong)
    assert __main__.main() == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_exits_1_on_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reference, "adaptive_margins", lambda d, *_: d * float("nan"))
    assert __main__.main() == 1
