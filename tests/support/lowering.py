"""Compile the kernels, as `amapo_loss` launches them, for a GPU that is not there.

    python -m tests.support.lowering 90

Real specialization and real options, on tensors without memory; only the launch itself is left out. What the
interpreter runs but the compiler refuses shows here. Prints one line a kernel; TRITON_INTERPRET must not be set.
"""

import re
import sys
from itertools import product
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from amapo_loss.kernels import online_lse, pair_loss

run = JITFunction.run
# Multiplications and additions that the assembler may still fuse; those that it may not are marked .rn.
FUSIBLE = re.compile(r"\b(?:mul|add|sub)(?:\.ftz)?\.f(?:32|64)\b")


class Driver:
    """Of a GPU of the architecture that the command line names."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
    kernel = run(self, *arguments, warmup=True, **options)
    fusible = len(FUSIBLE.findall(kernel.asm["ptx"]))
    print(self.fn.__name__, len(kernel.asm["cubin"]), "bytes,", kernel.metadata.num_warps, "warps,", fusible, "fusible")


def lower_tiles() -> None:
    half, single, whole = torch.bfloat16, torch.float32, torch.int64
    rows = [torch.empty(64, dtype=dtype, device="meta") for dtype in (whole, single, single)]
    coefficients = [torch.empty(64, device="meta") for _ in range(2)]
    bias = torch.empty(5000, dtype=half, device="meta")
    products = torch.empty(64, 8192, device="meta")[:, :5000]
    for finish in ((None, 1.0, None), (bias, 0.5, 30.0)):
        online_lse.update(*rows, products, 4096, *finish)
        online_lse.write_gradient(products.view(half)[:, :5000], products, *rows, 4096, *finish, *coefficients, False)
        online_lse.write_gradient(products, products.to(half), *rows, 4096, *finish, *coefficients, True)
    for dtype in (half, torch.float16, single):
        logits = torch.empty(4, 20, 5001, dtype=dtype, device="meta")[:, 2:18]
        online_lse.update(*rows, logits, 0, None, 1.0, None)
        online_lse.write_gradient(torch.empty_like(logits), logits, *rows, 0, None, 1.0, None, *coefficients, False)


def main() -> None:
    driver.set_active(Driver())
    JITFunction.run = compile_only
    lower_tiles()
    half, single, whole = torch.bfloat16, torch.float32, torch.int64
    for n, everything in product((1, 100, 8192, 1 << 24), (False, True)):
        logps = [torch.empty(n, dtype=half if everything else single, device="meta") for _ in range(2)]
        others: list[torch.Tensor | None] = [None] * 8
        if everything:  # references, lengths, statistics, moments of three ranks, beta on the device
            others = [*logps, *(torch.empty(n, dtype=whole, device="meta") for _ in range(2)),
                      *(torch.empty(shape, device="meta") for shape in ((), (), (3, 3), ()))]  # fmt: skip
        switches = (not everything,) * 4
        reduction, with_gradient = ("none", True) if everything else ("mean", n > 1)
        pair_loss._launch(*logps, *others, 2.0, 0.1, *switches, reduction, with_gradient)


if __name__ == "__main__":
    main()
