"""The value that chooses a margin, and the margins themselves on worked examples."""

import dataclasses
import math

import pytest
import torch

from amapo_loss import AdaptiveMargin, amapo_loss

CHOSEN = torch.tensor([0.8, -0.2, 1.4]) / 2  # scores at beta = 2: mean 2/3, std 0.8082904
MU, SIGMA = 2 / 3, 0.8082904
Z = [(MU - r) / SIGMA for r in (0.8, -0.2, 1.4)]  # -, +, -


def test_is_a_frozen_hashable_value() -> None:
    assert {AdaptiveMargin(), AdaptiveMargin("paper", True, "exp", True)} == {AdaptiveMargin()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdaptiveMargin().clip = False  # type: ignore[misc]


EXP = [2 * math.exp(z * MU) for z in Z]
EXP_RELEASED = [2 * math.exp(z * MU / 2) for z in Z]


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (AdaptiveMargin(), [0, EXP[1], 0]),
        (AdaptiveMargin(clip=False), EXP),
        (AdaptiveMargin(scaling="linear"), [0, Z[1] * MU, 0]),
        (AdaptiveMargin(scaling="linear", clip=False), [z * MU for z in Z]),
        (AdaptiveMargin(normalize=False), [0, 2 * math.exp(MU), 0]),
        (AdaptiveMargin(normalize=False, clip=False), [2, 2 * math.exp(MU), 2]),
        (AdaptiveMargin(normalize=False, scaling="linear"), [0, MU, 0]),
        (AdaptiveMargin("released"), [0, EXP_RELEASED[1], 0]),
        (AdaptiveMargin("released", clip=False), EXP_RELEASED),
        (AdaptiveMargin("released", scaling="linear"), [0, 2 * Z[1] * MU / 2, 0]),
        (AdaptiveMargin("released", normalize=False), [0, 2 * math.exp(MU / 2), 0]),
        (AdaptiveMargin("released", normalize=False, scaling="linear"), [0, MU, 0]),
    ],
)
def test_by_hand(margin: AdaptiveMargin, expected: list[float]) -> None:
    margins = amapo_loss(CHOSEN, torch.zeros(3), beta=2.0, margin=margin).diagnostics.margins
    torch.testing.assert_close(margins, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_formulas_part_where_the_batch_mean_is_negative() -> None:
    """The paper's gate opens for the pairs above a negative mean, the released one stays on those below."""
    paper, released = (
        amapo_loss(-CHOSEN, torch.zeros(3), margin=AdaptiveMargin(formula)).diagnostics.margins
        for formula in ("paper", "released")
    )
    assert (paper > 0).tolist() == [False, True, False]
    assert (released > 0).tolist() == [True, False, True]
    assert paper[1] > 2 > released[[0, 2]].max()  # beta is 2


def test_z_does_not_depend_on_beta() -> None:
    """The released margin over beta is a function of the log-probs alone, to the last bit."""
    chosen = torch.randn(64, generator=torch.Generator().manual_seed(0))
    margins = [
        amapo_loss(chosen, torch.zeros(64), beta=beta, margin=AdaptiveMargin("released")).diagnostics.margins / beta
        for beta in (0.5, 1.0, 4.0)
    ]
    assert torch.equal(margins[0], margins[1])
    assert torch.equal(margins[1], margins[2])
