"""The method on batches of one to three pairs, worked out with a pocket calculator. Read this file first.

Every example goes through the same steps, with beta = 2 and without a reference model:

    score       r = beta * (chosen_logps - rejected_logps)      a pair is ranked correctly if r > 0
    statistics  mean and std of the scores of the batch         std divides by the number of pairs minus 1
    z           z = (mean - r) / std                            z > 0 for the pairs below the mean
    exponent    "paper": z * mean                               "released": z * mean / beta
    gate        "paper": open if exponent > 0                   "released": open if z > 0
    margin      h = beta * exp(exponent) if the gate is open, else h = 0
    loss        L = log(1 + exp(h - r)), averaged over the pairs
    weight      w = -dL/dr = sigmoid(h - r)
    gradient    d(mean of L) / d(chosen_logps) = -beta * w / (number of pairs); the margin is a constant here

The rejected log-probs have the same gradient with the opposite sign. The paper calls max(z * mean, 0) gamma: it is the
exponent of the "paper" formula where its gate is open, and 0 elsewhere.

Every line of arithmetic uses the rounded numbers of the lines above it.
"""

from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch

from amapo_loss import AdaptiveMargin, simpo_loss
from tests.support.backends import OnBackend, every_backend
from tests.support.oracle import oracle

BETA = 2.0


class WorkedExample(NamedTuple):
    """A batch and all numbers that follow from it, in the order of the steps above. A list has one entry per pair."""

    formula: Literal["paper", "released"]
    chosen_logps: list[float]
    rejected_logps: list[float]
    scores: list[float]
    mean: float
    std: float
    z: list[float]
    exponents: list[float]
    margins: list[float]
    losses: list[float]
    loss: float
    weights: list[float]
    grad_chosen: list[float]


# Pairs 0 and 2 are ranked correctly and lie above the mean, so they get no margin. Pair 1 is misranked and lies below
# the mean. Its margin of 4.4511 raises its weight from sigmoid(0.1) = 0.5250 to 0.9896.
POSITIVE_MEAN_PAPER = WorkedExample(
    formula="paper",
    chosen_logps=[-1.00, -1.25, -0.90],
    rejected_logps=[-1.50, -1.20, -1.50],
    # 2 * (-1.00 + 1.50) =  1.0
    # 2 * (-1.25 + 1.20) = -0.1
    # 2 * (-0.90 + 1.50) =  1.2
    scores=[1.0, -0.1, 1.2],
    # (1.0 - 0.1 + 1.2) / 3 = 0.7
    mean=0.7,
    # The scores deviate from the mean by 0.3, -0.8 and 0.5.
    # sqrt((0.3**2 + 0.8**2 + 0.5**2) / (3 - 1)) = sqrt(0.98 / 2) = 0.7
    std=0.7,
    # (0.7 - 1.0) / 0.7 = -0.4286
    # (0.7 + 0.1) / 0.7 =  1.1429
    # (0.7 - 1.2) / 0.7 = -0.7143
    z=[-0.4286, 1.1429, -0.7143],
    # -0.4286 * 0.7 = -0.3
    #  1.1429 * 0.7 =  0.8
    # -0.7143 * 0.7 = -0.5
    exponents=[-0.3, 0.8, -0.5],
    # The exponent is positive for pair 1 alone: 2 * exp(0.8) = 4.4511.
    margins=[0.0, 4.4511, 0.0],
    # log(1 + exp(0      - 1.0)) = 0.3133
    # log(1 + exp(4.4511 + 0.1)) = 4.5616
    # log(1 + exp(0      - 1.2)) = 0.2633
    losses=[0.3133, 4.5616, 0.2633],
    # (0.3133 + 4.5616 + 0.2633) / 3 = 1.7127
    loss=1.7127,
    # sigmoid(0      - 1.0) = 0.2689
    # sigmoid(4.4511 + 0.1) = 0.9896
    # sigmoid(0      - 1.2) = 0.2315
    weights=[0.2689, 0.9896, 0.2315],
    # -2 * 0.2689 / 3 = -0.1793
    # -2 * 0.9896 / 3 = -0.6597
    # -2 * 0.2315 / 3 = -0.1543
    grad_chosen=[-0.1793, -0.6597, -0.1543],
)

# The same pairs. With a positive mean, both formulas give a margin to the same pairs. The released exponent is smaller
# by the factor beta, because the authors' trainer multiplies z by the mean of chosen_logps - rejected_logps.
POSITIVE_MEAN_RELEASED = POSITIVE_MEAN_PAPER._replace(
    formula="released",
    # -0.4286 * 0.7 / 2 = -0.15
    #  1.1429 * 0.7 / 2 =  0.4
    # -0.7143 * 0.7 / 2 = -0.25
    exponents=[-0.15, 0.4, -0.25],
    # z is positive for pair 1 alone: 2 * exp(0.4) = 2.9836.
    margins=[0.0, 2.9836, 0.0],
    # log(1 + exp(2.9836 + 0.1)) = 3.1284
    losses=[0.3133, 3.1284, 0.2633],
    # (0.3133 + 3.1284 + 0.2633) / 3 = 1.2350
    loss=1.2350,
    # sigmoid(2.9836 + 0.1) = 0.9562
    weights=[0.2689, 0.9562, 0.2315],
    # -2 * 0.9562 / 3 = -0.6375
    grad_chosen=[-0.1793, -0.6375, -0.1543],
)

# The first example with chosen and rejected exchanged. The scores, their mean and z change their signs, so z * mean
# stays the same and the "paper" formula gives the same margin to the same pair. But this pair is now the only one that
# is ranked correctly. The misranked pairs 0 and 2 get no margin.
NEGATIVE_MEAN_PAPER = WorkedExample(
    formula="paper",
    chosen_logps=[-1.50, -1.20, -1.50],
    rejected_logps=[-1.00, -1.25, -0.90],
    # 2 * (-1.50 + 1.00) = -1.0
    # 2 * (-1.20 + 1.25) =  0.1
    # 2 * (-1.50 + 0.90) = -1.2
    scores=[-1.0, 0.1, -1.2],
    # (-1.0 + 0.1 - 1.2) / 3 = -0.7
    mean=-0.7,
    # The scores deviate from the mean by -0.3, 0.8 and -0.5.
    # sqrt((0.3**2 + 0.8**2 + 0.5**2) / (3 - 1)) = sqrt(0.98 / 2) = 0.7
    std=0.7,
    # (-0.7 + 1.0) / 0.7 =  0.4286
    # (-0.7 - 0.1) / 0.7 = -1.1429
    # (-0.7 + 1.2) / 0.7 =  0.7143
    z=[0.4286, -1.1429, 0.7143],
    #  0.4286 * -0.7 = -0.3
    # -1.1429 * -0.7 =  0.8
    #  0.7143 * -0.7 = -0.5
    exponents=[-0.3, 0.8, -0.5],
    # The exponent is positive for pair 1 alone: 2 * exp(0.8) = 4.4511.
    margins=[0.0, 4.4511, 0.0],
    # log(1 + exp(0      + 1.0)) = 1.3133
    # log(1 + exp(4.4511 - 0.1)) = 4.3639
    # log(1 + exp(0      + 1.2)) = 1.4633
    losses=[1.3133, 4.3639, 1.4633],
    # (1.3133 + 4.3639 + 1.4633) / 3 = 2.3802
    loss=2.3802,
    # sigmoid(0      + 1.0) = 0.7311
    # sigmoid(4.4511 - 0.1) = 0.9873
    # sigmoid(0      + 1.2) = 0.7685
    weights=[0.7311, 0.9873, 0.7685],
    # -2 * 0.7311 / 3 = -0.4874
    # -2 * 0.9873 / 3 = -0.6582
    # -2 * 0.7685 / 3 = -0.5123
    grad_chosen=[-0.4874, -0.6582, -0.5123],
)

# The same pairs. The released gate opens for z > 0, so it gives margins to the misranked pairs 0 and 2 instead.
NEGATIVE_MEAN_RELEASED = NEGATIVE_MEAN_PAPER._replace(
    formula="released",
    #  0.4286 * -0.7 / 2 = -0.15
    # -1.1429 * -0.7 / 2 =  0.4
    #  0.7143 * -0.7 / 2 = -0.25
    exponents=[-0.15, 0.4, -0.25],
    # z is positive for pairs 0 and 2. Their exponents are negative, so these margins are below beta.
    # 2 * exp(-0.15) = 1.7214
    # 2 * exp(-0.25) = 1.5576
    margins=[1.7214, 0.0, 1.5576],
    # log(1 + exp(1.7214 + 1.0)) = 2.7851
    # log(1 + exp(0      - 0.1)) = 0.6444
    # log(1 + exp(1.5576 + 1.2)) = 2.8191
    losses=[2.7851, 0.6444, 2.8191],
    # (2.7851 + 0.6444 + 2.8191) / 3 = 2.0829
    loss=2.0829,
    # sigmoid(1.7214 + 1.0) = 0.9383
    # sigmoid(0      - 0.1) = 0.4750
    # sigmoid(1.5576 + 1.2) = 0.9403
    weights=[0.9383, 0.4750, 0.9403],
    # -2 * 0.9383 / 3 = -0.6255
    # -2 * 0.4750 / 3 = -0.3167
    # -2 * 0.9403 / 3 = -0.6269
    grad_chosen=[-0.6255, -0.3167, -0.6269],
)

# Both pairs are ranked correctly. Pair 0 lies below the mean all the same, so it gets a margin.
CORRECT_BUT_BELOW_THE_MEAN = WorkedExample(
    formula="paper",
    chosen_logps=[-1.00, -1.00],
    rejected_logps=[-1.25, -1.75],
    # 2 * (-1.00 + 1.25) = 0.5
    # 2 * (-1.00 + 1.75) = 1.5
    scores=[0.5, 1.5],
    # (0.5 + 1.5) / 2 = 1.0
    mean=1.0,
    # The scores deviate from the mean by -0.5 and 0.5.
    # sqrt((0.5**2 + 0.5**2) / (2 - 1)) = sqrt(0.5) = 0.7071
    std=0.7071,
    # (1.0 - 0.5) / 0.7071 =  0.7071
    # (1.0 - 1.5) / 0.7071 = -0.7071
    z=[0.7071, -0.7071],
    #  0.7071 * 1.0 =  0.7071
    # -0.7071 * 1.0 = -0.7071
    exponents=[0.7071, -0.7071],
    # The exponent is positive for pair 0 alone: 2 * exp(0.7071) = 4.0562.
    margins=[4.0562, 0.0],
    # log(1 + exp(4.0562 - 0.5)) = 3.5843
    # log(1 + exp(0      - 1.5)) = 0.2014
    losses=[3.5843, 0.2014],
    # (3.5843 + 0.2014) / 2 = 1.8929
    loss=1.8929,
    # sigmoid(4.0562 - 0.5) = 0.9722
    # sigmoid(0      - 1.5) = 0.1824
    weights=[0.9722, 0.1824],
    # -2 * 0.9722 / 2 = -0.9722
    # -2 * 0.1824 / 2 = -0.1824
    grad_chosen=[-0.9722, -0.1824],
)

# One pair is its own mean and has no standard deviation. It is reported as 0, z counts as 0, and the margin is 0.
ONE_PAIR = WorkedExample(
    formula="paper",
    chosen_logps=[-1.00],
    rejected_logps=[-1.50],
    # 2 * (-1.00 + 1.50) = 1.0
    scores=[1.0],
    mean=1.0,
    std=0.0,
    z=[0.0],
    exponents=[0.0],
    margins=[0.0],
    # log(1 + exp(0 - 1.0)) = 0.3133
    losses=[0.3133],
    loss=0.3133,
    # sigmoid(0 - 1.0) = 0.2689
    weights=[0.2689],
    # -2 * 0.2689 / 1 = -0.5378
    grad_chosen=[-0.5378],
)

EXAMPLES = {
    "positive mean, paper": POSITIVE_MEAN_PAPER,
    "positive mean, released": POSITIVE_MEAN_RELEASED,
    "negative mean, paper": NEGATIVE_MEAN_PAPER,
    "negative mean, released": NEGATIVE_MEAN_RELEASED,
    "correct but below the mean": CORRECT_BUT_BELOW_THE_MEAN,
    "one pair": ONE_PAIR,
}
every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


def assert_close(
    actual: torch.Tensor | np.ndarray | float,
    written: list[float] | float,
) -> None:
    """Compare with numbers that are written with four decimals and computed from others of that kind."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    torch.testing.assert_close(actual, torch.tensor(written, dtype=torch.float64), rtol=0, atol=1e-4)


@every_backend
@every_example
def test_every_backend_gives_the_numbers_on_paper(loss_fn: OnBackend, example: WorkedExample) -> None:
    chosen = torch.tensor(example.chosen_logps, requires_grad=True)
    rejected = torch.tensor(example.rejected_logps, requires_grad=True)
    margin = AdaptiveMargin(formula=example.formula)
    loss, diagnostics = loss_fn(chosen, rejected, beta=BETA, margin=margin)
    losses = loss_fn(chosen, rejected, beta=BETA, margin=margin, reduction="none").loss
    loss.backward()

    assert_close(diagnostics.scores, example.scores)
    assert_close(diagnostics.statistics.mean, example.mean)
    assert_close(diagnostics.statistics.std, example.std)
    assert_close(diagnostics.margins, example.margins)
    assert_close(losses.detach(), example.losses)
    assert_close(loss.detach(), example.loss)
    assert_close(diagnostics.gradient_weights, example.weights)
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert_close(chosen.grad, example.grad_chosen)
    assert torch.equal(rejected.grad, -chosen.grad)


@every_backend
@every_example
def test_every_backend_gives_the_exponents_on_paper(loss_fn: OnBackend, example: WorkedExample) -> None:
    """Without the exponential function and the gate, the margin is z * mean with both formulas."""
    chosen, rejected = torch.tensor(example.chosen_logps), torch.tensor(example.rejected_logps)
    margin = AdaptiveMargin(formula=example.formula, scaling="linear", clip=False)
    z_times_mean = loss_fn(chosen, rejected, beta=BETA, margin=margin).diagnostics.margins
    assert_close(z_times_mean, [z * example.mean for z in example.z])
    assert_close(z_times_mean / (1 if example.formula == "paper" else BETA), example.exponents)


@every_example
def test_the_oracle_gives_the_numbers_on_paper(example: WorkedExample) -> None:
    """The oracle is the independent implementation in `tests.support.oracle`. Its results are intervals."""
    n = len(example.scores)
    expected = oracle(
        np.array(example.chosen_logps),
        np.array(example.rejected_logps),
        beta=BETA,
        margin=AdaptiveMargin(formula=example.formula),
        unit=2.0**-52,
    )
    assert_close(expected.summary["amapo/score_mean"][0], example.mean)
    assert_close(expected.summary["amapo/score_std"][0], example.std)
    for side in ("low", "high"):
        assert_close(getattr(expected.margins, side), example.margins)
        assert_close(getattr(expected.losses, side), example.losses)
        assert_close(getattr(expected.gradient_weights, side), example.weights)
        assert_close(getattr(expected.gradients[0], side) / n, example.grad_chosen)


@every_backend
def test_one_pair_alone_has_the_loss_of_simpo_without_a_margin(loss_fn: OnBackend) -> None:
    chosen, rejected = torch.tensor(ONE_PAIR.chosen_logps), torch.tensor(ONE_PAIR.rejected_logps)
    assert_close(loss_fn(chosen, rejected, beta=BETA).loss, 0.3133)
    assert_close(simpo_loss(chosen, rejected, beta=BETA, gamma=0.0).loss, 0.3133)
