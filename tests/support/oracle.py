"""An independent oracle in float64 NumPy with a hand-derived gradient, and the library held against it.

The oracle shares no code with the package. It is written from the paper's equations, and it bounds its own answers:
every result is an interval, as wide as the rounding of the tested arithmetic (`unit`, its machine epsilon) can make
it. The gate of the margin is a jump, so a pair that this rounding may put on either side of it (`at_gate`) may also
have the margin 0; no other pair is let off.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from amapo_loss import AdaptiveMargin, AMaPOOutput

Array = NDArray[np.float64]


class Interval(NamedTuple):
    low: Array
    high: Array

    def contains(self, actual: Array, slack: float | Array = 0.0) -> bool:
        return bool(np.all((self.low - slack <= actual) & (actual <= self.high + slack)))


def smallest(unit: float) -> float:
    """Below this the precision of the arithmetic ends."""
    return 2 * float(np.finfo(np.float64 if unit < 1e-10 else np.float32).tiny)


class Oracle(NamedTuple):
    losses: Interval
    weights: Interval  # -dL/dr
    margins: Interval
    at_gate: NDArray[np.bool_]
    gradients: tuple[Interval, Interval]  # of the summed losses in the policy's log-probs, chosen and rejected
    summary: dict[str, tuple[float, float]]  # value, tolerance


def adaptive_margins(
    d: Array, d_error: Array, magnitude: float, beta: float, margin: AdaptiveMargin,
    statistics: tuple[float, float] | None, unit: float,
) -> tuple[Interval, NDArray[np.bool_], tuple[float, float], float]:  # fmt: skip
    """Margins, which of them may be 0 as well, (mean, std) and the error of the mean, in the units of d."""
    n = len(d)
    rounding = 2 * unit * np.abs(d).max()
    if statistics is None:
        mean = math.fsum(d) / n
        std = math.sqrt(math.fsum((d - mean) ** 2) / (n - 1)) if n > 1 else 0.0
        mean_error = d_error.mean() + rounding
        std_error = math.sqrt((d_error**2).sum() / max(n - 1, 1)) + 16 * unit * std
    else:
        mean, std = statistics[0] / beta, statistics[1] / beta
        mean_error, std_error = 2 * unit * abs(mean), 2 * unit * std
    threshold = 8 * unit * magnitude
    zero = np.zeros(n)
    if std + std_error < threshold * (1 - 4 * unit) or std == 0:
        return Interval(zero, zero), np.zeros(n, bool), (mean, std), mean_error
    either = np.full(n, std - std_error <= threshold * (1 + 4 * unit))
    spread = max(std - std_error, std / 8)

    below = mean - d
    below_error = mean_error + d_error + unit * np.abs(below) + rounding
    factor = (beta if margin.formula == "paper" else 1.0) * mean
    factor_error = (beta if margin.formula == "paper" else 1.0) * (mean_error + rounding) + 2 * unit * abs(factor)
    uncertain = np.abs(below) <= rounding + below_error
    if margin.normalize:
        z = below / std
        z_error = (below_error + np.abs(z) * std_error) / spread + 2 * unit * np.abs(z)
        z_low, z_high = z - z_error, z + z_error
    else:
        z = (below > 0).astype(float)
        z_low, z_high = np.where(uncertain, 0.0, z), np.where(uncertain, 1.0, z)
    corners = np.stack([zs * f for zs in (z_low, z_high) for f in (factor - factor_error, factor + factor_error)])
    gamma_low, gamma_high = corners.min(0), corners.max(0)
    if margin.scaling == "exp":
        low = beta * np.exp(np.minimum(gamma_low - 4 * unit * np.abs(gamma_low), 60)) * (1 - 16 * unit) - smallest(unit)
        high = beta * np.exp(np.minimum(gamma_high + 4 * unit * np.abs(gamma_high), 60)) * (1 + 16 * unit) + smallest(
            unit
        )
    else:
        scale = 1.0 if margin.formula == "paper" else beta
        low = scale * (gamma_low - 4 * unit * np.abs(gamma_low))
        high = scale * (gamma_high + 4 * unit * np.abs(gamma_high))
    if margin.clip:
        if margin.formula == "paper":
            is_open = (z > 0) & (mean > 0) if not margin.normalize else z * mean > 0
            either |= uncertain | (abs(mean) <= rounding + mean_error)
        else:
            is_open = z > 0
            either |= uncertain
        low, high = (np.where(is_open | either, bound, 0.0) for bound in (low, high))
    return Interval(low, high), either, (mean, std), mean_error


def oracle(
    chosen: Array, rejected: Array, ref_chosen: Array | None = None, ref_rejected: Array | None = None, *,
    chosen_lengths: Array | None = None, rejected_lengths: Array | None = None, beta: float,
    label_smoothing: float = 0.0, margin: AdaptiveMargin | float, statistics: tuple[float, float] | None = None,
    unit: float,
) -> Oracle:  # fmt: skip
    """Everything a batch of at least one pair must give. A number for `margin` is a constant margin."""
    n, eps = len(chosen), label_smoothing
    size = [np.ones(n) if s is None else np.where(s == 0, 1, s) for s in (chosen_lengths, rejected_lengths)]
    refs = [np.zeros(n) if ref is None else ref for ref in (ref_chosen, ref_rejected)]
    a, b = (chosen - refs[0]) / size[0], (rejected - refs[1]) / size[1]
    d = a - b
    derived = ref_chosen is not None or chosen_lengths is not None
    d_error = unit * (np.abs(d) + (np.abs(a) + np.abs(b) if derived else 0.0))
    terms = [
        d,
        a,
        b,
        *([chosen / size[0], rejected / size[1], refs[0] / size[0], refs[1] / size[1]] if derived else []),
    ]
    magnitude = float(np.abs(terms).max())

    if isinstance(margin, AdaptiveMargin):
        h, at_gate, (mean, std), mean_error = adaptive_margins(d, d_error, magnitude, beta, margin, statistics, unit)
    else:
        h, at_gate = Interval(np.full(n, margin), np.full(n, margin)), np.zeros(n, bool)
        _, _, (mean, std), mean_error = adaptive_margins(d, d_error, magnitude, beta, AdaptiveMargin(), None, unit)

    r, r_error = beta * d, beta * d_error + 2 * unit * np.abs(beta * d)
    h_low = np.where(at_gate, np.minimum(h.low, 0.0), h.low)
    h_high = np.where(at_gate, np.maximum(h.high, 0.0), h.high)
    # L and w fall in x = r - h: softplus by log(1 + e^x), and dL/dx = eps sigmoid(x) - (1 - eps) sigmoid(-x).
    x_low, x_high = r - r_error - h_high, r + r_error - h_low
    x_low, x_high = x_low - unit * np.abs(x_low), x_high + unit * np.abs(x_high)

    def loss(x: Array) -> Array:
        return (1 - eps) * np.logaddexp(0, -x) + eps * np.logaddexp(0, x)

    def weight(x: Array) -> Array:
        return (1 - eps) * np.exp(-np.logaddexp(0, x)) - eps * np.exp(-np.logaddexp(0, -x))

    # The smoothed loss has its minimum inside where x_low < log((1 - eps) / eps) < x_high.
    bottom = math.log((1 - eps) / eps) if eps else math.inf
    ends = np.stack([loss(x_low), loss(x_high), loss(np.clip(bottom, x_low, x_high))])
    size_of_terms = np.abs(ends).max(0) + eps * np.maximum(np.abs(x_low), np.abs(x_high))
    floor = smallest(unit)
    w_ends = weight(x_high), weight(x_low)
    slack = [16 * unit * size + floor for size in (size_of_terms, *(np.abs(w) + eps for w in w_ends))]
    losses = Interval(ends.min(0) - slack[0], ends.max(0) + slack[0])
    weights = Interval(w_ends[0] - slack[1], w_ends[1] + slack[2])
    gradients = (
        Interval(-weights.high * beta / size[0], -weights.low * beta / size[0]),
        Interval(weights.low * beta / size[1], weights.high * beta / size[1]),
    )

    tiny = 64 * unit
    correct, misranked = d > 0, d <= 0
    sign_unknown = derived * (np.abs(d) <= d_error)
    rank_unknown = np.abs(d - mean) <= 2 * (mean_error + d_error)
    middle = [(interval.low + interval.high) / 2 for interval in (h, weights)]
    half = [np.maximum(h_high, h.high) - np.minimum(h_low, h.low), (weights.high - weights.low) / 2]

    def mean_of(x: Array, error: Array | float = 0.0) -> tuple[float, float]:
        return float(x.mean()), float(np.mean(error + np.zeros(n)) + tiny * np.abs(x).mean() + 1e-37)

    def share_of(x: NDArray[np.bool_], unknown: NDArray[Any]) -> tuple[float, float]:
        return float(x.mean()), float(unknown.mean() + tiny)

    def group_mean(group: NDArray[np.bool_]) -> tuple[float, float]:
        if sign_unknown.any():
            return 0.0, 1.0
        return mean_of_group(middle[1][group], half[1][group]) if group.any() else (0.0, 0.0)

    def mean_of_group(x: Array, error: Array) -> tuple[float, float]:
        return float(x.mean()), float(error.mean() + tiny * np.abs(x).mean() + 1e-37)

    # Where the spread is itself rounding, it has that of the mean that it is taken about; float64 has no wider sums.
    about_mean = math.sqrt(n) * unit * float(np.abs(d).max()) if unit < 1e-10 else 0.0
    ab_error = beta * unit * 4 * (np.abs(a) + np.abs(b))
    summary = {
        "rewards/chosen": mean_of(beta * a, ab_error),
        "rewards/rejected": mean_of(beta * b, ab_error),
        "rewards/accuracies": share_of(correct, sign_unknown),
        "rewards/margins": mean_of(r, r_error),
        "logps/chosen": mean_of(chosen),
        "logps/rejected": mean_of(rejected),
        "amapo/score_mean": (beta * mean, beta * mean_error + tiny * abs(beta * mean) + 1e-37),
        "amapo/score_std": (
            beta * std,
            beta * (2 * math.sqrt(2) * float(d_error.max()) + about_mean + tiny * std) + 1e-37,
        ),
        "amapo/margin_mean": mean_of(middle[0], half[0]),
        "amapo/margin_max": (float(h_high.max()), float(half[0].max() + tiny * np.abs(h_high).max())),
        "amapo/margin_active": share_of(h.low > 0, at_gate | ((h.low <= 0) & (h.high > 0))),
        "amapo/margin_accuracies": share_of(d > mean, rank_unknown),
        "amapo/gradient_weight_correct": group_mean(correct),
        "amapo/gradient_weight_misranked": group_mean(misranked),
        "amapo/nonfinite": (0.0, 0.0),
    }
    return Oracle(losses, weights, h, at_gate, gradients, summary)


def assert_matches(
    actual: AMaPOOutput, given: dict[str, torch.Tensor], expected: Oracle, reduction: str, unit: float
) -> None:
    """Value, gradients, margins, weights and every entry of the summary."""
    loss, diagnostics = actual
    margins = diagnostics.margins.double().numpy()
    inside = (expected.margins.low <= margins) & (margins <= expected.margins.high)
    assert np.all(inside | (expected.at_gate & (margins == 0))), "margins"
    assert expected.weights.contains(diagnostics.gradient_weights.double().numpy()), "weights"

    n = len(margins)
    low, high = expected.losses
    if reduction != "none":
        low, high = low.sum(), high.sum()
        slack = 64 * unit * max(abs(low), abs(high))
        scale = n if reduction == "mean" else 1
        low, high = (low - slack) / scale, (high + slack) / scale
    value = loss.detach().double().numpy()
    assert np.all((low <= value) & (value <= high)), f"loss {value} outside [{low}, {high}]"

    inputs = [given["chosen_logps"], given["rejected_logps"]]
    scale = n if reduction == "mean" else 1
    for x, got, interval in zip(inputs, torch.autograd.grad(loss.sum(), inputs), expected.gradients):
        assert got.dtype == x.dtype
        step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}.get(x.dtype, 4 * unit)
        # The smallest numbers of a half precision, which `scale` magnifies.
        subnormal = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}.get(x.dtype, 0) * scale + 1e-37
        bound = np.maximum(np.abs(interval.low), np.abs(interval.high))
        assert interval.contains(got.double().numpy() * scale, step * bound + subnormal), "gradient"

    summary = diagnostics.summary()
    assert summary.keys() == expected.summary.keys()
    for name, (entry, tolerance) in expected.summary.items():
        assert summary[name].ndim == 0
        assert abs(summary[name].item() - entry) <= tolerance, f"{name}: {summary[name].item()}, expected {entry}"
