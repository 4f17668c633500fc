"""Compile the kernels for GPUs that need not be present, and count what is in the machine code.

    python -m benchmarks.speed.sass 80 90 gfx942

The arguments are compute capabilities of NVIDIA and architectures of AMD, here A100, H100 and MI300X. The launch
functions run as they do in the library, on meta tensors, which have shapes and dtypes but no memory. Each launch
compiles its kernel with the specialization and the options of a real launch, and does not run it. This finds code
that Triton's interpreter accepts and its compiler rejects, and shows without a GPU what a change does to registers,
spills and barriers. The counts are static: a loop counts once. TRITON_INTERPRET must not be set. Depends on torch,
Triton, Rich and the kernels.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from amapo_loss.kernels import online_lse, pair_loss
from amapo_loss.logps._online_lse import OnlineLSE
from benchmarks.record import write_json

run = JITFunction.run
# In PTX, the assembler may fuse a multiplication and an addition unless they are marked .rn.
FUSIBLE = re.compile(r"\b(?:mul|add|sub)(?:\.ftz)?\.f(?:32|64)\b")
IN_SASS = {"barriers": r"BAR\.SYNC", "shuffles": r"SHFL", "instructions": r"/\*[0-9a-f]{4,}\*/"}
IN_AMDGCN = {
    "registers": r"\.vgpr_count: +(\d+)",
    "stack": r"\.private_segment_fixed_size: +(\d+)",
    "barriers": r"\ts_barrier",
    "shuffles": r"\t(?:ds_bpermute|ds_permute|ds_swizzle|v_permlane|v_\w+_dpp)",
    "instructions": r"(?m)^\t[a-z]",
}


class Kernel(NamedTuple):
    """Counts from the machine code of one launch, and from its PTX for `fusible`."""

    target: str
    name: str
    block: int  # pairs or columns that a program holds at a time
    warps: int
    registers: int  # of a thread
    stack: int  # bytes of a thread, for registers that are spilled
    barriers: int
    shuffles: int
    instructions: int
    fusible: int | None  # floating-point instructions that the assembler may fuse; not counted for AMD


class Driver:
    """A Triton driver that reports some GPU as its current device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return a number of its own for each target, because Triton keeps what it compiled for a device."""
        return hash(self.target)

    def get_current_stream(self, device: int) -> int:
        """Return a stream, which nothing is launched on."""
        return 0


def gpu_target(name: str) -> GPUTarget:
    """Return what Triton compiles for, from a compute capability without its dot or from the name of an AMD GPU."""
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name), 32)


def compile_kernels(target: GPUTarget) -> list[Kernel]:
    """Compile all kernels for one kind of GPU, in the order of their launches."""
    count = count_amd if target.backend == "hip" else count_nvidia
    kernels = []

    def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
        compiled = run(self, *arguments, warmup=True, **options)
        launch = (str(target.arch), self.fn.__name__, options["BLOCK"], compiled.metadata.num_warps)
        kernels.append(Kernel(*launch, **count(compiled.asm)))

    driver.set_active(Driver(target))
    with patch.object(JITFunction, "run", compile_only):
        compile_online_lse()
        compile_pair_loss()
    return kernels


def count_nvidia(asm: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is in the machine code of a kernel that was compiled for NVIDIA, and in its PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in (
                (knobs.nvidia.cuobjdump.path, "--dump-resource-usage"),
                (knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", "--no-vliw"),  # these two save time
            )
        )
    registers, stack = (int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    counts = {what: len(re.findall(pattern, sass)) for what, pattern in IN_SASS.items()}
    return {"registers": registers, "stack": stack, **counts, "fusible": len(FUSIBLE.findall(asm["ptx"]))}


def count_amd(asm: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is in the assembly code of a kernel that was compiled for AMD, which its machine code repeats."""
    found = {what: re.findall(pattern, asm["amdgcn"]) for what, pattern in IN_AMDGCN.items()}
    counts = {what: int(found[what][0]) if what in ("registers", "stack") else len(found[what]) for what in found}
    return {**counts, "fusible": None}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_online_lse() -> None:
    """Launch the kernels of `online_lse` as the linear head does, and then as `sequence_logps` does."""
    state = OnlineLSE(empty(64, dtype=torch.int64), empty(64), empty(64), empty(64))
    rows = (state.target_ids, state.max_rest)
    coefficients = [empty(64), empty(64)]

    # The linear head: tiles of float32 matrix products, and gradients in bfloat16.
    z = empty(64, 8192)[:, :5000]
    for transform in (  # bias, scale, softcap
        (None, 1.0, None),
        (empty(5000, dtype=torch.bfloat16), 0.5, 30.0),
    ):
        online_lse.update(*state, z, 4096, *transform)
        online_lse.update(*state._replace(deviation_rest=empty(64)), z, 4096, *transform)  # with the entropy
        grad_z = z.view(torch.bfloat16)[:, :5000]  # in the memory of z
        online_lse.write_gradient(grad_z, z, *rows, 4096, *transform, *coefficients, False)
        cached_tile = z.to(torch.bfloat16)
        online_lse.write_gradient(grad_z, cached_tile, *rows, 4096, *transform, *coefficients, True)

    # `sequence_logps`: logits of every dtype, with strides over sequences and positions.
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = empty(4, 20, 5001, dtype=dtype)[:, 2:18]
        online_lse.update(*state, logits, 0, None, 1.0, None)
        grad_logits = torch.empty_like(logits)
        online_lse.write_gradient(grad_logits, logits, *rows, 0, None, 1.0, None, *coefficients, False)


def compile_pair_loss() -> None:
    """Launch the kernels of `pair_loss` with one and with two launches, each without and with all optional inputs.

    The third call of each size has given margins and numbers as weights. The last launch is that of the moments.
    """
    for n in (1, 100, 4096, 1 << 24):
        for with_optional, given in ((False, False), (True, False), (True, True)):
            dtype = torch.bfloat16 if with_optional else torch.float32
            chosen_logps, rejected_logps = empty(n, dtype=dtype), empty(n, dtype=dtype)
            optional: list[Tensor | None] = [None] * 10
            if with_optional:
                optional = [
                    chosen_logps,  # as ref_chosen_logps
                    rejected_logps,  # as ref_rejected_logps
                    empty(n, dtype=torch.int64),  # chosen_lengths
                    empty(n, dtype=torch.int64),  # rejected_lengths
                    empty(n, dtype=torch.float32 if given else torch.bool),  # weights
                    empty(n) if given else None,  # given_margins
                    empty(),  # mean
                    empty(),  # std
                    empty(3, 6, dtype=torch.float64),  # rank_moments, of three ranks
                    empty(),  # beta_tensor
                ]
            formula = None if given else "released" if with_optional else "paper"
            normalize = exponential = clip = not with_optional
            pair_loss._launch(
                chosen_logps,
                rejected_logps,
                *optional,
                beta=2.0,
                label_smoothing=0.1,
                formula=formula,
                normalize=normalize,
                exponential=exponential,
                clip=clip,
                constant_margin=0.5,
                reduction="none" if with_optional else "mean",
                with_gradient=with_optional or n > 1,
            )
    logps = empty(1 << 24)
    pair_loss._launch_moments(logps, logps, *[None] * 6, beta=2.0)


def main() -> None:
    """Compile all kernels for each kind of GPU and print their counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = [gpu_target(name) for name in ("80", "89", "90", "100", "120", "gfx942")]
    parser.add_argument("target", type=gpu_target, nargs="*", default=targets, help="GPUs, as in 90 or gfx942")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    kernels = [kernel for target in args.target for kernel in compile_kernels(target)]
    table = Table(title="Machine code of each launch", box=SIMPLE, collapse_padding=True)
    for field in Kernel._fields:
        table.add_column(field, justify="left" if field in ("target", "name") else "right", no_wrap=True)
    for kernel in kernels:
        table.add_row(*("" if value is None else str(value) for value in kernel))
    Console(width=120).print(table)
    if args.out:
        write_json(args.out, "benchmarks.speed.sass", {"kernels": [kernel._asdict() for kernel in kernels]})


if __name__ == "__main__":
    main()
