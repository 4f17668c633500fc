"""Check the report and the exit status of `python -m amapo_loss`."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from amapo_loss import AdaptiveMargin, __main__, __version__, _reference

TRITON_WITHOUT_INTERPRETER = "can run on cuda:0" if torch.cuda.is_available() else "cannot run: PyTorch sees no"


@pytest.mark.parametrize(
    ("environment", "triton"),
    [
        pytest.param({}, TRITON_WITHOUT_INTERPRETER, id="without interpreter"),
        pytest.param({"TRITON_INTERPRET": "1"}, "can run interpreted, on the CPU", id="with interpreter"),
    ],
)
def test_the_report_lists_what_can_run_and_the_exit_status_is_0(environment: dict[str, str], triton: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "amapo_loss"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    for expected in (f"amapo-loss {__version__}", f"torch   {torch.__version__}", "cpu", f"triton  {triton}"):
        assert expected in result.stdout
    checked_backends = {line.split()[0] for line in result.stdout.splitlines() if line.endswith("agrees")}
    assert checked_backends == ({"torch"} if "cannot" in triton else {"torch", "triton"})


def test_the_exit_status_is_1_if_a_backend_disagrees(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error of a thousandth of each margin is found, even if only float32 has it."""
    adaptive_margins = _reference.adaptive_margins

    def slightly_wrong(d: Tensor, *arguments: Tensor | float | AdaptiveMargin) -> Tensor:
        return adaptive_margins(d, *arguments) * (1.001 if d.dtype == torch.float32 else 1)

    monkeypatch.setattr(_reference, "adaptive_margins", slightly_wrong)
    assert __main__.main() == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_the_exit_status_is_1_if_a_result_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reference, "adaptive_margins", lambda d, *_: d * float("nan"))
    assert __main__.main() == 1
