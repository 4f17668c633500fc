r"""The AMaPO loss of a batch as one kernel launch, with its gradient and everything that a trainer logs of it.

Up to `ONE_LAUNCH` pairs one program sees the whole batch. Beyond, a first launch takes the statistics and a second one
the loss. Read from the top: the mathematics in the order and the symbols of `amapo_loss._reference`, the kernels that
put it together, their launch, the operator that PyTorch knows, and the function that `amapo_loss` calls. Knows torch
and Triton, nothing else of the package.

A side of the pairs, CHOSEN or REJECTED, is a tuple (LOGPS, stride, REF, stride, LENGTHS, stride) of pointers [n] to any
dtype, the last two of which may be None. Everything is computed in float32, but the sums of scores in float64: neither
a mean far larger than the spread nor a large batch costs them precision. No launch lets the compiler fuse a product
into a difference: rounded once less than elsewhere, equal scores would differ from their own mean.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_LAUNCH = 8192  # pairs; beyond, the registers of one program overflow
TILE = 2048  # pairs that a program of two launches holds at a time
FIRST_PROGRAMS = 512  # at most; few enough for every program of the second launch to add up their sums
SECOND_PROGRAMS = 1024  # at most; few enough for the last of them to add up their totals

EPS = tl.constexpr(2.0**-23)  # of float32
MAX_EXPONENT = tl.constexpr(60.0)  # as in the reference
INF = tl.constexpr(float("inf"))

# The columns of totals [16] that need to be known by name; the order is that of `_block_of_pairs`.
CORRECT = tl.constexpr(3)
SUM_OF_MARGINS = tl.constexpr(7)
WEIGHT_OF_CORRECT = tl.constexpr(10)
WEIGHT_OF_MISRANKED = tl.constexpr(11)
NONFINITE = tl.constexpr(12)
LARGEST_MARGIN = tl.constexpr(13)
MEAN = tl.constexpr(14)
STD = tl.constexpr(15)

# ---------------------------------------------------------------------------------------------- the mathematics


@triton.jit
def _log_ratio(SIDE, i, mask):
    """Of one side: log pi(y), the log-ratio (log pi(y) - log ref(y)) / |y|, |y|, and the magnitude behind the ratio."""
    LOGPS, stride, REF, ref_stride, LENGTHS, length_stride = SIDE
    logps = tl.load(LOGPS + i * stride, mask=mask, other=0.0).to(tl.float32)
    ratio = logps
    magnitude = tl.abs(logps)
    if REF is not None:
        ref = tl.load(REF + i * ref_stride, mask=mask, other=0.0).to(tl.float32)
        ratio = logps - ref
        magnitude = tl.maximum(magnitude, tl.abs(ref))
    size = 1.0
    if LENGTHS is not None:
        size = tl.load(LENGTHS + i * length_stride, mask=mask, other=1).to(tl.float32)
        size = tl.where(size == 0, 1.0, size)  # an empty response counts as one token
        ratio = tl.div_rn(ratio, size)
        magnitude = tl.div_rn(magnitude, size)
    return logps, ratio, size, tl.maximum(magnitude, tl.abs(ratio))


@triton.jit
def _load_pairs(CHOSEN, REJECTED, i, mask, beta):
    """Scores r = beta * d, the magnitude of the largest reward behind each, and both sides; as many as there are i."""
    chosen_logps, chosen, chosen_size, chosen_magnitude = _log_ratio(CHOSEN, i, mask)
    rejected_logps, rejected, rejected_size, rejected_magnitude = _log_ratio(REJECTED, i, mask)
    d = chosen - rejected
    r = beta * d
    magnitude = beta * tl.maximum(tl.abs(d), tl.maximum(chosen_magnitude, rejected_magnitude))
    return r, magnitude, (chosen_logps, chosen, chosen_size), (rejected_logps, rejected, rejected_size)


@triton.jit
def _score_of_pair_0(CHOSEN, REJECTED, n, beta):
    """Around it the sums of scores are taken; 0 where there is no pair."""
    i = tl.full((), 0, tl.int64)
    return _load_pairs(CHOSEN, REJECTED, i, i < n, beta)[0]


@triton.jit
def _sums(r, p, magnitude, mask):
    """What the statistics are made of; around p, the score of pair 0, equal scores add up to exactly 0."""
    from_p = tl.where(mask, r.to(tl.float64) - p.to(tl.float64), 0.0)
    largest = tl.max(tl.where(mask, tl.abs(r), 0.0))
    return tl.sum(from_p), tl.sum(from_p * from_p), largest, tl.max(tl.where(mask, magnitude, 0.0))


@triton.jit
def _moments_of_sums(p, sum1, sum2, n):
    """The number of scores, their mean, and the sum of squares about it; in float64."""
    n = tl.cast(n, tl.float64)
    squares = sum2 - sum1 * sum1 / tl.maximum(n, 1.0)
    return n, p.to(tl.float64) + sum1 / tl.maximum(n, 1.0), tl.where(squares < 0, 0.0, squares)


@triton.jit
def _merged_moments(MOMENTS, ranks, RANKS: tl.constexpr):
    """The same of all ranks, from MOMENTS [ranks, 3]; Chan's formula, as in `amapo_loss.statistics.merged`."""
    q = tl.arange(0, RANKS)
    counts = tl.load(MOMENTS + 3 * q, mask=q < ranks, other=0.0)
    means = tl.load(MOMENTS + 3 * q + 1, mask=q < ranks, other=0.0)
    squares = tl.load(MOMENTS + 3 * q + 2, mask=q < ranks, other=0.0)
    n = tl.sum(counts)
    mu = tl.sum(counts * means) / tl.maximum(n, 1.0)
    return n, mu, tl.sum(squares + counts * (means - mu) * (means - mu))


@triton.jit
def _statistics(STATISTICS, p, sum1, sum2, n, RANKS: tl.constexpr):
    """The number of pairs, the mean mu, in float64, and the standard deviation sigma: of all ranks, or as supplied."""
    MEAN, STD, MOMENTS, ranks = STATISTICS
    if MOMENTS is None:
        count, mu, squares = _moments_of_sums(p, sum1, sum2, n)
    else:
        count, mu, squares = _merged_moments(MOMENTS, ranks, RANKS)
    sigma = tl.sqrt(squares / tl.maximum(count - 1.0, 1.0)).to(tl.float32)
    if MEAN is not None:
        mu = tl.load(MEAN).to(tl.float64)
        sigma = tl.load(STD).to(tl.float32)
    return count, mu, sigma


@triton.jit
def _adaptive_margins(r, mu, sigma, magnitude, largest, beta,
                      PAPER: tl.constexpr, NORMALIZE: tl.constexpr, EXP: tl.constexpr, CLIP: tl.constexpr):  # fmt: skip
    """The margins h; line by line `amapo_loss._reference.adaptive_margins`, which says why."""
    sigma = tl.where(sigma <= magnitude * (8 * EPS), INF, sigma)
    below = (mu - r.to(tl.float64)).to(tl.float32)
    mu = mu.to(tl.float32)
    distance = tl.abs(below)
    if PAPER:
        distance = tl.minimum(distance, tl.abs(mu))
    z = tl.where(distance <= largest * (2 * EPS), 0.0, below) / sigma
    if not NORMALIZE:
        z = (z > 0).to(tl.float32) + 0 * z

    gamma = z * mu
    h = gamma
    if EXP:
        exponent = gamma if PAPER else gamma / beta
        h = beta * tl.exp(tl.where(exponent > MAX_EXPONENT, MAX_EXPONENT, exponent))  # tl.minimum would lose a NaN
    if CLIP:
        gate = gamma if PAPER else z
        return tl.where(gate <= 0, 0.0, h)
    return h * (sigma < INF).to(tl.float32)


@triton.jit
def _pair_losses(r, h, eps):
    """The losses L, and the gradient weights w = -dL/dr."""
    shortfall = h - r
    e = tl.exp(-tl.abs(shortfall))
    u = 1 + e
    log1p = tl.where(u == 1, e, tl.log(u) * (e / (u - 1)))  # log(u) alone loses what u has rounded off
    losses = tl.where(shortfall < 0, 0.0, shortfall) + log1p - eps * shortfall
    weights = tl.where(shortfall < 0, e, 1.0) / u - eps
    return losses, weights


# --------------------------------------------------------------------------------- from pairs to what is returned


@triton.jit
def _block_of_pairs(pairs, i, mask, mu, sigma, magnitude, largest, n, beta, eps, scale, OUT,
                    PER_PAIR: tl.constexpr, PAPER: tl.constexpr, NORMALIZE: tl.constexpr, EXP: tl.constexpr,
                    CLIP: tl.constexpr):  # fmt: skip
    """Store margins, gradients and, with PER_PAIR, losses; return the totals [16] that `_finish` summarizes."""
    LOSS, GRADIENT, MARGINS, _, _, _ = OUT
    r, _, chosen_side, rejected_side = pairs
    chosen_logps, chosen, chosen_size = chosen_side
    rejected_logps, rejected, rejected_size = rejected_side
    h = _adaptive_margins(r, mu, sigma, magnitude, largest, beta, PAPER, NORMALIZE, EXP, CLIP)
    losses, weights = _pair_losses(r, h, eps)

    tl.store(MARGINS + i, h, mask=mask)
    if PER_PAIR:
        tl.store(LOSS + i, losses, mask=mask)
    if GRADIENT is not None:  # [2, n]: in the log-probs of the chosen responses, and of the rejected ones
        tl.store(GRADIENT + i, -beta * scale * weights / chosen_size, mask=mask)
        tl.store(GRADIENT + n + i, beta * scale * weights / rejected_size, mask=mask)

    # One number a column, in this order: the loss, and what the entries of the summary are made of.
    addends = (
        losses,
        beta * chosen,
        beta * rejected,
        (r > 0).to(tl.float32),
        r,
        chosen_logps,
        rejected_logps,
        h,
        (h > 0).to(tl.float32),
        (r > mu.to(tl.float32)).to(tl.float32),
        tl.where(r > 0, weights, 0.0),
        tl.where(r <= 0, weights, 0.0),
        tl.where(tl.abs(r) < INF, 0.0, 1.0),
    )
    k = tl.arange(0, 16)
    totals = tl.where(k == LARGEST_MARGIN, tl.max(tl.where(mask, h, -INF)), 0.0)
    for column in tl.static_range(LARGEST_MARGIN):
        totals = tl.where(k == column, tl.sum(tl.where(mask, addends[column], 0.0)), totals)
    return totals


@triton.jit
def _added(totals, more):
    """The totals of two sets of pairs together."""
    return tl.where(tl.arange(0, 16) == LARGEST_MARGIN, tl.maximum(totals, more), totals + more)


@triton.jit
def _finish(totals, mu, sigma, count_of_all, n, scale, OUT, PER_PAIR: tl.constexpr):
    """From the totals of the whole batch, store the loss, the summary, the statistics [2] and the number of pairs."""
    LOSS, _, _, SUMMARY, MEAN_AND_STD, COUNT = OUT
    k = tl.arange(0, 16)
    if not PER_PAIR:
        tl.store(LOSS + k, scale * totals, mask=k == 0)
    correct = tl.sum(tl.where(k == CORRECT, totals, 0.0))
    sum_of_margins = tl.sum(tl.where(k == SUM_OF_MARGINS, totals, 0.0))
    largest_margin = tl.sum(tl.where(k == LARGEST_MARGIN, totals, 0.0))
    largest_margin = tl.where(sum_of_margins != sum_of_margins, sum_of_margins, largest_margin)  # tl.max loses a NaN

    count = tl.where(k == WEIGHT_OF_CORRECT, correct, tl.cast(n, tl.float32))
    count = tl.where(k == WEIGHT_OF_MISRANKED, n - correct, count)
    count = tl.where(k >= NONFINITE, 1.0, tl.maximum(count, 1.0))
    summary = totals / count
    summary = tl.where(k == LARGEST_MARGIN, tl.where(n == 0, 0.0, largest_margin), summary)
    summary = tl.where(k == MEAN, mu.to(tl.float32), summary)
    summary = tl.where(k == STD, sigma, summary)
    tl.store(SUMMARY + k - 1, summary, mask=k > 0)
    tl.store(MEAN_AND_STD, mu)  # in float64, so that whoever supplies them to another batch gets the same margins there
    tl.store(MEAN_AND_STD + 1, sigma.to(tl.float64))
    tl.store(COUNT, count_of_all.to(tl.int64))


# ------------------------------------------------------------------------------------------------------ the kernels


@triton.jit
def _one_launch(CHOSEN, REJECTED, STATISTICS, BETA, OUT, n, beta, eps, scale,
                PER_PAIR: tl.constexpr, PAPER: tl.constexpr, NORMALIZE: tl.constexpr, EXP: tl.constexpr,
                CLIP: tl.constexpr, OVER_ALL: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Everything, by one program that holds all n <= BLOCK pairs."""
    if BETA is not None:
        beta = tl.load(BETA)
    p = _score_of_pair_0(CHOSEN, REJECTED, n, beta)
    i = tl.arange(0, BLOCK).to(tl.int64)
    mask = i < n
    pairs = _load_pairs(CHOSEN, REJECTED, i, mask, beta)
    sum1, sum2, largest, magnitude = _sums(pairs[0], p, pairs[1], mask)
    count, mu, sigma = _statistics(STATISTICS, p, sum1, sum2, n, RANKS)
    if OVER_ALL:
        scale = scale / tl.maximum(count, 1.0).to(tl.float32)
    totals = _block_of_pairs(
        pairs, i, mask, mu + 0 * sum1, sigma, magnitude, largest, n, beta, eps, scale, OUT,
        PER_PAIR, PAPER, NORMALIZE, EXP, CLIP,
    )  # fmt: skip
    _finish(totals, mu, sigma, count, n, scale, OUT, PER_PAIR)


@triton.jit
def _moments(CHOSEN, REJECTED, BETA, MOMENTS, n, beta, BLOCK: tl.constexpr):
    """MOMENTS [3] of this rank's scores, for the others; by one program."""
    if BETA is not None:
        beta = tl.load(BETA)
    p = _score_of_pair_0(CHOSEN, REJECTED, n, beta)
    sum1 = tl.zeros((), tl.float64)
    sum2 = tl.zeros((), tl.float64)
    for block in range(0, tl.cdiv(n, BLOCK)):
        i = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        pairs = _load_pairs(CHOSEN, REJECTED, i, i < n, beta)
        sums = _sums(pairs[0], p, pairs[1], i < n)
        sum1 += sums[0]
        sum2 += sums[1]
    count, mean, squares = _moments_of_sums(p, sum1, sum2, n)
    tl.store(MOMENTS, count)
    tl.store(MOMENTS + 1, mean)
    tl.store(MOMENTS + 2, squares)


@triton.jit
def _first_launch(CHOSEN, REJECTED, BETA, SUMS, FINISHED, n, beta, BLOCK: tl.constexpr):
    """SUMS [4, programs]; a program takes every programs-th block of pairs, from its own number on."""
    if BETA is not None:
        beta = tl.load(BETA)
    p = _score_of_pair_0(CHOSEN, REJECTED, n, beta)
    program, programs = tl.program_id(0), tl.num_programs(0)
    sum1 = tl.zeros((), tl.float64)
    sum2 = tl.zeros((), tl.float64)
    largest = tl.zeros((), tl.float32)
    magnitude = tl.zeros((), tl.float32)
    for block in range(program, tl.cdiv(n, BLOCK), programs):
        i = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        pairs = _load_pairs(CHOSEN, REJECTED, i, mask, beta)
        sums = _sums(pairs[0], p, pairs[1], mask)
        sum1 += sums[0]
        sum2 += sums[1]
        largest = tl.maximum(largest, sums[2])
        magnitude = tl.maximum(magnitude, sums[3])
    tl.store(SUMS + program, sum1)
    tl.store(SUMS + programs + program, sum2)
    tl.store(SUMS + 2 * programs + program, largest.to(tl.float64))
    tl.store(SUMS + 3 * programs + program, magnitude.to(tl.float64))
    if program == 0:
        tl.store(FINISHED, 0)


@triton.jit
def _second_launch(CHOSEN, REJECTED, STATISTICS, BETA, SUMS, FINISHED, TOTALS, OUT, n, beta, eps, scale, sums,
                   PER_PAIR: tl.constexpr, PAPER: tl.constexpr, NORMALIZE: tl.constexpr, EXP: tl.constexpr,
                   CLIP: tl.constexpr, OVER_ALL: tl.constexpr, RANKS: tl.constexpr, MOST_SUMS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """TOTALS [programs, 16]; a program takes blocks as in the first launch, the last to finish adds up the totals."""
    if BETA is not None:
        beta = tl.load(BETA)
    p = _score_of_pair_0(CHOSEN, REJECTED, n, beta)
    q = tl.arange(0, MOST_SUMS)
    sum1 = tl.sum(tl.load(SUMS + q, mask=q < sums, other=0.0))
    sum2 = tl.sum(tl.load(SUMS + sums + q, mask=q < sums, other=0.0))
    largest = tl.max(tl.load(SUMS + 2 * sums + q, mask=q < sums, other=0.0)).to(tl.float32)
    magnitude = tl.max(tl.load(SUMS + 3 * sums + q, mask=q < sums, other=0.0)).to(tl.float32)
    count, mu, sigma = _statistics(STATISTICS, p, sum1, sum2, n, RANKS)
    if OVER_ALL:
        scale = scale / tl.maximum(count, 1.0).to(tl.float32)

    program, programs = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, 16)
    nothing = tl.where(k == LARGEST_MARGIN, -INF, 0.0)
    totals = nothing
    for block in range(program, tl.cdiv(n, BLOCK), programs):
        i = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        more = _block_of_pairs(
            _load_pairs(CHOSEN, REJECTED, i, mask, beta), i, mask, mu + 0 * sum1, sigma, magnitude, largest, n, beta,
            eps, scale, OUT, PER_PAIR, PAPER, NORMALIZE, EXP, CLIP,
        )  # fmt: skip
        totals = _added(totals, more)
    tl.store(TOTALS + program * 16 + k, totals)

    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(FINISHED, 1, sem="acq_rel") == programs - 1:
        totals = nothing
        for row in range(0, programs, 64):
            rows = row + tl.arange(0, 64)[:, None]
            some = tl.load(TOTALS + rows * 16 + k[None, :], mask=rows < programs, cache_modifier=".cg")
            some = tl.where(rows < programs, some, nothing[None, :])
            totals = _added(totals, tl.where(k == LARGEST_MARGIN, tl.max(some, axis=0), tl.sum(some, axis=0)))
        _finish(totals, mu, sigma, count, n, scale, OUT, PER_PAIR)


# --------------------------------------------------------------------------------------------------- their launch


def _launch(
    chosen_logps: Tensor, rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None, ref_rejected_logps: Tensor | None,
    chosen_lengths: Tensor | None, rejected_lengths: Tensor | None,
    mean: Tensor | None, std: Tensor | None, moments: Tensor | None,
    beta_on_device: Tensor | None, beta: float, label_smoothing: float,
    paper: bool, normalize: bool, exponential: bool, clip: bool, reduction: str, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, gradient, margins, summary, mean and std, number of pairs; their shapes are in `_outputs`."""
    out = _outputs(chosen_logps, reduction, with_gradient)
    loss, gradient, margins, summary, mean_and_std, count = out
    n = len(margins)
    chosen = _side(chosen_logps, ref_chosen_logps, chosen_lengths)
    rejected = _side(rejected_logps, ref_rejected_logps, rejected_lengths)
    ranks = 1 if moments is None else len(moments)
    statistics = (mean, std, moments, ranks)
    over_all = reduction == "mean" and moments is not None
    scale = ranks if over_all else 1 / max(n, 1) if reduction == "mean" else 1
    numbers = (n, beta, label_smoothing, float(scale))
    options = {
        "PER_PAIR": reduction == "none", "PAPER": paper, "NORMALIZE": normalize, "EXP": exponential, "CLIP": clip,
        "OVER_ALL": over_all, "RANKS": triton.next_power_of_2(ranks), "enable_fp_fusion": False,
    }  # fmt: skip
    pointers = (loss, gradient if with_gradient else None, margins, summary, mean_and_std, count)
    with torch.cuda.device_of(chosen_logps):  # Triton launches on the current device, the tensors may be on another
        if n <= ONE_LAUNCH:
            block = max(128, triton.next_power_of_2(n))
            _one_launch[(1,)](
                chosen, rejected, statistics, beta_on_device, pointers, *numbers, **options,
                BLOCK=block, num_warps=min(max(block // 512, 1), 16),
            )  # fmt: skip
            return out
        sums, programs = (min(triton.cdiv(n, TILE), most) for most in (FIRST_PROGRAMS, SECOND_PROGRAMS))
        partial_sums = margins.new_empty((4, sums), dtype=torch.float64)
        totals = margins.new_empty((programs, 16))
        finished = margins.new_empty((), dtype=torch.int32)
        _first_launch[(sums,)](
            chosen, rejected, beta_on_device, partial_sums, finished, n, beta, BLOCK=TILE, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
        _second_launch[(programs,)](
            chosen, rejected, statistics, beta_on_device, partial_sums, finished, totals, pointers, *numbers, sums,
            **options, MOST_SUMS=FIRST_PROGRAMS, BLOCK=TILE, num_warps=8,
        )  # fmt: skip
    return out


def _launch_moments(
    chosen_logps: Tensor, rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None, ref_rejected_logps: Tensor | None,
    chosen_lengths: Tensor | None, rejected_lengths: Tensor | None,
    beta_on_device: Tensor | None, beta: float,
) -> Tensor:  # fmt: skip
    """[3] float64: what `_moments` stores."""
    chosen = _side(chosen_logps, ref_chosen_logps, chosen_lengths)
    rejected = _side(rejected_logps, ref_rejected_logps, rejected_lengths)
    out, n = torch.empty(3, dtype=torch.float64, device=chosen_logps.device), len(chosen_logps)
    with torch.cuda.device_of(chosen_logps):
        _moments[(1,)](chosen, rejected, beta_on_device, out, n, beta, BLOCK=TILE, num_warps=8, enable_fp_fusion=False)
    return out


def _outputs(
    logps: Tensor, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, empty = logps.shape[0], partial(torch.empty, dtype=torch.float32, device=logps.device)
    return (
        empty((n,) if reduction == "none" else ()),
        empty((2, n) if with_gradient else (0,)),
        empty((n,)),
        empty((15,)),
        empty((2,), dtype=torch.float64),
        empty((), dtype=torch.int64),
    )


def _side(*tensors: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """Each tensor with its stride."""
    return tuple(x for tensor in tensors for x in (tensor, 0 if tensor is None else tensor.stride(0)))


# ---------------------------------------------------------------------------------- the operator, and its gradient

_library = torch.library.Library("amapo_loss", "FRAGMENT")
_library.define("pair_loss" + torch.library.infer_schema(_launch, mutates_args=()))
_library.impl("pair_loss", _launch, "CompositeExplicitAutograd")
_library.define("moments" + torch.library.infer_schema(_launch_moments, mutates_args=()))
_library.impl("moments", _launch_moments, "CompositeExplicitAutograd")


@torch.library.register_fake("amapo_loss::pair_loss", lib=_library)
def _(chosen_logps: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(chosen_logps, *arguments[-2:])


@torch.library.register_fake("amapo_loss::moments", lib=_library)
def _(chosen_logps: Tensor, *arguments: Any) -> Tensor:
    return torch.empty(3, dtype=torch.float64, device=chosen_logps.device)


class _PairLoss(torch.autograd.Function):
    """The operator; backward only scales the gradient that it computed."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.amapo_loss.pair_loss.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[1], *inputs[:4])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
        unused = (None,) * 18
        if upstream is None:
            return unused
        gradient, *logps = ctx.saved_tensors
        chosen, rejected = _Scaled.apply(gradient, upstream, *logps).unbind()
        needed = ctx.needs_input_grad
        return (
            chosen.to(logps[0].dtype) if needed[0] else None,
            rejected.to(logps[1].dtype) if needed[1] else None,
            -chosen.to(logps[2].dtype) if needed[2] else None,
            -rejected.to(logps[3].dtype) if needed[3] else None,
            *unused[4:],
        )


class _Scaled(torch.autograd.Function):
    """The product of a saved gradient with the one from upstream; sees the log-probs, to refuse a second derivative."""

    @staticmethod
    def forward(
        gradient: Tensor, upstream: Tensor,
        chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return gradient * upstream

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError("backend='triton' has no second derivative: use backend='torch' for double backward")


# ------------------------------------------------------------------------------------- what `amapo_loss` calls


# Chosen and rejected log-probs, the reference's, the lengths; in the order in which the operators take them.
SixTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def moments(pairs: SixTensors, beta: float) -> Tensor:
    """[3] float64: the number of scores, their mean, and the sum of squares about it."""
    detached = (x if x is None else x.detach() for x in pairs)
    result: Tensor = torch.ops.amapo_loss.moments.default(*detached, *_beta(beta, pairs[0].device))
    return result


def pair_loss(
    pairs: SixTensors, statistics: tuple[Tensor | None, Tensor | None], moments: Tensor | None, beta: float,
    label_smoothing: float, paper: bool, normalize: bool, exponential: bool, clip: bool, reduction: str,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Of checked pairs [n] on one device: the loss, differentiable in the log-probs, margins [n] and summary [15].

    Then the statistics: mean and standard deviation, float64, and number of pairs; of these pairs, or, with their
    `moments` [ranks, 3], of those of all ranks. The first two may be supplied.
    """
    with_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in pairs[:4])
    run = _PairLoss.apply if with_gradient else torch.ops.amapo_loss.pair_loss.default
    loss, _, margins, summary, mean_and_std, count = run(
        *pairs, *statistics, moments, *_beta(beta, pairs[0].device), label_smoothing,
        paper, normalize, exponential, clip, reduction, with_gradient,
    )  # fmt: skip
    return loss, margins, summary, (mean_and_std[0], mean_and_std[1], count)


def _beta(beta: float, device: torch.device) -> tuple[Tensor | None, float]:
    """On the device where it is compiled: a number would be compiled in, and every other one compiled anew."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float32, device=device) * beta, 1.0
    return None, beta
