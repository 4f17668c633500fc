"""Check that the files around the code agree with it: citation, pre-commit, workflows, CONTRIBUTING.md, Makefile.

Depends on PyYAML, and for the citation on TRL. Without them, the tests that need them are skipped.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import amapo_loss
from tests.frameworks.test_frameworks import FRAMEWORKS

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_yaml(path: str | Path) -> Any:
    return pytest.importorskip("yaml").safe_load((ROOT / path).read_text())


def pinned_versions() -> dict[str, str]:
    """Return the version of each package in constraints.txt."""
    pins = re.findall(r"^([\w-]+)==([^\s#]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    return dict(pins)


def all_steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def python_versions(workflow: dict[str, Any]) -> set[str]:
    """Return the Python versions that the jobs of a workflow set up."""
    versions = set()
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            version = step.get("with", {}).get("python-version", "")
            if version == "${{ matrix.python-version }}":
                matrix = job["strategy"]["matrix"]
                versions |= {case["python-version"] for case in matrix.get("include", [])}
                versions |= set(matrix.get("python-version", []))
            elif version:
                versions.add(version)
    return versions


def make_targets() -> set[str]:
    """Return the targets that the Makefile declares as phony, with its list of studies filled in."""
    makefile = (ROOT / "Makefile").read_text()
    (declared,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    (studies,) = re.findall(r"^STUDIES := (.*)$", makefile, flags=re.MULTILINE)
    return set(declared.replace("$(STUDIES)", studies).split())


def named_targets(text: str) -> set[str]:
    """Return the targets of the `make` commands in inline code and at the start of lines of a code block."""
    return set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, flags=re.MULTILINE))


def named_paths(text: str) -> Iterator[str]:
    """Yield the paths in inline code and the targets of relative links, with braces expanded as a shell does."""
    names = re.findall(r"`([\w./{},-]+)`", text) + re.findall(r"\]\(([^)#:]+)\)", text)
    for name in names:
        if "/" in name or name == "Makefile" or name.endswith((".md", ".py", ".txt", ".toml", ".cff", ".yml")):
            parts = re.split(r"\{([^}]*)\}", name)  # every second part is the inside of braces
            choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
            yield from map("".join, product(*choices))


def test_citation_has_the_required_keys_and_the_version_of_the_package() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == amapo_loss.__version__
    assert {"message", "title", "authors"} <= citation.keys()
    assert {"type", "title", "authors"} <= citation["preferred-citation"].keys()
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()


def test_citation_names_the_paper_that_the_trainer_cites() -> None:
    pytest.importorskip("trl")
    from amapo_loss.trl import AMaPOTrainer

    paper, preferred = AMaPOTrainer._paper, read_yaml("CITATION.cff")["preferred-citation"]
    assert preferred["title"] == paper["title"]
    assert [identifier["value"] for identifier in preferred["identifiers"]] == [f"arXiv:{paper['id']}"]
    assert preferred["url"].endswith(paper["id"])
    names = " and ".join(f"{author['given-names']} {author['family-names']}" for author in preferred["authors"])
    assert f"author    = {{{names}}}" in paper["citation"]
    assert f"year      = {preferred['year']}" in paper["citation"]


def test_pre_commit_uses_the_pinned_ruff() -> None:
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"].endswith("/ruff-pre-commit")
    assert repository["rev"] == f"v{pinned_versions()['ruff']}"
    assert {hook["id"] for hook in repository["hooks"]} == {"ruff-check", "ruff-format"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_complete_and_pins_its_actions(path: Path) -> None:
    workflow = read_yaml(path)
    assert workflow[True], "YAML reads the key `on` as true"
    assert all("run" in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in all_steps(workflow))
    targets = {target for step in all_steps(workflow) for target in named_targets(step.get("run", ""))}
    assert targets <= make_targets()


def test_ci_runs_the_script_of_the_repository() -> None:
    assert [path.stem for path in WORKFLOWS] == ["ci", "newest"]
    assert {"run": ".ci/run"} in all_steps(read_yaml(".github/workflows/ci.yml"))


def test_ci_runs_exactly_the_supported_python_versions() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    (supported,) = re.findall(r'^requires-python = "(.*)"', pyproject, flags=re.MULTILINE)
    versions = python_versions(read_yaml(".github/workflows/ci.yml"))
    assert versions == set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject))
    assert all(version in SpecifierSet(supported) for version in versions)


def test_ci_runs_the_oldest_supported_versions_and_those_of_the_makefile() -> None:
    pyproject, makefile = (ROOT / "pyproject.toml").read_text(), (ROOT / "Makefile").read_text()
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    tested = {
        "torch": [case["torch"] for case in jobs["torch"]["strategy"]["matrix"]["include"]],
        "trl": jobs["trl"]["strategy"]["matrix"]["version"],
        "frameworks": jobs["frameworks"]["strategy"]["matrix"]["name"],
    }
    for job, variable in {"torch": "TORCH", "trl": "VERSIONS", "frameworks": "FRAMEWORKS"}.items():
        assert re.findall(rf"^{variable} \?= (.*)", makefile, flags=re.MULTILINE) == [" ".join(tested[job])]
    assert tested["frameworks"] == list(FRAMEWORKS)
    tested["triton"] = [
        case["triton"].removeprefix("triton==") for case in jobs["torch"]["strategy"]["matrix"]["include"]
    ]
    for package in ("torch", "triton", "trl"):
        (oldest,) = {*re.findall(rf'"{package}>=([\d.]+)', pyproject)}
        assert Version(tested[package][0]) == Version(oldest)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_make_targets_in_the_documentation_exist(guide: Path) -> None:
    assert named_targets(guide.read_text()) <= make_targets()


def test_contributing_names_make_targets_and_only_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(named_paths(text))
    assert {"test", "lint", "help"} <= named_targets(text)
    assert {"tests/loss/", "tests/logps/", "amapo_loss/_options.py", "constraints.txt"} <= paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [target for target in sorted(make_targets()) if not re.search(rf"\b{target}\b", listed)] == []
