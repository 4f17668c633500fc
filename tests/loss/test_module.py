"""The module `AMaPOLoss`, called as OpenRLHF and torchtune call their DPO losses."""

import copy
import inspect
import io

import torch

from amapo_loss import AdaptiveMargin, AMaPOLoss, amapo_loss
from tests.support.generators import random_logps, score_statistics


def test_openrlhf_can_call_it_in_place_of_its_dpo_loss() -> None:
    """OpenRLHF runs `loss, chosen_reward, reject_reward = loss_fn(chosen, rejected, ref_chosen, ref_rejected)`."""
    policy, ref = random_logps(6), random_logps(6, seed=1)
    loss_fn = AMaPOLoss(0.1, label_smoothing=0.05)
    loss, chosen_reward, rejected_reward = loss_fn(policy[0], policy[1], ref[0], ref[1])
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
    assert list(module) == [name for name in function if name not in tensors]
    assert {name: module[name].default for name in module} == {name: function[name].default for name in module}


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
