"""The diagnostics: their keys, their values on one batch by hand, empty groups, and non-finite pairs.

test_oracle.py compares the values on generated batches.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amapo_loss import ScoreStatistics, ScoreWindow, Totals, amapo_loss, dpo_loss
from tests.support.backends import OnBackend, every_backend
from tests.support.generators import Batch, Options, batches, examples, float32_logps, loss_options, random_logps

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
    "amapo/left_out",
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
        "amapo/left_out": 0.0,
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
    assert abs(summary["amapo/score_mean"]) < 10, "the summary has the mean of the pairs"


@every_backend
def test_the_summary_counts_nonfinite_pairs(loss_fn: OnBackend) -> None:
    chosen, rejected = (x.detach().clone() for x in random_logps(6))
    chosen[1], rejected[4], chosen[5] = float("nan"), float("inf"), float("-inf")
    assert loss_fn(chosen, rejected).diagnostics.summary()["amapo/nonfinite"] == 3


@every_backend
def test_the_weighted_summary_has_the_values_computed_by_hand(loss_fn: OnBackend) -> None:
    """The scores are 0.8, -0.2 and 1.4, as above, and the weights 1, 3 and 4, whose sum is 8."""
    chosen, rejected = torch.tensor([-1.0, -1.2, -0.9]), torch.tensor([-1.4, -1.1, -1.6])
    summary = loss_fn(chosen, rejected, beta=2.0, weights=torch.tensor([1.0, 3.0, 4.0])).diagnostics.summary()
    expected = {
        "rewards/chosen": 2 * (-1.0 * 1 - 1.2 * 3 - 0.9 * 4) / 8,
        "rewards/rejected": 2 * (-1.4 * 1 - 1.1 * 3 - 1.6 * 4) / 8,
        "rewards/accuracies": (1 + 4) / 8,
        "rewards/margins": (0.8 * 1 - 0.2 * 3 + 1.4 * 4) / 8,
        "logps/chosen": (-1.0 * 1 - 1.2 * 3 - 0.9 * 4) / 8,
        "logps/rejected": (-1.4 * 1 - 1.1 * 3 - 1.6 * 4) / 8,
        "amapo/score_mean": 2 / 3,  # like the standard deviation, not weighted
        "amapo/score_std": 0.80829,
        "amapo/margin_mean": 4.08762 * 3 / 8,
        "amapo/margin_max": 4.08762,
        "amapo/margin_active": 3 / 8,
        "amapo/margin_accuracies": (1 + 4) / 8,
        "amapo/gradient_weight_correct": (0.310026 * 1 + 0.197816 * 4) / 5,
        "amapo/gradient_weight_misranked": 0.986449,
        "amapo/nonfinite": 0.0,
        "amapo/left_out": 0.0,
    }
    assert {name: value.item() for name, value in summary.items()} == pytest.approx(expected, abs=2e-5)


def test_dpo_has_the_same_diagnostics() -> None:
    policy, ref = random_logps(8), random_logps(8, seed=1)
    _, diagnostics = dpo_loss(policy[0], policy[1], ref[0], ref[1], beta=0.1)
    torch.testing.assert_close(diagnostics.chosen_rewards, 0.1 * (policy[0] - ref[0]).detach())
    torch.testing.assert_close(diagnostics.statistics.mean, diagnostics.scores.mean())
    assert sorted(diagnostics.summary()) == sorted(KEYS)


@every_backend
@examples()
@given(
    batches(),
    loss_options,
    st.lists(st.floats(0, 1), max_size=6),
    st.sampled_from(["none", "bool", "numbers"]),
    st.integers(0, 2**31),
)
def test_the_summary_of_any_split_is_that_of_the_whole_set(
    loss_fn: OnBackend, batch: Batch, options: Options, cuts: list[float], weights_kind: str, seed: int
) -> None:
    """The parts have supplied statistics, so that their margins do not depend on the split."""
    inputs, n = float32_logps(batch), len(batch[0])
    drawn = 4 * torch.rand(n, generator=torch.Generator().manual_seed(seed)) - 1
    weights = {"none": None, "bool": drawn > 0, "numbers": drawn.clamp(min=0)}[weights_kind]
    statistics = loss_fn(*inputs, **options).diagnostics.statistics
    whole = loss_fn(*inputs, **options, statistics=statistics, weights=weights).diagnostics
    bounds = [0, *sorted(int(cut * n) for cut in cuts), n]
    parts = []
    for start, stop in pairwise(bounds):
        part = slice(start, stop)
        masked = None if weights is None else weights[part]
        parts.append(loss_fn(*(x[part] for x in inputs), **options, statistics=statistics, weights=masked).diagnostics)
    summary = sum((part.totals() for part in parts), start=Totals.none()).summary()
    # Sums of float32 columns round differently if they are split; a pair at the gate may have either margin.
    scores = whole.scores
    limit = 4 * torch.finfo(torch.float32).eps * scores.abs().max()
    at_gate = ((scores - statistics.mean).abs() <= limit) | (statistics.mean.abs() <= limit)
    at_gate |= statistics.std <= 20 * torch.finfo(torch.float32).eps * options["beta"] * max(
        x.abs().max() for x in inputs
    )
    for key, expected in whole.summary().items():
        if at_gate.any() and key.startswith(("amapo/margin_", "amapo/gradient")):
            continue
        largest = max(1.0, *(x.abs().max().item() for x in (*inputs, scores, whole.margins)))
        assert summary[key].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5 * largest), key


def test_adding_no_totals_changes_nothing() -> None:
    totals = amapo_loss(*random_logps(5)).diagnostics.totals()
    for other in (totals + Totals.none(), Totals.none() + totals, totals.reduced(None)):
        assert torch.equal(other.values, totals.values)
    assert all(value == 0 for value in Totals.none().summary().values())
    empty = amapo_loss(*random_logps(0)).diagnostics.totals()
    assert torch.equal((empty + totals).values, totals.values)


@every_backend
def test_a_nan_in_one_part_shows_in_the_summary_of_all(loss_fn: OnBackend) -> None:
    chosen, rejected = (x.detach().clone() for x in random_logps(6))
    chosen[1] = torch.nan
    parts = [loss_fn(chosen[part], rejected[part]).diagnostics.totals() for part in (slice(3), slice(3, 6))]
    summary = (parts[0] + parts[1]).summary()
    assert summary["amapo/nonfinite"] == 1
    assert summary["amapo/margin_max"].isnan()
    assert summary["rewards/margins"].isnan()
