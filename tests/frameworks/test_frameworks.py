"""The recipes of docs/recipes.md train in the real frameworks. `make frameworks` installs these, and runs the tests."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {  # the heading of the recipe, by the name of the package
    "llamafactory": "LLaMA-Factory",
    "openrlhf": "OpenRLHF",
    "swift": "ms-swift",
    "axolotl": "axolotl",
    "torchtune": "torchtune",
}


def blocks(heading: str) -> dict[str, str]:
    """Return the code of the recipe under a heading, by the name of the language."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    (section,) = re.findall(rf"^### {heading}\n(.*?)(?=^##)", text + "\n##", flags=re.DOTALL | re.MULTILINE)
    return dict(re.findall(r"```(python|yaml)\n(.*?)```", section, flags=re.DOTALL))


@pytest.mark.parametrize("package", FRAMEWORKS)
def test_the_recipe_gives_the_expected_losses(package: str, tmp_path: Path) -> None:
    """The framework trains for four steps, with two micro-batches each. All but torchtune evaluate in between."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    for language, code in blocks(FRAMEWORKS[package]).items():
        (tmp_path / {"python": "amapo.py", "yaml": "run.yaml"}[language]).write_text(code)
    paths = [str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", f"tests.frameworks.{package}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | environment,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert len(result["losses"]) == 4
    assert result["losses"] == pytest.approx(result["expected"], rel=1e-4)
    assert result["seen"] == result["pairs"] == 32, "the window has the scores of training, and none of evaluation"


@pytest.mark.parametrize("package", FRAMEWORKS)
def test_the_recipe_is_short(package: str) -> None:
    assert all(code.count("\n") <= 30 for code in blocks(FRAMEWORKS[package]).values())
