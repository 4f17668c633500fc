"""Every wrong argument raises an exception whose message names it, what it got and what it expects."""

import math
import re
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amapo_loss import (
    AdaptiveMargin,
    AMaPOLoss,
    ScoreStatistics,
    ScoreWindow,
    amapo_loss,
    dpo_loss,
    functional,
    kernels,
    linear_sequence_logps,
    linear_token_logps,
    sequence_logps,
    simpo_loss,
)
from amapo_loss._options import LossOptions
from amapo_loss._pairs import Pairs
from amapo_loss.logps import _online_lse

LOGPS = torch.linspace(-2, -1, 4)
STATISTICS = ScoreStatistics(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(4))
META = torch.device("meta")

# The wrong arguments, the exception, and a part of its message.
Case = tuple[dict[str, Any], type[Exception], str]

PAIR_TENSORS: list[Case] = [
    ({"chosen_logps": [1.0]}, TypeError, "chosen_logps must be a floating tensor, got list"),
    ({"chosen_logps": None}, TypeError, "chosen_logps must be a floating tensor, got NoneType"),
    ({"rejected_logps": LOGPS.long()}, TypeError, "floating tensor, got a tensor of torch.int64"),
    ({"rejected_logps": LOGPS.to(torch.complex64)}, TypeError, "rejected_logps must be a floating tensor"),
    ({"chosen_logps": LOGPS[None]}, ValueError, "chosen_logps must be 1-D with one entry per pair, got shape (1, 4)"),
    ({"chosen_logps": LOGPS[0]}, ValueError, "chosen_logps must be 1-D with one entry per pair, got shape ()"),
    ({"rejected_logps": LOGPS[:3]}, ValueError, "rejected_logps has shape (3,), expected that of chosen_logps, (4,)"),
    ({"rejected_logps": LOGPS[:1]}, ValueError, "rejected_logps has shape (1,), expected that of chosen_logps, (4,)"),
    ({"rejected_logps": LOGPS.to(META)}, ValueError, "rejected_logps is on meta, expected the device of chosen"),
    ({"ref_chosen_logps": LOGPS}, ValueError, "ref_chosen_logps was given without ref_rejected_logps"),
    ({"ref_rejected_logps": LOGPS}, ValueError, "ref_rejected_logps was given without ref_chosen_logps"),
    ({"ref_chosen_logps": LOGPS.int(), "ref_rejected_logps": LOGPS}, TypeError, "ref_chosen_logps must be a"),
    ({"ref_chosen_logps": LOGPS, "ref_rejected_logps": LOGPS[:2]}, ValueError, "ref_rejected_logps has shape (2,)"),
    ({"chosen_lengths": LOGPS}, ValueError, "chosen_lengths was given without rejected_lengths"),
    ({"rejected_lengths": LOGPS}, ValueError, "rejected_lengths was given without chosen_lengths"),
    ({"chosen_lengths": 3, "rejected_lengths": LOGPS}, TypeError, "chosen_lengths must be an integer or floating"),
    ({"chosen_lengths": LOGPS > 0, "rejected_lengths": LOGPS}, TypeError, "chosen_lengths must be an integer or"),
    ({"chosen_lengths": LOGPS, "rejected_lengths": LOGPS[None]}, ValueError, "rejected_lengths has shape (1, 4)"),
    (
        {"weights": LOGPS.to(torch.complex64)},
        TypeError,
        "weights must be a bool, integer or floating tensor, got a tensor of torch.complex64",
    ),
    ({"weights": [True] * 4}, TypeError, "weights must be a bool, integer or floating tensor, got list"),
    ({"weights": LOGPS[:3] > 0}, ValueError, "weights has shape (3,), expected that of chosen_logps, (4,)"),
    ({"weights": (LOGPS > 0).to(META)}, ValueError, "weights is on meta, expected the device of chosen_logps"),
]
PAIR_TENSORS_WITHOUT_REF = [case for case in PAIR_TENSORS if not any("ref" in name for name in case[0])]
OPTIONS_OF_ALL_LOSSES: list[Case] = [
    ({"beta": 0}, ValueError, "beta must be > 0 and finite, got 0"),
    ({"beta": -1.0}, ValueError, "beta must be > 0 and finite, got -1.0"),
    ({"beta": math.nan}, ValueError, "beta must be > 0 and finite, got nan"),
    ({"beta": math.inf}, ValueError, "beta must be > 0 and finite, got inf"),
    ({"beta": torch.tensor(1)}, TypeError, "beta must be a floating tensor, got a tensor of torch.int64"),
    ({"beta": LOGPS}, ValueError, "beta must be 0-dim on cpu, got shape (4,) on cpu"),
    ({"beta": True}, TypeError, "beta must be a Python number or a 0-dim tensor, got bool"),
    ({"beta": "2"}, TypeError, "beta must be a Python number or a 0-dim tensor, got str"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be >= 0 and < 0.5, got -0.1"),
    ({"label_smoothing": 0.5}, ValueError, "label_smoothing must be >= 0 and < 0.5, got 0.5"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be >= 0 and < 0.5, got nan"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ({"reduction": None}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got None"),
    ({"reduction": ["mean"]}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got ['mean']"),
]
AMAPO_OPTIONS: list[Case] = [
    *OPTIONS_OF_ALL_LOSSES,
    (
        {"margin": "paper"},
        TypeError,
        "margin must be an AdaptiveMargin such as AdaptiveMargin('released'), a number, a tensor with one entry per "
        "pair, or a function, got str",
    ),
    ({"margin": AdaptiveMargin}, TypeError, "or a function, got the class AdaptiveMargin"),
    ({"margin": True}, TypeError, "margin must be a Python number, got bool"),
    ({"margin": math.nan}, ValueError, "margin must be finite, got nan"),
    ({"margin": LOGPS > 0}, TypeError, "margin must be an integer or floating tensor, got a tensor of torch.bool"),
    (
        {"statistics": 128},
        TypeError,
        "statistics must be ScoreStatistics, or a callable estimator such as ScoreWindow(128), got int",
    ),
    (
        {"statistics": ScoreWindow},
        TypeError,
        "callable estimator such as ScoreWindow(128), got the class ScoreWindow",
    ),
    (
        {"process_group": "world"},
        TypeError,
        "process_group must be a torch.distributed group that this rank belongs to",
    ),
    ({"process_group": -100}, TypeError, "process_group must be a torch.distributed group that this rank belongs to"),
    ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
]
SUPPLIED_STATISTICS: list[Case] = [
    ({"statistics": STATISTICS._replace(mean=0.0)}, TypeError, "statistics.mean must be a floating tensor, got float"),
    ({"statistics": STATISTICS._replace(std=LOGPS)}, ValueError, "statistics.std must be 0-dim on cpu, got shape (4,)"),
    ({"statistics": STATISTICS._replace(mean=torch.empty((), device=META))}, ValueError, "got shape () on meta"),
    (
        {"statistics": lambda *_: 1.0},
        TypeError,
        "the callable passed as statistics must return ScoreStatistics, got float",
    ),
    ({"statistics": lambda r, _: STATISTICS._replace(std=r)}, ValueError, "statistics.std must be 0-dim on cpu, got"),
]


TENSORS_OF_A_BATCH: list[Case] = [  # these do not fit the log-probs, which a module does not know when it is built
    ({"beta": torch.tensor(1.0, device=META)}, ValueError, "beta must be 0-dim on cpu, got shape () on meta"),
    ({"margin": LOGPS[:3]}, ValueError, "margin has shape (3,), expected that of chosen_logps, (4,)"),
    ({"margin": LOGPS[0]}, ValueError, "margin has shape (), expected that of chosen_logps, (4,)"),
    ({"margin": LOGPS.to(META)}, ValueError, "margin is on meta, expected the device of chosen_logps, cpu"),
    ({"margin": lambda *_: 0.5}, TypeError, "the result of margin must be an integer or floating tensor, got float"),
    ({"margin": lambda scores, _: scores[:3]}, ValueError, "the result of margin has shape (3,), expected that of"),
    ({"margin": lambda scores, _: scores.to(META)}, ValueError, "the result of margin is on meta, expected the device"),
]


def with_each_of(*tables: list[Case]) -> pytest.MarkDecorator:
    """Run a test with every case of the tables."""
    cases = [case for table in tables for case in table]
    return pytest.mark.parametrize(("wrong", "error", "message"), cases, ids=[message for *_, message in cases])


def raises(error: type[Exception], message: str) -> Any:
    """Expect the exception, with `message` somewhere in its message."""
    return pytest.raises(error, match=re.escape(message))


@with_each_of(PAIR_TENSORS, AMAPO_OPTIONS, SUPPLIED_STATISTICS, TENSORS_OF_A_BATCH)
def test_amapo_loss_rejects_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(error, message):
        amapo_loss(**{"chosen_logps": LOGPS, "rejected_logps": LOGPS} | wrong)


@with_each_of(AMAPO_OPTIONS)
def test_the_module_rejects_wrong_options_on_construction(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    with raises(error, message):
        AMaPOLoss(**wrong)


@with_each_of(PAIR_TENSORS_WITHOUT_REF, OPTIONS_OF_ALL_LOSSES)
def test_simpo_loss_rejects_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(error, message):
        simpo_loss(**{"chosen_logps": LOGPS, "rejected_logps": LOGPS} | wrong)


@pytest.mark.parametrize(("gamma", "error"), [(math.inf, ValueError), (math.nan, ValueError), ("1", TypeError)])
def test_simpo_loss_rejects_a_wrong_gamma(gamma: Any, error: type[Exception]) -> None:
    with raises(error, "gamma must be "):
        simpo_loss(LOGPS, LOGPS, gamma=gamma)


@with_each_of(PAIR_TENSORS_WITHOUT_REF, OPTIONS_OF_ALL_LOSSES)
def test_dpo_loss_rejects_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    with raises(error, message):
        dpo_loss(**dict.fromkeys(names, LOGPS) | wrong)


def test_dpo_loss_requires_both_references() -> None:
    with raises(TypeError, "ref_chosen_logps must be a floating tensor, got NoneType"):
        dpo_loss(LOGPS, LOGPS, None, None)
    with raises(ValueError, "ref_chosen_logps was given without ref_rejected_logps"):
        dpo_loss(LOGPS, LOGPS, LOGPS, None)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"formula": "papers"}, ValueError, "formula must be one of 'paper', 'released', got 'papers'"),
        ({"scaling": "log"}, ValueError, "scaling must be one of 'exp', 'linear', got 'log'"),
        ({"scaling": ["exp"]}, ValueError, "scaling must be one of 'exp', 'linear', got ['exp']"),
        ({"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
        ({"clip": None}, TypeError, "clip must be True or False, got None"),
        ({"floor": -0.1}, ValueError, "floor must be >= 0 and finite, got -0.1"),
        ({"floor": torch.tensor(1.0)}, TypeError, "floor must be a Python number, got a tensor of torch.float32"),
        ({"floor": 1.0, "clip": False}, ValueError, "floor must be 0 with clip=False, which excludes no pair, got 1.0"),
    ],
)
def test_adaptive_margin_rejects_wrong_options(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(error, message):
        AdaptiveMargin(**wrong)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([1.0], TypeError, "scores must be a floating tensor, got list"),
        (LOGPS.long(), TypeError, "scores must be a floating tensor, got a tensor of torch.int64"),
        (LOGPS[None], ValueError, "scores must be 1-D with one entry per pair, got shape (1, 4)"),
    ],
)
def test_score_statistics_reject_wrong_scores(scores: Any, error: type[Exception], message: str) -> None:
    with raises(error, message):
        ScoreStatistics.of(scores)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, "size must be at least 1, got 0"),
        (2.0, TypeError, "size must be an int, got float"),
        (True, TypeError, "size must be an int, got bool"),
    ],
)
def test_a_score_window_rejects_a_wrong_size(size: Any, error: type[Exception], message: str) -> None:
    with raises(error, message):
        ScoreWindow(size)


LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (LOGITS.long(), LABELS, TypeError, "logits must be a floating tensor, got a tensor of torch.int64"),
        (LOGITS, LABELS.float(), TypeError, "labels must be an int64 tensor, got a tensor of torch.float32"),
        (LOGITS, LABELS.int(), TypeError, "labels must be an int64 tensor, got a tensor of torch.int32"),
        (LOGITS[0], LABELS, ValueError, "logits must be [N, T, V] and labels [N, T], got shapes (3, 5) and (2, 3)"),
        (LOGITS, LABELS[:, 1:], ValueError, "labels [N, T], got shapes (2, 3, 5) and (2, 2)"),
        (LOGITS, LABELS.to(META), ValueError, "labels is on meta, expected the device of logits, cpu"),
        (LOGITS, LABELS + 5, IndexError, "token ids must be in [0, 5), got 5"),
        (LOGITS, LABELS - 1, IndexError, "token ids must be in [0, 5), got -1"),
    ],
)
def test_sequence_logps_rejects_wrong_arguments(
    logits: torch.Tensor, labels: torch.Tensor, error: type[Exception], message: str
) -> None:
    with raises(error, message):
        sequence_logps(logits, labels)


HIDDEN, WEIGHT, TARGETS = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(3, dtype=torch.int64)
LINEAR_HEAD: list[Case] = [
    ({"hidden": HIDDEN.long()}, TypeError, "hidden must be a floating tensor, got a tensor of torch.int64"),
    ({"weight": None}, TypeError, "weight must be a floating tensor, got NoneType"),
    ({"weight": torch.nn.Linear(8, 5)}, TypeError, "weight must be a floating tensor, got Linear"),
    ({"weight": WEIGHT.to(META)}, ValueError, "weight is on meta, expected the device of hidden, cpu"),
    (
        {"weight": WEIGHT.bfloat16()},
        ValueError,
        "weight is torch.bfloat16, expected the dtype of hidden, torch.float32",
    ),
    (
        {"weight": torch.zeros(0)},
        ValueError,
        "weight is empty, as DeepSpeed ZeRO-3 leaves a partitioned parameter: call this inside "
        "deepspeed.zero.GatheredParameters(weight)",
    ),
    ({"bias": torch.zeros(0)}, ValueError, "bias is empty, as DeepSpeed ZeRO-3 leaves a partitioned parameter"),
    ({"bias": 0.0}, TypeError, "bias must be a floating tensor, got float"),
    ({"bias": torch.zeros(3)}, ValueError, "bias must be (5,), one entry per vocabulary token, got shape (3,)"),
    ({"bias": torch.zeros(5, device=META)}, ValueError, "bias is on meta, expected the device of hidden, cpu"),
    (
        {"bias": torch.zeros(5).double()},
        ValueError,
        "bias is torch.float64, expected the dtype of hidden, torch.float32",
    ),
    ({"keep_bytes": -1}, ValueError, "keep_bytes must be at least 0, got -1"),
    ({"keep_bytes": 1e9}, TypeError, "keep_bytes must be an int, got float"),
    ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite, got nan"),
    ({"logit_scale": None}, TypeError, "logit_scale must be a Python number, got NoneType"),
    ({"final_logit_softcapping": 0}, ValueError, "final_logit_softcapping must be > 0 and finite, got 0"),
    ({"final_logit_softcapping": WEIGHT}, TypeError, "final_logit_softcapping must be a Python number, got a tensor"),
]
TOKENS: list[Case] = [
    ({"targets": TARGETS.int()}, TypeError, "targets must be an int64 tensor, got a tensor of torch.int32"),
    ({"targets": TARGETS[:2]}, ValueError, "targets must be (3,), one entry per hidden state, got shape (2,)"),
    ({"targets": TARGETS.to(META)}, ValueError, "targets is on meta, expected the device of hidden, cpu"),
    ({"targets": TARGETS + 5}, IndexError, "token ids must be in [0, 5), got 5"),
    ({"hidden": HIDDEN[0]}, ValueError, "hidden must be [n, H] and weight [V, H], got shapes (8,) and (5, 8)"),
    ({"hidden": HIDDEN[None]}, ValueError, "hidden must be [n, H] and weight [V, H], got shapes (1, 3, 8) and (5, 8)"),
    ({"weight": WEIGHT[0]}, ValueError, "hidden must be [n, H] and weight [V, H], got shapes (3, 8) and (8,)"),
    ({"weight": WEIGHT.T}, ValueError, "hidden must be [n, H] and weight [V, H], got shapes (3, 8) and (8, 5)"),
]
SEQUENCES: list[Case] = [
    ({"weight": WEIGHT.T}, ValueError, "hidden must be [N, T, H] and weight [V, H], got shapes (1, 3, 8) and (8, 5)"),
    ({"labels": TARGETS}, ValueError, "hidden must be [N, T, H] and labels [N, T], got shapes (1, 3, 8) and (3,)"),
    ({"hidden": HIDDEN}, ValueError, "hidden must be [N, T, H] and labels [N, T], got shapes (3, 8) and (1, 3)"),
    ({"labels": TARGETS[None].float()}, TypeError, "labels must be an int64 tensor, got a tensor of torch.float32"),
    ({"labels": TARGETS[None].to(META)}, ValueError, "labels is on meta, expected the device of hidden, cpu"),
    ({"labels": TARGETS[None] - 1}, IndexError, "token ids must be in [0, 5), got -1"),
]


@with_each_of(LINEAR_HEAD, TOKENS)
def test_linear_token_logps_rejects_wrong_arguments(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    with raises(error, message):
        linear_token_logps(**{"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS} | wrong)


# The cases of `LINEAR_HEAD` that are left out contain a hidden state, or its shape, without the sequence dimension.
@with_each_of([case for case in LINEAR_HEAD if "hidden" not in case[0] and "(3, 8)" not in case[2]], SEQUENCES)
def test_linear_sequence_logps_rejects_wrong_arguments(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    with raises(error, message):
        linear_sequence_logps(**{"hidden": HIDDEN[None], "weight": WEIGHT, "labels": TARGETS[None]} | wrong)


def test_the_message_says_why_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for construct in (lambda: amapo_loss(LOGPS, LOGPS, backend="triton"), lambda: AMaPOLoss(backend="triton")):
        with raises(RuntimeError, "backend='triton' cannot run: PyTorch sees no GPU: use backend='torch' or 'auto'"):
            construct()


def takes_triton_on_a_gpu() -> bool:
    """Return whether float32 tensors on a GPU take Triton, which must be the same for the loss and the log-probs."""
    kernels._triton_starts_on.cache_clear()
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    options = LossOptions(2.0, 0.0, AdaptiveMargin(), None, None, "mean", "auto")
    takes_triton = functional._uses_triton(Pairs(on_gpu, on_gpu), options)
    assert _online_lse.uses_triton(on_gpu) == takes_triton
    kernels._triton_starts_on.cache_clear()
    return takes_triton


@pytest.mark.parametrize(
    ("found", "installed", "reason"),
    [
        (None, None, "Triton is not installed: `pip install triton`, or use backend='torch' or 'auto'"),
        ("found", "3.3.1", "Triton 3.3.1 is older than 3.4: update PyTorch, or use backend='torch' or 'auto'"),
        ("found", "3.4.0", None),
        ("found", "3.10.0+git1a2b3c", None),
        ("found", None, None),  # under the name of another distribution
    ],
)
def test_without_a_triton_that_can_be_used_auto_takes_torch(
    monkeypatch: pytest.MonkeyPatch, found: str | None, installed: str | None, reason: str | None
) -> None:
    def version(_: str) -> str:
        if installed is None:
            raise PackageNotFoundError
        return installed

    monkeypatch.setattr(kernels, "find_spec", lambda _: found)
    monkeypatch.setattr(kernels, "version", version)
    assert kernels._why_no_triton() == reason
    monkeypatch.setattr(kernels, "WHY_NO_TRITON", reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=SimpleNamespace(get_current_target=int)))
    assert takes_triton_on_a_gpu() == (reason is None)
    if reason is not None:
        with raises(RuntimeError, f"backend='triton' cannot run: {reason}"):
            amapo_loss(LOGPS, LOGPS, backend="triton")


@pytest.mark.parametrize("prevented_by", ["nothing", "an AMD GPU", "an old GPU", "no C compiler"])
def test_auto_takes_torch_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch, prevented_by: str) -> None:
    def start() -> None:
        if prevented_by == "no C compiler":
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "WHY_NO_TRITON", None)
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=SimpleNamespace(get_current_target=start)))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda _: (6, 1) if prevented_by == "an old GPU" else (7, 0)
    )
    monkeypatch.setattr(torch.version, "hip", "6.4" if prevented_by == "an AMD GPU" else None)
    expected = "amapo_loss uses PyTorch, because Triton cannot start: Failed to find C compiler"
    with pytest.warns(UserWarning, match=expected) if prevented_by == "no C compiler" else nullcontext():
        assert takes_triton_on_a_gpu() == (prevented_by == "nothing")


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("True", True), ("on", True), ("0", False), ("", False)])
def test_the_words_that_switch_the_interpreter_on_are_those_of_triton(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    triton = pytest.importorskip("triton")
    assert kernels.interpreted() == triton.knobs.runtime.interpret == expected


def test_the_message_says_what_triton_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: None)
    with raises(ValueError, "backend='triton' computes in float32, got float64 log-probs: use backend='torch' or"):
        amapo_loss(LOGPS, LOGPS.double(), backend="triton")
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    with raises(ValueError, "backend='triton' runs on a GPU, got chosen_logps on cpu: use backend='torch' or 'auto'"):
        amapo_loss(LOGPS, LOGPS, backend="triton")
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    logps = LOGPS.to("meta")
    with raises(
        ValueError, "backend='triton' is interpreted on the CPU, got chosen_logps on meta: use backend='torch'"
    ):
        amapo_loss(logps, logps, backend="triton")
