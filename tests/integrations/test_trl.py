"""TRL's real trainer on a tiny Llama, a byte-level tokenizer and pairs made here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from amapo_loss import AdaptiveMargin, ScoreWindow, amapo_loss

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs there are many


from amapo_loss.trl import AMaPOConfig  # noqa: E402
from benchmarks.speed import trainer as steps  # noqa: E402
from tests.support.trl import pairs, tiny_llama, trainer  # noqa: E402


def by_hand(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of log-probs, and lengths, of a collated batch: chosen answers, then rejected ones."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    tokens = logits[:, :-1].double().log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    counted = batch["completion_mask"][:, 1:]
    return (tokens * counted).sum(1).float(), counted.sum(1)


def first_batch(of: Any) -> dict[str, torch.Tensor]:
    return dict(next(iter(of.get_train_dataloader())))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"formula": "released", "beta": 2.5, "label_smoothing": 0.1},
        {"normalize": False, "scaling": "linear"},
        {"clip": False},
        {"length_average": False, "beta": 0.1},
        {"sft_weight": 0.3},
    ],
)
def test_the_loss_of_step_one_is_that_of_amapo_loss(tmp_path: Path, options: dict[str, Any]) -> None:
    run = trainer(tmp_path, max_steps=1, **options)
    batch = first_batch(run)
    sums, lengths = by_hand(run.model, batch)
    chosen, rejected = sums.chunk(2)
    chosen_lengths, rejected_lengths = lengths.chunk(2) if options.get("length_average", True) else (None, None)
    margin = AdaptiveMargin(
        **{name: options[name] for name in ("formula", "normalize", "scaling", "clip") if name in options}
    )
    loss, diagnostics = amapo_loss(
        chosen, rejected, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, margin=margin,
        beta=options.get("beta", 2.0), label_smoothing=options.get("label_smoothing", 0.0),
    )  # fmt: skip
    loss = loss - options.get("sft_weight", 0.0) * chosen.sum() / lengths.chunk(2)[0].sum()
    run.train()
    logged = run.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, value in diagnostics.summary().items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    assert {"entropy", "num_tokens", "mean_token_accuracy", "logits/chosen"} <= logged.keys()


def test_no_second_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is built, kept or run; nor is there a second forward pass."""
    import trl.trainer.dpo_trainer as theirs

    monkeypatch.setattr(theirs, "create_model_from_path", lambda *_, **__: pytest.fail("builds a model"))
    run = trainer(tmp_path)
    assert run.ref_model is None
    calls = []
    run.model.model.register_forward_hook(lambda *_: calls.append(1))
    run.train()
    assert len(calls) == 2  # steps


def test_trains(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=30, per_device_train_batch_size=8)
    run.train()
    history = [log for log in run.state.log_history if "loss" in log]
    assert history[-1]["rewards/margins"] > history[0]["rewards/margins"] + 0.5


def test_with_a_reference(tmp_path: Path) -> None:
    """Given, found under the adapter, and computed before: DPO's score, on averages or sums."""
    reference = tiny_llama(seed=7)
    run = trainer(tmp_path, ref_model=reference, reference_free=False, max_steps=1, beta=0.5)
    batch = first_batch(run)
    (sums, lengths), (ref_sums, _) = by_hand(run.model, batch), by_hand(reference, batch)
    expected = amapo_loss(
        *sums.chunk(2),
        *ref_sums.chunk(2),
        chosen_lengths=lengths.chunk(2)[0],
        rejected_lengths=lengths.chunk(2)[1],
        beta=0.5,
    )
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert run.state.log_history[0]["amapo/score_std"] == pytest.approx(
        expected.diagnostics.statistics.std.item(), rel=1e-3
    )

    before = trainer(
        tmp_path, ref_model=reference, reference_free=False, max_steps=1, beta=0.5, precompute_ref_log_probs=True
    )
    before.train()
    assert before.state.log_history[0]["loss"] == pytest.approx(expected.loss.item(), rel=1e-4)


@pytest.mark.parametrize("reference_free", [True, False])
def test_lora(tmp_path: Path, reference_free: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(tmp_path, peft_config=config, reference_free=reference_free, max_steps=3, learning_rate=1e-2)
    before = {name: x.clone() for name, x in run.model.named_parameters()}
    run.train()
    changed = {name for name, x in run.model.named_parameters() if not torch.equal(x, before[name])}
    assert changed
    assert all("lora" in name for name in changed)
    assert all("ref" not in name for name in before)
    first = run.state.log_history[0]
    if not reference_free:  # the adapter starts as nothing: policy and reference agree
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_evaluates(tmp_path: Path) -> None:
    """On this batch's own statistics; training's window neither counts nor changes."""
    run = trainer(tmp_path, eval_dataset=pairs(8), per_device_eval_batch_size=8, statistics_window=16)
    expected_sums, lengths = by_hand(run.model, dict(next(iter(run.get_eval_dataloader()))))
    expected = amapo_loss(
        *expected_sums.chunk(2), chosen_lengths=lengths.chunk(2)[0], rejected_lengths=lengths.chunk(2)[1]
    )
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert run.state.log_history[-1]["eval_rewards/margins"] == pytest.approx(
        expected.diagnostics.summary()["rewards/margins"].item(), rel=1e-3
    )
    assert run.window.seen == 0
    run.train()
    assert run.window.seen == 8


@pytest.mark.parametrize("window", [None, 16])
def test_a_resumed_run_goes_on_bitwise(tmp_path: Path, window: int | None) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "statistics_window": window}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "whole", tiny_llama(seed=9), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, x), y in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(x, y), name
    if window:
        assert torch.equal(whole.window.scores, resumed.window.scores)
        assert whole.window.seen == resumed.window.seen == 16
        (tmp_path / "whole" / "checkpoint-2" / "score_window.pt").unlink()  # and it matters
        other = trainer(tmp_path / "whole", tiny_llama(seed=9), **options)
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert not torch.equal(whole.model.lm_head.weight, other.model.lm_head.weight)


def test_gradient_accumulation(tmp_path: Path) -> None:
    """The mean of the micro-batches; with a window their statistics are those of what came before, too."""
    for window in (None, 8):
        run = trainer(tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3,
                      statistics_window=window)  # fmt: skip
        remembered, losses = None if window is None else ScoreWindow(window), []
        for batch, _ in zip(run.get_train_dataloader(), range(3)):
            sums, lengths = by_hand(run.model, dict(batch))
            losses.append(amapo_loss(
                *sums.chunk(2), chosen_lengths=lengths.chunk(2)[0], rejected_lengths=lengths.chunk(2)[1],
                statistics=remembered,
            ).loss.item())  # fmt: skip
        run.train()
        assert run.state.log_history[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


RANK = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.support.trl import trainer
import torch
run = trainer(Path({folder!r}), max_steps=3, statistics_window=12, ddp_backend="gloo")
run.train()
if run.accelerator.is_main_process:
    torch.save((run.state.log_history, run.model.state_dict()), {folder!r} + "/ranks.pt")
"""


def test_two_processes_are_one_with_both_their_batches(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(root=root, folder=str(tmp_path)))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    history, weights = torch.load(tmp_path / "ranks.pt", weights_only=False)
    one = trainer(tmp_path / "one", max_steps=3, statistics_window=12, per_device_train_batch_size=8)
    one.train()
    for got, expected in zip(history[:3], one.state.log_history[:3]):
        for name in (
            "loss",
            "rewards/margins",
            "amapo/score_mean",
            "amapo/score_std",
            "amapo/margin_mean",
            "grad_norm",
        ):
            assert got[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    for name, x in one.model.state_dict().items():
        torch.testing.assert_close(weights[name], x, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["ipo"]}, "loss_type is of DPO's other losses: leave it at ['sigmoid'], got ['ipo']"),
        ({"use_weighting": True}, "use_weighting is of DPO's other losses: leave it at False, got True"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs is of a reference, and reference_free is on"),
        ({"sync_ref_model": True}, "sync_ref_model is of a reference, and reference_free is on"),
        ({"formula": "papers"}, "formula must be 'paper' or 'released', got 'papers'"),
        ({"beta": 0.0}, "beta must be > 0 and finite, got 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be >= 0 and < 0.5, got 0.5"),
        ({"sft_weight": -1.0}, "sft_weight must be >= 0 and finite, got -1.0"),
        ({"statistics_window": 0}, "statistics_window must be at least 1, got 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AMaPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_what_the_trainer_refuses(tmp_path: Path) -> None:
    from trl import DPOConfig

    with pytest.raises(ValueError, match="ref_model was given, and reference_free is on"):
        trainer(tmp_path, ref_model=tiny_llama(1))
    with pytest.raises(TypeError, match="args must be an AMaPOConfig, got DPOConfig"):
        trainer(tmp_path, config=DPOConfig)


@pytest.mark.parametrize(
    ("found", "message"),
    [("1.15.2", "needs trl>=1.16,<1.17, found 1.15.2"), ("1.17.0", "found 1.17.0"), (None, "needs TRL: `pip install")],
)
def test_another_version_of_trl_is_refused(found: str | None, message: str) -> None:
    code = f"""
import importlib.metadata as metadata
def version(name):
    if {found!r} is None:
        raise metadata.PackageNotFoundError(name)
    return {found!r}
metadata.version = version
try:
    import amapo_loss.trl
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert message in result.stdout


def test_reads_the_command_line(tmp_path: Path) -> None:
    line = (
        f"--output_dir {tmp_path} --formula released --reference_free false --statistics_window 64 --use_cpu --bf16 no"
    )
    (args,) = transformers.HfArgumentParser(AMaPOConfig).parse_args_into_dataclasses(line.split())
    assert args.margin == AdaptiveMargin(formula="released")
    assert (args.reference_free, args.statistics_window, args.beta) == (False, 64, 2.0)
    assert json.loads(args.to_json_string())["formula"] == "released"


def test_the_benchmark_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trainer.json"
    small = {"rounds": 1, "steps": 3, "batch-size": 2, "vocabulary": 258, "width": 32, "layers": 1, "out": out}
    monkeypatch.setattr(sys, "argv", ["trainer", *(f"--{name}={value}" for name, value in small.items())])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    steps.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["trainer"] for row in rows] == list(steps.KINDS)
    assert rows[0]["ratio"] == 1
    assert rows[1]["peak_mb"] == pytest.approx(rows[0]["peak_mb"], rel=0.02)
    assert "AMaPOTrainer, window" in capsys.readouterr().out
