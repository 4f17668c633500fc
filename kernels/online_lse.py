"""A tile of logits to what its rows' log-probs are made of, and to the gradient in it, one pass over memory each.

The mathematics, its symbols and the order of its arguments are those of `amapo_loss.logps._online_lse`. A program takes a row.
Knows torch and Triton, nothing else of the package.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns that a program holds at a time

INF = tl.constexpr(float("inf"))


@triton.jit
def _logits(Z, BIAS, j, z_stride, mask, scale, softcap):
    """Finished logits; -inf beyond the tile."""
    z = tl.load(Z + j * z_stride, mask=mask, other=0.0).to(tl.float32)
    if BIAS is not None:
        z += tl.load(BIAS + j, mask=mask, other=0.0).to(tl.float32)
    z *= scale
    if softcap is not None:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return tl.where(mask, z, -INF)


@triton.jit
def _add(Z, z_outer, z_inner, z_stride, TARGETS, TARGET, OTHERS, BIAS, first, columns, scale, softcap, inner,
         BLOCK: tl.constexpr):  # fmt: skip
    """TARGET and OTHERS [n], in place, with one more tile Z [n / inner, inner, columns] seen."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(TARGETS + row)
    if y >= 0:
        Z += row // inner * z_outer + row % inner * z_inner
        y -= first
        target = tl.zeros((), tl.float32)
        most = tl.full((), -INF, tl.float32)
        total = tl.zeros((), tl.float32)
        for start in range(0, columns, BLOCK):
            j = start + tl.arange(0, BLOCK).to(tl.int64)
            z = _logits(Z, BIAS, j, z_stride, j < columns, scale, softcap)
            target += tl.sum(tl.where(j == y, z, 0.0))
            z = tl.where(j == y, -INF, z)
            more = tl.maximum(most, tl.max(z))
            around = tl.where(more == -INF, 0.0, more)  # nothing seen yet: its exponential is 0, not NaN
            total = total * tl.exp(most - around) + tl.sum(tl.exp(z - around))
            most = more
        others = tl.load(OTHERS + row)
        more = tl.maximum(others, most)
        tl.store(OTHERS + row, more + tl.log(tl.exp(others - more) + total * tl.exp(most - more)))
        if (y >= 0) & (y < columns):
            tl.store(TARGET + row, target)


@triton.jit
def _gradient(OUT, out_outer, out_inner, Z, z_outer, z_inner, z_stride, TARGETS, OTHERS, BIAS, first, columns,
              scale, softcap, OF_OTHERS, OF_TARGET, inner, SHARES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """OUT [n / inner, inner, columns]; it may be Z's memory, seen as elements of the same size or smaller."""
    row = tl.program_id(0).to(tl.int64)
    Z += row // inner * z_outer + row % inner * z_inner
    OUT += row // inner * out_outer + row % inner * out_inner
    y = tl.load(TARGETS + row)
    others = tl.load(OTHERS + row)
    of_others = tl.load(OF_OTHERS + row)
    of_target = tl.load(OF_TARGET + row)
    counts = y >= 0
    seen = tl.where(counts, columns, 0)  # of a row that does not count, nothing is read
    y -= first
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = j < columns
        if SHARES:
            share = tl.load(Z + j * z_stride, mask=j < seen, other=0.0).to(tl.float32)
        else:
            z = _logits(Z, BIAS, j, z_stride, j < seen, scale, softcap)
            share = tl.exp(z - others)
            if softcap is not None:
                share *= 1 - (z / softcap) * (z / softcap)
        out = tl.where(counts, tl.where(j == y, of_target, -of_others * share), 0.0)
        tl.debug_barrier()  # a store, of elements half as wide, may be where another thread loads
        tl.store(OUT + j, out.to(OUT.dtype.element_ty), mask=mask)


def add(
    targets: Tensor, target: Tensor, others: Tensor, z: Tensor, first: int,
    bias: Tensor | None, scale: float, softcap: float | None,
) -> None:  # fmt: skip
    """Of a tile [n, v], or [n / m, m, v], to rows [n]; any strides."""
    columns, inner, strides = _layout(z)
    if targets.numel():
        with torch.cuda.device_of(z):
            _add[(len(targets),)](
                z, *strides, targets, target, others, bias, first, columns, scale, softcap, inner,
                BLOCK=_block(columns), num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip


def gradient(
    out: Tensor, z: Tensor, targets: Tensor, target: Tensor, others: Tensor, first: int,
    bias: Tensor | None, scale: float, softcap: float | None, of_others: Tensor, of_target: Tensor, shares: bool,
) -> None:  # fmt: skip
    """In a tile of these shapes; the columns of `out` are adjacent."""
    columns, inner, strides = _layout(z)
    if targets.numel():
        with torch.cuda.device_of(z):
            _gradient[(len(targets),)](
                out, *_layout(out)[2][:2], z, *strides, targets, others, bias, first, columns, scale, softcap,
                of_others, of_target, inner, SHARES=shares, BLOCK=_block(columns), num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip


def _layout(z: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Columns, m, and the strides of [n / m, m, v]; a tile [n, v] has m = 1."""
    z = z if z.ndim == 3 else z.unsqueeze(1)
    return z.shape[2], z.shape[1], z.stride()


def _block(columns: int) -> int:
    return min(BLOCK, max(128, int(triton.next_power_of_2(columns))))
