"""The value `AdaptiveMargin`, and the margins of every combination of its options on three pairs."""

import dataclasses
import math

import pytest
import torch

from amapo_loss import AdaptiveMargin, amapo_loss

SCORES = [0.8, -0.2, 1.4]
CHOSEN = torch.tensor(SCORES) / 2  # with beta = 2 and rejected log-probs of 0, the scores are SCORES
MEAN = 2 / 3  # (0.8 - 0.2 + 1.4) / 3
STD = 0.8082904  # sqrt((0.1333**2 + 0.8667**2 + 0.7333**2) / (3 - 1))
Z = [(MEAN - r) / STD for r in SCORES]  # negative, positive, negative


def test_adaptive_margin_is_a_frozen_hashable_value() -> None:
    assert {AdaptiveMargin(), AdaptiveMargin("paper", True, "exp", True)} == {AdaptiveMargin()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdaptiveMargin().clip = False  # type: ignore[misc]


EXP = [2 * math.exp(z * MEAN) for z in Z]
EXP_RELEASED = [2 * math.exp(z * MEAN / 2) for z in Z]


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (AdaptiveMargin(), [0, EXP[1], 0]),
        (AdaptiveMargin(clip=False), EXP),
        (AdaptiveMargin(scaling="linear"), [0, Z[1] * MEAN, 0]),
        (AdaptiveMargin(scaling="linear", clip=False), [z * MEAN for z in Z]),
        (AdaptiveMargin(normalize=False), [0, 2 * math.exp(MEAN), 0]),
        (AdaptiveMargin(normalize=False, clip=False), [2, 2 * math.exp(MEAN), 2]),
        (AdaptiveMargin(normalize=False, scaling="linear"), [0, MEAN, 0]),
        (AdaptiveMargin("released"), [0, EXP_RELEASED[1], 0]),
        (AdaptiveMargin("released", clip=False), EXP_RELEASED),
        (AdaptiveMargin("released", scaling="linear"), [0, 2 * Z[1] * MEAN / 2, 0]),
        (AdaptiveMargin("released", normalize=False), [0, 2 * math.exp(MEAN / 2), 0]),
        (AdaptiveMargin("released", normalize=False, scaling="linear"), [0, MEAN, 0]),
        (AdaptiveMargin(floor=0.5), [0.5, EXP[1], 0.5]),
        (AdaptiveMargin("released", floor=0.5), [0.5, EXP_RELEASED[1], 0.5]),
    ],
)
def test_every_option_gives_the_margins_of_its_equation(margin: AdaptiveMargin, expected: list[float]) -> None:
    margins = amapo_loss(CHOSEN, torch.zeros(3), beta=2.0, margin=margin).diagnostics.margins
    torch.testing.assert_close(margins, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_formulas_give_margins_to_opposite_pairs_if_the_mean_is_negative() -> None:
    """The paper's formula gives them to the pairs above a negative mean, the released formula to the pairs below it."""
    paper, released = (
        amapo_loss(-CHOSEN, torch.zeros(3), margin=AdaptiveMargin(formula)).diagnostics.margins
        for formula in ("paper", "released")
    )
    assert (paper > 0).tolist() == [False, True, False]
    assert (released > 0).tolist() == [True, False, True]
    assert (
        paper[1] > 2 > released[[0, 2]].max()
    )  # above beta = 2 with a positive exponent, below it with a negative one


def test_z_does_not_depend_on_beta() -> None:
    """The released margin divided by beta depends only on the log-probs. Powers of two keep every bit the same."""
    chosen = torch.randn(64, generator=torch.Generator().manual_seed(0))
    margins = [
        amapo_loss(chosen, torch.zeros(64), beta=beta, margin=AdaptiveMargin("released")).diagnostics.margins / beta
        for beta in (0.5, 1.0, 4.0)
    ]
    assert torch.equal(margins[0], margins[1])
    assert torch.equal(margins[1], margins[2])
