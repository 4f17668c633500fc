r"""The mathematics of AMaPO in plain PyTorch, in the order and the symbols of the paper (arXiv 2511.09385).

    d = log-ratio difference    r = beta * d    h = margin    L = (1 - eps) softplus(h - r) + eps softplus(r - h)

Every other backend is held against this file. It knows tensors, `Pairs` and `AdaptiveMargin`; what comes here is
checked, of one floating dtype, and [B] where nothing else is said.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from amapo_loss._pairs import Pairs
from amapo_loss.margin import AdaptiveMargin

# exp(60) is far beyond where the gradient saturates, and a million such losses still add up to a finite float32.
MAX_EXPONENT = 60.0


def differences(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """The log-ratio differences d [B], with their graph, and the rewards [3, B] without.

    Those are beta times d, which are the scores r, and beta times the log-ratios of both responses.
    """
    chosen = log_ratio(pairs.chosen_logps, pairs.ref_chosen_logps, pairs.chosen_lengths)
    rejected = log_ratio(pairs.rejected_logps, pairs.ref_rejected_logps, pairs.rejected_lengths)
    d = chosen - rejected
    return d, beta * torch.stack((d, chosen, rejected)).detach()


def log_ratio(logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None) -> Tensor:
    """(log pi(y) - log ref(y)) / |y|, each part where it is given; an empty response counts as one token."""
    ratio = logps if ref_logps is None else logps - ref_logps
    return ratio if lengths is None else ratio / lengths.masked_fill(lengths == 0, 1)


def magnitude(pairs: Pairs, rewards: Tensor, beta: float) -> Tensor:
    """Of the largest reward behind the scores, 0-dim; with a reference, of what that was taken from, too."""
    if pairs.ref_chosen_logps is None or pairs.ref_rejected_logps is None:
        return largest(rewards)
    lengths = (pairs.chosen_lengths, pairs.rejected_lengths)
    logps = (pairs.chosen_logps, pairs.rejected_logps, pairs.ref_chosen_logps, pairs.ref_rejected_logps)
    terms = torch.stack([log_ratio(x.detach(), None, length) for x, length in zip(logps, lengths * 2)])
    return torch.maximum(largest(rewards), beta * largest(terms))


def largest(x: Tensor) -> Tensor:
    """The largest absolute value, 0-dim; NaN if there is one, and 0 if there is nothing."""
    return x.abs().max() if x.numel() else x.sum()


def adaptive_margins(
    r: Tensor, mu: Tensor, sigma: Tensor, magnitude: Tensor, beta: float, margin: AdaptiveMargin
) -> Tensor:
    """The margins h [B] of pairs with scores r [B], in a batch with mean mu and standard deviation sigma, 0-dim.

    `magnitude`, 0-dim, is that of the largest reward behind the scores; sigma means something beyond its rounding only.
    """
    eps = torch.finfo(r.dtype).eps
    sigma = sigma.masked_fill(sigma <= 8 * eps * magnitude, math.inf)  # no spread to speak of: every z is 0
    # A mean in float64 may be far larger than the spread, and must not be rounded before.
    below = mu - r if mu.dtype == r.dtype else (mu - r.to(mu.dtype)).to(r.dtype)
    distance = below.abs()
    if margin.formula == "paper":  # whose gate also turns over where mu is 0
        distance = torch.minimum(distance, mu.abs())
    # What is within rounding of the mean is at it, so that no gate depends on the order of a sum.
    z = below.masked_fill(distance <= 2 * eps * largest(r), 0) / sigma
    if not margin.normalize:
        z = (z > 0) + 0 * z  # NaN stays NaN

    gamma = z * mu
    if margin.scaling == "linear":
        h = gamma
    else:
        exponent = gamma if margin.formula == "paper" else gamma / beta  # released: the mean of d, not of r
        h = beta * exponent.clamp_max(MAX_EXPONENT).exp()
    if margin.clip:
        return h.masked_fill((gamma if margin.formula == "paper" else z) <= 0, 0)  # the gate; NaN stays NaN
    return h * sigma.isfinite()


def pair_losses(d: Tensor, h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The losses L [B], differentiable in d.

    With y = h - r, softplus(-y) = softplus(y) - y turns the two terms of L into softplus(y) - eps y, which keeps its
    relative precision for pairs that rank far above their margin, y << 0.
    """
    shortfall = torch.add(h, d, alpha=-beta)
    losses = F.softplus(shortfall, threshold=40.0)  # the default, 20, is visible in float64
    return losses - label_smoothing * shortfall if label_smoothing else losses


def gradient_weights(r: Tensor, h: Tensor, label_smoothing: float) -> Tensor:
    """The gradient weights w = -dL/dr = sigmoid(y) - eps [B] of these losses."""
    weights = (h - r).sigmoid()
    return weights - label_smoothing if label_smoothing else weights
