r"""The log-softmax of rows of logits, computed tile by tile over the vocabulary, in plain PyTorch.

For a row with logits z and target y, three numbers carry everything: the target's logit z_y, and two numbers of the
rest, its maximum $m = \max_{j \ne y} z_j$ and its sum $S = \sum_{j \ne y} \exp(z_j - m)$. From them

    log-odds = log (p_y / (1 - p_y)) = (z_y - m) - log S
    log p_y = log sigmoid(log-odds)               1 - p_y = sigmoid(-log-odds)
    d log p_y / d z_j = (1 - p_y) * (1 if j = y, else -exp(z_j - m) / S)

Most tokens have p_y near 1 after training. A sum over the rest keeps the digits of 1 - p_y there, and subtracting p_y
from 1 would lose them. The maximum and the sum stay apart, because the log-sum-exp m + log S would be rounded to the
digits of m: logits near 10,000 would have log-probs with an error of 5e-4.

The entropy needs a fourth number, $D = \sum_{j \ne y} \exp(z_j - m) (z_j - m)$. With the binary entropy h(p),

    -sum_j p_j log p_j = h(p_y) + (1 - p_y) (log S - D / S)

On a GPU, `amapo_loss.kernels.online_lse` does the same in one pass over a tile. Depends only on torch and the kernels.

A tile z is [n, v]: the columns first_column, first_column + 1, ... of n rows. Callers fill it with matrix products and
pass it through `transform_unless_triton`, which turns the products into logits. Where Triton processes the tile, that
does nothing, because the kernels apply the transform themselves. The functions that take a tile may overwrite it.
"""

from collections.abc import Iterator
from math import inf, nan
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amapo_loss import kernels

# Elements in a tile: enough for fast matrix products, and little memory beside a model and its optimizer.
TILE_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
BLOCK_MULTIPLE = 128  # the length of a block is a multiple of this, which suits matrix units, unless one block is all
ROW_MULTIPLE = 8  # rows are padded to a multiple of 8 numbers: in bfloat16, 16 bytes, which matrix units load at once
CPU_LSE_ROWS = 64  # rows that are exponentiated at a time on a CPU, because that takes a copy of them
GPU_LSE_ELEMENTS = 2**24  # as many numbers at a time on a GPU without Triton, where each operation is a launch


class OnlineLSE(NamedTuple):
    """The state of n rows after some of their columns: an online log-sum-exp that leaves the target out."""

    target_ids: Tensor  # [n] int64: y, -1 in a row that does not count, or beyond the columns if another rank has y
    target_logit: Tensor  # [n] z_y, or 0 as long as the column y has not been seen
    max_rest: Tensor  # [n] m over the columns seen so far
    sum_rest: Tensor  # [n] S over the columns seen so far: 0 if they are all -inf, and in [1, V) otherwise
    deviation_rest: Tensor | None = None  # [n] D over the columns seen so far; None if no entropy is wanted

    @classmethod
    def start(cls, target_ids: Tensor, dtype: torch.dtype, with_entropy: bool = False) -> "OnlineLSE":
        """Return the state before the first column. It gives log-prob 0 and gradient 0.

        Rows with the target -1 must stay in this state: the kernels skip them, and on a CPU the caller leaves them out.
        """
        lowest = torch.finfo(dtype).min  # not -inf, because -inf - -inf is NaN
        return cls(
            target_ids,
            torch.zeros_like(target_ids, dtype=dtype),
            torch.full_like(target_ids, lowest, dtype=dtype),
            torch.zeros_like(target_ids, dtype=dtype),
            torch.zeros_like(target_ids, dtype=dtype) if with_entropy else None,
        )

    def select(self, rows: slice | Tensor) -> "OnlineLSE":
        """Return the state of some rows. With a slice it shares memory with this one."""
        target_ids, target_logit, max_rest, sum_rest, deviation_rest = self
        deviations = None if deviation_rest is None else deviation_rest[rows]
        return OnlineLSE(target_ids[rows], target_logit[rows], max_rest[rows], sum_rest[rows], deviations)

    def numbers(self) -> list[Tensor]:
        """Return the numbers [n] of each row that change from tile to tile: three, or four with the entropy."""
        return [x for x in self[1:] if x is not None]


class LogitTransform(NamedTuple):
    """How logits follow from products: z = cap(scale * (product + bias)), cap(x) = softcap * tanh(x / softcap)."""

    bias: Tensor | None = None  # [v]
    scale: float = 1.0
    softcap: float | None = None  # None: cap(x) = x

    def slope(self, z: Tensor) -> Tensor | float:
        """Return the derivative of cap as a function of its result z."""
        return 1.0 if self.softcap is None else 1 - (z / self.softcap).square_()

    def columns(self, block: slice) -> "LogitTransform":
        """Return the transform of a block of columns."""
        return self if self.bias is None else self._replace(bias=self.bias[block])


def token_logps(
    target_logit: Tensor,  # [n]
    max_rest: Tensor,  # [n]
    sum_rest: Tensor,  # [n]
) -> Tensor:
    """Return log p_y [n]."""
    return F.logsigmoid(_log_odds(target_logit, max_rest, sum_rest))


def entropies(state: OnlineLSE) -> Tensor:
    """Return the entropy of each row's distribution [n] in nats; [0] if none is wanted."""
    _, target_logit, max_rest, sum_rest, deviation_rest = state
    if deviation_rest is None:
        return sum_rest.new_empty(0)
    # Beyond 700, the smaller probability is below 1e-300. Clamping keeps 0 * log 0 from being NaN.
    log_odds = _log_odds(target_logit, max_rest, sum_rest).clamp(-700, 700)
    sum_rest = sum_rest.clamp(min=1)  # 0 if the rest is impossible, and at least 1 otherwise
    entropy_of_rest = sum_rest.log() - deviation_rest / sum_rest
    p, rest = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    return rest * (entropy_of_rest - F.logsigmoid(-log_odds)) - p * F.logsigmoid(log_odds)


def gradient_factor(state: OnlineLSE, transform: LogitTransform) -> Tensor:
    """Return the factor [n] that all entries of a row's gradient have in common: (1 - p_y) * scale."""
    return torch.sigmoid(-_log_odds(*state[1:4])) * transform.scale


def gradient_coefficients(
    factor: Tensor,  # [n] `gradient_factor` times the gradient with respect to log p_y, or another common factor
    state: OnlineLSE,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """Return the coefficients (a, b) [n] of each row's gradient with respect to the products x.

    It is dx_j = -a exp(z_j - m) slope_j for j != y, and dx_y = b, where slope_j is the derivative of the softcap.
    """
    # A sum of 0 has the factor 0, and 0 / 0 would be NaN. Every other sum is at least 1.
    return factor / state.sum_rest.clamp(min=1), factor * transform.slope(state.target_logit)


def check_target_ids(
    target_ids: Tensor,  # [n]
    vocab_size: int,
) -> None:
    """Raise IndexError for a target outside the vocabulary.

    On a GPU this is PyTorch's device-side assertion, because raising here would have to wait for the device.
    """
    if target_ids.device.type != "cpu":
        target_ids.new_zeros(1).expand(vocab_size).gather(0, target_ids)  # asserts 0 <= y < vocab_size
    elif target_ids.numel():
        low, high = torch.aminmax(target_ids)
        if low < 0 or high >= vocab_size:
            raise IndexError(f"token ids must be in [0, {vocab_size}), got {int(low if low < 0 else high)}")


def uses_triton(tensor: Tensor) -> bool:
    """Return whether Triton processes this tensor."""
    return tensor.dtype != torch.float64 and kernels.chosen_for(tensor.device)


def transform_unless_triton(
    z: Tensor,  # [n, v] matrix products
    transform: LogitTransform,
) -> Tensor:
    """Turn a tile of matrix products into logits, in place. Leave it to the kernels where Triton processes the tile."""
    if uses_triton(z):
        return z
    if transform.bias is not None:
        z += transform.bias
    if transform.scale != 1:
        z *= transform.scale
    if transform.softcap is not None:
        z.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return z


def update(
    state: OnlineLSE,
    z: Tensor,  # [n, v]
    first_column: int,
    transform: LogitTransform,
) -> None:
    """Add the columns of a tile to the state, in place."""
    if not z.numel():
        return
    if uses_triton(z):
        from amapo_loss.kernels import online_lse

        online_lse.update(*state, z, first_column, *transform)
        return
    in_tile, column = _target_columns(state.target_ids, z, first_column)
    tile_target_logit = z.gather(1, column).squeeze(1)
    state.target_logit.copy_(torch.where(in_tile, tile_target_logit, state.target_logit))
    z.scatter_(1, column, tile_target_logit.masked_fill(in_tile, -inf).unsqueeze(1))  # leave the target out of the sum
    rows = CPU_LSE_ROWS if z.device.type == "cpu" else max(GPU_LSE_ELEMENTS // z.shape[1], 1)
    for block in blocks(len(z), rows):
        _add_columns(state.select(block), z[block])


def merge(
    parts: Tensor,  # [k, 3, n] or [k, 4, n], the numbers of k states with different columns of the same rows
    state: OnlineLSE,
) -> None:
    """Write the state after the columns of all parts to `state`."""
    target_logits, maxima, sums, *deviations = parts.unbind(1)
    max_rest = maxima.amax(0)
    steps = maxima - max_rest
    if state.deviation_rest is not None:
        state.deviation_rest.copy_(_rescaled(deviations[0], sums, steps).sum(0))
    state.target_logit.copy_(target_logits.sum(0))  # 0 in all parts but the target's
    state.sum_rest.copy_((sums * steps.exp()).sum(0))
    state.max_rest.copy_(max_rest)


def write_gradient(
    out: Tensor,  # [n, v], may be the memory of z
    z: Tensor,  # [n, v]
    state: OnlineLSE,
    first_column: int,
    transform: LogitTransform,
    coefficients: tuple[Tensor, Tensor],  # (a, b) [n], see `gradient_coefficients`
    z_is_exp: bool = False,
) -> None:
    """Write the gradient with respect to a tile of matrix products, see `gradient_coefficients`.

    With the coefficients (-1, 0) the result is exp(z_j - m) slope_j, from which every gradient of the row follows by
    scaling. With `z_is_exp`, z already holds exp(z_j - m) slope_j.
    """
    if not z.numel():
        return
    if uses_triton(z):
        from amapo_loss.kernels import online_lse

        online_lse.write_gradient(
            out, z, state.target_ids, state.max_rest, first_column, *transform, *coefficients, z_is_exp
        )
        return
    a, b = coefficients
    in_tile, column = _target_columns(state.target_ids, z, first_column)
    if z_is_exp:
        z = out.copy_(z)
    else:
        slope = transform.slope(z)
        z.sub_(state.max_rest.unsqueeze(1)).exp_()
        if transform.softcap is not None:
            z *= slope
    z *= -a.unsqueeze(1)
    z.scatter_(1, column, torch.where(in_tile, b, z.gather(1, column).squeeze(1)).unsqueeze(1))
    out.copy_(z)


def _add_columns(
    state: OnlineLSE,
    z: Tensor,  # [n, v], -inf in the target's column
) -> None:
    """Add columns to the sums of a state, in place. This takes one copy of them, or three for an entropy."""
    _, _, max_rest, sum_rest, deviation_rest = state
    new_max = torch.maximum(max_rest, z.amax(1))
    difference = z - new_max.unsqueeze(1)
    step = max_rest - new_max
    if deviation_rest is not None:
        exp = difference.exp()
        difference.masked_fill_(exp == 0, 0)  # 0 * -inf would be NaN
        deviation_rest.copy_(_rescaled(deviation_rest, sum_rest, step)).add_((exp * difference).sum(1))
    else:
        exp = difference.exp_()
    sum_rest.mul_(step.exp()).add_(exp.sum(1))
    max_rest.copy_(new_max)


def _log_odds(
    target_logit: Tensor,  # [n]
    max_rest: Tensor,  # [n]
    sum_rest: Tensor,  # [n]
) -> Tensor:
    """Return the log-odds [n] of the target. A logit of infinity gives NaN, because its softmax is undefined."""
    return ((target_logit - max_rest) - sum_rest.log()).masked_fill(target_logit == inf, nan)


def _rescaled(deviation_rest: Tensor, sum_rest: Tensor, step: Tensor) -> Tensor:
    """Return D after m has changed by -step, exp(step) (D + step S). Where exp(step) is 0, the step may be -inf."""
    exp = step.exp()
    return torch.where(exp > 0, (deviation_rest + sum_rest * step) * exp, 0)


def _target_columns(
    target_ids: Tensor,  # [n]
    z: Tensor,  # [n, v]
    first_column: int,
) -> tuple[Tensor, Tensor]:
    """Return whether the tile contains each row's target [n], and the target's column, clamped into the tile [n, 1]."""
    column = target_ids - first_column
    return (column >= 0) & (column < z.shape[1]), column.clamp(0, z.shape[1] - 1).unsqueeze(1)


def block_length(total: int, other_length: int, device: torch.device) -> int:
    """Return the length of blocks of `total` rows or columns, such that block x other_length is about TILE_ELEMENTS."""
    # Under torch.compile a length may be a SymInt, on whose value `min` and `max` would specialize the graph.
    elements = TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cuda"])
    multiples = torch.sym_max(elements // torch.sym_max(other_length, 1) // BLOCK_MULTIPLE, 1)
    length: int = torch.sym_max(torch.sym_min(total, multiples * BLOCK_MULTIPLE), 1)
    return length


def empty_tile(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor whose rows are aligned in memory, on the device of `like`."""
    *outer, length = shape
    aligned = -(-length // ROW_MULTIPLE) * ROW_MULTIPLE
    return like.new_empty((*outer, aligned), dtype=dtype)[..., :length]


def blocks(total: int, length: int) -> Iterator[slice]:
    """Yield the slices of `total` of that length; the last one may be shorter."""
    return (slice(start, min(start + length, total)) for start in range(0, total, length))
