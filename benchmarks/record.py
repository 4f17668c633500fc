"""How every benchmark writes: figures beside command, versions and hardware, and files whole or not at all."""

import io
import json
import os
import platform
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def write_json(path: Path, module: str, figures: dict[str, Any]) -> None:
    """Write the figures with what they were measured with."""
    write_record(path, {"command": shlex.join(["python", "-m", module, *sys.argv[1:]]), **environment(), **figures})


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write it as it is, as one that was read and has changed."""
    text = json.dumps(record, indent=1)
    text = re.sub(
        r"\[\n[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text
    )  # a list of numbers on one line
    write_whole(path, (text + "\n").encode())


def write_picture(path: Path, figure: Figure) -> None:
    """Write it as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_whole(path, picture.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Write all of it, or raise OSError and leave what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


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
