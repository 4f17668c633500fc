"""The wheel that users install, built and imported in a virtual environment of its own."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import amapo_loss

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment, cwd="/")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files under version control, as a release is: from a copy, so that nothing stale gets in."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("amapo_loss", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source)
    (built,) = dist.glob("*.whl")
    return built


def test_holds_one_package_and_its_types_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"amapo_loss-{amapo_loss.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"amapo_loss", info}
    assert {"amapo_loss/py.typed", "amapo_loss/kernels/__init__.py", f"{info}/licenses/LICENSE"} <= set(names)
    assert f"{info}/top_level.txt" in names
    assert zipfile.ZipFile(wheel).read(f"{info}/top_level.txt").decode().split() == ["amapo_loss"]


def test_torch_is_the_only_hard_dependency(wheel: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(f"amapo_loss-{amapo_loss.__version__}.dist-info/METADATA").decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [line.split()[1].partition(">")[0].partition("<")[0] for line in required] == ["torch"]
    extras = {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")}
    assert extras == {"test", "bench", "trl", "dev"}


def test_installs_and_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    # Torch alone is borrowed: a path, unlike an environment, brings no editable installation with it.
    borrowed = str(Path(torch.__file__).parent.parent)
    code = "import amapo_loss, amapo_loss.kernels; print(amapo_loss.__file__, amapo_loss.kernels.__file__)"
    for file in run(python, "-c", code, PYTHONPATH=borrowed).split():
        assert Path(file).is_relative_to(tmp_path)
    assert "agrees" in run(python, "-m", "amapo_loss", PYTHONPATH=borrowed)


def test_importing_takes_nothing_but_torch() -> None:
    """With every other package it could want made unimportable."""
    unwanted = ("triton", "trl", "transformers", "numpy", "hypothesis", "pytest", "matplotlib", "rich")
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")  # torch's, about NumPy
sys.modules |= dict.fromkeys({unwanted!r})
from amapo_loss import amapo_loss
import torch
amapo_loss(torch.zeros(3, requires_grad=True), torch.ones(3)).loss.backward()
"""
    run(sys.executable, "-c", code)


def test_import_is_light() -> None:
    """What `import amapo_loss` loads beside torch is its own few modules and a little of the standard library."""
    code = """
import sys, torch
before = set(sys.modules)
import amapo_loss
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    assert run(sys.executable, "-c", code).split() == ["amapo_loss"]


def test_public_names() -> None:
    assert set(amapo_loss.__all__) == {
        "AMaPOLoss", "AMaPOOutput", "AdaptiveMargin", "Diagnostics", "Estimator", "ScoreStatistics", "ScoreWindow",
        "amapo_loss", "dpo_loss", "linear_sequence_logps", "linear_token_logps", "sequence_logps", "simpo_loss",
    }  # fmt: skip
    for name in amapo_loss.__all__:
        assert (getattr(amapo_loss, name).__doc__ or "").strip(), name
