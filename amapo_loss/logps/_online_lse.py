r"""The log-softmax of rows of logits, a tile of their columns at a time. The mathematics in plain PyTorch.

Of a row with logits z and target y, everything is made of z_y and of the others' $L = \log \sum_{j \ne y} \exp z_j$:

    log p_y = log sigmoid(z_y - L)                1 - p_y = sigmoid(L - z_y)
    d log p_y / d z_j = (1 - p_y) * (1 where j = y, else -exp(z_j - L))

Where p_y is near 1, as of most tokens after training, a sum that leaves the target out keeps 1 - p_y precise; what is
left of 1 would not be. On a GPU, `kernels.online_lse` does the same in one pass over a tile. Knows tensors and the kernels.
"""

from collections.abc import Callable, Iterator
from math import inf, nan
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amapo_loss import kernels

ELEMENTS = {"cpu": 2**23, "cuda": 2**26}  # of a tile: enough for fast products, few beside what a model holds
MULTIPLE = 128  # of columns and rows, which matrix units like
ROWS = 64  # of a tile on a CPU, the logsumexp of which is taken at once: it makes a copy


class Rows(NamedTuple):
    """n rows of logits, as far as their columns have been seen."""

    targets: Tensor  # [n] int64: y, or -1 in a row that does not count
    target: Tensor  # [n] z_y
    others: Tensor  # [n] L

    @classmethod
    def of(cls, targets: Tensor, dtype: torch.dtype) -> "Rows":
        """Before the first column; a row that does not count stays like this: log-prob 0, and no gradient."""
        nothing = torch.finfo(dtype).min  # not -inf, of which two have no difference
        return cls(targets, torch.zeros_like(targets, dtype=dtype), torch.full_like(targets, nothing, dtype=dtype))

    def part(self, rows: slice | Tensor) -> "Rows":
        """Some of them; a slice stays in the same memory."""
        return Rows(*(x[rows] for x in self))


class Finish(NamedTuple):
    """From products to logits: z = cap(scale * (product + bias)), with cap(x) = softcap * tanh(x / softcap)."""

    bias: Tensor | None = None  # [v]
    scale: float = 1.0
    softcap: float | None = None

    def slope(self, z: Tensor) -> Tensor | float:
        """The derivative of cap, from its result."""
        return 1.0 if self.softcap is None else 1 - (z / self.softcap).square_()


def token_logps(target: Tensor, others: Tensor) -> Tensor:
    """[n] log p_y."""
    return F.logsigmoid(target - others).masked_fill(target == inf, nan)  # of infinite logits nothing can be said


def coefficients(upstream: Tensor | float, rows: Rows, finish: Finish) -> tuple[Tensor, Tensor]:
    """Of each row's gradient [n]: what it has, negatively, of each share of the others, and what at the target."""
    of_others = torch.sigmoid(rows.others - rows.target) * upstream * finish.scale
    return of_others, of_others * finish.slope(rows.target)


def require_within(targets: Tensor, vocabulary: int) -> None:
    """Every target is a column; else, an IndexError on a CPU, and on a GPU, for which none waits, its own assertion."""
    if targets.device.type != "cpu":
        targets.new_zeros(1).expand(vocabulary).gather(0, targets)  # asserts 0 <= y < V
    elif targets.numel():
        low, high = torch.aminmax(targets)
        if low < 0 or high >= vocabulary:
            raise IndexError(f"token ids must be in [0, {vocabulary}), got {int(low if low < 0 else high)}")


# A tile z [n, v] holds columns first, first + 1, ... of the rows. What adds it or takes its gradient may overwrite it.


def in_triton(tensor: Tensor) -> bool:
    """Whether the kernels take tiles like this one. Their tiles are of products, which they finish on their way."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and kernels.HAS_TRITON


def finished(z: Tensor, finish: Finish) -> Tensor:
    """A tile of products, in the same memory, as the functions below take it."""
    if in_triton(z):
        return z
    if finish.bias is not None:
        z += finish.bias
    if finish.scale != 1:
        z *= finish.scale
    if finish.softcap is not None:
        z.div_(finish.softcap).tanh_().mul_(finish.softcap)
    return z


def add(rows: Rows, z: Tensor, first: int, finish: Finish) -> None:
    """Let the rows see a tile."""
    if in_triton(z):
        from amapo_loss.kernels import online_lse

        online_lse.add(*rows, z, first, *finish)
        return
    inside, column = _places(rows.targets, z, first)
    at_column = z.gather(1, column).squeeze(1)
    rows.target.copy_(torch.where(inside, at_column, rows.target))
    z.scatter_(1, column, at_column.masked_fill(inside, -inf).unsqueeze(1))
    of_tile = torch.cat([some.logsumexp(1) for some in z.split(ROWS)])
    torch.logaddexp(rows.others, of_tile, out=rows.others)


def gradient(
    out: Tensor, z: Tensor, rows: Rows, first: int, finish: Finish, of_others: Tensor, of_target: Tensor,
    shares: bool = False,
) -> None:  # fmt: skip
    """Write the gradient in a tile of products to `out` [n, v], which may be the tile's own memory.

    The shares that all gradients are made of, exp(z_j - L) times the slope, are that for coefficients -1 and 0. With
    `shares`, z holds those.
    """
    if in_triton(z):
        from amapo_loss.kernels import online_lse

        online_lse.gradient(out, z, *rows, first, *finish, of_others, of_target, shares)
        return
    inside, column = _places(rows.targets, z, first)
    if shares:
        z = out.copy_(z)
    else:
        slope = finish.slope(z)
        z.sub_(rows.others.unsqueeze(1)).exp_()
        if finish.softcap is not None:
            z *= slope
    z *= -of_others.unsqueeze(1)
    z.scatter_(1, column, torch.where(inside, of_target, z.gather(1, column).squeeze(1)).unsqueeze(1))
    out.copy_(z)


def _places(targets: Tensor, z: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Whether the tile has a row's target [n], and, to be gathered and scattered, the column that then is it [n, 1]."""
    column = targets - first
    return (column >= 0) & (column < z.shape[1]), column.clamp(0, z.shape[1] - 1).unsqueeze(1)


# Under torch.compile, symbols may stand for these ints.
least: Callable[[int, int], int] = torch.sym_min
most: Callable[[int, int], int] = torch.sym_max


def size(total: int, other: int, device: torch.device) -> int:
    """Of slices of `total` that with `other` make a tile."""
    elements = ELEMENTS.get(device.type, ELEMENTS["cuda"])
    return most(least(total, most(elements // most(other, 1) // MULTIPLE, 1) * MULTIPLE), 1)


def slices(total: int, size: int) -> Iterator[slice]:
    """Of that size, the last one perhaps smaller."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
