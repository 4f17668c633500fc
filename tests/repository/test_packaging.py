"""Check the wheel, what importing the package loads, its public names, and the layers of its modules."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch

import amapo_loss

ROOT = Path(__file__).parents[2]


def find_source_files() -> dict[str, Path]:
    """Return the file of each module of the package, with the name under which the module is imported as the key."""
    files = {}
    for folder, package in ((ROOT / "amapo_loss", "amapo_loss"), (ROOT / "kernels", "amapo_loss.kernels")):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            files[".".join((package, *parts)).removesuffix(".__init__")] = file
    return files


SOURCE_FILES = find_source_files()

# The kernels are private, although their names have no leading underscore.
PUBLIC_MODULES = [
    name
    for name in SOURCE_FILES
    if not name.startswith("amapo_loss.kernels") and not any(part.startswith("_") for part in name.split("."))
]

# The highest layers of the package, from the lowest of them to the highest. All other modules are below these layers. A
# module may import only from layers below its own. "amapo_loss" is `amapo_loss/__init__.py`, which exports the public
# names.
LAYERS = ["amapo_loss.functional", "amapo_loss.module", "amapo_loss", "amapo_loss.trl", "amapo_loss.__main__"]


def run(*command: str | Path, **environment: str) -> str:
    """Return the standard output of a command, which must succeed. It runs in a folder without the source files."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment, cwd="/")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def empty_environment(folder: Path) -> Path:
    """Create a virtual environment without any package, and return its Python interpreter."""
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


def path_of_torch() -> str:
    """Return the folder that contains torch, for PYTHONPATH.

    Python does not read .pth files in the folders of PYTHONPATH. So an editable installation of this package in the
    same folder is not found.
    """
    return str(Path(torch.__file__).parent.parent)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from it, from a copy of the source files without those of an earlier build."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")
    for name in ("amapo_loss", "kernels", "tests", *files):
        run("cp", "-r", ROOT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source)
    (built,) = dist.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    (built,) = sdist.parent.glob("*.whl")
    return built


def test_the_sdist_has_the_package_and_no_test_without_its_helpers(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    packaged = {str(file.relative_to(ROOT)) for file in SOURCE_FILES.values()}
    assert packaged | {"LICENSE", "CHANGELOG.md", "CITATION.cff", "amapo_loss/py.typed"} <= names
    assert not any(name.startswith("tests") for name in names)


def test_the_wheel_contains_one_package_with_its_types_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"amapo_loss-{amapo_loss.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"amapo_loss", info}
    assert {"amapo_loss/py.typed", "amapo_loss/kernels/__init__.py", f"{info}/licenses/LICENSE"} <= set(names)
    assert f"{info}/top_level.txt" in names
    assert zipfile.ZipFile(wheel).read(f"{info}/top_level.txt").decode().split() == ["amapo_loss"]


def test_torch_is_the_only_required_dependency(wheel: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(f"amapo_loss-{amapo_loss.__version__}.dist-info/METADATA").decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [line.split()[1].partition(">")[0].partition("<")[0] for line in required] == ["torch"]
    extras = {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")}
    assert extras == {"test", "bench", "studies", "trl", "dev"}


def test_the_wheel_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    code = "import amapo_loss, amapo_loss.kernels; print(amapo_loss.__file__, amapo_loss.kernels.__file__)"
    for file in run(python, "-c", code, PYTHONPATH=path_of_torch()).split():
        assert Path(file).is_relative_to(tmp_path)
    assert "agrees" in run(python, "-m", "amapo_loss", PYTHONPATH=path_of_torch())


def test_a_checkout_can_be_imported_although_its_kernels_are_in_another_folder(tmp_path: Path) -> None:
    """Python started in a clone imports the clone, as in `pip install .` and then `python -m amapo_loss`."""
    python, checkout = empty_environment(tmp_path / "environment"), tmp_path / "checkout"
    for name in ("amapo_loss", "kernels"):
        shutil.copytree(ROOT / name, checkout / name)
    code = "import amapo_loss.kernels; print(amapo_loss.kernels.__file__)"
    path = os.pathsep.join([str(checkout), path_of_torch()])
    assert run(python, "-c", code, PYTHONPATH=path).strip() == str(checkout / "kernels" / "__init__.py")
    assert "agrees" in run(python, "-m", "amapo_loss", PYTHONPATH=path)


def test_the_package_can_be_imported_in_a_pytorch_without_distributed() -> None:
    """Such a build has the module torch.distributed, but no collectives in it."""
    code = """
import torch.distributed as dist
for name in ("all_gather_single", "all_gather_into_tensor"):
    vars(dist).pop(name, None)
import amapo_loss
"""
    run(sys.executable, "-c", code)


def test_the_loss_needs_no_package_but_torch() -> None:
    """The loss runs although the import of every other package that it could use fails."""
    unavailable = ("triton", "trl", "transformers", "numpy", "hypothesis", "pytest", "matplotlib", "rich")
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")  # torch warns that NumPy is missing
sys.modules |= dict.fromkeys({unavailable!r})
from amapo_loss import amapo_loss
import torch
amapo_loss(torch.zeros(3, requires_grad=True), torch.ones(3)).loss.backward()
"""
    run(sys.executable, "-c", code)


def test_importing_loads_nothing_but_the_package_torch_and_the_standard_library() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import amapo_loss
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    assert run(sys.executable, "-c", code).split() == ["amapo_loss"]


def test_the_public_names_are_these_and_have_docstrings() -> None:
    assert set(amapo_loss.__all__) == {
        "AMaPOLoss",
        "AMaPOOutput",
        "AdaptiveMargin",
        "Diagnostics",
        "Estimator",
        "ScoreStatistics",
        "ScoreWindow",
        "Totals",
        "amapo_loss",
        "dpo_loss",
        "linear_sequence_logps",
        "linear_token_logps",
        "sequence_logps",
        "simpo_loss",
    }
    for name in amapo_loss.__all__:
        assert (getattr(amapo_loss, name).__doc__ or "").strip(), name


def test_the_public_modules_are_these() -> None:
    assert set(PUBLIC_MODULES) == {
        "amapo_loss",
        "amapo_loss.diagnostics",
        "amapo_loss.functional",
        "amapo_loss.logps",
        "amapo_loss.margin",
        "amapo_loss.module",
        "amapo_loss.statistics",
        "amapo_loss.totals",
        "amapo_loss.trl",
    }


@pytest.mark.filterwarnings("ignore")  # TRL and its dependencies raise many warnings about themselves
@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_a_public_module_defines_no_other_public_name(module_name: str) -> None:
    if module_name == "amapo_loss.trl":
        pytest.importorskip("trl")
    module = importlib.import_module(module_name)
    defined_here = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module_name}
    exported = module.__all__ if module_name == "amapo_loss.trl" else amapo_loss.__all__
    assert {name for name in defined_here if not name.startswith("_")} <= set(exported)


def imported_modules(module_name: str) -> set[str]:
    """Return the modules of the package that the code of a module imports, inside its functions as well."""
    file = SOURCE_FILES[module_name]
    package = module_name if file.name == "__init__.py" else module_name.rpartition(".")[0]
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                imported.add(submodule if submodule in SOURCE_FILES else source)
    return imported & SOURCE_FILES.keys()


@pytest.mark.parametrize("module_name", SOURCE_FILES)
def test_a_module_imports_only_from_lower_layers(module_name: str) -> None:
    first_higher_layer = LAYERS.index(module_name) + 1 if module_name in LAYERS else 0
    assert imported_modules(module_name).isdisjoint(LAYERS[first_higher_layer:])
