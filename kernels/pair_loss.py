r"""The AMaPO loss of a batch in one or two kernel launches, with its gradient and the totals of its summary.

Up to `MAX_PAIRS_ONE_LAUNCH` pairs, one program holds the whole batch. For larger batches, a first launch writes partial
sums of the scores, and a second one computes the statistics and the loss. This file has, from top to bottom, bundles of
kernel arguments, the mathematics in the order and with the symbols of `amapo_loss._reference`, the kernels, their
launch, the operators that PyTorch sees, and the functions that `amapo_loss.functional` calls. Depends on torch, Triton,
`amapo_loss.kernels` and the types of `amapo_loss`.

Everything is computed in float32, except the sums of scores. They are float64, so that a mean far larger than the
standard deviation and a large batch do not cost precision. Every launch passes `enable_fp_fusion=False`. A fused
multiply-add rounds once where separate operations round twice, so that equal scores could differ from their own mean.
"""

import inspect
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from amapo_loss._autograd import once_differentiable, view_if_compiling
from amapo_loss._options import LossOptions
from amapo_loss._pairs import Pairs
from amapo_loss.kernels import next_power_of_2
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import ScoreStatistics

# From measurements on an H200. The first of two launches has few programs, because each program of the second adds up
# the sums of all of them. The second has two programs for each multiprocessor; its last program adds up their totals.
MAX_PAIRS_ONE_LAUNCH = 4096
PAIRS_PER_WARP = 128  # with one launch, up to 16 warps
BLOCK_PAIRS = 1024  # pairs that a program holds at a time in all other launches
MAX_STATISTICS_PROGRAMS = 512  # a power of 2
MAX_LOSS_PROGRAMS = 264  # at most MAX_STATISTICS_PROGRAMS, the number of totals that the last program can read

MACHINE_EPS = tl.constexpr(2.0**-23)  # machine epsilon of float32
MAX_EXPONENT = tl.constexpr(60.0)  # as in the reference
INF = tl.constexpr(float("inf"))

# Indices into the totals [16] of a program. `_process_block` lists all of them; these are used by name.
MARGIN_SUM = tl.constexpr(10)
MAX_MARGIN = tl.constexpr(14)


# Bundles of kernel arguments. In a kernel, a tensor is a pointer to its first element.


class Responses(NamedTuple):
    """The chosen or the rejected responses of a batch."""

    logps: Tensor  # [n]
    logps_stride: int
    ref: Tensor | None  # [n] log-probs under the reference model
    ref_stride: int
    lengths: Tensor | None  # [n]
    lengths_stride: int


class Batch(NamedTuple):
    """The pairs, as many tensors as they have. The stride of a tensor that is None is 0."""

    chosen: Responses
    rejected: Responses
    weights: Tensor | None  # [n] bool or numbers
    weights_stride: int


class Statistics(NamedTuple):
    """The sources of the mean and the standard deviation. If all are None, the kernel computes both from the pairs."""

    mean: Tensor | None  # 0-dim, supplied
    std: Tensor | None  # 0-dim, supplied
    rank_moments: Tensor | None  # [ranks, 6] count, mean, M2, sum of the weights, max |score|, max input scale
    num_ranks: int


class Margins(NamedTuple):
    """The parts of the margins that are not computed from the scores."""

    given: Tensor | None  # [n]
    given_stride: int
    constant: float  # of the pairs whose gate is closed; without an adaptive or given margin, of all pairs


class Outputs(NamedTuple):
    """What the kernels write."""

    loss: Tensor  # 0-dim, or [n] with reduction="none"
    gradient: Tensor | None  # [2, n] with respect to the chosen and to the rejected log-probs; None if not wanted
    margins: Tensor  # [n]
    total_values: Tensor  # [19] float64, the values of `amapo_loss.Totals`
    mean_and_std: Tensor  # [2] float64
    num_pairs: Tensor  # 0-dim int64


# The mathematics.


@triton.jit
def _load_weights(batch, i, in_range):
    """Return the weights of the pairs i, and which of them are in range and not left out. All others have weight 0."""
    counted = in_range
    weights = in_range.to(tl.float32)
    if batch.weights is not None:
        given = tl.load(batch.weights + i * batch.weights_stride, mask=counted, other=0)
        counted = counted & (given != 0)
        weights = given.to(tl.float32)
        weights = tl.where(weights < 0, float("nan"), weights)  # as in `Pairs.prepared`
    if batch.chosen.lengths is not None:
        chosen_lengths = batch.chosen.lengths + i * batch.chosen.lengths_stride
        counted = tl.load(chosen_lengths, mask=counted, other=0) != 0
        rejected_lengths = batch.rejected.lengths + i * batch.rejected.lengths_stride
        counted = tl.load(rejected_lengths, mask=counted, other=0) != 0
    return tl.where(counted, weights, 0.0), counted


@triton.jit
def _load_responses(responses, i, mask):
    """Return four values for each response: (log-prob, log-ratio, length, input scale).

    The log-ratio is (log pi(y) - log ref(y)) / |y|, and the input scale the largest absolute value it is computed from.
    """
    logps = tl.load(responses.logps + i * responses.logps_stride, mask=mask, other=0.0).to(tl.float32)
    ratio = logps
    input_scale = tl.abs(logps)
    if responses.ref is not None:
        ref = tl.load(responses.ref + i * responses.ref_stride, mask=mask, other=0.0).to(tl.float32)
        ratio = logps - ref
        input_scale = tl.maximum(input_scale, tl.abs(ref))
    length = 1.0
    if responses.lengths is not None:
        length = tl.load(responses.lengths + i * responses.lengths_stride, mask=mask, other=1).to(tl.float32)
        ratio = tl.div_rn(ratio, length)
        input_scale = tl.div_rn(input_scale, length)
    return logps, ratio, length, tl.maximum(input_scale, tl.abs(ratio))


@triton.jit
def _load_pairs(batch, i, mask, beta):
    """Return the scores r = beta * d of the pairs i, their input scales, and (log-prob, log-ratio, length) twice.

    These three are the terms of the chosen responses, then those of the rejected responses. Where the mask is false,
    nothing is read, and the score is 0.
    """
    chosen_logps, chosen_ratio, chosen_length, chosen_scale = _load_responses(batch.chosen, i, mask)
    rejected_logps, rejected_ratio, rejected_length, rejected_scale = _load_responses(batch.rejected, i, mask)
    d = chosen_ratio - rejected_ratio
    r = beta * d
    input_scale = beta * tl.maximum(tl.abs(d), tl.maximum(chosen_scale, rejected_scale))
    chosen_terms = (chosen_logps, chosen_ratio, chosen_length)
    return r, input_scale, chosen_terms, (rejected_logps, rejected_ratio, rejected_length)


@triton.jit
def _pivot_score(batch, n, beta):
    """Return the score of pair 0, which is subtracted from every score before summing; 0 if it is left out."""
    i = tl.full((), 0, tl.int64)
    return _load_pairs(batch, i, _load_weights(batch, i, i < n)[1], beta)[0]


# These stack n columns [BLOCK] into one tensor [BLOCK, 2, ..., 2] with zeros in the rows that the mask excludes.
# Reshaped to [BLOCK, n], it has the columns in the order of the tuple. A reduction of many columns at once waits at as
# few barriers as a reduction of one. There is a function for each n, because Triton 3.4 cannot compile a recursive one.


@triton.jit
def _stack_2(columns, mask):
    return tl.join(tl.where(mask, columns[0], 0.0), tl.where(mask, columns[1], 0.0))


@triton.jit
def _stack_4(columns, mask):
    return tl.join(_stack_2(columns[0::2], mask), _stack_2(columns[1::2], mask))


@triton.jit
def _stack_8(columns, mask):
    return tl.join(_stack_4(columns[0::2], mask), _stack_4(columns[1::2], mask))


@triton.jit
def _stack_16(columns, mask):
    return tl.join(_stack_8(columns[0::2], mask), _stack_8(columns[1::2], mask))


@triton.jit
def _score_columns(pairs, pivot, weights, mask, MASKED: tl.constexpr):
    """Return two stacks: the columns to sum, and those of which `_reduce_scores` takes the maximum."""
    r, input_scale = pairs[0], pairs[1]
    from_pivot = r.to(tl.float64) - pivot.to(tl.float64)
    if MASKED:
        columns = (from_pivot, from_pivot * from_pivot, mask.to(tl.float64), weights.to(tl.float64))
        addends = _stack_4(columns, mask)
    else:
        addends = _stack_2((from_pivot, from_pivot * from_pivot), mask)
    return addends, _stack_2((tl.abs(r), input_scale), mask)


@triton.jit
def _reduce_scores(addends, maxima, n, MASKED: tl.constexpr):
    """Return the sum and the sum of squares of r - pivot, the count, the sum of the weights, max |r|, max input scale.

    If all scores are equal and pair 0 is not left out, the first two are exactly 0. Without MASKED, the count and the
    sum of the weights are n.
    """
    max_score, max_scale = tl.split(tl.max(maxima, axis=0))
    sums = tl.sum(addends, axis=0)
    count = tl.cast(n, tl.float64)
    weight = count
    if MASKED:
        sum1_and_count, sum2_and_weight = tl.split(sums)
        sum1, count = tl.split(sum1_and_count)
        sum2, weight = tl.split(sum2_and_weight)
    else:
        sum1, sum2 = tl.split(sums)
    return sum1, sum2, count, weight, max_score, max_scale


@triton.jit
def _sum_scores(batch, pivot, n, beta, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Return `_reduce_scores` of a program's pairs.

    This is a grid-stride loop: program p of P takes the blocks of pairs p, p + P, p + 2P, ...
    """
    if MASKED:
        addends = tl.zeros((BLOCK, 2, 2), tl.float64)
    else:
        addends = tl.zeros((BLOCK, 2), tl.float64)
    maxima = tl.zeros((BLOCK, 2), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        i = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        weights, mask = _load_weights(batch, i, i < n)
        more = _score_columns(_load_pairs(batch, i, mask, beta), pivot, weights, mask, MASKED)
        addends, maxima = addends + more[0], tl.maximum(maxima, more[1])
    return _reduce_scores(addends, maxima, n, MASKED)


@triton.jit
def _moments_from_sums(pivot, sum1, sum2, n):
    """Return the count, the mean and the sum of squared deviations (M2) of the scores, in float64."""
    m2 = sum2 - sum1 * sum1 / tl.maximum(n, 1.0)
    # Rounding may make M2 negative. tl.maximum(m2, 0) would also replace a NaN.
    return n, pivot.to(tl.float64) + sum1 / tl.maximum(n, 1.0), tl.where(m2 < 0, 0.0, m2)


@triton.jit
def _merge_moments(rank_moments, num_ranks, BLOCK_RANKS: tl.constexpr):
    """Merge the moments [ranks, 6] of all ranks by Chan's formula, as `amapo_loss._moments.merge_moments` does.

    The sums of the weights are added up, and the last two columns are maxima.
    """
    rank = tl.arange(0, BLOCK_RANKS)
    row, in_range = rank_moments + 6 * rank, rank < num_ranks
    counts = tl.load(row, mask=in_range, other=0.0)
    means = tl.load(row + 1, mask=in_range, other=0.0)
    m2s = tl.load(row + 2, mask=in_range, other=0.0)
    weights = tl.load(row + 3, mask=in_range, other=0.0)
    max_score = tl.max(tl.load(row + 4, mask=in_range, other=0.0))
    max_scale = tl.max(tl.load(row + 5, mask=in_range, other=0.0))
    n = tl.sum(counts)
    mu = tl.sum(counts * means) / tl.maximum(n, 1.0)
    m2 = tl.sum(m2s + counts * (means - mu) * (means - mu))
    return n, mu, m2, tl.sum(weights), max_score.to(tl.float32), max_scale.to(tl.float32)


@triton.jit
def _batch_statistics(statistics, pivot, sums, BLOCK_RANKS: tl.constexpr):
    """Return the statistics of all ranks, from what `_reduce_scores` has returned as `sums` for this rank.

    These are the number of pairs, the mean mu in float64, sigma in float32, the sum of the weights, the largest |r| and
    the largest input scale.
    """
    sum1, sum2, n, total_weight, max_score, input_scale = sums
    if statistics.rank_moments is None:
        count, mu, m2 = _moments_from_sums(pivot, sum1, sum2, n)
    else:
        merged = _merge_moments(statistics.rank_moments, statistics.num_ranks, BLOCK_RANKS)
        count, mu, m2, total_weight, max_score, input_scale = merged
    sigma = tl.sqrt(m2 / tl.maximum(count - 1.0, 1.0)).to(tl.float32)
    if statistics.mean is not None:
        mu = tl.load(statistics.mean).to(tl.float64)
        sigma = tl.load(statistics.std).to(tl.float32)
    return count, mu, sigma, total_weight, max_score, input_scale


@triton.jit
def _mean_scale(loss_scale, total_weight):
    """Return the factor of the losses in their mean: `loss_scale` divided by the sum of the weights, which may be 0."""
    return loss_scale / tl.where(total_weight == 0, 1.0, total_weight).to(tl.float32)


@triton.jit
def _adaptive_margins(
    r,
    mu,
    sigma,
    input_scale,
    max_score,
    beta,
    floor,
    FORMULA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXP: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Return the margins h. For the reasons, see the same lines in `amapo_loss._reference.adaptive_margins`."""
    sigma = tl.where(sigma <= input_scale * (8 * MACHINE_EPS), INF, sigma)
    rest = (mu - mu.to(tl.float32).to(tl.float64)).to(tl.float32)  # what float32 loses of the mean
    mu = mu.to(tl.float32)
    below = (mu - r) + rest
    distance = tl.abs(below)
    if FORMULA == "paper":
        distance = tl.minimum(distance, tl.abs(mu))
    z = tl.where(distance <= max_score * (2 * MACHINE_EPS), 0.0, below) / sigma
    if not NORMALIZE:
        z = (z > 0).to(tl.float32) + 0 * z

    gamma = z * mu
    h = gamma
    if EXP:
        exponent = gamma if FORMULA == "paper" else gamma / beta
        h = beta * tl.exp(tl.where(exponent > MAX_EXPONENT, MAX_EXPONENT, exponent))  # tl.minimum would drop a NaN
    if CLIP:
        gate = gamma if FORMULA == "paper" else z
        return tl.where(gate <= 0, floor, h)
    return h * (sigma < INF).to(tl.float32)


@triton.jit
def _pair_losses(r, h, label_smoothing):
    """Return the losses L and the gradient weights w = -dL/dr."""
    shortfall = h - r
    e = tl.exp(-tl.abs(shortfall))
    # log(1 + e): u rounds 1 + e, and the factor e / (u - 1) corrects the logarithm for that rounding.
    u = 1 + e
    log1p = tl.where(u == 1, e, tl.log(u) * (e / (u - 1)))
    smoothed = tl.where(label_smoothing == 0, 0.0, label_smoothing * shortfall)  # 0 * inf would be NaN
    losses = tl.where(shortfall < 0, 0.0, shortfall) + log1p - smoothed
    weights = tl.where(shortfall < 0, e, 1.0) / u - label_smoothing
    return losses, weights


# From pairs to outputs.


@triton.jit
def _process_block(
    pairs,
    weights,
    margins,
    i,
    in_range,
    mask,
    mu,
    sigma,
    input_scale,
    max_score,
    n,
    beta,
    label_smoothing,
    loss_scale,
    out,
    PER_PAIR: tl.constexpr,
    FORMULA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXP: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Write the margins, the gradients and, with PER_PAIR, the losses of a block of pairs.

    Return what `_reduce_totals` reduces: a stack of columns to sum, and the margins.
    """
    r, _, chosen_terms, rejected_terms = pairs
    chosen_logps, chosen_ratio, chosen_length = chosen_terms
    rejected_logps, rejected_ratio, rejected_length = rejected_terms
    if FORMULA is not None:
        h = _adaptive_margins(
            r, mu, sigma, input_scale, max_score, beta, margins.constant, FORMULA, NORMALIZE, EXP, CLIP
        )
    elif margins.given is not None:
        h = tl.load(margins.given + i * margins.given_stride, mask=mask, other=0.0).to(tl.float32) + 0 * r
    else:
        h = margins.constant + 0 * r  # NaN where the score is NaN or infinite, as above
    losses, gradient_weights = _pair_losses(r, h, label_smoothing)

    tl.store(out.margins + i, tl.where(mask, h, 0.0), mask=in_range)
    if PER_PAIR:
        tl.store(out.loss + i, tl.where(mask, weights * losses, 0.0), mask=in_range)
    if out.gradient is not None:
        grad_score = tl.where(mask, beta * loss_scale * weights * gradient_weights, 0.0)
        tl.store(out.gradient + i, -grad_score / chosen_length, mask=in_range)
        tl.store(out.gradient + n + i, grad_score / rejected_length, mask=in_range)

    columns = (  # the loss, and then the entries of `Totals` from the scores to the non-finite pairs, in its order
        weights * losses,
        weights * r,
        tl.where(r > 0, weights, 0.0),
        tl.where(r <= 0, weights, 0.0),
        tl.where(r > 0, weights * gradient_weights, 0.0),
        tl.where(r <= 0, weights * gradient_weights, 0.0),
        weights * (beta * chosen_ratio),
        weights * (beta * rejected_ratio),
        weights * chosen_logps,
        weights * rejected_logps,
        weights * h,
        tl.where(h > 0, weights, 0.0),
        tl.where(r > mu.to(tl.float32), weights, 0.0),
        tl.where(tl.abs(weights * r) < INF, 0.0, 1.0),
        0 * weights,  # the place of the maximum
        0 * weights,  # `_stack_16` takes 16
    )
    return _stack_16(columns, mask), tl.where(mask, h, -INF)


@triton.jit
def _reduce_totals(columns, margins):
    """Return the totals [16] of the pairs of a program."""
    sums = tl.reshape(tl.sum(columns, axis=0), (16,))
    return tl.where(tl.arange(0, 16) == MAX_MARGIN, tl.max(margins), sums)


@triton.jit
def _write_batch_outputs(totals, own_moments, own_weight, mu, sigma, count, n, loss_scale, out, PER_PAIR: tl.constexpr):
    """Write what describes the whole batch: the reduced loss, the totals, the statistics and the number of pairs."""
    k = tl.arange(0, 16)
    if not PER_PAIR:
        tl.store(out.loss + k, loss_scale * totals, mask=k == 0)
    margin_sum = tl.sum(tl.where(k == MARGIN_SUM, totals, 0.0))
    # tl.max drops a NaN, and the sum keeps it.
    totals = tl.where(k == MAX_MARGIN, tl.where(margin_sum != margin_sum, margin_sum, totals), totals)
    own_count, mean, m2 = own_moments
    tl.store(out.total_values, own_count)
    tl.store(out.total_values + 1, mean)
    tl.store(out.total_values + 2, m2)
    tl.store(out.total_values + 3, tl.cast(own_weight, tl.float64))
    tl.store(out.total_values + 3 + k, totals.to(tl.float64), mask=(k > 0) & (k < MAX_MARGIN))
    tl.store(out.total_values + 17, n - own_count)  # the number of pairs that are left out
    tl.store(out.total_values + 4 + k, totals.to(tl.float64), mask=k == MAX_MARGIN)
    tl.store(out.mean_and_std, mu)  # not rounded, so that a batch that is supplied with it gets the same margins
    tl.store(out.mean_and_std + 1, sigma.to(tl.float64))
    tl.store(out.num_pairs, count.to(tl.int64))


# The kernels. `beta_ptr` replaces `beta` where it is not None.


@triton.jit
def _one_launch_kernel(
    batch,
    statistics,
    margins,
    beta_ptr,
    out,
    n,
    beta,
    label_smoothing,
    loss_scale,
    PER_PAIR: tl.constexpr,
    FORMULA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXP: tl.constexpr,
    CLIP: tl.constexpr,
    MASKED: tl.constexpr,
    MEAN_ON_DEVICE: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute everything in one program, which holds all n <= BLOCK pairs."""
    if beta_ptr is not None:
        beta = tl.load(beta_ptr)
    pivot = _pivot_score(batch, n, beta)
    i = tl.arange(0, BLOCK).to(tl.int64)
    weights, mask = _load_weights(batch, i, i < n)
    pairs = _load_pairs(batch, i, mask, beta)
    addends, maxima = _score_columns(pairs, pivot, weights, mask, MASKED)
    sums = _reduce_scores(addends, maxima, n, MASKED)
    sum1, sum2, own_count, own_weight, _, _ = sums
    count, mu, sigma, total_weight, max_score, input_scale = _batch_statistics(statistics, pivot, sums, BLOCK_RANKS)
    if MEAN_ON_DEVICE:
        loss_scale = _mean_scale(loss_scale, total_weight)
    columns, h = _process_block(
        pairs,
        weights,
        margins,
        i,
        i < n,
        mask,
        mu + 0 * sum1,  # NaN if a score is NaN, also where the mean is supplied
        sigma,
        input_scale,
        max_score,
        n,
        beta,
        label_smoothing,
        loss_scale,
        out,
        PER_PAIR,
        FORMULA,
        NORMALIZE,
        EXP,
        CLIP,
    )
    totals = _reduce_totals(columns, h)
    own_moments = _moments_from_sums(pivot, sum1, sum2, own_count)
    _write_batch_outputs(totals, own_moments, own_weight, mu, sigma, count, n, loss_scale, out, PER_PAIR)


@triton.jit
def _moments_kernel(batch, beta_ptr, moments, n, beta, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Write the row [6] of `rank_moments` of this rank, in one program."""
    if beta_ptr is not None:
        beta = tl.load(beta_ptr)
    pivot = _pivot_score(batch, n, beta)
    sum1, sum2, own_count, own_weight, max_score, input_scale = _sum_scores(batch, pivot, n, beta, MASKED, BLOCK)
    count, mean, m2 = _moments_from_sums(pivot, sum1, sum2, own_count)
    tl.store(moments, count)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, m2)
    tl.store(moments + 3, own_weight)
    tl.store(moments + 4, max_score.to(tl.float64))
    tl.store(moments + 5, input_scale.to(tl.float64))


@triton.jit
def _statistics_kernel(batch, beta_ptr, partials, done_counter, n, beta, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Write the partial sums and maxima [6, P] of the P programs of this launch, the first of two; reset the counter.

    The last two rows are written only with MASKED.
    """
    if beta_ptr is not None:
        beta = tl.load(beta_ptr)
    pivot = _pivot_score(batch, n, beta)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    sum1, sum2, own_count, own_weight, max_score, input_scale = _sum_scores(batch, pivot, n, beta, MASKED, BLOCK)
    tl.store(partials + program, sum1)
    tl.store(partials + num_programs + program, sum2)
    tl.store(partials + 2 * num_programs + program, max_score.to(tl.float64))
    tl.store(partials + 3 * num_programs + program, input_scale.to(tl.float64))
    if MASKED:
        tl.store(partials + 4 * num_programs + program, own_count)
        tl.store(partials + 5 * num_programs + program, own_weight)
    if program == 0:
        tl.store(done_counter, 0)


@triton.jit
def _loss_kernel(
    batch,
    statistics,
    margins,
    beta_ptr,
    partials,
    done_counter,
    program_totals,
    out,
    n,
    beta,
    label_smoothing,
    loss_scale,
    num_partials,
    PER_PAIR: tl.constexpr,
    FORMULA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXP: tl.constexpr,
    CLIP: tl.constexpr,
    MASKED: tl.constexpr,
    MEAN_ON_DEVICE: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    MAX_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute everything from the pairs and the partial sums [6, num_partials], in the second of two launches.

    This is a grid-stride loop of Q programs as in the first launch, but from the last block to the first. Each program
    writes its totals to a row of `program_totals` [Q, 16], and the last program to finish adds up the rows.
    """
    if beta_ptr is not None:
        beta = tl.load(beta_ptr)
    pivot = _pivot_score(batch, n, beta)
    q = tl.arange(0, MAX_PARTIALS)
    in_range = q < num_partials
    sums1 = tl.load(partials + q, mask=in_range, other=0.0)
    sums2 = tl.load(partials + num_partials + q, mask=in_range, other=0.0)
    max_scores = tl.load(partials + 2 * num_partials + q, mask=in_range, other=0.0).to(tl.float32)
    max_scales = tl.load(partials + 3 * num_partials + q, mask=in_range, other=0.0).to(tl.float32)
    if MASKED:
        counts = tl.load(partials + 4 * num_partials + q, mask=in_range, other=0.0)
        sums_of_weights = tl.load(partials + 5 * num_partials + q, mask=in_range, other=0.0)
        addends = _stack_4((sums1, sums2, counts, sums_of_weights), in_range)
    else:
        addends = _stack_2((sums1, sums2), in_range)
    sums = _reduce_scores(addends, _stack_2((max_scores, max_scales), in_range), n, MASKED)
    sum1, sum2, own_count, own_weight, _, _ = sums
    count, mu, sigma, total_weight, max_score, input_scale = _batch_statistics(statistics, pivot, sums, BLOCK_RANKS)
    if MEAN_ON_DEVICE:
        loss_scale = _mean_scale(loss_scale, total_weight)

    program, num_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.zeros((BLOCK, 2, 2, 2, 2), tl.float32)
    max_margins = tl.full((BLOCK,), -INF, tl.float32)
    num_blocks = tl.cdiv(n, BLOCK)
    for step in range(program, num_blocks, num_programs):
        block = num_blocks - 1 - step  # the L2 cache still holds the end of what the first launch read
        i = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        weights, mask = _load_weights(batch, i, i < n)
        more_columns, h = _process_block(
            _load_pairs(batch, i, mask, beta),
            weights,
            margins,
            i,
            i < n,
            mask,
            mu + 0 * sum1,  # NaN if a score is NaN, also where the mean is supplied
            sigma,
            input_scale,
            max_score,
            n,
            beta,
            label_smoothing,
            loss_scale,
            out,
            PER_PAIR,
            FORMULA,
            NORMALIZE,
            EXP,
            CLIP,
        )
        columns, max_margins = columns + more_columns, tl.maximum(max_margins, h)
    k = tl.arange(0, 16)
    tl.store(program_totals + program * 16 + k, _reduce_totals(columns, max_margins))

    tl.debug_barrier()  # all threads must have stored their totals before one of them counts this program as done
    if tl.atomic_add(done_counter, 1, sem="acq_rel") == num_programs - 1:
        row = tl.arange(0, MAX_PARTIALS)[:, None]
        rows = tl.load(
            program_totals + row * 16 + k[None, :],
            mask=row < num_programs,
            other=tl.where(k == MAX_MARGIN, -INF, 0.0)[None, :],
            cache_modifier=".cg",  # the L1 cache may hold what was there before the other programs wrote
        )
        totals = tl.where(k == MAX_MARGIN, tl.max(rows, axis=0), tl.sum(rows, axis=0))
        own_moments = _moments_from_sums(pivot, sum1, sum2, own_count)
        _write_batch_outputs(totals, own_moments, own_weight, mu, sigma, count, n, loss_scale, out, PER_PAIR)


# The launch. The arguments are flat because the schema of a PyTorch operator asks for it.


def _launch(
    chosen_logps: Tensor,  # [n], like the seven that follow
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    weights: Tensor | None,
    given_margins: Tensor | None,
    mean: Tensor | None,  # 0-dim, supplied statistics
    std: Tensor | None,  # 0-dim
    rank_moments: Tensor | None,  # [ranks, 6]
    beta_tensor: Tensor | None,  # 0-dim, in place of `beta`
    beta: float,
    label_smoothing: float,
    formula: str | None,  # None, for margins that are not adaptive
    normalize: bool,
    exponential: bool,
    clip: bool,
    constant_margin: float,  # of the pairs whose gate is closed, or of all pairs without an adaptive or given margin
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels and return the fields of `Outputs`; the gradient is empty without `with_gradient`."""
    outputs = _allocate_outputs(chosen_logps, reduction, with_gradient)
    loss, gradient, *others = outputs
    out = Outputs(loss, gradient if with_gradient else None, *others)
    n = len(chosen_logps)
    chosen = _responses(chosen_logps, ref_chosen_logps, chosen_lengths)
    rejected = _responses(rejected_logps, ref_rejected_logps, rejected_lengths)
    batch = Batch(chosen, rejected, weights, 0 if weights is None else weights.stride(0))
    masked = weights is not None or chosen_lengths is not None  # whether pairs may be left out
    num_ranks = 1 if rank_moments is None else len(rank_moments)
    statistics = Statistics(mean, std, rank_moments, num_ranks)
    margins = Margins(given_margins, 0 if given_margins is None else given_margins.stride(0), constant_margin)
    # Only the device knows the number of pairs of other ranks and the sum of the weights. The factor `num_ranks` is
    # there because DDP and FSDP divide gradients by it.
    mean_on_device = reduction == "mean" and (rank_moments is not None or masked)
    if mean_on_device:
        loss_scale = float(num_ranks)
    else:
        loss_scale = 1 / max(n, 1) if reduction == "mean" else 1.0
    numbers = (n, beta, label_smoothing, loss_scale)
    constants = {
        "PER_PAIR": reduction == "none",
        "FORMULA": formula,
        "NORMALIZE": normalize,
        "EXP": exponential,
        "CLIP": clip,
        "MASKED": masked,
        "MEAN_ON_DEVICE": mean_on_device,
        "BLOCK_RANKS": next_power_of_2(num_ranks),
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(chosen_logps):  # Triton launches on the current device, not on that of the tensors
        if n <= MAX_PAIRS_ONE_LAUNCH:
            block = max(32, next_power_of_2(n))
            num_warps = min(max(block // PAIRS_PER_WARP, 1), 16)
            _one_launch_kernel[(1,)](
                batch, statistics, margins, beta_tensor, out, *numbers, **constants, BLOCK=block, num_warps=num_warps
            )
            return outputs
        num_partials, num_programs = (
            min(-(-n // BLOCK_PAIRS), limit) for limit in (MAX_STATISTICS_PROGRAMS, MAX_LOSS_PROGRAMS)
        )
        partials = loss.new_empty((6, num_partials), dtype=torch.float64)
        program_totals = loss.new_empty((num_programs, 16))
        done_counter = loss.new_empty((), dtype=torch.int32)
        _statistics_kernel[(num_partials,)](
            batch,
            beta_tensor,
            partials,
            done_counter,
            n,
            beta,
            MASKED=masked,
            BLOCK=BLOCK_PAIRS,
            num_warps=8,
            enable_fp_fusion=False,
        )
        _loss_kernel[(num_programs,)](
            batch,
            statistics,
            margins,
            beta_tensor,
            partials,
            done_counter,
            program_totals,
            out,
            *numbers,
            num_partials,
            **constants,
            MAX_PARTIALS=MAX_STATISTICS_PROGRAMS,
            BLOCK=BLOCK_PAIRS,
            num_warps=8,
        )
    return outputs


def _launch_moments(
    chosen_logps: Tensor,  # [n], like the six that follow
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    weights: Tensor | None,
    beta_tensor: Tensor | None,  # 0-dim, in place of `beta`
    beta: float,
) -> Tensor:
    """Return a row [6] of `Statistics.rank_moments`, in float64."""
    chosen = _responses(chosen_logps, ref_chosen_logps, chosen_lengths)
    rejected = _responses(rejected_logps, ref_rejected_logps, rejected_lengths)
    batch = Batch(chosen, rejected, weights, 0 if weights is None else weights.stride(0))
    masked = weights is not None or chosen_lengths is not None
    out, n = torch.empty(6, dtype=torch.float64, device=chosen_logps.device), len(chosen_logps)
    with torch.cuda.device_of(chosen_logps):
        _moments_kernel[(1,)](
            batch,
            beta_tensor,
            out,
            n,
            beta,
            MASKED=masked,
            BLOCK=BLOCK_PAIRS,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return out


def _allocate_outputs(
    logps: Tensor,  # [n]
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, empty = logps.shape[0], partial(torch.empty, dtype=torch.float32, device=logps.device)
    return (
        empty((n,) if reduction == "none" else ()),
        empty((2, n) if with_gradient else (0,)),
        empty((n,)),
        empty((19,), dtype=torch.float64),
        empty((2,), dtype=torch.float64),
        empty((), dtype=torch.int64),
    )


def _responses(
    logps: Tensor,  # [n], like the two that follow
    ref: Tensor | None,
    lengths: Tensor | None,
) -> Responses:
    ref_stride = 0 if ref is None else ref.stride(0)
    lengths_stride = 0 if lengths is None else lengths.stride(0)
    return Responses(logps, logps.stride(0), ref, ref_stride, lengths, lengths_stride)


# The operators and their gradient.

_library = torch.library.Library("amapo_loss", "FRAGMENT")
_library.define("pair_loss" + torch.library.infer_schema(_launch, mutates_args=()))
_library.impl("pair_loss", _launch, "CompositeExplicitAutograd")
_library.define("moments" + torch.library.infer_schema(_launch_moments, mutates_args=()))
_library.impl("moments", _launch_moments, "CompositeExplicitAutograd")


@torch.library.register_fake("amapo_loss::pair_loss", lib=_library)
def _(chosen_logps: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    reduction, with_gradient = arguments[-2:]
    return _allocate_outputs(chosen_logps, reduction, with_gradient)


@torch.library.register_fake("amapo_loss::moments", lib=_library)
def _(chosen_logps: Tensor, *_: Any) -> Tensor:
    return torch.empty(6, dtype=torch.float64, device=chosen_logps.device)


@torch.library.register_vmap("amapo_loss::pair_loss", lib=_library)
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Compute one batch after another. Without this rule, a gradient of the results would be 0 without an error."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:4]):
        raise NotImplementedError("backend='triton' has no gradient under torch.func.vmap: use backend='torch'")
    batches = [
        torch.ops.amapo_loss.pair_loss.default(
            *(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims))
        )
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(x) for x in zip(*batches))
    return outputs, (0,) * len(outputs)


NO_SECOND_DERIVATIVE = "backend='triton' has no second derivative: use backend='torch' for double backward"


class _PairLoss(torch.autograd.Function):
    """The operator under autograd: forward computes the gradient as well, and backward only scales it."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.amapo_loss.pair_loss.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # Backward needs the dtypes of these inputs, and the error of a second derivative needs the tensors. The others
        # may be tensors that cannot be saved, such as the log-probs of a reference from inference mode.
        differentiated = (x if needed else None for x, needed in zip(inputs[:4], ctx.needs_input_grad))
        ctx.save_for_backward(output[1], *differentiated)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @partial(once_differentiable, message=NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_output: Tensor | None, *_: Any) -> Any:
        no_gradients = (None,) * len(ctx.needs_input_grad)
        if grad_output is None:
            return no_gradients
        gradient, *logps = saved
        grad_chosen, grad_rejected = (gradient * grad_output).unbind()
        needed = ctx.needs_input_grad
        return (
            grad_chosen.to(logps[0].dtype) if needed[0] else None,
            grad_rejected.to(logps[1].dtype) if needed[1] else None,
            -grad_chosen.to(logps[2].dtype) if needed[2] else None,
            -grad_rejected.to(logps[3].dtype) if needed[3] else None,
            *no_gradients[4:],
        )


# Autograd asks for the signature in each call, and finding it out takes longer than launching the kernel.
_PairLoss.forward.__signature__ = inspect.signature(_PairLoss.forward)  # type: ignore[attr-defined]


# What `amapo_loss.functional` calls.


class PairLossOutput(NamedTuple):
    """The loss, differentiable in the log-probs, and everything else that the kernel has computed."""

    loss: Tensor  # 0-dim, or [n] with reduction="none"
    margins: Tensor  # [n]
    total_values: Tensor  # [19] float64
    mean: Tensor  # 0-dim float64: the supplied mean, else that of all ranks, else that of these pairs
    std: Tensor  # 0-dim float64, likewise
    num_pairs: Tensor  # 0-dim int64, of all ranks


def pair_loss(
    pairs: Pairs,
    options: LossOptions,  # its statistics and its margin are not functions
    rank_moments: Tensor | None,  # [ranks, 6]
) -> PairLossOutput:
    """Compute the loss of checked pairs."""
    pairs = pairs.map(view_if_compiling)
    with_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in pairs.logps())
    run = _PairLoss.apply if with_gradient else torch.ops.amapo_loss.pair_loss.default
    statistics = options.statistics
    assert statistics is None or isinstance(statistics, ScoreStatistics)
    loss, _, margins, total_values, mean_and_std, num_pairs = run(
        *pairs,
        options.margin if isinstance(options.margin, Tensor) else None,
        *((None, None) if statistics is None else (statistics.mean, statistics.std)),
        rank_moments,
        *_beta_arguments(options.beta, pairs.chosen_logps.device),
        options.label_smoothing,
        *_margin_arguments(options.margin),
        options.reduction,
        with_gradient,
    )
    return PairLossOutput(loss, margins, total_values, mean_and_std[0], mean_and_std[1], num_pairs)


def moments(pairs: Pairs, beta: float | Tensor) -> Tensor:
    """Return a row [6] of `rank_moments`: count, mean, M2, sum of the weights, max |score| and max input scale."""
    device = pairs.chosen_logps.device
    result: Tensor = torch.ops.amapo_loss.moments.default(*pairs.detached(), *_beta_arguments(beta, device))
    return result


def _beta_arguments(beta: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """Return `beta_tensor` and `beta`.

    Under torch.compile, beta is passed as a tensor, because a new Python number would recompile the graph.
    """
    if isinstance(beta, Tensor):
        return beta, 1.0
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float32, device=device) * beta, 1.0
    return None, beta


def _margin_arguments(margin: Any) -> tuple[str | None, bool, bool, bool, float]:
    """Return `formula`, `normalize`, `exponential`, `clip` and `constant_margin`."""
    if isinstance(margin, AdaptiveMargin):
        return margin.formula, margin.normalize, margin.scaling == "exp", margin.clip, margin.floor
    return None, True, True, True, 0.0 if isinstance(margin, Tensor) else margin
