"""Compile the kernels for an NVIDIA GPU that need not be present, here one of compute capability 9.0:

    python -m tests.support.lowering 90

The launch functions run as they do in the library, on meta tensors, which have shapes and dtypes but no memory. Each
launch compiles its kernel with the specialization and the options of a real launch, and does not run it. This finds
code that Triton's interpreter accepts and its compiler rejects. The script prints one line per launch: the name of the
kernel, the size of its binary, its warps, and the number of floating-point instructions that the assembler may fuse.
TRITON_INTERPRET must not be set.
"""

import re
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from amapo_loss.kernels import online_lse, pair_loss

run = JITFunction.run
# In PTX, the assembler may fuse a multiplication and an addition unless they are marked .rn.
FUSIBLE = re.compile(r"\b(?:mul|add|sub)(?:\.ftz)?\.f(?:32|64)\b")


class Driver:
    """A Triton driver that reports the GPU of the command line as its current device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
    """Compile a kernel and print one line about it. This replaces `JITFunction.run`, which would also launch it."""
    kernel = run(self, *arguments, warmup=True, **options)
    fusible = len(FUSIBLE.findall(kernel.asm["ptx"]))
    print(self.fn.__name__, len(kernel.asm["cubin"]), "bytes,", kernel.metadata.num_warps, "warps,", fusible, "fusible")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_online_lse() -> None:
    """Launch the kernels of `online_lse` as the linear head does, and then as `sequence_logps` does."""
    state = [empty(64, dtype=torch.int64), empty(64), empty(64), empty(64)]  # the fields of OnlineLSE
    coefficients = [empty(64), empty(64)]

    # The linear head: tiles of float32 matrix products, and gradients in bfloat16.
    z = empty(64, 8192)[:, :5000]
    for transform in (  # bias, scale, softcap
        (None, 1.0, None),
        (empty(5000, dtype=torch.bfloat16), 0.5, 30.0),
    ):
        online_lse.update(*state, z, 4096, *transform)
        grad_z = z.view(torch.bfloat16)[:, :5000]  # in the memory of z
        online_lse.write_gradient(grad_z, z, *state, 4096, *transform, *coefficients, False)
        cached_tile = z.to(torch.bfloat16)
        online_lse.write_gradient(z, cached_tile, *state, 4096, *transform, *coefficients, True)

    # `sequence_logps`: logits of every dtype, with strides over sequences and positions.
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = empty(4, 20, 5001, dtype=dtype)[:, 2:18]
        online_lse.update(*state, logits, 0, None, 1.0, None)
        grad_logits = torch.empty_like(logits)
        online_lse.write_gradient(grad_logits, logits, *state, 0, None, 1.0, None, *coefficients, False)


def compile_pair_loss() -> None:
    """Launch the kernels of `pair_loss` with one and with two launches, each without and with all optional inputs.

    The third launch of each size has given margins and numbers as weights.
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
                    empty(3, 4),  # rank_moments, of three ranks
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


def main() -> None:
    """Compile all kernels. The order of the lines is that of the launches."""
    driver.set_active(Driver())
    JITFunction.run = compile_only
    compile_online_lse()
    compile_pair_loss()


if __name__ == "__main__":
    main()
