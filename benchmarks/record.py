"""What every benchmark writes beside its figures: command, versions, hardware. Knows no benchmark."""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write_json(path: Path, module: str, figures: dict[str, Any]) -> None:
    """Write the figures with what they were measured with, all at once or not at all."""
    record = {"command": shlex.join(["python", "-m", module, *sys.argv[1:]]), **environment(), **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with the kind of build, which its metadata lacks
            "triton": version_of("triton"),
        },
        "hardware": {
            "cpu": _cpu_name(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def version_of(package: str) -> str | None:
    """As installed, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
