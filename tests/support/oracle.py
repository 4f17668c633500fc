"""An independent implementation of the losses, and the comparison of the library's results with it.

`oracle` is written from the equations of the paper, in float64 NumPy and with a gradient derived by hand. It shares no
code with the package and uses only its types: `AdaptiveMargin`, which names the margin formula, and `AMaPOOutput`.

The tests compare with intervals, not with a fixed tolerance. The library computes in float32 or float64, and every
operation rounds. `oracle` follows the largest possible rounding error through the computation, so each of its results
is an interval that contains whatever a correct implementation may return. In the comments:

- `unit` is the machine epsilon of the arithmetic under test: 2**-52 for float64, and 2**-23 for float32, in which
  bfloat16 and float16 are computed, too. The rounding of one operation changes its result by at most unit / 2 times the
  result. Factors such as 4 or 16 in front of `unit` are generous bounds on the number of such roundings in a row.
- `at_gate` marks the pairs whose margin may also be the floor, which is 0 by default. The margin jumps from there to
  about beta where its gate opens. If rounding may put a pair on either side of the gate, its margin may lie in its
  interval or be the floor. The margins of all other pairs must lie in their intervals.

The oracle computes with the log-ratio differences d, while the package computes with the scores r = beta * d. Means,
standard deviations and errors are therefore those of d, unless a comment says otherwise. Arrays are [n], with one entry
per pair.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from amapo_loss import AdaptiveMargin, AMaPOOutput

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

MAX_EXPONENT = 60.0  # the library caps the exponent of a margin here
SMALLEST_FLOAT32 = 1e-37  # absolute tolerance of values that float32 may round to 0


class Interval(NamedTuple):
    """The range of the values that rounding allows, entry by entry."""

    low: Array
    high: Array

    def contains(
        self,
        actual: Array,  # [n]
        slack: float | Array = 0.0,
    ) -> bool:
        """Return whether all entries lie in their interval, widened by `slack` at both ends."""
        return bool(np.all((self.low - slack <= actual) & (actual <= self.high + slack)))


class Oracle(NamedTuple):
    """What the loss of one batch must return."""

    losses: Interval  # [n]
    gradient_weights: Interval  # [n] w = -dL/dr
    margins: Interval  # [n]
    at_gate: Mask  # [n] pairs whose margin may also be the floor
    floor: Interval  # 0-dim
    total_weight: float  # sum of the weights of the pairs
    gradients: tuple[Interval, Interval]  # [n] of the sum of the losses, in the chosen and in the rejected log-probs
    summary: dict[str, tuple[float, float]]  # value and tolerance of each entry


class BoundedStatistics(NamedTuple):
    """Mean and standard deviation of d, and how far rounding may move those that the library uses."""

    mean: float
    std: float
    mean_error: float
    std_error: float


def underflow(unit: float) -> float:
    """Return twice the smallest normal number. Below it, a result has fewer digits or is rounded to 0."""
    return 2 * float(np.finfo(np.float64 if unit < 1e-10 else np.float32).tiny)


def rounded(value: float | Array, unit: float) -> Interval:
    """Return what a value may become if it is rounded once, entry by entry."""
    return Interval(np.asarray(value - unit * np.abs(value)), np.asarray(value + unit * np.abs(value)))


def score_statistics(
    d: Array,  # [n]
    d_error: Array,  # [n]
    beta: float,
    supplied: tuple[float, float] | None,
    unit: float,
) -> BoundedStatistics:
    """Return the statistics of d, or the supplied ones, which are a mean and a standard deviation of scores."""
    if supplied is not None:
        mean, std = supplied[0] / beta, supplied[1] / beta
        # The library compares them with the scores beta * d, where beta is rounded to the dtype of the scores.
        return BoundedStatistics(mean, std, 2 * unit * abs(mean), 2 * unit * std)
    n = len(d)
    mean = math.fsum(d) / n
    std = math.sqrt(math.fsum((d - mean) ** 2) / (n - 1)) if n > 1 else 0.0
    # The products beta * d and their sum are rounded, each relative to the largest |d|.
    mean_error = d_error.mean() + 2 * unit * np.abs(d).max()
    # Adding e to d changes the standard deviation of d by at most sqrt(sum(e**2) / (n - 1)). The second term is the
    # rounding of the computation itself.
    std_error = math.sqrt((d_error**2).sum() / max(n - 1, 1)) + 16 * unit * std
    return BoundedStatistics(mean, std, mean_error, std_error)


def adaptive_margins(
    d: Array,  # [n]
    d_error: Array,  # [n]
    input_scale: float,
    beta: float,
    margin: AdaptiveMargin,
    statistics: BoundedStatistics,
    unit: float,
) -> tuple[Interval, Mask]:
    """Return the margins [n] while the gate is open, and the pairs [n] whose margin may also be the floor."""
    mean, std, mean_error, std_error = statistics
    n = len(d)

    # The library treats scores as equal if their standard deviation is at most 8 * unit * input_scale. The threshold is
    # itself rounded, which the factors 1 - 4 * unit and 1 + 4 * unit allow for. A batch of zeros has the threshold 0,
    # so its standard deviation is not below it.
    threshold = 8 * unit * input_scale
    if std + std_error < threshold * (1 - 4 * unit) or std == 0:
        return Interval(*(np.full(n, end) for end in rounded(margin.floor, unit))), np.zeros(n, bool)
    at_gate = np.full(n, std - std_error <= threshold * (1 + 4 * unit))
    # This is the smallest standard deviation that the library may divide by. The library divides only if its own value
    # is above the threshold. The errors of d move that value by at most sqrt(2) * 3 * unit * input_scale, which is less
    # than the threshold. Therefore its own value is above std / 2, and std / 8 is a safe lower bound.
    smallest_std = max(std - std_error, std / 8)

    # The library sets z to 0 for a pair whose distance to the mean is at most this tolerance. With the "paper" formula
    # it does so for all pairs if the absolute value of the mean is at most this tolerance. The errors below contain the
    # tolerance, so that the intervals contain the results with and without this step. The tolerance also covers the
    # rounding of r = beta * d.
    equality_tolerance = 2 * unit * np.abs(d).max()
    below = mean - d
    below_error = mean_error + d_error + unit * np.abs(below) + equality_tolerance
    # The exponent is z * mean(r) with the "paper" formula and z * mean(d) with the "released" one.
    mean_factor = (beta if margin.formula == "paper" else 1.0) * mean
    mean_factor_error = (beta if margin.formula == "paper" else 1.0) * (mean_error + equality_tolerance)
    mean_factor_error += 2 * unit * abs(mean_factor)

    side_unknown = np.abs(below) <= equality_tolerance + below_error  # the pair may lie on either side of the mean
    if margin.normalize:
        z = below / std
        # For rounded values below' and std':
        # |below' / std' - below / std| <= (|below' - below| + |z| * |std' - std|) / std'.
        z_error = (below_error + np.abs(z) * std_error) / smallest_std + 2 * unit * np.abs(z)
        z_low, z_high = z - z_error, z + z_error
    else:
        z = (below > 0).astype(float)
        z_low, z_high = np.where(side_unknown, 0.0, z), np.where(side_unknown, 1.0, z)

    # The product of two intervals lies between the smallest and the largest product of their ends.
    factors = (mean_factor - mean_factor_error, mean_factor + mean_factor_error)
    products = np.stack([z_end * factor for z_end in (z_low, z_high) for factor in factors])
    exponent_low, exponent_high = products.min(0), products.max(0)
    exponent_low = exponent_low - 4 * unit * np.abs(exponent_low)
    exponent_high = exponent_high + 4 * unit * np.abs(exponent_high)
    if margin.scaling == "exp":
        exponent_low, exponent_high = (np.minimum(x, MAX_EXPONENT) for x in (exponent_low, exponent_high))
        # The fast exponential of an NVIDIA GPU has an error of 2 + 1.173 |x| units, by the CUDA programming guide.
        low = beta * np.exp(exponent_low) * (1 - (16 + 2 * np.abs(exponent_low)) * unit) - underflow(unit)
        high = beta * np.exp(exponent_high) * (1 + (16 + 2 * np.abs(exponent_high)) * unit) + underflow(unit)
    else:  # z * mean(r) with both formulas
        scale = 1.0 if margin.formula == "paper" else beta
        low, high = scale * exponent_low, scale * exponent_high

    if margin.clip:
        if margin.formula == "paper":
            # This gate also switches where the mean changes its sign.
            is_open = z * mean > 0
            at_gate |= side_unknown | (abs(mean) <= equality_tolerance + mean_error)
        else:
            is_open = z > 0
            at_gate |= side_unknown
        low, high = (np.where(is_open | at_gate, *ends) for ends in zip((low, high), rounded(margin.floor, unit)))
    return Interval(low, high), at_gate


def oracle(
    chosen: Array,  # [n], like all arrays that follow
    rejected: Array,
    ref_chosen: Array | None = None,
    ref_rejected: Array | None = None,
    *,
    chosen_lengths: Array | None = None,
    rejected_lengths: Array | None = None,
    weights: Array | None = None,
    beta: float,
    label_smoothing: float = 0.0,
    margin: AdaptiveMargin | float | Array,
    statistics: tuple[float, float] | None = None,
    unit: float,
) -> Oracle:
    """Return what the loss of a batch of at least one pair must return. No pair is left out.

    Args:
        chosen: log-probs of the chosen responses, exactly as the library gets them.
        rejected: log-probs of the rejected responses.
        ref_chosen: log-probs of the chosen responses under the reference model.
        ref_rejected: log-probs of the rejected responses under the reference model.
        chosen_lengths: number of tokens in each chosen response.
        rejected_lengths: number of tokens in each rejected response.
        weights: weight of each pair, above 0. None: all are 1.
        beta: scale of the ranking score.
        label_smoothing: share of wrong labels, as in `amapo_loss`.
        margin: the adaptive margin, a number for the constant margin of DPO and SimPO, or a margin for each pair.
        statistics: supplied mean and standard deviation of the scores.
        unit: machine epsilon of the arithmetic under test.

    """
    n, eps = len(chosen), label_smoothing
    chosen_length, rejected_length = (
        np.ones(n) if length is None else length for length in (chosen_lengths, rejected_lengths)
    )
    ref_chosen_logps, ref_rejected_logps = (np.zeros(n) if ref is None else ref for ref in (ref_chosen, ref_rejected))
    chosen_ratio = (chosen - ref_chosen_logps) / chosen_length
    rejected_ratio = (rejected - ref_rejected_logps) / rejected_length
    d = chosen_ratio - rejected_ratio
    # Without a reference and lengths, the ratios are the log-probs themselves, so they are exact.
    ratios_are_rounded = ref_chosen is not None or chosen_lengths is not None
    d_error = unit * (np.abs(d) + (np.abs(chosen_ratio) + np.abs(rejected_ratio) if ratios_are_rounded else 0.0))
    terms = [d, chosen_ratio, rejected_ratio]  # everything that d is computed from
    if ratios_are_rounded:
        terms += [chosen / chosen_length, rejected / rejected_length]
        terms += [ref_chosen_logps / chosen_length, ref_rejected_logps / rejected_length]
    input_scale = float(np.abs(terms).max())

    if isinstance(margin, AdaptiveMargin):
        d_statistics = score_statistics(d, d_error, beta, statistics, unit)
        h, at_gate = adaptive_margins(d, d_error, input_scale, beta, margin, d_statistics, unit)
        floor = rounded(margin.floor, unit)
    else:
        d_statistics = score_statistics(d, d_error, beta, statistics, unit)
        h, at_gate, floor = rounded(np.full(n, margin), unit), np.zeros(n, bool), rounded(0.0, unit)
    own_statistics = score_statistics(d, d_error, beta, None, unit)  # differ from d_statistics if these are supplied
    # The loss of a pair at the gate may be that of its margin or that of the floor.
    h_or_floor = Interval(
        np.where(at_gate, np.minimum(h.low, floor.low), h.low),
        np.where(at_gate, np.maximum(h.high, floor.high), h.high),
    )

    r, r_error = beta * d, beta * d_error + 2 * unit * np.abs(beta * d)
    x_low, x_high = r - r_error - h_or_floor.high, r + r_error - h_or_floor.low  # x = r - h
    x = Interval(x_low - unit * np.abs(x_low), x_high + unit * np.abs(x_high))
    a = np.ones(n) if weights is None else weights
    unweighted_losses, unweighted = losses_and_weights(x, eps, unit)
    losses, gradient_weights = (
        Interval(a * low - unit * a * np.abs(low), a * high + unit * a * np.abs(high))
        for low, high in (unweighted_losses, unweighted)
    )
    gradients = (
        Interval(-gradient_weights.high * beta / chosen_length, -gradient_weights.low * beta / chosen_length),
        Interval(gradient_weights.low * beta / rejected_length, gradient_weights.high * beta / rejected_length),
    )

    sum_rounding = 64 * unit  # of a sum or a mean, relative to the mean absolute value of its terms
    correct, misranked = d > 0, d <= 0
    sign_unknown = ratios_are_rounded * (np.abs(d) <= d_error)  # a difference of exact numbers keeps its sign
    side_unknown = np.abs(d - d_statistics.mean) <= 2 * (d_statistics.mean_error + d_error)
    h_center, h_error = (h.low + h.high) / 2, h_or_floor.high - h_or_floor.low
    w_center, w_error = (unweighted.low + unweighted.high) / 2, (unweighted.high - unweighted.low) / 2
    everywhere = np.ones(n, bool)

    # Each of these functions returns a value and its tolerance.

    def mean_of(values: Array, error: Array | float = 0.0, pairs: Mask = everywhere) -> tuple[float, float]:
        mean, mean_error, mean_abs = (
            float(np.average(np.broadcast_to(x, n)[pairs], weights=a[pairs])) for x in (values, error, np.abs(values))
        )
        return mean, mean_error + sum_rounding * mean_abs + SMALLEST_FLOAT32

    def share_of(pairs: Mask, unknown: Mask) -> tuple[float, float]:
        return float(np.average(pairs, weights=a)), float(np.average(unknown, weights=a) + sum_rounding)

    def mean_weight_of(pairs: Mask) -> tuple[float, float]:
        if sign_unknown.any():
            return 0.0, 1.0  # the members of the group are unknown: accept any weight, as all are below 1
        return mean_of(w_center, w_error, pairs) if pairs.any() else (0.0, 0.0)

    # The library accumulates float32 scores in float64, but it has no wider dtype for float64 scores. If these differ
    # only by rounding, the rounding of the mean that they are compared with adds to their standard deviation.
    std_from_mean = math.sqrt(n) * unit * float(np.abs(d).max()) if unit < 1e-10 else 0.0
    std_error = 2 * math.sqrt(2) * float(d_error.max()) + std_from_mean + sum_rounding * own_statistics.std
    rewards_error = beta * unit * 4 * (np.abs(chosen_ratio) + np.abs(rejected_ratio))
    score_mean = beta * own_statistics.mean
    margin_max = float(h_or_floor.high.max())
    summary = {
        "rewards/chosen": mean_of(beta * chosen_ratio, rewards_error),
        "rewards/rejected": mean_of(beta * rejected_ratio, rewards_error),
        "rewards/accuracies": share_of(correct, sign_unknown),
        "rewards/margins": mean_of(r, r_error),
        "logps/chosen": mean_of(chosen),
        "logps/rejected": mean_of(rejected),
        "amapo/score_mean": (
            score_mean,
            beta * own_statistics.mean_error + sum_rounding * abs(score_mean) + SMALLEST_FLOAT32,
        ),
        "amapo/score_std": (beta * own_statistics.std, beta * std_error + SMALLEST_FLOAT32),
        "amapo/margin_mean": mean_of(h_center, h_error),
        "amapo/margin_max": (margin_max, float(h_error.max() + sum_rounding * np.abs(h_or_floor.high).max())),
        "amapo/margin_active": share_of(h.low > 0, at_gate | ((h.low <= 0) & (h.high > 0))),
        "amapo/margin_accuracies": share_of(d > d_statistics.mean, side_unknown),
        "amapo/gradient_weight_correct": mean_weight_of(correct),
        "amapo/gradient_weight_misranked": mean_weight_of(misranked),
        "amapo/nonfinite": (0.0, 0.0),
        "amapo/left_out": (0.0, 0.0),
    }
    return Oracle(losses, gradient_weights, h, at_gate, floor, float(a.sum()), gradients, summary)


def losses_and_weights(
    x: Interval,  # [n] r - h
    eps: float,
    unit: float,
) -> tuple[Interval, Interval]:
    """Return the losses [n] and the gradient weights [n], with label smoothing `eps`."""

    def loss(x: Array) -> Array:  # (1 - eps) softplus(-x) + eps softplus(x)
        return (1 - eps) * np.logaddexp(0, -x) + eps * np.logaddexp(0, x)

    def weight(x: Array) -> Array:  # -dL/dx = (1 - eps) sigmoid(-x) - eps sigmoid(x)
        return (1 - eps) * np.exp(-np.logaddexp(0, x)) - eps * np.exp(-np.logaddexp(0, -x))

    # The loss falls in x until x = log((1 - eps) / eps) and rises from there, so an interval that contains this point
    # has its smallest loss there. Without label smoothing the loss falls everywhere.
    lowest_point = math.log((1 - eps) / eps) if eps else math.inf
    candidates = np.stack([loss(x.low), loss(x.high), loss(np.clip(lowest_point, x.low, x.high))])
    # The library adds and subtracts terms of this size, and each is rounded relative to its own size.
    loss_terms = np.abs(candidates).max(0) + eps * np.maximum(np.abs(x.low), np.abs(x.high))
    loss_slack = 16 * unit * loss_terms + underflow(unit)
    # The weight falls in x everywhere.
    w_low, w_high = weight(x.high), weight(x.low)
    w_low_slack, w_high_slack = (16 * unit * (np.abs(w) + eps) + underflow(unit) for w in (w_low, w_high))
    losses = Interval(candidates.min(0) - loss_slack, candidates.max(0) + loss_slack)
    return losses, Interval(w_low - w_low_slack, w_high + w_high_slack)


def assert_matches(
    actual: AMaPOOutput,
    inputs: dict[str, torch.Tensor],  # [n] the log-probs that the loss was called with, by name
    expected: Oracle,
    reduction: str,
    unit: float,
    counted: Mask | slice = slice(None),  # [n] the pairs that are not left out, which the oracle was given
) -> None:
    """Compare the loss, the gradients, the margins, the gradient weights and every entry of the summary.

    For the pairs that are left out, all of them must be 0.
    """
    loss, diagnostics = actual
    margins, weights = (x.double().numpy() for x in (diagnostics.margins, diagnostics.gradient_weights))
    left_out = np.ones(len(margins), bool)
    left_out[counted] = False
    assert not margins[left_out].any()
    assert not weights[left_out].any()
    margins, weights = margins[counted], weights[counted]
    inside, at_floor = ((low <= margins) & (margins <= high) for low, high in (expected.margins, expected.floor))
    assert np.all(inside | (expected.at_gate & at_floor)), "margins"
    assert expected.gradient_weights.contains(weights), "weights"

    divisor = expected.total_weight if reduction == "mean" else 1
    low, high = expected.losses
    if reduction != "none":
        low, high = low.sum(), high.sum()
        sum_rounding = 64 * unit * max(abs(low), abs(high))
        low, high = (low - sum_rounding) / divisor, (high + sum_rounding) / divisor
    value = loss.detach().double().numpy()
    if reduction == "none":
        value = value[counted]
    assert np.all((low <= value) & (value <= high)), f"loss {value} outside [{low}, {high}]"

    logps = [inputs["chosen_logps"], inputs["rejected_logps"]]
    for x, gradient, interval in zip(logps, torch.autograd.grad(loss.sum(), logps), expected.gradients):
        assert gradient.dtype == x.dtype
        assert not gradient.double().numpy()[left_out].any()
        # The gradient has the dtype of the log-probs, which may be a half precision. There, rounding is coarser, and
        # gradients near 0 are rounded to multiples of the smallest positive number. The comparison multiplies the
        # gradient by `divisor`, and with it this absolute rounding.
        relative_rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}.get(x.dtype, 4 * unit)
        smallest_positive = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}.get(x.dtype, 0)
        absolute_rounding = smallest_positive * divisor + SMALLEST_FLOAT32
        size = np.maximum(np.abs(interval.low), np.abs(interval.high))
        slack = relative_rounding * size + absolute_rounding
        assert interval.contains(gradient.double().numpy()[counted] * divisor, slack), "gradient"

    summary = diagnostics.summary()
    assert summary.keys() == expected.summary.keys()
    for name, (entry, tolerance) in expected.summary.items():
        assert summary[name].ndim == 0
        assert abs(summary[name].item() - entry) <= tolerance, f"{name}: {summary[name].item()}, expected {entry}"
