"""The module `AMaPOLoss`, called as OpenRLHF and torchtune call their DPO losses."""

import copy
import dataclasses
import inspect
import io
import json
import re
from typing import Any

import pytest
import torch
from typing_extensions import assert_type

from amapo_loss import AdaptiveMargin, AMaPOLoss, ScoreWindow, amapo_loss
from tests.support.generators import random_logps, score_statistics


def test_openrlhf_can_call_it_in_place_of_its_dpo_loss() -> None:
    """OpenRLHF runs `loss, chosen_reward, reject_reward = loss_fn(chosen, rejected, ref_chosen, ref_rejected)`."""
    policy, ref = random_logps(6), random_logps(6, seed=1)
    loss_fn = AMaPOLoss(0.1, label_smoothing=0.05)
    results = loss_fn(policy[0], policy[1], ref[0], ref[1])
    assert_type(results, tuple[torch.Tensor, torch.Tensor, torch.Tensor])  # `make lint` checks this
    loss, chosen_reward, rejected_reward = results
    expected = amapo_loss(policy[0], policy[1], ref[0], ref[1], beta=0.1, label_smoothing=0.05)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(chosen_reward, expected.diagnostics.chosen_rewards)
    assert torch.equal(rejected_reward, expected.diagnostics.rejected_rewards)
    loss.backward()
    assert policy[0].grad is not None


def test_torchtune_can_call_it_in_place_of_its_dpo_loss() -> None:
    """torchtune 0.6 runs `loss, chosen_rewards, rejected_rewards = loss_fn(...)` and then `loss = loss.mean()`."""
    policy, ref = random_logps(6), random_logps(6, seed=1)
    expected = amapo_loss(*policy, *ref, beta=0.1)
    for reduction in ("mean", "none"):
        loss, chosen_rewards, rejected_rewards = AMaPOLoss(beta=0.1, reduction=reduction)(*policy, *ref)
        torch.testing.assert_close(loss.mean(), expected.loss)
        assert torch.equal(chosen_rewards > rejected_rewards, expected.diagnostics.scores > 0)


def test_accepts_log_probs_and_lengths_by_keyword() -> None:
    chosen, rejected = random_logps(6)
    lengths = {"chosen_lengths": torch.arange(1, 7), "rejected_lengths": torch.arange(2, 8)}
    loss, *_ = AMaPOLoss()(policy_chosen_logps=chosen, policy_rejected_logps=rejected, **lengths)
    assert torch.equal(loss, amapo_loss(chosen, rejected, **lengths).loss)


def test_has_every_option_of_amapo_loss_with_the_same_default() -> None:
    tensors = [
        "chosen_logps",
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "chosen_lengths",
        "rejected_lengths",
        "weights",
    ]
    function = inspect.signature(amapo_loss).parameters
    module = inspect.signature(AMaPOLoss).parameters
    flat = {"ipo", "statistics_window", *(field.name for field in dataclasses.fields(AdaptiveMargin))}
    assert [name for name in module if name not in flat] == [name for name in function if name not in tensors]
    defaults = {name: module[name].default for name in module if name not in flat}
    assert defaults | {"margin": AdaptiveMargin()} == {name: function[name].default for name in defaults}
    assert AMaPOLoss().margin == AdaptiveMargin()


def test_takes_the_options_of_the_margin_and_the_window_one_by_one() -> None:
    """Configuration files can only give flat values, here those of JSON."""
    options = json.loads(
        '{"beta": 3, "formula": "released", "scaling": "linear", "floor": 0.5, "statistics_window": 16}'
    )
    loss_fn = AMaPOLoss(**options)
    assert loss_fn.margin == AdaptiveMargin("released", scaling="linear", floor=0.5)
    assert isinstance(loss_fn.statistics, ScoreWindow)
    assert loss_fn.state_dict()["statistics._extra_state"].shape == (17,)


def test_is_constructed_as_the_dpo_loss_of_openrlhf() -> None:
    """OpenRLHF runs `DPOLoss(self.args.beta, self.args.label_smoothing, self.args.ipo)`."""
    loss_fn = AMaPOLoss(0.1, 0.05, False)
    assert (loss_fn.beta, loss_fn.label_smoothing, loss_fn.margin) == (0.1, 0.05, AdaptiveMargin())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipo": True}, "ipo must be False, because IPO is another loss, got True"),
        ({"margin": 0.5, "formula": "paper"}, "formula was given beside margin: pass one of the two"),
        ({"margin": AdaptiveMargin(), "floor": 0.0}, "floor was given beside margin: pass one of the two"),
        ({"statistics_window": 4, "statistics": ScoreWindow(4)}, "statistics_window was given beside statistics: pass"),
        ({"statistics_window": 0}, "statistics_window must be at least 1, got 0"),
        ({"formula": "papers"}, "formula must be one of 'paper', 'released', got 'papers'"),
    ],
)
def test_rejects_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AMaPOLoss(**options)


def test_passes_every_option_to_amapo_loss() -> None:
    inputs = random_logps(6)
    options = {
        "beta": 1.5,
        "label_smoothing": 0.1,
        "margin": AdaptiveMargin("released", scaling="linear"),
        "statistics": score_statistics(0.2, 1.3),
        "reduction": "none",
        "backend": "torch",
    }
    assert torch.equal(AMaPOLoss(**options)(*inputs)[0], amapo_loss(*inputs, **options).loss)


def test_margins_of_a_call_replace_those_of_the_module() -> None:
    loss_fn, inputs, margins = AMaPOLoss(margin=0.3), random_logps(6), torch.linspace(0, 1, 6)
    assert torch.equal(loss_fn(*inputs, margin=margins)[0], amapo_loss(*inputs, margin=margins).loss)
    assert torch.equal(loss_fn(*inputs)[0], amapo_loss(*inputs, margin=0.3).loss)


def test_beta_may_change_from_call_to_call() -> None:
    loss_fn, inputs = AMaPOLoss(), random_logps(6)
    loss_fn.beta = torch.tensor(0.7)
    assert torch.equal(loss_fn(*inputs)[0], amapo_loss(*inputs, beta=0.7).loss)


def test_keeps_the_diagnostics_of_the_last_call() -> None:
    loss_fn = AMaPOLoss()
    assert loss_fn.diagnostics is None
    loss_fn(*random_logps(4))
    loss_fn(*random_logps(6))
    assert loss_fn.diagnostics is not None
    assert loss_fn.diagnostics.scores.shape == (6,)


def test_shows_its_options_and_has_no_state() -> None:
    loss_fn = AMaPOLoss(beta=3.0)
    assert "beta=3.0" in repr(loss_fn)
    assert not loss_fn.state_dict()


def test_a_compiled_module_can_be_copied_and_saved() -> None:
    """`module.compile()` keeps a compiled function in the module, which nn.Module leaves out of both."""
    loss_fn = AMaPOLoss()
    loss_fn.compile(backend="eager")
    expected, *_ = loss_fn(*random_logps(4))
    loss, *_ = copy.deepcopy(loss_fn)(*random_logps(4))
    assert torch.equal(loss, expected)
    torch.save(loss_fn, io.BytesIO())
