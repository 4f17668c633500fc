"""Two kernels for a tile of logits: one adds it to an online log-sum-exp, the other writes its gradient.

Each kernel reads the tile once. The mathematics, the symbols and the order of the arguments are those of
`amapo_loss.logps._online_lse`. One program processes one row. Depends only on torch, Triton
and `amapo_loss.kernels`.

A tile is [n, v], or [n / inner, inner, v] with any strides. Row r of the latter has the index (r // inner, r % inner).
`z_outer_stride` and `z_inner_stride` are the strides over these two, and `z_column_stride` is the stride over columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from amapo_loss.kernels import next_power_of_2

MAX_BLOCK = 4096  # columns that a program holds at a time

INF = tl.constexpr(float("inf"))


@triton.jit
def _tanh(x):
    """Return tanh(x), which Triton has only in libdevice. Its interpreter does not run that."""
    exp = tl.exp(-2 * tl.abs(x))
    far = (1 - exp) / (1 + exp)
    # Near 0, the difference 1 - exp has few digits. The next term of the series is below 1e-8 times x there.
    x2 = x * x
    near = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    return tl.where(x2 < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def _load_logits(z_ptr, bias_ptr, j, z_column_stride, mask, scale, softcap):
    """Return the logits of the columns j, with the transform applied, and -inf where the mask is false."""
    z = tl.load(z_ptr + j * z_column_stride, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + j, mask=mask, other=0.0).to(tl.float32)
    z *= scale
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    return tl.where(mask, z, -INF)


@triton.jit
def _move(deviations, sums, step, exp_step):
    """Return sums of exp(z - m) (z - m) after m has changed by -step. Where exp(step) is 0, the step may be -inf."""
    return tl.where(exp_step > 0, (deviations + sums * step) * exp_step, 0.0)


@triton.jit
def _update_kernel(
    z_ptr,  # [n / inner, inner, v]
    z_outer_stride,
    z_inner_stride,
    z_column_stride,
    target_ids_ptr,  # [n]
    target_logit_ptr,  # [n], updated
    max_rest_ptr,  # [n], updated
    sum_rest_ptr,  # [n], updated
    deviation_rest_ptr,  # [n], updated, or None
    bias_ptr,  # [v], or None
    first_column,
    num_columns,
    scale,
    softcap,
    inner,
    BLOCK: tl.constexpr,
):
    """Add a tile to the state of its rows."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ids_ptr + row)
    if y >= 0:
        z_ptr += row // inner * z_outer_stride + row % inner * z_inner_stride
        target_column = y - first_column
        earlier_max = tl.load(max_rest_ptr + row)  # finite from the start, because -inf - -inf would be NaN below
        # Each of the BLOCK positions has a maximum and sums of its own, so that no thread waits inside the loop.
        maxima = tl.zeros((BLOCK,), tl.float32) + earlier_max
        sums = tl.zeros((BLOCK,), tl.float32)
        deviations = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_columns, BLOCK):
            j = start + tl.arange(0, BLOCK).to(tl.int64)
            z = _load_logits(z_ptr, bias_ptr, j, z_column_stride, j < num_columns, scale, softcap)
            z = tl.where(j == target_column, -INF, z)
            # One exponential is both the factor of the old sums, if z is a new maximum, and else the new addend.
            difference = z - maxima
            exp = tl.exp(-tl.abs(difference))
            if deviation_rest_ptr is not None:
                added = deviations + tl.where(exp > 0, exp * difference, 0.0)  # 0 * -inf would be NaN
                deviations = tl.where(z > maxima, _move(deviations, sums, -difference, exp), added)
            sums = tl.where(z > maxima, sums * exp + 1, sums + exp)
            maxima = tl.maximum(maxima, z)
        max_rest = tl.max(maxima)
        step = maxima - max_rest
        earlier_step = earlier_max - max_rest
        earlier_sum = tl.load(sum_rest_ptr + row)
        if deviation_rest_ptr is not None:
            earlier = _move(tl.load(deviation_rest_ptr + row), earlier_sum, earlier_step, tl.exp(earlier_step))
            tl.store(deviation_rest_ptr + row, earlier + tl.sum(_move(deviations, sums, step, tl.exp(step))))
        tl.store(max_rest_ptr + row, max_rest)
        tl.store(sum_rest_ptr + row, earlier_sum * tl.exp(earlier_step) + tl.sum(sums * tl.exp(step)))
        if (target_column >= 0) & (target_column < num_columns):
            target_logit = _load_logits(z_ptr, bias_ptr, target_column, z_column_stride, y >= 0, scale, softcap)
            tl.store(target_logit_ptr + row, target_logit)


@triton.jit
def _gradient_kernel(
    out_ptr,  # [n / inner, inner, v], may be the memory of z with elements of the same size or smaller
    out_outer_stride,
    out_inner_stride,
    z_ptr,  # [n / inner, inner, v]
    z_outer_stride,
    z_inner_stride,
    z_column_stride,
    target_ids_ptr,  # [n]
    max_rest_ptr,  # [n]
    bias_ptr,  # [v], or None
    first_column,
    num_columns,
    scale,
    softcap,
    a_ptr,  # [n]
    b_ptr,  # [n]
    inner,
    Z_IS_EXP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of a tile: -a exp(z_j - m) times the slope of the softcap for j != y, and b for j = y."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row // inner * z_outer_stride + row % inner * z_inner_stride
    out_ptr += row // inner * out_outer_stride + row % inner * out_inner_stride
    y = tl.load(target_ids_ptr + row)
    max_rest = tl.load(max_rest_ptr + row)
    a = tl.load(a_ptr + row)
    b = tl.load(b_ptr + row)
    is_counted = y >= 0
    num_read = tl.where(is_counted, num_columns, 0)  # a row that does not count is written but not read
    target_column = y - first_column
    for start in range(0, num_columns, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = j < num_columns
        if Z_IS_EXP:
            exp_logits = tl.load(z_ptr + j * z_column_stride, mask=j < num_read, other=0.0).to(tl.float32)
        else:
            z = _load_logits(z_ptr, bias_ptr, j, z_column_stride, j < num_read, scale, softcap)
            exp_logits = tl.exp(z - max_rest)
            if softcap is not None:
                exp_logits *= 1 - (z / softcap) * (z / softcap)
        out = tl.where(is_counted, tl.where(j == target_column, b, -a * exp_logits), 0.0)
        # `out` may be the memory of z, with smaller elements: a store hits what another thread has yet to load.
        tl.debug_barrier()
        tl.store(out_ptr + j, out.to(out_ptr.dtype.element_ty), mask=mask)


def update(
    target_ids: Tensor,  # [n]
    target_logit: Tensor,  # [n]
    max_rest: Tensor,  # [n]
    sum_rest: Tensor,  # [n]
    deviation_rest: Tensor | None,  # [n]
    z: Tensor,  # [n, v] or [n / inner, inner, v], any strides
    first_column: int,
    bias: Tensor | None,  # [v]
    scale: float,
    softcap: float | None,
) -> None:
    """Add a tile of matrix products to the state of its rows, in place."""
    num_columns, inner, z_strides = _layout(z)
    if target_ids.numel():
        with torch.cuda.device_of(z):
            _update_kernel[(len(target_ids),)](
                z,
                *z_strides,
                target_ids,
                target_logit,
                max_rest,
                sum_rest,
                deviation_rest,
                bias,
                first_column,
                num_columns,
                scale,
                softcap,
                inner,
                BLOCK=_block(num_columns),
                num_warps=8,
                enable_fp_fusion=True,
            )


def write_gradient(
    out: Tensor,  # shape of z, adjacent columns
    z: Tensor,  # [n, v] or [n / inner, inner, v], any strides
    target_ids: Tensor,  # [n]
    max_rest: Tensor,  # [n]
    first_column: int,
    bias: Tensor | None,  # [v]
    scale: float,
    softcap: float | None,
    a: Tensor,  # [n]
    b: Tensor,  # [n]
    z_is_exp: bool,
) -> None:
    """Write the gradient with respect to a tile of matrix products to `out`."""
    num_columns, inner, z_strides = _layout(z)
    _, _, (out_outer_stride, out_inner_stride, _) = _layout(out)
    if target_ids.numel():
        with torch.cuda.device_of(z):
            _gradient_kernel[(len(target_ids),)](
                out,
                out_outer_stride,
                out_inner_stride,
                z,
                *z_strides,
                target_ids,
                max_rest,
                bias,
                first_column,
                num_columns,
                scale,
                softcap,
                a,
                b,
                inner,
                Z_IS_EXP=z_is_exp,
                BLOCK=_block(num_columns),
                num_warps=8,
                enable_fp_fusion=True,
            )


def _layout(z: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Return (v, inner, strides) of a tile as [n / inner, inner, v]; a tile [n, v] has inner = 1."""
    z = z if z.ndim == 3 else z.unsqueeze(1)
    return z.shape[2], z.shape[1], z.stride()


def _block(num_columns: int) -> int:
    block: int = min(MAX_BLOCK, max(128, next_power_of_2(num_columns)))
    return block
