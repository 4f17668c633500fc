"""The memory accesses of all kernels, watched in Triton's interpreter: none is out of bounds, and none races."""

from unittest.mock import patch

import pytest
import torch

from amapo_loss import amapo_loss
from amapo_loss.kernels import online_lse, pair_loss
from amapo_loss.logps._online_lse import OnlineLSE
from tests.support.backends import GPU, OnBackend, triton_loss, two_launches
from tests.support.watch import watched

pytestmark = pytest.mark.skipif(GPU, reason="the interpreter runs without a GPU; compute-sanitizer watches one")


@pytest.mark.parametrize("with_optional", [False, True])
@pytest.mark.parametrize(
    ("loss_fn", "n"), [(triton_loss, n) for n in (0, 1, 7, 32, 129)] + [(two_launches, n) for n in (17, 256, 700, 1100)]
)
def test_the_loss_accesses_memory_without_races(loss_fn: OnBackend, n: int, with_optional: bool) -> None:
    logps = [torch.randn(3 * n)[::3].requires_grad_() for _ in range(4)]
    lengths = torch.arange(n)
    options = {"chosen_lengths": lengths, "rejected_lengths": lengths, "weights": torch.rand(n), "reduction": "none"}
    with watched() as problems:
        loss_fn(*logps[: 4 if with_optional else 2], **(options if with_optional else {}))
        with torch.no_grad():
            loss_fn(*logps[:2], margin=torch.rand(n))
    assert not problems


def test_the_moments_access_memory_without_races() -> None:
    with watched() as problems, patch.object(pair_loss, "BLOCK_PAIRS", 128):
        pair_loss._launch_moments(*torch.randn(2, 300), *[None] * 6, beta=2.0)
    assert not problems


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("v", [5, 128, 300])
def test_tiles_of_logits_are_accessed_without_races(v: int, dtype: torch.dtype) -> None:
    """The gradient overwrites the logits. With smaller elements, only the barrier prevents a race."""
    for count_barriers in (True, False):
        z = torch.randn(6, v + 4 - v % 2)[:, :v]
        state = OnlineLSE.start(torch.tensor([0, v - 1, -1, 3, 2, 1]), torch.float32)
        with watched(count_barriers) as problems, patch.object(online_lse, "MAX_BLOCK", 128):
            online_lse.update(*state, z, 0, None, 1.0, None)
            grad_z = z.view(dtype)[:, :v]
            online_lse.write_gradient(
                grad_z, z, state.target_ids, state.max_rest, 0, torch.randn(v), 0.5, 30.0, *torch.ones(2, 6), False
            )
        race = "_gradient_kernel: a lane stores what another one loads, without a barrier between them"
        assert problems == ([] if count_barriers or dtype == torch.float32 else [race])


def test_the_watch_finds_an_access_out_of_bounds() -> None:
    chosen, rejected = torch.randn(2, 9)
    outputs = pair_loss._allocate_outputs(chosen[:8], "mean", True)  # one entry too few
    with watched() as problems, patch.object(pair_loss, "_allocate_outputs", lambda *_: outputs):
        amapo_loss(chosen.requires_grad_(), rejected, backend="triton")
    # the last margin and the last two gradients
    assert problems == ["_one_launch_kernel: 3 lanes access no element of an argument"]


def test_the_watch_finds_programs_that_race() -> None:
    """The margins of some pairs are stored where other programs load the log-probs of other pairs."""
    memory, rejected = torch.randn(2, 2000)
    loss, gradient, _, *others = pair_loss._allocate_outputs(memory[:1100], "mean", False)
    outputs = loss, gradient, memory[256:1356], *others
    with watched() as problems, patch.object(pair_loss, "_allocate_outputs", lambda *_: outputs):
        two_launches(memory[:1100], rejected[:1100])
    assert "_loss_kernel: a program stores what another one accesses" in problems
