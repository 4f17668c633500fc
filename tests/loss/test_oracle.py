"""The library against the independent float64 oracle of `tests.support.oracle`, on generated batches."""

import math
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amapo_loss import AdaptiveMargin, ScoreStatistics, dpo_loss, simpo_loss
from tests.support.backends import OnBackend, every_backend
from tests.support.generators import MARGINS, as_float64, batches, dtypes, options, tensors, unit_of
from tests.support.oracle import Array, assert_matches, oracle


@every_backend
@settings(max_examples=400, deadline=None)
@given(
    batches(), st.sampled_from(MARGINS), options, dtypes, st.booleans(), st.booleans(),
    st.sampled_from(["mean", "sum", "none"]), st.integers(0, 2**31),
)  # fmt: skip
def test_amapo(
    loss_fn: OnBackend, batch: tuple[Array, Array], margin: AdaptiveMargin, options: dict[str, float],
    dtype: torch.dtype, with_ref: bool, with_lengths: bool, reduction: Any, seed: int,
) -> None:  # fmt: skip
    chosen, rejected = batch
    if loss_fn.backend == "triton" and dtype == torch.float64:
        dtype = torch.float32
    if dtype == torch.float16:
        chosen, rejected = np.clip(chosen, -6e4, 6e4), np.clip(rejected, -6e4, 6e4)
    rng = np.random.default_rng(seed)
    n = len(chosen)
    noise = np.abs(chosen).mean() * rng.normal(0, 0.3, (2, n))
    given = tensors(
        {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "ref_chosen_logps": chosen + noise[0] if with_ref else None,
            "ref_rejected_logps": rejected + noise[1] if with_ref else None,
        },
        dtype,
    )
    sizes = (
        {"chosen_lengths": rng.integers(0, 50, n), "rejected_lengths": rng.integers(1, 50, n)} if with_lengths else {}
    )
    if not all(tensor.isfinite().all() for tensor in given.values()):
        return  # float16 overflowed: the edge table's case
    arrays = {name.removesuffix("_logps"): array for name, array in as_float64(given).items()}
    unit = unit_of(dtype)
    expected = oracle(**arrays, **{k: v.astype(float) for k, v in sizes.items()}, **options, margin=margin, unit=unit)
    for name in ("chosen_logps", "rejected_logps"):
        given[name].requires_grad_()
    lengths = {name: torch.tensor(size) for name, size in sizes.items()}
    actual = loss_fn(**given, **lengths, **options, margin=margin, reduction=reduction)
    assert_matches(actual, given, expected, reduction, unit)


@every_backend
@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(MARGINS), options, st.floats(-2, 2), st.floats(0.01, 3))
def test_amapo_with_supplied_statistics(
    loss_fn: OnBackend,
    batch: tuple[Array, Array],
    margin: AdaptiveMargin,
    options: dict[str, float],
    mean: float,
    std: float,
) -> None:
    scale = float(np.abs(batch).max())  # statistics in the range of the batch, but not its own
    supplied = [float(np.float32(options["beta"] * scale * value)) for value in (mean, std)]
    statistics = ScoreStatistics(torch.tensor(supplied[0]), torch.tensor(supplied[1]), torch.tensor(128))
    given = tensors({"chosen_logps": batch[0], "rejected_logps": batch[1]}, torch.float32)
    expected = oracle(*as_float64(given).values(), **options, margin=margin, statistics=tuple(supplied), unit=2.0**-23)
    for name in ("chosen_logps", "rejected_logps"):
        given[name].requires_grad_()
    actual = loss_fn(**given, **options, margin=margin, statistics=statistics)
    expected.summary["amapo/score_mean"] = (supplied[0], 0.0)
    expected.summary["amapo/score_std"] = (supplied[1], 0.0)
    assert_matches(actual, given, expected, "mean", 2.0**-23)


@settings(max_examples=60, deadline=None)
@given(batches(), options, st.sampled_from([None, 0.0, 0.5, -1.5, 5.0]), st.sampled_from(["mean", "sum", "none"]))
def test_dpo_and_simpo(
    batch: tuple[Array, Array], options: dict[str, float], gamma: float | None, reduction: Any
) -> None:
    """`gamma` None: DPO. Both are the unified objective with a constant margin."""
    ref = batch[0] * 0.9 if gamma is None else None
    given = tensors(
        {"chosen_logps": batch[0], "rejected_logps": batch[1], "ref_chosen_logps": ref, "ref_rejected_logps": ref},
        torch.float32,
    )
    expected = oracle(*as_float64(given).values(), **options, margin=gamma or 0.0, unit=2.0**-23)
    for name in ("chosen_logps", "rejected_logps"):
        given[name].requires_grad_()
    actual = (
        dpo_loss(**given, **options, reduction=reduction)
        if gamma is None
        else simpo_loss(**given, **options, gamma=gamma, reduction=reduction)
    )
    assert_matches(actual, given, expected, reduction, 2.0**-23)


def test_oracle_lets_almost_nobody_off() -> None:
    """The bounds are worth something: on plain batches nearly every margin and weight is known to four digits."""
    rng = np.random.default_rng(0)
    for margin in MARGINS:
        chosen, rejected = rng.normal([[-0.7], [-1.0]], 0.5, (2, 512)).astype(np.float32).astype(float)
        expected = oracle(chosen, rejected, beta=2.0, margin=margin, unit=2.0**-23)
        assert expected.at_gate.mean() <= 0.01, margin
        margin_width = expected.margins.high - expected.margins.low
        weight_width = expected.weights.high - expected.weights.low
        known = (margin_width <= 1e-4 * np.maximum(expected.margins.high, 1)) & (weight_width <= 1e-4)
        assert np.mean(known & ~expected.at_gate) >= 0.98, margin


def test_oracle_by_hand() -> None:
    """Three pairs, worked with a pocket calculator: scores 0.8, -0.2, 1.4; mean 2/3, std 0.80829."""
    chosen, rejected = np.array([-1.0, -1.2, -0.9]), np.array([-1.4, -1.1, -1.6])
    expected = oracle(chosen, rejected, beta=2.0, margin=MARGINS[0], unit=2.0**-52)
    margin = 2 * math.exp(0.8666667 / 0.8082904 * 0.6666667)
    weights = 1 / (1 + np.exp([0.8, -0.2 - margin, 1.4]))
    np.testing.assert_allclose(expected.margins.low, [0, margin, 0], rtol=1e-6)
    np.testing.assert_allclose(expected.weights.low, weights, rtol=1e-6)
    np.testing.assert_allclose(expected.losses.low, -np.log1p(-weights), rtol=1e-6)
    np.testing.assert_allclose(expected.gradients[0].low, -2 * weights, rtol=1e-6)
