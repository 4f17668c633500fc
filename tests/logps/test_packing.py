"""Check the log-probs of packed rows against those of the same sequences, each in a row of its own."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amapo_loss import linear_sequence_logps, sequence_logps
from tests.support.backends import every_tiling, tiled
from tests.support.generators import examples
from tests.support.logps import IGNORE_INDEX, reference_logps

V, H = 11, 5


def padded(rows: list[Tensor], value: float) -> Tensor:
    """Return the rows below each other, filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def packed(rows: list[Tensor], tail: int, value: float) -> Tensor:
    """Return the rows one after the other, and a padded tail."""
    whole = torch.cat([*rows, rows[0].new_full((tail, *rows[0].shape[1:]), value)])
    return whole.unsqueeze(0)


@every_tiling
@examples(60)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    tail=st.integers(0, 3),
    ignored_share=st.floats(0, 1),
    average=st.booleans(),
    shift=st.booleans(),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    described_by=st.sampled_from(["cu_seqlens", "position_ids"]),
    seed=st.integers(0, 2**31),
)
def test_packed_rows_give_what_each_sequence_gives_alone(
    backend: str,
    lengths: list[int],
    tail: int,
    ignored_share: float,
    average: bool,
    shift: bool,
    index_dtype: torch.dtype,
    described_by: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if described_by == "position_ids":  # they have no place for an empty sequence, nor for one that looks like padding
        lengths = [length for length in lengths if length > 1] or [2]
    hidden = [torch.randn(length, H, generator=generator, dtype=torch.float64) for length in lengths]
    labels = [torch.randint(V, (length,), generator=generator) for length in lengths]
    for row in labels:
        row[torch.rand(len(row), generator=generator) < ignored_share] = IGNORE_INDEX
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    grad_output = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    separate = padded(hidden, 0.0).requires_grad_()
    expected = reference_logps(separate @ weight.T, padded(labels, IGNORE_INDEX), average, shift)
    (expected_gradient,) = torch.autograd.grad(expected, separate, grad_output)
    expected_gradient = packed([row[:length] for row, length in zip(expected_gradient, lengths)], tail, 0.0)

    # With offsets, the tail may have any label. With position ids, padding is told by its label.
    states = packed(hidden, tail, 1.0)
    packed_labels = packed(labels, tail, 3 if described_by == "cu_seqlens" else IGNORE_INDEX)
    description = {
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(index_dtype),
        "position_ids": packed([torch.arange(length) for length in lengths], tail, 0).to(index_dtype),
    }[described_by]
    with tiled(backend, 40) as device:
        x, w = states.to(device, torch.float32).requires_grad_(), weight.to(device, torch.float32)
        options: Any = {"average": average, "shift": shift, described_by: description.to(device)}
        for logps in (
            linear_sequence_logps(x, w, packed_labels.to(device), **options),
            sequence_logps(x @ w.T, packed_labels.to(device), **options),
        ):
            torch.testing.assert_close(logps.cpu().double(), expected, rtol=1e-5, atol=1e-5)
            (gradient,) = torch.autograd.grad(logps, x, grad_output.to(logps))
            torch.testing.assert_close(gradient.cpu().double(), expected_gradient, rtol=1e-4, atol=1e-5)


def test_several_packed_rows_and_rows_of_padding() -> None:
    """The second row begins with a sequence that goes on, and the last one is padding."""
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 0, 1, 2, 3], [0, 0, 0, 0, 0, 0]])
    labels = torch.randint(V, (3, 6))
    labels[0, 5] = labels[2] = IGNORE_INDEX
    logits = torch.randn(3, 6, V)
    sequences = [(0, 0, 3), (0, 3, 5), (1, 0, 2), (1, 2, 6)]
    expected = [sequence_logps(logits[row : row + 1, a:b], labels[row : row + 1, a:b]) for row, a, b in sequences]
    torch.testing.assert_close(sequence_logps(logits, labels, position_ids=position_ids), torch.cat(expected))
    offsets = torch.tensor([0, 3, 5, 6, 8, 12])  # the padding at the end of the first row is a sequence of its own
    with_padding = torch.cat([*expected[:2], torch.zeros(1), *expected[2:]])
    torch.testing.assert_close(sequence_logps(logits, labels, cu_seqlens=offsets), with_padding)


def test_a_sequence_may_go_on_in_the_next_row() -> None:
    """Offsets count the positions of all rows, as if these were one."""
    logits, labels, offsets = torch.randn(2, 5, V), torch.randint(V, (2, 5)), torch.tensor([0, 3, 10])
    expected = sequence_logps(logits.view(1, 10, V), labels.view(1, 10), cu_seqlens=offsets)
    assert torch.equal(sequence_logps(logits, labels, cu_seqlens=offsets), expected)


def test_a_one_token_sequence_with_a_label_is_no_padding() -> None:
    logits, position_ids = torch.randn(1, 4, V), torch.tensor([[0, 1, 2, 0]])
    counted, ignored = torch.tensor([[IGNORE_INDEX, 2, 3, 5]]), torch.tensor([[IGNORE_INDEX, 2, 3, IGNORE_INDEX]])
    assert sequence_logps(logits, counted, position_ids=position_ids).shape == (2,)
    assert sequence_logps(logits, ignored, position_ids=position_ids).shape == (1,)


def test_without_sequences_there_are_no_log_probs() -> None:
    logits, labels = torch.randn(1, 3, V, requires_grad=True), torch.full((1, 3), IGNORE_INDEX)
    descriptions: list[dict[str, Any]] = [
        {"cu_seqlens": torch.tensor([0])},
        {"position_ids": torch.zeros(1, 3, dtype=torch.int64)},
    ]
    for options in descriptions:
        logps = sequence_logps(logits, labels, **options)
        assert logps.shape == (0,)
        assert not torch.autograd.grad(logps.sum(), logits)[0].any()


def test_many_tokens_are_summed_without_loss_of_digits() -> None:
    """A float32 sum over 100,000 tokens, one after the other, would lose two digits."""
    logits, labels = torch.randn(1, 100_000, 3), torch.randint(3, (1, 100_000))
    actual = sequence_logps(logits, labels, cu_seqlens=torch.tensor([0, 100_000]), average=False)
    expected = reference_logps(logits.double(), labels, average=False)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["cu_seqlens", "position_ids"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the compiler
def test_packed_rows_compile(name: str) -> None:
    labels, logits = torch.randint(V, (1, 6)), torch.randn(1, 6, V, requires_grad=True)
    options: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, 4, 6]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]]),
    }

    def step(logits: Tensor) -> Tensor:
        logps: Tensor = sequence_logps(logits, labels, **{name: options[name]})
        return logps

    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        actual = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
        (gradient,) = torch.autograd.grad(actual.sum(), logits)
    torch.testing.assert_close(actual, step(logits))
    torch.testing.assert_close(gradient, torch.autograd.grad(step(logits).sum(), logits)[0])


def test_the_operator_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.amapo_loss.sequence_of_positions.default, (torch.tensor([0, 2, 2, 5]), 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": torch.tensor([1, 4])}, "cu_seqlens must begin with 0, not decrease, and not exceed the 4 pos"),
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, "cu_seqlens must begin with 0, not decrease"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"not exceed the 4 positions, got \[0, 5\]"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens must be an int32 or int64 tensor, got a tensor of"),
        ({"cu_seqlens": [0, 4]}, "cu_seqlens must be an int32 or int64 tensor, got list"),
        ({"cu_seqlens": torch.tensor([[0, 4]])}, r"cu_seqlens must be \[S \+ 1\], which begins with 0, got shape"),
        ({"cu_seqlens": torch.empty(0, dtype=torch.int32)}, r"cu_seqlens must be \[S \+ 1\], which begins with 0"),
        ({"position_ids": torch.arange(4)}, r"position_ids must have the shape of labels, \(1, 4\), got \(4,\)"),
        ({"position_ids": torch.zeros(1, 4)}, "position_ids must be an int32 or int64 tensor"),
        (
            {"position_ids": torch.arange(4)[None], "cu_seqlens": torch.tensor([0, 4])},
            "cu_seqlens must be None if position_ids is given",
        ),
        ({"ignore_index": None}, "ignore_index must be an int, got NoneType"),
        ({"cu_seqlens": torch.tensor([0, 4], device="meta")}, "cu_seqlens is on meta, expected the device of labels"),
    ],
    ids=str,
)
def test_errors(options: dict[str, Any], message: str) -> None:
    labels = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=message):
        sequence_logps(torch.zeros(1, 4, V), labels, **options)
    with pytest.raises((TypeError, ValueError), match=message):
        linear_sequence_logps(torch.zeros(1, 4, H), torch.zeros(V, H), labels, **options)
