"""Check `AMaPOTrainer` with FSDP2 and with DeepSpeed's ZeRO-2 and ZeRO-3: real accelerate, two real processes on CPUs.

`make test` runs the test with FSDP2. `make deepspeed` installs DeepSpeed, and runs the two others.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and its dependencies raise many warnings about themselves

from tests.support.sharded import CASES, RESUMED, train  # noqa: E402

ROOT = Path(__file__).parents[2]
KEYS = {"FSDP2": "fsdp_version: 2", "ZeRO-2": "zero_stage: 2", "ZeRO-3": "zero_stage: 3"}
SUMMARY = ("amapo/", "rewards/", "logps/")


def configuration(sharding: str) -> str:
    """Return the configuration for accelerate that docs/recipes.md has for a kind of sharding."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), flags=re.DOTALL)
    (block,) = (block for block in blocks if KEYS[sharding] in block)
    return str(block)


def results_of_two_processes(sharding: str, folder: Path) -> list[dict[str, Any]]:
    """Return what each process returns for all cases."""
    (folder / "accelerate.yaml").write_text(configuration(sharding))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    run = subprocess.run(
        [*launch, "--main_process_port", "0", "--module", "tests.support.sharded", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of one process for all cases."""
    return {case: train(tmp_path_factory.mktemp("one") / case, case) for case in CASES}


@pytest.mark.parametrize("sharding", KEYS)
def test_two_processes_train_evaluate_save_and_resume_like_one_process(
    sharding: str, tmp_path: Path, one_process: dict[str, dict[str, Any]]
) -> None:
    """Each process has half of every micro-batch."""
    if sharding != "FSDP2" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    ranks = results_of_two_processes(sharding, tmp_path)
    for results in ranks:
        for case in CASES:
            check_like_one_process(case, results[case], one_process[case])
        for case in RESUMED:
            check_resumed(case, results[f"{case}, resumed"], results[case])


def check_like_one_process(case: str, actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check weights, window and logs. The two runs add numbers in different orders, and differ by rounding only."""
    assert actual["share of moments"] == pytest.approx(0.5, abs=0.01), f"{case}: the optimizer is not sharded"
    assert actual["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        # Weights near 1 are 1.2e-7 apart in float32.
        allowed = 1e-7 + 2 * torch.finfo(torch.float32).eps * weight.abs()
        assert ((actual["weights"][name] - weight).abs() <= allowed).all(), (case, name)
    window, expected_window = (run["window"]["_extra_state"] for run in (actual, expected))  # the scores, and seen
    assert window[-1] == 24
    torch.testing.assert_close(window, expected_window, rtol=1e-5, atol=1e-6)
    *steps, _, evaluation = expected["logs"]
    assert len(steps) == 3
    for log, expected_log in zip(actual["logs"], steps):
        for name in ("loss", "grad_norm", *(key for key in steps[0] if key.startswith(SUMMARY))):
            assert log[name] == pytest.approx(expected_log[name], rel=1e-5, abs=1e-6), (case, name)
    for name in ("loss", *(key for key in steps[0] if key.startswith(SUMMARY))):
        key = f"eval_{name}"
        assert actual["logs"][-1][key] == pytest.approx(evaluation[key], rel=1e-5, abs=1e-6), (case, key)


def check_resumed(case: str, resumed: dict[str, Any], uninterrupted: dict[str, Any]) -> None:
    """Check that the run that was resumed ends bitwise where the run without an interruption ends."""
    for name, weight in uninterrupted["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), (case, name)
    assert torch.equal(resumed["window"]["_extra_state"], uninterrupted["window"]["_extra_state"]), case
    assert resumed["logs"][2]["loss"] == uninterrupted["logs"][2]["loss"], case
