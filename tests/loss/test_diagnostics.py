"""The diagnostics: their keys, their values on one batch by hand, empty groups, and non-finite pairs.

test_oracle.py compares the values on generated batches.
"""

import pytest
import torch

from amapo_loss import ScoreStatistics, ScoreWindow, dpo_loss
from tests.support.backends import OnBackend, every_backend
from tests.support.generators import random_logps

KEYS = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "amapo/score_mean",
    "amapo/score_std",
    "amapo/margin_mean",
    "amapo/margin_max",
    "amapo/margin_active",
    "amapo/margin_accuracies",
    "amapo/gradient_weight_correct",
    "amapo/gradient_weight_misranked",
    "amapo/nonfinite",
]


@every_backend
@pytest.mark.parametrize("prefix", ["", "eval_"])
def test_the_summary_has_these_keys_with_any_prefix(loss_fn: OnBackend, prefix: str) -> None:
    summary = loss_fn(*random_logps(5), statistics=ScoreWindow(8)).diagnostics.summary(prefix)
    assert sorted(summary) == sorted(prefix + key for key in KEYS)
    assert all(value.ndim == 0 and value.dtype == torch.float32 for value in summary.values())


@every_backend
def test_the_summary_has_the_values_computed_by_hand(loss_fn: OnBackend) -> None:
    """The scores are 0.8, -0.2 and 1.4. The reference changes only the rewards. Only pair 1 gets a margin."""
    chosen, rejected = torch.tensor([-1.0, -1.2, -0.9]), torch.tensor([-1.4, -1.1, -1.6])
    ref = torch.full((3,), -0.5)
    summary = loss_fn(chosen, rejected, ref, ref, beta=2.0).diagnostics.summary()
    # mean = (0.8 - 0.2 + 1.4) / 3 = 2 / 3
    # std = sqrt((0.13333**2 + 0.86667**2 + 0.73333**2) / (3 - 1)) = 0.80829
    # margin of pair 1 = 2 * exp((2 / 3 + 0.2) / 0.80829 * 2 / 3) = 4.08762
    # gradient weights = sigmoid(-0.8), sigmoid(4.08762 + 0.2), sigmoid(-1.4) = 0.310026, 0.986449, 0.197816
    expected = {
        "rewards/chosen": 2 * (-3.1 / 3 + 0.5),
        "rewards/rejected": 2 * (-4.1 / 3 + 0.5),
        "rewards/accuracies": 2 / 3,
        "rewards/margins": 2 / 3,
        "logps/chosen": -3.1 / 3,
        "logps/rejected": -4.1 / 3,
        "amapo/score_mean": 2 / 3,
        "amapo/score_std": 0.80829,
        "amapo/margin_mean": 4.08762 / 3,
        "amapo/margin_max": 4.08762,
        "amapo/margin_active": 1 / 3,
        "amapo/margin_accuracies": 2 / 3,
        "amapo/gradient_weight_correct": (0.310026 + 0.197816) / 2,
        "amapo/gradient_weight_misranked": 0.986449,
        "amapo/nonfinite": 0.0,
    }
    assert {name: value.item() for name, value in summary.items()} == pytest.approx(expected, abs=2e-5)


@every_backend
def test_the_mean_weight_of_an_empty_group_is_zero(loss_fn: OnBackend) -> None:
    lower, higher = torch.zeros(3), torch.ones(3)
    all_misranked = loss_fn(lower, higher).diagnostics.summary()
    all_correct = loss_fn(higher, lower).diagnostics.summary()
    assert all_misranked["amapo/gradient_weight_correct"] == 0
    assert all_correct["amapo/gradient_weight_misranked"] == 0
    assert all_misranked["rewards/accuracies"] == 0
    assert all_correct["rewards/accuracies"] == 1


@every_backend
def test_a_pair_with_score_zero_is_misranked(loss_fn: OnBackend) -> None:
    summary = loss_fn(torch.zeros(2), torch.zeros(2)).diagnostics.summary()
    assert summary["rewards/accuracies"] == 0
    assert summary["amapo/gradient_weight_misranked"] == 0.5


@every_backend
def test_margin_accuracies_use_the_statistics_of_the_margins(loss_fn: OnBackend) -> None:
    supplied = ScoreStatistics(torch.tensor(100.0), torch.tensor(1.0), torch.tensor(8))
    summary = loss_fn(*random_logps(6), statistics=supplied).diagnostics.summary()
    assert summary["amapo/margin_accuracies"] == 0
    assert summary["amapo/score_mean"] == 100


@every_backend
def test_the_summary_counts_nonfinite_pairs(loss_fn: OnBackend) -> None:
    chosen, rejected = (x.detach().clone() for x in random_logps(6))
    chosen[1], rejected[4], chosen[5] = float("nan"), float("inf"), float("-inf")
    assert loss_fn(chosen, rejected).diagnostics.summary()["amapo/nonfinite"] == 3


def test_dpo_has_the_same_diagnostics() -> None:
    policy, ref = random_logps(8), random_logps(8, seed=1)
    _, diagnostics = dpo_loss(policy[0], policy[1], ref[0], ref[1], beta=0.1)
    torch.testing.assert_close(diagnostics.chosen_rewards, 0.1 * (policy[0] - ref[0]).detach())
    torch.testing.assert_close(diagnostics.statistics.mean, diagnostics.scores.mean())
    assert sorted(diagnostics.summary()) == sorted(KEYS)
