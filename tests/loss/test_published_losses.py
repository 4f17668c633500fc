"""Each line of `benchmarks.losses`, against a published formula, written out in float64.

A comment names the source of each formula. Gradients are compared as well, which shows what the authors detach.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amapo_loss import ScoreStatistics
from benchmarks.losses import LOSSES, Batch, Loss, dynamic_margins, made_up_batch
from tests.support.backends import on_gpu, triton_loss


def dpo_logits(b: Batch) -> Tensor:
    return (b.sums[0] - b.ref_sums[0]) - (b.sums[1] - b.ref_sums[1])


def simpo_logits(b: Batch) -> Tensor:
    return b.means[0] - b.means[1]


def dpo(b: Batch) -> Tensor:
    """2305.18290, equation 7."""
    return -F.logsigmoid(0.1 * dpo_logits(b))


def cdpo(b: Batch) -> Tensor:
    """eric-mitchell/direct-preference-optimization, trainers.py: preference_loss."""
    logits = 0.1 * dpo_logits(b)
    return -F.logsigmoid(logits) * 0.9 - F.logsigmoid(-logits) * 0.1


def length_normalized_dpo(b: Batch) -> Tensor:
    """2411.15124, equation 6; `dpo_norm` in allenai/open-instruct averages the reference's log-probs as well."""
    chosen, rejected = ((b.sums[i] - b.ref_sums[i]) / b.lengths[i] for i in (0, 1))
    return -F.logsigmoid(5.0 * chosen - 5.0 * rejected)


def r_dpo(b: Batch) -> Tensor:
    """The reward minus alpha |y|, put into DPO's derivation, adds alpha |y_w| - alpha |y_l| to the logit.

    This is how 2502.12982, equation 2, quotes 2403.19159. The gradient of pairs with a longer chosen response shrinks.
    """
    return -F.logsigmoid(0.1 * dpo_logits(b) + (0.05 * b.lengths[0] - 0.05 * b.lengths[1]))


def odpo(b: Batch) -> Tensor:
    """rycolab/odpo, trainers.py: the offset is not multiplied by beta."""
    offset = 1.0 * torch.log(b.ratings[0] - b.ratings[1])
    return -F.logsigmoid(0.5 * dpo_logits(b) - offset)


def beta_dpo(b: Batch) -> Tensor:
    """junkangwu/beta-DPO, trainers.py, without the filter: the gap in beta is not multiplied by beta."""
    gap = dpo_logits(b)
    beta = max(1e-3, 0.1 * (1 + 0.6 * (gap.mean().item() - b.mean_gap.item())))
    return -F.logsigmoid(beta * gap)


def wpo(b: Batch) -> Tensor:
    """2406.11827, equation 2, and wzhouad/WPO, run_wpo.py, whose weights are at most 1."""
    weights = (b.on_policy[0] * b.on_policy[1]).clamp(max=1).detach()
    return -weights * F.logsigmoid(0.01 * dpo_logits(b))


def cpo(b: Batch) -> Tensor:
    """2401.08417, the preference term."""
    return -F.logsigmoid(0.1 * b.sums[0] - 0.1 * b.sums[1])


def orpo(b: Batch) -> Tensor:
    """2403.07691, equations 6 and 7: odds(y) = P / (1 - P), with P the geometric mean of the token probabilities."""
    odds = [x.exp() / (1 - x.exp()) for x in b.means]
    return -F.logsigmoid(torch.log(odds[0] / odds[1]))


def simpo(b: Batch) -> Tensor:
    """2405.14734, equation 6."""
    return -F.logsigmoid(2.0 * b.means[0] - 2.0 * b.means[1] - 1.0)


def alpha_po(b: Batch) -> Tensor:
    """2501.03884, equation 4, as in its authors' pull request 3776 to TRL: r(y) = beta (1 - pi(y)^-alpha) / alpha."""
    rewards = [2.5 * (1 - x.exp() ** -0.25) / 0.25 for x in b.means]
    return -F.logsigmoid(rewards[0] - rewards[1] - 0.25)


def alpha_dpo(b: Batch) -> Tensor:
    """junkangwu/alpha-DPO, scripts/dpo_trainer.py, with the statistics of the batch and not their running average."""
    pi_logratios, ref_logratios = b.means[0] - b.means[1], b.ref_means[0] - b.ref_means[1]
    gap = pi_logratios - ref_logratios
    normalized = (gap - gap.mean()) / gap.std()
    constant = (normalized * 0.05 + 0.15).detach()
    return -F.logsigmoid(2.5 * (pi_logratios - constant))


def gamma_po_margins(r: Tensor, gamma: float, tau: float) -> Tensor:
    """Solve 2506.03690's problem: p minimizes mean(softplus(n gamma p - r)) + tau sum(p log(n p)) over the simplex.

    At the minimum, margin = c exp(-(gamma / tau) sigmoid(margin - r)) for every pair, and c makes the mean gamma.
    Both equations are solved by bisection, the inner one for all pairs at once.
    """

    def margins(c: float) -> Tensor:
        low, high = torch.zeros_like(r), torch.full_like(r, c)
        for _ in range(60):
            middle = (low + high) / 2
            too_low = middle < c * torch.exp(-(gamma / tau) * torch.sigmoid(middle - r))
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        return low

    low, high = gamma, gamma * math.exp(gamma / tau)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if margins(middle).mean() < gamma else (low, middle)
    return margins(low)


def gamma_po(b: Batch) -> Tensor:
    """sunjie279/gammaPO, scripts/simpo_trainer.py, on the batch alone: its authors also draw from earlier scores."""
    r = 10.0 * simpo_logits(b)
    return -F.logsigmoid(r - gamma_po_margins(r.detach(), 3.0, 3.0))


def amapo(b: Batch) -> Tensor:
    """2511.09385, section 4."""
    r = 2.0 * simpo_logits(b)
    mu, sigma = r.mean().detach(), r.std().detach()
    gamma = torch.clamp((mu - r.detach()) / sigma * mu, min=0)
    return -F.logsigmoid(r - torch.where(gamma > 0, 2.0 * torch.exp(gamma), 0))


def amapo_released(b: Batch) -> Tensor:
    """Its authors' trainer: the statistics are those of the difference without beta."""
    d = simpo_logits(b)
    z = ((d.mean() - d) / d.std()).detach()
    return -F.logsigmoid(2.0 * d - torch.where(z > 0, 2.0 * torch.exp(z * d.mean().detach()), 0))


def llama_2_reward_model(b: Batch) -> Tensor:
    """2307.09288, equation 2 and table 27: the margin is 0, 1/3, 2/3 or 1, from negligibly to significantly better."""
    margin = torch.tensor([0, 1 / 3, 2 / 3, 1], dtype=torch.float64)[(b.ratings[0] - b.ratings[1]).long() - 1]
    return -F.logsigmoid(b.rewards[0] - b.rewards[1] - margin)


FORMULAS: dict[str, Callable[[Batch], Tensor]] = {
    "DPO": dpo,
    "cDPO": cdpo,
    "length-normalized DPO": length_normalized_dpo,
    "R-DPO": r_dpo,
    "ODPO": odpo,
    "beta-DPO": beta_dpo,
    "WPO": wpo,
    "Llama 2's reward model": llama_2_reward_model,
    "CPO": cpo,
    "ORPO": orpo,
    "SimPO": simpo,
    "AlphaPO": alpha_po,
    "alpha-DPO": alpha_dpo,
    "gamma-PO": gamma_po,
    "AMaPO, paper": amapo,
    "AMaPO, released code": amapo_released,
}


def with_gradients(batch: Batch, device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Batch, list[Tensor]]:
    """Return a copy of the batch, and the leaves that its sums, means and rewards are computed from."""
    *pairs, mean_gap = batch
    sums, means, *others = ([x.to(device, dtype, copy=True) for x in both] for both in pairs)
    lengths, rewards = others[2], others[4]
    leaves = [x.requires_grad_() for x in sums + rewards]
    means = [x / length for x, length in zip(sums, lengths)]
    return Batch._make([*map(tuple, (sums, means, *others)), mean_gap.to(device, dtype)]), leaves


def loss_and_gradients(losses: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, retain_graph=True)
    return [x.detach().cpu().double() for x in (losses, *gradients) if x is not None]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=on_gpu)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_the_line_computes_the_formula_of_the_paper(loss: Loss, seed: int, backend: str) -> None:
    batch, leaves = with_gradients(made_up_batch(60, seed, torch.float64))
    expected = loss_and_gradients(FORMULAS[loss.name](batch), leaves)
    # 20 steps of gamma-PO's iteration leave an error of about 1e-6, as in its authors' code.
    tolerance = 1e-5 if loss.name == "gamma-PO" else 1e-12
    if backend == "triton":
        batch, leaves = with_gradients(made_up_batch(60, seed, torch.float64), triton_loss.device, torch.float32)
        tolerance = 1e-4
    actual = loss_and_gradients(loss(batch, reduction="none", backend=backend).loss, leaves)
    assert len(actual) == len(expected)
    for x, expected_x in zip(actual, expected):
        assert expected_x.any()
        torch.testing.assert_close(x, expected_x, rtol=tolerance, atol=tolerance * expected_x.abs().max().item())


def test_every_loss_has_a_formula() -> None:
    assert [loss.name for loss in LOSSES] == list(FORMULAS)


def test_the_margins_of_gamma_po_have_the_given_mean_and_grow_with_the_score() -> None:
    scores = torch.linspace(-3, 3, 50, dtype=torch.float64)
    margins = dynamic_margins(gamma=0.5, tau=2.0)(scores, ScoreStatistics.of(scores))
    assert margins.mean().item() == pytest.approx(0.5)
    assert torch.all(margins.diff() > 0)
    torch.testing.assert_close(margins, gamma_po_margins(scores, 0.5, 2.0), rtol=1e-5, atol=0)
