"""Check `AMaPOTrainer` in TRL's real training loop, with a tiny Llama, a byte-level tokenizer and generated pairs."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from amapo_loss import AdaptiveMargin, AMaPOOutput, ScoreStatistics, ScoreWindow, Totals, __version__, amapo_loss

pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and its dependencies raise many warnings about themselves

# These modules import TRL, so they must come after the lines that skip this file where TRL is not installed.
from amapo_loss import trl as amapo_loss_trl  # noqa: E402
from amapo_loss.trl import AMaPOConfig  # noqa: E402
from benchmarks.speed import trainer as trainer_benchmark  # noqa: E402
from benchmarks.speed.trainer import byte_tokenizer  # noqa: E402
from tests.support.trl import (  # noqa: E402
    make_trainer,
    pairs,
    pairs_with_columns,
    pairs_with_images,
    tiny_llama,
    tiny_llava,
    tiny_mixtral,
)

ROOT = Path(__file__).parents[2]
TRL = tuple(map(int, version("trl").split(".")[:2]))
MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values")


def summed_logps(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed log-prob and the length of each response [2B] of a collated batch, the chosen ones first."""
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}).logits
    token_logps = logits[:, :-1].double().log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    counted = batch["completion_mask"][:, 1:]
    return (token_logps * counted).sum(1).float(), counted.sum(1)


def expected_output(
    model: Any,
    batch: dict[str, Tensor],
    ref_model: Any = None,
    length_average: bool = True,
    **options: Any,
) -> AMaPOOutput:
    """Return what `amapo_loss` gives for a collated batch, with log-probs from the logits of the model."""
    options |= {name: batch[name] for name in ("margin", "weights") if name in batch}
    sums, lengths = summed_logps(model, batch)
    sums.requires_grad_()  # a window remembers only scores that a gradient is wanted for
    ref_sums = () if ref_model is None else summed_logps(ref_model, batch)[0].chunk(2)
    chosen_lengths, rejected_lengths = lengths.chunk(2) if length_average else (None, None)
    reduction: Any = "sum" if "weights" in options else "mean"
    loss, diagnostics = amapo_loss(
        *sums.chunk(2),
        *ref_sums,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        reduction=reduction,
        **options,
    )
    return AMaPOOutput(loss / (len(sums) / 2) if "weights" in options else loss, diagnostics)


def first_batch(dataloader: Any) -> dict[str, Tensor]:
    return dict(next(iter(dataloader)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"formula": "released", "beta": 2.5, "label_smoothing": 0.1},
        {"normalize": False, "scaling": "linear"},
        {"clip": False},
        {"length_average": False, "beta": 0.1},
        {"sft_weight": 0.3},
        {"floor": 0.5},
        {"constant_margin": 0.5},
        {"margin_column": "gap"},
        {"weight_column": "importance"},
        {"margin_column": "gap", "weight_column": "importance", "length_average": False, "beta": 0.1},
        {"weight_column": "importance", "sft_weight": 0.3},
    ],
)
def test_the_first_step_has_the_loss_and_the_summary_of_amapo_loss(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, train_dataset=pairs_with_columns(), **options)
    batch = first_batch(trainer.get_train_dataloader())
    margin_options = ("formula", "normalize", "scaling", "clip", "floor")
    loss, diagnostics = expected_output(
        trainer.model,
        batch,
        length_average=options.get("length_average", True),
        margin=options.get(
            "constant_margin", AdaptiveMargin(**{name: options[name] for name in margin_options if name in options})
        ),
        beta=options.get("beta", 2.0),
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    (chosen_sums, _), (chosen_lengths, _) = (x.chunk(2) for x in summed_logps(trainer.model, batch))
    if "weight_column" in options:  # SFT leaves out the pairs of weight 0
        assert 0 < (batch["weights"] == 0).sum() < len(batch["weights"])
        chosen_sums, chosen_lengths = (x * (batch["weights"] != 0) for x in (chosen_sums, chosen_lengths))
    sft_loss = -chosen_sums.sum() / chosen_lengths.sum()
    loss = loss + options.get("sft_weight", 0.0) * sft_loss
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, value in diagnostics.summary().items():
        assert log[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    assert {"entropy", "num_tokens", "mean_token_accuracy", "logits/chosen"} <= log.keys()


def test_without_a_reference_there_is_no_second_model_and_no_second_forward_pass(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import trl.trainer.dpo_trainer

    monkeypatch.setattr(
        trl.trainer.dpo_trainer,
        "create_model_from_path",
        lambda *_, **__: pytest.fail("the trainer builds a second model"),
    )
    trainer = make_trainer(tmp_path)
    assert trainer.ref_model is None
    forward_passes = []
    trainer.model.model.register_forward_hook(lambda *_: forward_passes.append(1))
    trainer.train()
    assert len(forward_passes) == 2, "the number of steps"


@pytest.mark.skipif(not hasattr(AMaPOConfig, "router_aux_loss_coef"), reason="this TRL adds no auxiliary loss")
def test_the_auxiliary_loss_of_a_mixture_of_experts_is_added(tmp_path: Path) -> None:
    model = tiny_mixtral()
    trainer = make_trainer(tmp_path, model, max_steps=1, router_aux_loss_coef=0.1)
    batch = first_batch(trainer.get_train_dataloader())
    expected = expected_output(model, batch).loss
    with torch.no_grad():
        auxiliary_loss = model(batch["input_ids"], batch["attention_mask"], output_router_logits=True).aux_loss
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["aux_loss"] == pytest.approx(auxiliary_loss.item(), rel=1e-4)
    assert log["loss"] == pytest.approx((expected + 0.1 * auxiliary_loss).item(), rel=1e-4)

    dataset = pairs().add_column("importance", [0.0] * len(pairs()))
    columns = {"train_dataset": dataset, "weight_column": "importance", "sft_weight": 0.3}
    trainer = make_trainer(tmp_path, tiny_mixtral(), max_steps=1, router_aux_loss_coef=0.1, **columns)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.1 * log["aux_loss"], rel=1e-4), "no pair counts, and the auxiliary loss stays"


@pytest.mark.parametrize("reference_free", [True, False])
def test_a_vision_language_model_trains_on_pairs_with_images(tmp_path: Path, reference_free: bool) -> None:
    model, processor = tiny_llava()
    ref_model = None if reference_free else tiny_llava(seed=7)[0]
    data = {"train_dataset": pairs_with_images(), "eval_dataset": pairs_with_images(5)}
    options = {"processing_class": processor, "max_length": None, "reference_free": reference_free, **data}
    trainer = make_trainer(tmp_path, model, ref_model=ref_model, statistics_window=12, **options)
    batch = first_batch(trainer.get_train_dataloader())
    expected = expected_output(model, batch, ref_model)
    black = batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])}
    assert expected_output(model, black, ref_model).loss != expected.loss
    trainer.train()
    log = trainer.state.log_history[0]
    for name, value in expected.diagnostics.summary().items():
        assert log[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.window.seen == 8


@pytest.mark.skipif(TRL < (1, 15), reason="before 1.15, TRL has no fused head")
@pytest.mark.parametrize("precompute", [False, True])
def test_log_probs_in_bfloat16_are_summed_in_float32(tmp_path: Path, precompute: bool) -> None:
    """FSDP2 gives the log-probs of the tokens in bfloat16, in which their sums would have steps of 0.125 and more."""

    def in_bfloat16(_: Any, __: Any, outputs: Any) -> None:
        outputs.log_probs = outputs.log_probs.bfloat16()

    models = [tiny_llama(seed) for seed in (0, 7)]
    for model in models:
        model.register_forward_hook(in_bfloat16)
    options = {"ref_model": models[1], "reference_free": False, "max_steps": 1, "precompute_ref_log_probs": precompute}
    trainer = make_trainer(tmp_path, models[0], **options, length_average=False, beta=0.1)
    batch = first_batch(trainer.get_train_dataloader())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    token_logps = [model(**inputs, labels=labels, fused_lm_head=True).log_probs for model in models]
    logps, ref_logps = (logps.float().sum(1).chunk(2) for logps in token_logps)
    trainer.train()
    expected = amapo_loss(*logps, *ref_logps, beta=0.1).loss.item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_training_increases_the_reward_margins(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=30, per_device_train_batch_size=8)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"] + 0.5


def test_a_reference_model_gives_the_dpo_score_precomputed_or_not(tmp_path: Path) -> None:
    ref_model = tiny_llama(seed=7)
    options = {"ref_model": ref_model, "reference_free": False, "max_steps": 1, "beta": 0.5}
    trainer = make_trainer(tmp_path, **options)
    batch = first_batch(trainer.get_train_dataloader())
    loss, diagnostics = expected_output(trainer.model, batch, ref_model, beta=0.5)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["amapo/score_std"] == pytest.approx(diagnostics.statistics.std.item(), rel=1e-3)

    precomputing_trainer = make_trainer(tmp_path, **options, precompute_ref_log_probs=True)
    precomputing_trainer.train()
    assert precomputing_trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("reference_free", [True, False])
def test_lora_trains_only_the_adapter(tmp_path: Path, reference_free: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, peft_config=config, reference_free=reference_free, max_steps=3, learning_rate=1e-2)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all("lora" in name for name in changed)
    assert all("ref" not in name for name in before)
    if not reference_free:
        # The reference is the model without its adapter. A new adapter changes nothing, so all scores start at 0.
        assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sft_weight": 0.3},
        {"length_average": False, "beta": 0.1},
        {"margin_column": "gap", "weight_column": "importance"},
    ],
)
def test_evaluation_gives_the_loss_and_the_summary_of_the_whole_set(
    tmp_path: Path, batch_size: int, options: dict[str, Any]
) -> None:
    """They do not depend on the batch size. Evaluation neither uses nor changes the window of the training scores."""
    data = {"train_dataset": pairs_with_columns(), "eval_dataset": pairs_with_columns(8)}
    columns = {name: value for name, value in options.items() if name.endswith("_column")}
    whole = make_trainer(tmp_path, per_device_eval_batch_size=8, **data, **columns)
    batch = first_batch(whole.get_eval_dataloader())
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=batch_size, statistics_window=16, **data, **options)
    loss, diagnostics = expected_output(
        trainer.model,
        batch,
        length_average=options.get("length_average", True),
        beta=options.get("beta", 2.0),
    )
    metrics = trainer.evaluate()
    if "sft_weight" not in options:  # TRL averages its SFT loss over the batches
        assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)
    log = trainer.state.log_history[-1]
    for name, value in diagnostics.summary().items():
        assert log[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    assert trainer.window.seen == 0
    trainer.train()
    left_out = sum(log.get("amapo/left_out", 0) for log in trainer.state.log_history)
    assert (left_out > 0) == bool(columns)
    assert trainer.window.seen == 8 - left_out


def test_each_of_several_evaluation_sets_has_the_summary_under_its_name(tmp_path: Path) -> None:
    sets = {"first": pairs(5), "second": pairs(9).select(range(5, 9))}
    trainer = make_trainer(tmp_path, eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, dataset in sets.items():
        alone = make_trainer(tmp_path, eval_dataset=dataset).evaluate()
        for key in ("loss", "rewards/margins", "rewards/accuracies", "amapo/score_std"):
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(alone[f"eval_{key}"], rel=1e-5)
    assert "eval_rewards/margins" not in metrics
    predicted = trainer.predict(trainer.eval_dataset["first"]).metrics
    assert predicted["test_rewards/margins"] == pytest.approx(metrics["eval_first_rewards/margins"], rel=1e-5)


def test_an_evaluation_without_a_whole_batch_returns_no_loss(tmp_path: Path) -> None:
    options = {"per_device_eval_batch_size": 4, "dataloader_drop_last": True}
    metrics = make_trainer(tmp_path, eval_dataset=pairs_with_columns(3), **options).evaluate()
    assert "eval_runtime" in metrics
    assert "eval_loss" not in metrics


@pytest.mark.parametrize(("batch_size", "accumulation_steps"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_the_log_has_the_summary_of_all_pairs_since_the_last_log(
    tmp_path: Path, batch_size: int, accumulation_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics are fixed, so that the margins do not depend on how the pairs are split."""
    fixed = ScoreStatistics(torch.tensor(0.5), torch.tensor(1.0), torch.tensor(8))
    trainer = make_trainer(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation_steps,
        statistics_window=8,
    )
    batches = [dict(batch) for batch, _ in zip(trainer.get_train_dataloader(), range(accumulation_steps))]
    parts = [expected_output(trainer.model, batch, statistics=fixed).diagnostics.totals() for batch in batches]
    monkeypatch.setattr(trainer.window, "forward", lambda *_: fixed)
    trainer.train()
    log = trainer.state.log_history[0]
    for name, value in sum(parts, start=Totals.none()).summary().items():
        assert log[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(("batch_size", "accumulation_steps"), [(1, 8), (4, 2), (8, 1)])
def test_weights_mean_the_same_in_every_micro_batch(tmp_path: Path, batch_size: int, accumulation_steps: int) -> None:
    """The margin is constant, so that the loss and the step do not depend on how the pairs are split."""
    trainers = [
        make_trainer(
            tmp_path,
            max_steps=1,
            train_dataset=pairs_with_columns(),
            weight_column="importance",
            constant_margin=0.5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        for size, steps in ((8, 1), (batch_size, accumulation_steps))
    ]
    for trainer in trainers:
        trainer.train()
    whole, split = (trainer.state.log_history[0] for trainer in trainers)
    for name in ("loss", "grad_norm", "rewards/margins", "amapo/left_out"):
        assert split[name] == pytest.approx(whole[name], rel=1e-4), name


def test_a_nan_loss_that_the_filter_hides_shows_in_the_log(tmp_path: Path) -> None:
    """Hugging Face replaces a NaN loss in its log (`logging_nan_inf_filter`). The number of such pairs is logged."""
    trainer = make_trainer(tmp_path, max_steps=1, logging_nan_inf_filter=True)
    with torch.no_grad():
        trainer.model.lm_head.weight[65] = torch.nan  # every log-prob is NaN
    trainer.train()
    assert trainer.state.log_history[0]["amapo/nonfinite"] == 4


@pytest.mark.parametrize("length_average", [True, False])
def test_a_pair_with_an_empty_response_is_left_out(tmp_path: Path, length_average: bool) -> None:
    """Truncation makes such pairs. The logged figures are those of the other pairs."""
    trainer = make_trainer(tmp_path, max_steps=1, length_average=length_average, beta=0.1)
    batch = first_batch(trainer.get_train_dataloader())
    batch["completion_mask"][1] = 0  # the chosen response of the second of four pairs
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    summary = trainer._totals.summary()
    assert summary["amapo/left_out"] == 1
    sums, lengths = summed_logps(trainer.model, batch)
    (chosen, rejected), (chosen_lengths, rejected_lengths) = sums.chunk(2), lengths.chunk(2)
    others = torch.tensor([0, 2, 3])
    given = {"chosen_lengths": chosen_lengths[others], "rejected_lengths": rejected_lengths[others]}
    expected = amapo_loss(chosen[others], rejected[others], beta=0.1, **given if length_average else {})
    for name, value in expected.diagnostics.summary().items():
        if name != "amapo/left_out":
            assert summary[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_average": False}, "beta=2 is meant for averaged log-probs, and length_average is False"),
        ({"per_device_train_batch_size": 1}, "every micro-batch has a single pair, so all margins are 0"),
        ({"beta": 0.1}, "beta=0.1 is meant for sums of log-probs, and length_average is True"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model='loss' prefers early checkpoints"),
        ({"metric_for_best_model": "eval_a_loss"}, "metric_for_best_model='eval_a_loss' prefers early checkpoints"),
        (
            {"model": tiny_llama().to(torch.bfloat16), "learning_rate": 6e-7},
            "weights are in bfloat16, where most steps of learning_rate=6e-07 are lost in rounding",
        ),
        (
            {"train_dataset": pairs(8).add_column("weight", [1.0] * 8)},
            "column 'weight'.*: set weight_column='weight' to",
        ),
        (
            {"train_dataset": pairs(8).add_column("margins", [1.0] * 8)},
            "column 'margins'.*: set margin_column='margins'",
        ),
    ],
)
def test_the_trainer_warns_of_settings_that_do_not_train_as_intended(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        make_trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("accumulation_steps", "window", "message"),
    [
        (8, None, "over a micro-batch, with 4 pairs: set statistics_window=32"),
        (8, 15, "statistics_window=15 is far from the pairs per step: set statistics_window=32"),
        (8, 65, "statistics_window=65 is far from the pairs per step: set statistics_window=32"),
        (8, 16, None),
        (8, 64, None),
        (1, None, None),
    ],
)
def test_the_trainer_warns_of_a_window_that_is_far_from_the_pairs_per_step(
    tmp_path: Path, accumulation_steps: int, window: int | None, message: str | None
) -> None:
    options = {"gradient_accumulation_steps": accumulation_steps, "statistics_window": window, "max_steps": 1}
    for margin in (None, 0.5):
        trainer = make_trainer(tmp_path, constant_margin=margin, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        texts = [str(warning.message) for warning in caught if "statistics" in str(warning.message)]
        assert len(texts) == (message is not None and margin is None), texts
        assert all(str(message) in text for text in texts)


def test_weights_in_bfloat16_may_be_trained_with_a_large_rate_copies_or_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_llama().to(torch.bfloat16)
    adapted = get_peft_model(
        tiny_llama().to(torch.bfloat16), LoraConfig(task_type="CAUSAL_LM"), autocast_adapter_dtype=False
    )
    assert {weight.dtype for weight in adapted.parameters()} == {torch.bfloat16}
    whole_layer = LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="the weights are in bfloat16"):
        make_trainer(tmp_path, get_peft_model(tiny_llama().to(torch.bfloat16), whole_layer), learning_rate=6e-7)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the weights are in bfloat16")
        trainer = make_trainer(tmp_path, model, learning_rate=1e-3)
        make_trainer(tmp_path, adapted, learning_rate=6e-7)
        trainer.args.learning_rate = 6e-7
        for keeps_copies in ("is_deepspeed_enabled", "is_fsdp_enabled"):  # of the weights, in float32
            with monkeypatch.context() as patched:
                patched.setattr(trainer, keeps_copies, True)
                trainer._warn()


def test_a_callback_may_change_beta(tmp_path: Path) -> None:
    """It is an attribute of `DPOTrainer`."""
    trainer = make_trainer(tmp_path)
    batch = first_batch(trainer.get_train_dataloader())
    sums, lengths = summed_logps(trainer.model, batch)
    trainer.beta = 50.0
    averages = sums / lengths
    expected = amapo_loss(*averages.chunk(2), beta=50.0).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model.train(), batch), expected, rtol=1e-4, atol=1e-5)


def test_no_model_sees_the_columns(tmp_path: Path) -> None:
    """`DPOTrainer` passes every key of a batch that it does not know to the model."""
    columns = {"train_dataset": pairs_with_columns(), "margin_column": "gap", "weight_column": "importance"}
    options = {"reference_free": False, "max_steps": 1, "beta": 0.5, **columns}
    losses, seen = [], set()
    for precompute in (False, True):
        models = [tiny_llama(), tiny_llama(seed=7)]
        for model in models:
            model.register_forward_pre_hook(lambda _, __, inputs: seen.update(inputs), with_kwargs=True)
        trainer = make_trainer(tmp_path, models[0], ref_model=models[1], precompute_ref_log_probs=precompute, **options)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "input_ids" in seen
    assert not {"margin", "weights", "gap", "importance"} & seen


def test_a_micro_batch_whose_pairs_are_all_left_out_has_the_loss_0(tmp_path: Path) -> None:
    """TRL's average over no token would be NaN."""
    dataset = pairs().add_column("importance", [0.0] * len(pairs()))
    trainer = make_trainer(
        tmp_path,
        max_steps=1,
        train_dataset=dataset,
        weight_column="importance",
        sft_weight=0.3,
        logging_nan_inf_filter=False,
    )
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == log["grad_norm"] == 0
    assert all(math.isfinite(value) for value in log.values())
    assert torch.equal(trainer.model.lm_head.weight, before)


class KeepsTheBest(NamedTuple):
    """What a configuration that keeps the best model looks at."""

    metric_for_best_model: str
    greater_is_better: bool

    @classmethod
    def of(cls, config: Any) -> "KeepsTheBest":
        return cls(config.metric_for_best_model, config.greater_is_better)


def test_the_best_model_is_that_of_the_highest_accuracy(tmp_path: Path) -> None:
    """The evaluation loss grows with the margins while the model improves."""
    from trl import DPOConfig

    options = {"eval_steps": 4, "save_steps": 4, "eval_strategy": "steps", "save_strategy": "steps"}
    best = {"load_best_model_at_end": True, **options}
    trainer = make_trainer(tmp_path, eval_dataset=pairs(8), max_steps=12, learning_rate=1e-2, **best)
    assert KeepsTheBest.of(trainer.args) == ("rewards/accuracies", True)
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluations[-1]["eval_loss"] > 2 * evaluations[0]["eval_loss"]
    assert evaluations[-1]["eval_amapo/score_mean"] > evaluations[0]["eval_amapo/score_mean"]
    assert trainer.state.best_metric == max(log["eval_rewards/accuracies"] for log in evaluations)

    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    by_loss, by_accuracy = ("loss", False), ("rewards/accuracies", True)
    for config, expected in (
        (AMaPOConfig(**common), (None, None)),
        (AMaPOConfig(**common, constant_margin=0.5, **best), by_loss),
        (AMaPOConfig(**common, metric_for_best_model="loss", **best), by_loss),
        (AMaPOConfig(**common, lr_scheduler_type="reduce_lr_on_plateau", **options), by_accuracy),
        (AMaPOConfig.of(DPOConfig(**common, **best)), by_accuracy),
        (AMaPOConfig.of(DPOConfig(**common, **best), constant_margin=0.5), by_loss),
        (AMaPOConfig.of(DPOConfig(**common, metric_for_best_model="loss")), by_loss),
    ):
        assert KeepsTheBest.of(config) == expected


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_scheduler_that_looks_at_the_accuracy_maximizes_it(tmp_path: Path, scheduler: str) -> None:
    if scheduler not in {str(x.value) for x in transformers.SchedulerType}:
        pytest.skip("this Transformers has no such scheduler")
    options = {"max_steps": 6, "learning_rate": 3e-4, "eval_strategy": "steps", "eval_steps": 1}
    swapped = pairs().rename_columns(
        {"chosen": "rejected", "rejected": "chosen"}
    )  # which the model ranks wrong at first
    datasets = {"train_dataset": swapped, "eval_dataset": swapped}
    trainer = make_trainer(tmp_path, lr_scheduler_type=scheduler, **datasets, **options)
    trainer.train()
    accuracies = [log["eval_rewards/accuracies"] for log in trainer.state.log_history if "eval_loss" in log]
    assert min(accuracies) < max(accuracies)
    assert trainer.lr_scheduler.best == max(accuracies)
    by_loss = AMaPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, constant_margin=0.5, lr_scheduler_type=scheduler, **options
    )
    assert "mode" not in (by_loss.lr_scheduler_kwargs or {})
    own_metric = {"use_cpu": True, "bf16": False, "metric_for_best_model": "eval_a_rewards/accuracies", **options}
    for kwargs, mode in ((None, "max"), ({"patience": 3}, "max"), ({"mode": "min"}, "min")):
        config = AMaPOConfig(
            str(tmp_path),
            lr_scheduler_type=scheduler,
            **own_metric,
            **({"lr_scheduler_kwargs": kwargs} if kwargs else {}),
        )
        assert config.lr_scheduler_kwargs == (kwargs or {}) | {"mode": mode}


def test_a_training_log_after_an_evaluation_has_the_summary_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of an epoch, Hugging Face evaluates after the last step and before it logs the epoch."""
    strategies = {"logging_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2, eval_dataset=pairs(5), **strategies)
    num_pairs, numbers = [], amapo_loss_trl._summary_as_floats

    def recording(totals: Totals) -> dict[str, float]:
        num_pairs.append(totals.values[0].item())
        return numbers(totals)

    monkeypatch.setattr(amapo_loss_trl, "_summary_as_floats", recording)
    trainer.train()
    training_logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(training_logs) == 2
    assert all("rewards/margins" in log and "amapo/score_mean" in log for log in training_logs)
    assert num_pairs == [5, 5, 24] * 2, "two evaluations and the training log of each epoch"
    assert not any("eval_loss" not in log and "eval_rewards/margins" in log for log in trainer.state.log_history)


def test_a_training_starts_without_the_scores_of_an_earlier_one(tmp_path: Path) -> None:
    """It may be a second call of `train`, or the next try after memory ran out (`auto_find_batch_size`)."""
    options = {"statistics_window": 64, "max_steps": 1, "gradient_accumulation_steps": 2, "auto_find_batch_size": True}
    trainer = make_trainer(tmp_path, per_device_train_batch_size=8, **options)
    training_step, fails = trainer.training_step, True

    def failing_step(model: Any, inputs: Any, *arguments: Any, **others: Any) -> Any:
        nonlocal fails
        if fails:
            fails = False
            trainer.compute_loss(model.train(), inputs)
            raise RuntimeError("CUDA out of memory.")
        return training_step(model, inputs, *arguments, **others)

    trainer.training_step = failing_step
    for _ in range(2):
        trainer.train()
        assert trainer.window.seen == 2 * trainer._train_batch_size < 16


def test_a_pair_of_weight_0_may_have_an_infinite_log_prob(tmp_path: Path) -> None:
    """The head of a model may exclude tokens. TRL's own loss of such a pair would be infinite, also times 0."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, num_attention_heads=4))
    rows = [dict(row, importance=1.0) for row in pairs(8)]
    rows[2] |= {"chosen": "~", "importance": 0.0}
    dataset = pairs(0).from_list(rows)
    columns = {"train_dataset": dataset, "eval_dataset": dataset, "weight_column": "importance"}
    trainer = make_trainer(tmp_path, model, per_device_train_batch_size=8, logging_nan_inf_filter=False, **columns)
    (excluded, *_) = trainer.processing_class("~")["input_ids"]
    with torch.no_grad():
        model.lm_head.bias[excluded] = -torch.inf
    trainer.train()
    for log in trainer.state.log_history[:2]:
        assert math.isfinite(log["loss"])
        assert (log["amapo/nonfinite"], log["amapo/left_out"]) == (0, 1)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_an_evaluation_computes_the_log_probs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`DPOTrainer` calls the model again where `compute_metrics` needs the logits."""
    num_calls, summed = 0, amapo_loss_trl._summed_logps

    def counting(*arguments: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return summed(*arguments)

    monkeypatch.setattr(amapo_loss_trl, "_summed_logps", counting)
    options = {"compute_metrics": lambda _: {}, "eval_dataset": pairs(8), "per_device_eval_batch_size": 4}
    make_trainer(tmp_path, **options).evaluate()
    assert num_calls == 2


def test_a_callback_may_log_values_of_its_own(tmp_path: Path) -> None:
    """It may do so on one process only, so that such a log must not gather anything."""

    class Callback(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            with pytest.MonkeyPatch.context() as patches:
                patches.setattr(Totals, "reduced", lambda *_: pytest.fail("the log gathers totals"))
                trainer.log({"own": 1.0})

    histories = []
    for callbacks in ([], [Callback()]):
        trainer = make_trainer(tmp_path, max_steps=2, logging_steps=2)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        histories.append(trainer.state.log_history)
    own = [log for log in histories[1] if "own" in log]
    assert [log.keys() for log in own] == [{"own", "epoch", "step"}] * 2
    ((logged, _), (logged_beside, _)) = histories[0], [log for log in histories[1] if "own" not in log]
    assert logged == logged_beside


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    """A column that a data set lacks is named when the trainer is made, and not at the first evaluation."""
    options = {"weight_column": "importance"}
    missing = "has no column 'importance', which weight_column names"
    with pytest.raises(ValueError, match=f"train_dataset {missing}"):
        make_trainer(tmp_path, **options)
    options["train_dataset"] = pairs_with_columns()
    with pytest.raises(ValueError, match=f"eval_dataset {missing}"):
        make_trainer(tmp_path, eval_dataset=pairs(4), **options)
    with pytest.raises(ValueError, match=rf"eval_dataset\['b'\] {missing}"):
        make_trainer(tmp_path, eval_dataset={"a": pairs_with_columns(4), "b": pairs(4)}, **options)
    streamed = pairs(4).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"eval_dataset {missing}"):
        make_trainer(tmp_path, eval_dataset=streamed, **options)
    trainer = make_trainer(tmp_path, eval_dataset=pairs_with_columns(4), **options)
    with pytest.raises(ValueError, match=f"the data {missing}"):
        trainer.evaluate(trainer.train_dataset.remove_columns("importance"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("weight_column", None, "weight_column names, has a missing value"),
        ("weight_column", -1.0, "weight_column names, must be at least 0 and finite, got -1.0"),
        ("weight_column", math.inf, "weight_column names, must be at least 0 and finite, got inf"),
        ("margin_column", math.nan, "margin_column names, must be finite, got nan"),
        ("margin_column", "large", "margin_column names, must be finite, got 'large'"),
    ],
)
def test_a_wrong_value_in_a_column_is_named(tmp_path: Path, option: str, value: Any, message: str) -> None:
    """A NaN in one row would become the value of every weight of the model, and the log would show a loss of 0."""
    dataset = pairs(4).add_column("own", [value] * 4 if isinstance(value, str) else [1.0, value, 1.0, 1.0])
    trainer = make_trainer(tmp_path, train_dataset=dataset, **{option: "own"})
    with pytest.raises(ValueError, match=f"the column 'own', which {message}"):
        trainer.train()


def test_a_column_of_a_streamed_data_set_that_is_not_used_is_named(tmp_path: Path) -> None:
    dataset = pairs(4).add_column("weight", [1.0] * 4).to_iterable_dataset()
    with pytest.warns(UserWarning, match="AMaPOTrainer ignores the column 'weight' of the training data"):
        make_trainer(tmp_path, train_dataset=dataset, max_steps=1)


def test_a_compiled_reference_gives_the_loss_of_one_that_is_not(tmp_path: Path) -> None:
    """A compiled model has no truth value."""
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        models = {"model": tiny_llama(), "ref_model": tiny_llama(seed=7)}
        trainer = make_trainer(tmp_path, **models, reference_free=False, max_steps=1, **options)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_window_has_no_scores_of_a_reference_that_was_replaced(tmp_path: Path) -> None:
    """After step 2, the reference becomes the policy, so that all scores of step 3 are 0. So are all margins."""
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    options = {"reference_free": False, "statistics_window": 16, "max_steps": 3, "learning_rate": 1e-2, "beta": 0.5}
    trainer = make_trainer(tmp_path, ref_model=tiny_llama(seed=7), logging_steps=1, **sync, **options)
    trainer.train()
    *_, second, third = [log for log in trainer.state.log_history if "loss" in log]
    assert second["amapo/margin_mean"] > 0
    assert third["rewards/margins"] == pytest.approx(0, abs=1e-6)  # TRL 1.0 rounds the two models differently
    assert third["amapo/margin_mean"] == 0


@pytest.mark.parametrize("number", [1, True, 0.5, np.float32(0.5), np.int64(2), torch.tensor(0.5)])
def test_a_column_may_have_numbers_of_any_kind(number: Any) -> None:
    """Such as those of a data set in the format "numpy" or "torch"."""
    collate = amapo_loss_trl._CollatorWithColumns(lambda examples: {}, {"weights": "own"})
    assert torch.equal(collate([{"own": number}])["weights"], torch.tensor([float(number)]))


def test_the_best_model_needs_the_metric_of_one_of_several_evaluation_sets(tmp_path: Path) -> None:
    """Hugging Face would raise at the first evaluation."""
    options = {"eval_dataset": {"a": pairs(4), "b": pairs(5)}, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    message = "must name one of the evaluation sets, as in 'eval_a_rewards/accuracies', got 'rewards/accuracies'"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)
    for metric in ("eval_b_rewards/accuracies", "b_rewards/accuracies"):
        trainer = make_trainer(tmp_path, metric_for_best_model=metric, **options)
        trainer.train()
        assert trainer.state.best_metric is not None


def test_deepspeed_does_not_round_what_the_loss_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face rounds every number of a batch to the dtype of DeepSpeed. This needs no DeepSpeed."""
    options = {"train_dataset": pairs_with_columns(), "margin_column": "gap", "weight_column": "importance"}
    reference = {"ref_model": tiny_llama(1), "reference_free": False, "precompute_ref_log_probs": True}
    trainer = make_trainer(tmp_path, **reference, **options)
    batch = first_batch(trainer.get_train_dataloader()) | {"other": torch.tensor([1 / 3])}
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer.accelerator.state, "deepspeed_plugins", {"default": plugin})
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    prepared = trainer._prepare_inputs(batch)
    assert prepared["other"].dtype == torch.bfloat16, "otherwise this test shows nothing"
    for name in ("ref_chosen_logps", "ref_rejected_logps", "margin", "weights"):
        assert torch.equal(prepared[name], batch[name]), name


def test_an_evaluation_on_the_training_pairs_is_no_training_log(tmp_path: Path) -> None:
    """A callback may evaluate the training accuracy under the prefix of Hugging Face's last training log."""

    class Callback(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            trainer.evaluate(trainer.train_dataset.select(range(4)), metric_key_prefix="train")

    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=3)
    trainer.add_callback(Callback())
    plain = make_trainer(tmp_path, max_steps=3, logging_steps=3)
    for each in (trainer, plain):
        each.train()
    (logged,), (expected,) = ([x for x in each.state.log_history if "loss" in x] for each in (trainer, plain))
    for name in ("rewards/margins", "amapo/score_mean", "logps/chosen"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-6), name
    assert not any("amapo/score_mean" in x for x in trainer.state.log_history if "train_rewards/margins" in x)


def test_the_trainer_refuses_tensor_parallelism(tmp_path: Path) -> None:
    """Its processes have the same pairs, so that the statistics over all processes would count them twice."""
    from accelerate.parallelism_config import ParallelismConfig

    trainer = make_trainer(tmp_path)
    assert hasattr(trainer.accelerator, "parallelism_config")
    accelerator = trainer.accelerator
    trainer.accelerator = SimpleNamespace(parallelism_config=ParallelismConfig(tp_size=2))
    with pytest.raises(ValueError, match="got tp_size=2: use data parallelism only"):
        trainer._require_data_parallelism()
    trainer.accelerator = accelerator
    trainer._require_data_parallelism()
    trainer.is_deepspeed_enabled = True
    trainer.args.hf_deepspeed_config = SimpleNamespace(config={"tensor_parallel": {"autotp_size": 4}})
    with pytest.raises(ValueError, match="got tp_size=4: use data parallelism only"):
        trainer._require_data_parallelism()


def test_a_window_of_another_size_resumes(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, statistics_window=16, **options).train()
    resumed = make_trainer(tmp_path, tiny_llama(seed=9), statistics_window=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.window.seen == 6 + 2 * 4, "the newest 6 of 8 scores, and two steps of 4 pairs"


@pytest.mark.parametrize("window", [None, 16])
def test_a_resumed_run_continues_bitwise(tmp_path: Path, window: int | None) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "statistics_window": window}
    checkpoint = tmp_path / "checkpoint-2"
    uninterrupted = make_trainer(tmp_path, **options)
    uninterrupted.train()
    resumed = make_trainer(tmp_path, tiny_llama(seed=9), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (name, expected), actual in zip(uninterrupted.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(actual, expected), name
    if window:
        assert torch.equal(uninterrupted.window.scores, resumed.window.scores)
        assert uninterrupted.window.seen == resumed.window.seen == 16
        # Without the file of the window, the run must go on differently. Otherwise this test would show nothing.
        (checkpoint / "score_window.pt").unlink()
        resumed_without_window = make_trainer(tmp_path, tiny_llama(seed=9), **options)
        resumed_without_window.train(resume_from_checkpoint=str(checkpoint))
        assert not torch.equal(uninterrupted.model.lm_head.weight, resumed_without_window.model.lm_head.weight)


def test_gradient_accumulation_takes_the_mean_loss_of_the_micro_batches(tmp_path: Path) -> None:
    """With a window, the statistics of a micro-batch contain the scores of the micro-batches before it."""
    for size in (None, 8):
        trainer = make_trainer(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            statistics_window=size,
        )
        window = None if size is None else ScoreWindow(size)
        losses = [
            expected_output(trainer.model, dict(batch), statistics=window).loss.item()
            for batch, _ in zip(trainer.get_train_dataloader(), range(3))
        ]
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


DISTRIBUTED_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.support.trl import make_trainer, pairs_with_columns
import torch
held_out = pairs_with_columns(8).to_iterable_dataset() if {streamed} else pairs_with_columns(7)
data = {{"train_dataset": pairs_with_columns(), "eval_dataset": held_out}}
options = {{"statistics_window": 12, "per_device_eval_batch_size": 2, **{columns!r}}}
trainer = make_trainer(Path({folder!r}), max_steps=3, ddp_backend="gloo", **data, **options)
trainer.train()
trainer.evaluate()
if trainer.accelerator.is_main_process:
    torch.save((trainer.state.log_history, trainer.model.state_dict()), {folder!r} + "/result.pt")
"""


@pytest.mark.parametrize(
    ("columns", "streamed"),
    [({}, False), ({"weight_column": "importance"}, False), ({}, True)],
    ids=["no columns", "weights", "streamed"],
)
def test_two_processes_train_and_evaluate_like_one_process_with_twice_the_batch(
    tmp_path: Path, columns: dict[str, str], streamed: bool
) -> None:
    """The 7 pairs of the evaluation set are no multiple of the batch, so that accelerate repeats one of them.

    A streamed evaluation set has 8. By default, accelerate would cut its batches into chosen and rejected responses.
    """
    script = tmp_path / "distributed_run.py"
    script.write_text(DISTRIBUTED_RUN.format(root=str(ROOT), folder=str(tmp_path), columns=columns, streamed=streamed))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    logs, state_dict = torch.load(tmp_path / "result.pt", weights_only=False)
    data = {"train_dataset": pairs_with_columns(), "eval_dataset": pairs_with_columns(8 if streamed else 7)}
    options = {"statistics_window": 12, "per_device_eval_batch_size": 8, **columns}
    single = make_trainer(tmp_path / "single", max_steps=3, per_device_train_batch_size=8, **data, **options)
    single.train()
    single.evaluate()
    summary_keys = [key for key in single.state.log_history[0] if key.startswith(("amapo/", "rewards/", "logps/"))]
    assert len(summary_keys) == 16
    for actual, expected in zip(logs[:3], single.state.log_history[:3]):
        for name in ("loss", "grad_norm", *summary_keys):
            assert actual[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    for name in ("loss", *summary_keys):
        expected_value = single.state.log_history[-1][f"eval_{name}"]
        assert logs[-1][f"eval_{name}"] == pytest.approx(expected_value, rel=1e-3, abs=1e-5), name
    for name, parameter in single.model.state_dict().items():
        torch.testing.assert_close(state_dict[name], parameter, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_type": ["ipo"]},
            "loss_type belongs to another loss of DPOTrainer: leave it at ['amapo'], got ['ipo']",
        ),
        (
            {"loss_type": ["sigmoid", "sft"]},
            "loss_type belongs to another loss of DPOTrainer; for SFT beside this loss, set sft_weight: leave it at",
        ),
        (
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor belongs to another loss of DPOTrainer: leave it at 0",
        ),
        ({"include_for_metrics": ["loss"]}, 'include_for_metrics must not have "loss"'),
        ({"use_weighting": True}, "use_weighting belongs to another loss of DPOTrainer: leave it at False, got True"),
        (
            {"precompute_ref_log_probs": True},
            "precompute_ref_log_probs needs a reference model, and reference_free is True",
        ),
        ({"sync_ref_model": True}, "sync_ref_model needs a reference model, and reference_free is True"),
        ({"formula": "papers"}, "formula must be one of 'paper', 'released', got 'papers'"),
        ({"beta": 0.0}, "beta must be > 0 and finite, got 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be >= 0 and < 0.5, got 0.5"),
        ({"sft_weight": -1.0}, "sft_weight must be >= 0 and finite, got -1.0"),
        ({"statistics_window": 0}, "statistics_window must be at least 1, got 0"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "accelerator_config must not have dispatch_batches=True, which would mix up the pairs",
        ),
        ({"floor": -1.0}, "floor must be >= 0 and finite, got -1.0"),
        (
            {"margin_column": "gap", "floor": 0.5},
            "floor has no effect, because margin_column replaces the adaptive margin: leave it at 0.0, got 0.5",
        ),
        (
            {"constant_margin": 0.5, "formula": "released"},
            "formula has no effect, because constant_margin replaces the adaptive margin: leave it at 'paper'",
        ),
        (
            {"constant_margin": 0.5, "margin_column": "gap"},
            "constant_margin has no effect, because margin_column gives",
        ),
        ({"constant_margin": float("nan")}, "constant_margin must be finite, got nan"),
    ],
)
def test_the_config_rejects_unused_options_and_values_out_of_range(
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AMaPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_the_trainer_rejects_an_unused_reference_model_and_another_config(tmp_path: Path) -> None:
    from trl import DPOConfig

    with pytest.raises(ValueError, match="ref_model was given, but reference_free is True"):
        make_trainer(tmp_path, ref_model=tiny_llama(1))
    with pytest.raises(TypeError, match=r"args must be an AMaPOConfig, got DPOConfig: pass AMaPOConfig.of\(args\)"):
        make_trainer(tmp_path, config_class=DPOConfig)
    with pytest.raises(TypeError, match="args must be an AMaPOConfig, got dict"):
        make_trainer(tmp_path, config_class=lambda *_, **__: {})


def test_a_dpo_trainer_refuses_the_config(tmp_path: Path) -> None:
    """Otherwise a script with one of its two imports changed would train DPO with beta 2."""
    from trl import DPOTrainer

    args = make_trainer(tmp_path).args
    trainer = DPOTrainer(tiny_llama(), tiny_llama(), args, train_dataset=pairs(), processing_class=byte_tokenizer())
    with pytest.raises(ValueError, match="Unknown loss type: amapo"):
        trainer.train()


def test_a_dpo_config_becomes_an_amapo_config(tmp_path: Path) -> None:
    from trl import DPOConfig

    options = {"use_cpu": True, "bf16": False, "report_to": "none"}
    dpo_config = DPOConfig(
        str(tmp_path), learning_rate=6e-7, lr_scheduler_type="cosine", max_length=77, hub_token="secret", **options
    )
    config = AMaPOConfig.of(dpo_config, formula="released", statistics_window=64)
    assert type(config) is AMaPOConfig
    assert (config.output_dir, config.learning_rate, config.max_length) == (str(tmp_path), 6e-7, 77)
    assert (config.hub_token, config.lr_scheduler_type) == ("secret", "cosine")
    assert (config.beta, config.statistics_window, config.margin) == (2.0, 64, AdaptiveMargin("released"))
    assert AMaPOConfig.of(DPOConfig(str(tmp_path), beta=0.3, **options)).beta == 0.3
    assert AMaPOConfig.of(DPOConfig(str(tmp_path), beta=0.3, **options), beta=0.5).beta == 0.5
    assert AMaPOConfig.of(dpo_config, length_average=False, reference_free=False).beta == 0.1
    assert AMaPOConfig.of(AMaPOConfig(str(tmp_path), beta=0.1, **options), formula="released").beta == 0.1
    with pytest.raises(ValueError, match="loss_type belongs to another loss"):
        AMaPOConfig.of(DPOConfig(str(tmp_path), loss_type=["ipo"], **options))
    with pytest.raises(TypeError, match="dpo_config must be a DPOConfig, got dict"):
        AMaPOConfig.of({})


def test_a_trainer_with_the_config_of_a_dpo_config_trains_as_with_its_own(tmp_path: Path) -> None:
    from trl import DPOConfig

    def converted(*arguments: Any, **options: Any) -> AMaPOConfig:
        return AMaPOConfig.of(DPOConfig(*arguments, **options), statistics_window=8)

    options = {
        "max_steps": 2,
        "pad_token": "<pad>",
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 0.3},
        "accelerator_config": {"split_batches": False, "even_batches": True},
        "gradient_checkpointing": True,
        "report_to": [],
    }
    trainers = [
        make_trainer(tmp_path, config_class=converted, **options),
        make_trainer(tmp_path, statistics_window=8, **options),
    ]
    for trainer in trainers:
        trainer.train()
    assert trainers[0].args.to_dict() == trainers[1].args.to_dict()
    assert trainers[0].state.log_history[0]["loss"] == trainers[1].state.log_history[0]["loss"]
    assert torch.equal(trainers[0].model.lm_head.weight, trainers[1].model.lm_head.weight)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (
            "class DPOConfig: pass\nclass DPOTrainer:\n    def log(self): pass\n    def evaluation_loop(self): pass\n",
            "needs trl>=1.0,<1.17, found 0.24.0, whose DPOTrainer has no _inner_training_loop and no _compute_loss "
            "and no compute_ref_log_probs "
            "and no _set_signature_columns_if_needed and no _prepare_inputs and no _save_optimizer_and_scheduler "
            "and no _load_optimizer_and_scheduler: run `pip install 'trl>=1.0,<1.17'`",
        ),
        (None, "needs TRL: run `pip install 'trl>=1.0,<1.17'`"),
        (
            "import missing_dependency_of_trl",
            "needs trl>=1.0,<1.17, and trl 0.24.0 cannot be imported here: No module named 'missing_dependency_of_trl'",
        ),
        (
            "def __getattr__(name): raise RuntimeError('Failed to import trl.trainer')",
            "needs trl>=1.0,<1.17, and trl 0.24.0 cannot be imported here: Failed to import trl.trainer",
        ),
    ],
)
def test_importing_without_a_trl_that_has_the_hooks_raises(tmp_path: Path, package: str | None, message: str) -> None:
    """`package` is the content of another TRL, or None for no TRL at all."""
    code = "import sys\n"
    if package is None:
        code += "sys.modules['trl'] = None\n"
    else:
        (tmp_path / "trl").mkdir()
        (tmp_path / "trl" / "__init__.py").write_text(package)
        (tmp_path / "trl-0.24.0.dist-info").mkdir()
        (tmp_path / "trl-0.24.0.dist-info" / "METADATA").write_text("Name: trl\nVersion: 0.24.0\n")
        code += f"sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "try:\n    import amapo_loss.trl\nexcept ImportError as error:\n    print(error)\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert message in result.stdout


def test_a_trainer_without_an_attribute_that_is_set_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise TRL's own loss would be added, because nothing has set its weight to 0."""
    monkeypatch.setattr("amapo_loss.trl._ATTRIBUTES", ("loss_types", "no_such_attribute"))
    with pytest.raises(ImportError, match="whose DPOTrainer has no no_such_attribute"):
        make_trainer(tmp_path)


@pytest.mark.skipif(TRL >= (1, 15), reason="this TRL has no Liger loss of its own")
def test_a_liger_loss_of_trl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_liger_kernel must be False with TRL"):
        make_trainer(tmp_path, use_liger_kernel=True)


def test_the_config_can_be_parsed_from_a_command_line(tmp_path: Path) -> None:
    command_line = (
        f"--output_dir {tmp_path} --formula released --reference_free false --statistics_window 64 --use_cpu --bf16 no"
    )
    (args,) = transformers.HfArgumentParser(AMaPOConfig).parse_args_into_dataclasses(command_line.split())
    assert args.margin == AdaptiveMargin(formula="released")
    assert (args.reference_free, args.statistics_window, args.beta) == (False, 64, 2.0)
    assert json.loads(args.to_json_string())["formula"] == "released"


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_script_trains_from_a_yaml_file_and_the_model_card_names_the_loss(tmp_path: Path, use_peft: bool) -> None:
    """The data are a local file, and so is the model. An option on the command line replaces one of the file."""
    tiny_llama().save_pretrained(tmp_path / "model")
    trainer_benchmark.byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    pairs().to_json(tmp_path / "data" / "train.jsonl")
    options = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "formula": "released",
        "beta": 2.5,
        "statistics_window": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        **({"use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear"} if use_peft else {}),
    }
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    command = [sys.executable, "-m", "amapo_loss.trl", "--config", str(tmp_path / "run.yaml"), "--beta", "3.0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() is use_peft
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert type(args) is AMaPOConfig
    assert (args.beta, args.formula, args.statistics_window) == (3.0, "released", 16)
    card = (tmp_path / "out" / "README.md").read_text()
    loss = card.split("### Loss\n")[1].split("###")[0]
    assert f"- amapo-loss: {__version__}\n" in loss
    assert "- beta: 3.0\n" in loss
    assert "formula='released'" in loss
    assert "- statistics over: the latest 16 scores on all processes\n" in loss
    assert "arXiv 2511.09385" in card
    assert f"- TRL: {version('trl')}\n" in card, "the process has the TRL that is tested here"

    misspelt = subprocess.run(
        [*command, "--formla", "paper"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert misspelt.returncode != 0
    assert "formla" in misspelt.stderr


@pytest.mark.skipif(TRL < (1, 15), reason="the benchmark is for a TRL with a fused head")
def test_the_benchmark_of_a_training_step_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "trainer.json"
    options = {"rounds": 1, "steps": 3, "batch-size": 2, "vocabulary": 258, "width": 32, "layers": 1, "out": out}
    monkeypatch.setattr(sys, "argv", ["trainer", *(f"--{name}={value}" for name, value in options.items())])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    trainer_benchmark.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["trainer"] for row in rows] == list(trainer_benchmark.TRAINERS)
    assert rows[0]["ratio"] == 1
    assert rows[1]["peak_mb"] == pytest.approx(rows[0]["peak_mb"], rel=0.02)
    assert "AMaPOTrainer, window" in capsys.readouterr().out
