"""Check the entropies beside the log-probs against the definition in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amapo_loss import linear_sequence_logps, linear_token_logps, sequence_logps
from tests.support.backends import every_tiling, tiled
from tests.support.generators import examples
from tests.support.logps import IGNORE_INDEX


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each row by its definition, -sum p log p, where 0 log 0 is 0."""
    entropies: Tensor = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    return entropies


@every_tiling
@examples(60)
@given(
    n=st.integers(0, 6),
    vocab_size=st.integers(1, 60),
    tile_elements=st.integers(1, 200),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 1e4]),
    requires_grad=st.sampled_from(["", "hidden", "hidden weight"]),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_entropies_of_tokens(
    backend: str,
    n: int,
    vocab_size: int,
    tile_elements: int,
    spread: float,
    offset: float,
    requires_grad: str,
    softcap: float | None,
    seed: int,
) -> None:
    """The offset makes all logits large, whose digits then fail the sum of p_j z_j in float32."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.zeros(n, 2), torch.zeros(vocab_size, 2)
    hidden[:, 0], hidden[:, 1] = 1, offset
    weight[:, 0], weight[:, 1] = torch.randn(vocab_size, generator=generator).mul(spread), 1
    targets = torch.randint(vocab_size, (n,), generator=generator)
    logits = hidden @ weight.T  # in float32, as the function computes them
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    with tiled(backend, tile_elements) as device:
        x, w = (
            t.to(device).requires_grad_(name in requires_grad) for name, t in (("hidden", hidden), ("weight", weight))
        )
        logps, entropies = linear_token_logps(
            x, w, targets.to(device), final_logit_softcapping=softcap, return_entropy=True
        )
        expected_logps = linear_token_logps(x, w, targets.to(device), final_logit_softcapping=softcap)
    torch.testing.assert_close(entropies.cpu().double(), entropy(logits), rtol=1e-4, atol=1e-5)
    assert torch.equal(logps, expected_logps)
    assert entropies.dtype == torch.float32
    assert not entropies.requires_grad


@every_tiling
def test_entropies_of_confident_tokens_keep_their_digits(backend: str) -> None:
    """With p = 1 - 1e-6, the entropy is 1.5e-5. Computed as a difference of two logits, it would lose 4 digits."""
    logits = torch.tensor([[20.0, 6.2, -3.0], [30.0, 2.0, 4.0], [200.0, 0.0, 1.0]])
    with tiled(backend) as device:
        _, entropies = sequence_logps(
            logits[None].to(device),
            torch.zeros(1, 3, dtype=torch.int64, device=device),
            shift=False,
            return_entropy=True,
        )
        _, of_others = sequence_logps(
            logits[:, None].to(device),
            torch.ones(3, 1, dtype=torch.int64, device=device),
            shift=False,
            return_entropy=True,
        )
    torch.testing.assert_close(entropies.cpu().double(), entropy(logits).mean(0, keepdim=True), rtol=1e-5, atol=0)
    torch.testing.assert_close(of_others.cpu().double(), entropy(logits), rtol=1e-5, atol=1e-11)


@every_tiling
@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("largest", [2.0, 3e38])
def test_tokens_that_are_impossible_do_not_count(backend: str, target: int, largest: float) -> None:
    """Masked tokens have a logit of -inf or the lowest number. The target may be one of them."""
    logits = torch.tensor([[-torch.inf, 1.0, largest, torch.finfo(torch.float32).min, 0.5]])
    with tiled(backend, 2) as device:
        labels = torch.tensor([[target]], device=device)
        _, entropies = sequence_logps(logits[None].to(device), labels, shift=False, return_entropy=True)
    torch.testing.assert_close(entropies.cpu().double(), entropy(logits))


@every_tiling
@pytest.mark.parametrize("average", [True, False])
def test_entropies_of_sequences_are_reduced_like_the_log_probs(backend: str, average: bool) -> None:
    logits = torch.randn(3, 5, 11)
    labels = torch.randint(11, (3, 5))
    labels[0, 1:3] = labels[2] = IGNORE_INDEX
    counted = labels[:, 1:] != IGNORE_INDEX
    expected = (entropy(logits[:, :-1]) * counted).sum(1) / (counted.sum(1).clamp(min=1) if average else 1)
    with tiled(backend, 20) as device:
        x, y = logits.to(device).requires_grad_(), labels.to(device)
        results: list[Any] = [
            sequence_logps(x, y, average=average, return_entropy=True),
            linear_sequence_logps(x, torch.eye(11, device=device), y, average=average, return_entropy=True),
        ]
    for logps, entropies in results:
        torch.testing.assert_close(entropies.cpu().double(), expected, rtol=1e-5, atol=1e-6)
        assert logps.requires_grad
        assert not entropies.requires_grad
    offsets = torch.tensor([0, 5, 15])
    _, of_packed = sequence_logps(logits, labels, cu_seqlens=offsets, average=False, return_entropy=True)
    assert of_packed.shape == (2,)
