"""The library must agree with the independent oracle of `tests.support.oracle` on generated batches.

The last two tests check the oracle itself.
"""

import math
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from amapo_loss import AdaptiveMargin, ScoreStatistics, dpo_loss, simpo_loss
from tests.support.backends import OnBackend, every_backend
from tests.support.generators import (
    MARGINS,
    Batch,
    Options,
    as_float64,
    batches,
    dtypes,
    examples,
    loss_options,
    to_tensors,
    unit_of,
)
from tests.support.oracle import assert_matches, oracle

# How the weights of the pairs are drawn. Those that are 0 or False leave their pair out.
WEIGHTS: dict[str, Any] = {
    "none": lambda rng, n: None,
    "bool": lambda rng, n: rng.random(n) > 0.3,
    "integer": lambda rng, n: rng.integers(0, 5, n),
    "floating": lambda rng, n: (np.exp(rng.normal(0, 2, n)) * (rng.random(n) > 0.1)).astype(np.float32),
}
# How margins are given that are not adaptive. The function returns the same margins as "tensor".
GIVEN_MARGINS = ("number", "tensor", "function")


@every_backend
@examples(400)
@given(
    batches(),
    st.sampled_from(MARGINS) | st.sampled_from(GIVEN_MARGINS),
    loss_options,
    dtypes,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(WEIGHTS)),
    st.sampled_from(["mean", "sum", "none"]),
    st.integers(0, 2**31),
)
def test_amapo_loss_agrees_with_the_oracle(
    loss_fn: OnBackend,
    batch: Batch,
    margin: AdaptiveMargin | str,
    options: Options,
    dtype: torch.dtype,
    beta_on_device: bool,
    with_ref: bool,
    with_lengths: bool,
    weights_kind: str,
    reduction: Any,
    seed: int,
) -> None:
    """Pairs with a weight or a length of 0 are left out. Their log-probs and given margins are then replaced by NaN."""
    chosen, rejected = batch
    if loss_fn.backend == "triton" and dtype == torch.float64:
        dtype = torch.float32
    if dtype == torch.float16:
        chosen, rejected = np.clip(chosen, -6e4, 6e4), np.clip(rejected, -6e4, 6e4)
    rng = np.random.default_rng(seed)
    n = len(chosen)
    noise = np.abs(chosen).mean() * rng.normal(0, 0.3, (2, n))
    logps = to_tensors(
        {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "ref_chosen_logps": chosen + noise[0] if with_ref else None,
            "ref_rejected_logps": rejected + noise[1] if with_ref else None,
        },
        dtype,
    )
    lengths = (
        {"chosen_lengths": rng.integers(0, 50, n), "rejected_lengths": rng.integers(1, 50, n)} if with_lengths else {}
    )
    if not all(tensor.isfinite().all() for tensor in logps.values()):
        return  # float16 has overflowed; test_edge_cases.py covers log-probs that are not finite
    counted = np.ones(n, bool)
    for array in lengths.values():
        counted &= array > 0
    weights = WEIGHTS[weights_kind](rng, n)
    if weights is not None:
        counted &= weights != 0
    if not counted.any():
        return  # test_edge_cases.py covers batches without a pair
    unit = unit_of(dtype)
    given_margins = np.where(counted, rng.normal(0, 2, n), np.nan).astype(np.float32)
    margins: dict[Any, tuple[Any, Any]] = {  # for the loss and for the oracle
        "number": (0.7, 0.7),
        "tensor": (torch.tensor(given_margins), given_margins[counted].astype(float)),
        "function": (lambda scores, _: torch.tensor(given_margins).to(scores), given_margins[counted].astype(float)),
    }
    actual_margin, expected_margin = margins.get(margin, (margin, margin))
    expected = oracle(
        **{name.removesuffix("_logps"): array[counted] for name, array in as_float64(logps).items()},
        **{name: array[counted].astype(float) for name, array in lengths.items()},
        weights=None if weights is None else weights[counted].astype(float),
        **options,
        margin=expected_margin,
        unit=unit,
    )
    expected.summary["amapo/left_out"] = (float(n - counted.sum()), 0.0)
    for tensor in logps.values():
        tensor[torch.tensor(~counted)] = torch.nan
    for name in ("chosen_logps", "rejected_logps"):
        logps[name].requires_grad_()
    others = {name: torch.tensor(array) for name, array in lengths.items()}
    if weights is not None:
        others["weights"] = torch.tensor(weights)
    beta: Any = torch.tensor(options["beta"], dtype=torch.float64) if beta_on_device else options["beta"]
    actual = loss_fn(**logps, **others, **options | {"beta": beta}, margin=actual_margin, reduction=reduction)
    assert_matches(actual, logps, expected, reduction, unit, counted)


@every_backend
@examples(60)
@given(batches(), st.sampled_from(MARGINS), loss_options, st.floats(-2, 2), st.floats(0.01, 3))
def test_amapo_loss_with_supplied_statistics_agrees_with_the_oracle(
    loss_fn: OnBackend,
    batch: Batch,
    margin: AdaptiveMargin,
    options: Options,
    mean: float,
    std: float,
) -> None:
    # The supplied statistics are of the size of the scores, but they are not those of the batch.
    scale = float(np.abs(batch).max())
    mean, std = (float(np.float32(options["beta"] * scale * value)) for value in (mean, std))
    statistics = ScoreStatistics(torch.tensor(mean), torch.tensor(std), torch.tensor(128))
    logps = to_tensors({"chosen_logps": batch[0], "rejected_logps": batch[1]}, torch.float32)
    expected = oracle(*as_float64(logps).values(), **options, margin=margin, statistics=(mean, std), unit=2.0**-23)
    for name in ("chosen_logps", "rejected_logps"):
        logps[name].requires_grad_()
    actual = loss_fn(**logps, **options, margin=margin, statistics=statistics)
    assert_matches(actual, logps, expected, "mean", 2.0**-23)


@examples(60)
@given(batches(), loss_options, st.sampled_from([None, 0.0, 0.5, -1.5, 5.0]), st.sampled_from(["mean", "sum", "none"]))
def test_dpo_and_simpo_agree_with_the_oracle(
    batch: Batch, options: Options, gamma: float | None, reduction: Any
) -> None:
    """Both losses have a constant margin: `gamma` for SimPO, and 0 for DPO, which runs if `gamma` is None."""
    ref = batch[0] * 0.9 if gamma is None else None
    logps = to_tensors(
        {"chosen_logps": batch[0], "rejected_logps": batch[1], "ref_chosen_logps": ref, "ref_rejected_logps": ref},
        torch.float32,
    )
    expected = oracle(*as_float64(logps).values(), **options, margin=gamma or 0.0, unit=2.0**-23)
    for name in ("chosen_logps", "rejected_logps"):
        logps[name].requires_grad_()
    actual = (
        dpo_loss(**logps, **options, reduction=reduction)
        if gamma is None
        else simpo_loss(**logps, **options, gamma=gamma, reduction=reduction)
    )
    assert_matches(actual, logps, expected, reduction, 2.0**-23)


def test_the_intervals_of_the_oracle_are_narrow() -> None:
    """On ordinary batches, at most 1% of the pairs are at the gate. Nearly all other intervals are at most 1e-4 wide.

    Wide intervals would let the tests above pass whatever the library computes.
    """
    rng = np.random.default_rng(0)
    for margin in MARGINS:
        chosen, rejected = rng.normal([[-0.7], [-1.0]], 0.5, (2, 512)).astype(np.float32).astype(float)
        expected = oracle(chosen, rejected, beta=2.0, margin=margin, unit=2.0**-23)
        assert expected.at_gate.mean() <= 0.01, margin
        margin_width = expected.margins.high - expected.margins.low
        weight_width = expected.gradient_weights.high - expected.gradient_weights.low
        narrow = (margin_width <= 1e-4 * np.maximum(expected.margins.high, 1)) & (weight_width <= 1e-4)
        assert np.mean(narrow & ~expected.at_gate) >= 0.98, margin


def test_the_oracle_gives_the_values_computed_by_hand() -> None:
    """The scores are 0.8, -0.2 and 1.4, so their mean is 0.6666667 and pair 1 lies 0.8666667 below it.

    The standard deviation is 0.8082904. test_by_hand.py compares the oracle with more batches, to four decimals.
    """
    chosen, rejected = np.array([-1.0, -1.2, -0.9]), np.array([-1.4, -1.1, -1.6])
    expected = oracle(chosen, rejected, beta=2.0, margin=MARGINS[0], unit=2.0**-52)
    margin = 2 * math.exp(0.8666667 / 0.8082904 * 0.6666667)
    weights = 1 / (1 + np.exp([0.8, -0.2 - margin, 1.4]))
    np.testing.assert_allclose(expected.margins.low, [0, margin, 0], rtol=1e-6)
    np.testing.assert_allclose(expected.gradient_weights.low, weights, rtol=1e-6)
    np.testing.assert_allclose(expected.losses.low, -np.log1p(-weights), rtol=1e-6)
    np.testing.assert_allclose(expected.gradients[0].low, -2 * weights, rtol=1e-6)
