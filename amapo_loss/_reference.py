r"""The mathematics of AMaPO in plain PyTorch, in the order and with the symbols of the paper (arXiv 2511.09385).

    d = log-ratio difference    r = beta * d    h = margin    L = (1 - eps) softplus(h - r) + eps softplus(r - h)

Every other backend is tested against this file. It depends only on torch, `Pairs` and `AdaptiveMargin`. Its inputs are
already checked, prepared by `Pairs.prepared`, and of one floating dtype except for mu. Tensors are [B] unless their
comment says otherwise. Where beta is a tensor, it is 0-dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from amapo_loss._pairs import Pairs
from amapo_loss.margin import AdaptiveMargin

# exp(60) is far beyond the point where the gradient saturates, and a million such losses add up to a finite float32.
MAX_EXPONENT = 60.0


def log_ratio_differences(pairs: Pairs, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-ratio differences d [B] with their graph, and the detached rewards [3, B].

    The rows of the rewards are the scores r = beta * d, the chosen rewards and the rejected rewards. A reward is beta
    times the log-ratio of the response.
    """
    chosen = log_ratio(pairs.chosen_logps, pairs.ref_chosen_logps, pairs.chosen_lengths)
    rejected = log_ratio(pairs.rejected_logps, pairs.ref_rejected_logps, pairs.rejected_lengths)
    d = chosen - rejected
    return d, beta * torch.stack((d, chosen, rejected)).detach()


def log_ratio(logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Return (log pi(y) - log ref(y)) / |y|, without the parts that are None."""
    ratio = logps if ref_logps is None else logps - ref_logps
    return ratio if lengths is None else ratio / lengths


def rounding_scales(
    pairs: Pairs,
    rewards: Tensor,  # [3, B]
    beta: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return what rounding errors are judged by: the largest absolute score and the input scale (both 0-dim).

    The input scale is beta times the largest absolute value among the terms that the scores are computed from. The
    rounding error of a score is proportional to it. It may be far larger than the score itself. Without a reference,
    these terms are the rewards; with a reference, they are also the log-probs that the rewards subtract.
    """
    max_score, max_reward = max_abs(rewards[0]), max_abs(rewards)
    if pairs.ref_chosen_logps is None or pairs.ref_rejected_logps is None:
        return max_score, max_reward
    lengths = (pairs.chosen_lengths, pairs.rejected_lengths)
    logps = (pairs.chosen_logps, pairs.rejected_logps, pairs.ref_chosen_logps, pairs.ref_rejected_logps)
    terms = torch.stack([log_ratio(x.detach(), None, length) for x, length in zip(logps, lengths * 2)])
    return max_score, torch.maximum(max_reward, beta * max_abs(terms))


def max_abs(x: Tensor) -> Tensor:
    """Return the largest absolute value (0-dim): NaN if one of them is NaN, and 0 if there are none."""
    return x.abs().max() if x.numel() else x.sum()


def adaptive_margins(
    r: Tensor,
    mu: Tensor,  # 0-dim, may be float64
    sigma: Tensor,  # 0-dim
    max_score: Tensor,  # 0-dim, like the next from `rounding_scales`
    input_scale: Tensor,  # 0-dim
    beta: float | Tensor,
    margin: AdaptiveMargin,
) -> Tensor:
    """Return the margins h [B] of pairs with scores r in a batch with mean mu and standard deviation sigma."""
    machine_eps = torch.finfo(r.dtype).eps
    # Where the scores differ only by the rounding of their inputs, an infinite sigma makes every z 0.
    sigma = sigma.masked_fill(sigma <= 8 * machine_eps * input_scale, math.inf)
    # The subtraction is in the dtype of mu. If a float64 mean far larger than sigma were rounded first, z would be off.
    below = mu - r if mu.dtype == r.dtype else (mu - r.to(mu.dtype)).to(r.dtype)
    distance = below.abs()
    if margin.formula == "paper":  # the gate of this formula also switches where mu changes its sign
        distance = torch.minimum(distance, mu.abs())
    # A score within rounding of the mean counts as equal to it. Otherwise the gate of such a pair, and with it a jump
    # of the margin from 0 to beta, would depend on the order of summation.
    z = below.masked_fill(distance <= 2 * machine_eps * max_score, 0) / sigma
    if not margin.normalize:
        z = (z > 0) + 0 * z  # adding 0 * z keeps a NaN

    gamma = z * mu
    if margin.scaling == "linear":
        h = gamma
    else:
        # The released formula has the mean of d in its exponent, and gamma contains the mean of r = beta * d.
        exponent = gamma if margin.formula == "paper" else gamma / beta
        h = beta * exponent.clamp_max(MAX_EXPONENT).exp()
    if margin.clip:
        gate = gamma if margin.formula == "paper" else z
        return h.masked_fill(gate <= 0, margin.floor)  # a NaN is not <= 0 and is kept
    return h * sigma.isfinite()


def given_margins(r: Tensor, margins: Tensor | float) -> Tensor:
    """Return the given margins h [B], or the same one for every pair: NaN where the score is NaN or infinite."""
    return margins + 0 * r


def pair_losses(d: Tensor, h: Tensor, beta: float | Tensor, label_smoothing: float) -> Tensor:
    """Return the losses L [B], differentiable in d.

    With the shortfall s = h - r, the identity softplus(-s) = softplus(s) - s turns L into softplus(s) - eps * s. This
    form keeps its relative precision for pairs whose score is far above their margin, where s is far below 0.
    """
    shortfall = h - beta * d  # h - r; unlike the detached r, d has a graph
    losses = F.softplus(shortfall, threshold=40.0)  # the error of the default threshold, 20, is visible in float64
    return losses - label_smoothing * shortfall if label_smoothing else losses


def gradient_weights(r: Tensor, h: Tensor, label_smoothing: float) -> Tensor:
    """Return the gradient weights w = -dL/dr = sigmoid(h - r) - eps [B]."""
    weights = (h - r).sigmoid()
    return weights - label_smoothing if label_smoothing else weights
