"""Calls of `python -m benchmarks.studies` in a process of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.studies", *map(str, arguments)]


def run_command(*arguments: object, preexec_fn: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_line(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=preexec_fn
    )
