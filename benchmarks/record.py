"""Write the results of benchmarks to files, together with the command, versions and hardware behind them.

Depends on torch and matplotlib.
"""

import datetime
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

# Where benchmarks write by default. Another machine has other numbers, so a run must not change the committed ones. The
# tables of the documentation are made from these. To replace them, set the variable to benchmarks/results.
RESULTS = Path(os.environ.get("RESULTS", "build/results"))


def write_json(path: Path, module: str, results: dict[str, Any]) -> None:
    """Write results as JSON, after the command that runs `module`, the versions and the hardware."""
    write_record(path, {"command": shlex.join(["python", "-m", module, *sys.argv[1:]]), **environment(), **results})


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON and add nothing to it. Each list of numbers takes one line."""
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[\n[^][{}]*\]", lambda match: " ".join(match[0].split()), text)
    write_whole(path, (text + "\n").encode())


def write_picture(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_whole(path, picture.getvalue())


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write a dictionary that contains tensors, for `torch.load`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: if the file cannot be written. A file that already exists at `path` is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


def environment() -> dict[str, Any]:
    """Return the date, the versions of Python and its packages, and the hardware."""
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # the package metadata lacks the build suffix, such as +cpu
            "triton": version_of("triton"),
        },
        "hardware": {
            "cpu": _cpu_name(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "gpu driver": _driver_version() if torch.cuda.is_available() else None,
        },
    }


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
