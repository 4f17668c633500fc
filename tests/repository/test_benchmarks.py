"""Tests of the scripts in benchmarks/: they run, they write their results, and they report bad input files."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from amapo_loss import AdaptiveMargin, amapo_loss
from benchmarks import compare, demo
from benchmarks.figures import formulas, losses, runs
from benchmarks.losses import LOSSES
from benchmarks.speed import head, latency
from benchmarks.speed.floor import empty_kernel
from benchmarks.studies import estimators
from benchmarks.studies.data import SLIP_RATES, Pair, generated_corpus, read_pairs
from benchmarks.studies.models import END, IGNORED, ByteLM, tensors
from tests.support.backends import triton_loss

VALID_LINE = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
SMALL_DEMO = "--imitation-steps 2 --steps 2 --batch-size 4 --width 8 --layers 1 --max-prompt 8 --max-answer 8"


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_pairs_are_read_from_plain_and_gzipped_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = (VALID_LINE + '{"chosen": "ü\\n", "rejected": "e", "prompt": "", "source": 1}\n').encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_pairs(path)) == [Pair("a", "b", "c"), Pair("", "ü\n", "e")]


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        (b'{"prompt": "a", "chosen": "b", "rej', "line 2: not valid JSON"),
        (b"\n", "line 2: not valid JSON"),
        (b"\xff\n", "line 2: not valid JSON"),
        (b"[1]\n", "line 2: expected a JSON object with prompt, chosen, rejected, got list"),
        (b'{"prompt": "a", "chosen": "b"}\n', "line 2: the key 'rejected' is missing, found 'prompt', 'chosen'"),
        (b'{"prompt": "a", "chosen": "", "rejected": "c"}\n', "line 2: the answer 'chosen' is empty"),
        (b'{"prompt": "a", "chosen": "b", "rejected": ""}\n', "line 2: the answer 'rejected' is empty"),
        (b'{"prompt": "a", "chosen": [], "rejected": "c"}\n', "line 2: 'chosen' must be a string, got list"),
    ],
)
def test_a_bad_line_is_reported_with_its_number(tmp_path: Path, second_line: bytes, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(VALID_LINE.encode() + second_line)
    with pytest.raises(ValueError, match="pairs.jsonl, " + message.replace("[", r"\[")):
        list(read_pairs(path))


def test_an_empty_or_broken_file_is_reported_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(VALID_LINE.encode() * 1000)[:-20])
    (tmp_path / "plain.jsonl.gz").write_text(VALID_LINE)
    for name, message in (("empty.jsonl", "is empty"), ("cut.jsonl.gz", "ended before"), ("plain.jsonl.gz", "gzipped")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            list(read_pairs(tmp_path / name))


def test_generated_pairs_have_the_slip_rates_of_their_difficulty() -> None:
    corpus = generated_corpus(pairs=3000, held_out=500, demonstrations=6000, seed=1)
    assert len(corpus.train) == 2700
    assert len(corpus.validation) == 300
    assert len(corpus.held_out) == 500
    assert not {pair.prompt for pair in corpus.train} & {pair.prompt for pair in corpus.held_out + corpus.validation}
    assert all(pair.chosen != pair.rejected for pair in corpus.train)
    by_prompt = {pair.prompt: pair for pair in corpus.train}
    for difficulty, (lowest, highest) in SLIP_RATES.items():
        pairs = [pair for pair in corpus.train if pair.source == difficulty]
        assert {round(1 - (pair.confidence or 0), 6) for pair in pairs} >= {lowest, highest}
        demonstrated = [
            (by_prompt[prompt], answer)
            for prompt, answer in corpus.demonstrations
            if by_prompt[prompt].source == difficulty
        ]
        slip_rate = sum(answer == pair.rejected for pair, answer in demonstrated) / len(demonstrated)
        assert abs(slip_rate - (lowest + highest) / 2) < 0.05
    assert corpus == generated_corpus(pairs=3000, held_out=500, demonstrations=6000, seed=1)
    with pytest.raises(ValueError, match="at most"):
        generated_corpus(pairs=10**5, held_out=1, demonstrations=1, seed=0)


def test_tensors_truncates_and_labels_only_answers() -> None:
    (tokens, labels, _), num_truncated = tensors([("ab", "xyz"), ("c", "é")], max_prompt=1, max_answer=3)
    assert tokens.tolist() == [[END, ord("b"), *b"xyz"], [END, ord("c"), *"é".encode(), END]]
    assert labels.tolist() == [[IGNORED, IGNORED, *b"xyz"], [IGNORED, IGNORED, *"é".encode(), END]]
    assert num_truncated == 1


def test_the_model_is_causal() -> None:
    model = ByteLM(width=8, layers=2, max_length=10)
    tokens = torch.randint(257, (1, 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6:] = 0
    torch.testing.assert_close(model(tokens)[0, :6], model(changed)[0, :6])


@pytest.mark.parametrize("own_data", [False, True])
def test_the_demo_prints_tables_and_writes_json_and_picture(
    own_data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "results" / "demo.json", tmp_path / "pairs.jsonl"
    data.write_text(VALID_LINE * 6 + '{"prompt": "long enough to cut", "chosen": "b", "rejected": "c"}\n')
    files = ["--data", str(data), "--eval", str(data)] * own_data
    monkeypatch.setattr(sys, "argv", ["demo", *SMALL_DEMO.split(), *files, "--out", str(out)])
    demo.main()
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["models"].keys() == {"imitation alone", *demo.TREATMENTS}
    for name in demo.TREATMENTS:
        assert name in printed
        assert 0 <= results["models"][name]["ranking accuracy"] <= 1
    assert ("hard" in printed) != own_data
    assert "are truncated" in printed or not own_data
    assert results["versions"]["torch"] == torch.__version__
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.parent.glob("*.partial"))


@pytest.mark.parametrize("confidence", ["", ', "confidence": 0.6'])
def test_the_comparison_trains_with_every_line_that_the_data_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], confidence: str
) -> None:
    """Without confidences, there are no ratings for ODPO."""
    out, data = tmp_path / "compare.json", tmp_path / "pairs.jsonl"
    lines = [f'{{"prompt": "p{i}", "chosen": "c{i}", "rejected": "rejected{i}"{confidence}}}' for i in range(40)]
    data.write_text("\n".join(lines) + "\n")
    options = ["--orders", "2", "--data", str(data), "--eval", str(data), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["compare", *SMALL_DEMO.split(), *options])
    compare.main()
    results = json.loads(out.read_text())
    expected = {loss.name for loss in LOSSES if not loss.not_compared}
    if not confidence:
        expected.remove("ODPO")
    rows = results["mean and standard deviation over the orders"]
    assert rows.keys() == expected
    assert results["not compared"].keys() == {loss.name for loss in LOSSES} - expected
    for row in rows.values():
        assert 0 <= row["ranking accuracy"][0] <= 1
        assert row["gradient weight, misranked pairs"][0] > 0
    assert out.with_suffix(".png").stat().st_size > 0
    assert "not compared: CPO, because its authors add an SFT loss" in capsys.readouterr().out


def test_the_pictures_of_the_losses_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["losses", "--out", str(tmp_path)])
    losses.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses_margin.png", "losses_weight.png"]


def test_the_demo_exits_with_the_name_of_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.jsonl").write_text(VALID_LINE + "{}\n")
    monkeypatch.setattr(sys, "argv", ["demo", "--data", f"{tmp_path}/bad.jsonl", "--eval", f"{tmp_path}/bad.jsonl"])
    with pytest.raises(SystemExit, match=r"bad.jsonl, line 2: the key 'prompt' is missing, found none"):
        demo.main()
    monkeypatch.setattr(sys, "argv", ["demo", "--data", f"{tmp_path}/none.jsonl", "--eval", f"{tmp_path}/bad.jsonl"])
    with pytest.raises(SystemExit, match=r"none\.jsonl"):
        demo.main()
    monkeypatch.setattr(sys, "argv", ["demo", "--data", f"{tmp_path}/bad.jsonl"])
    with pytest.raises(SystemExit, match="2"):
        demo.main()


def test_the_latency_baseline_computes_the_same_loss_as_the_library() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(64, generator=generator) - mean).requires_grad_() for mean in (1.0, 1.4)]

    expected = latency.released_loss(inputs[0], inputs[1])
    losses = expected, amapo_loss(inputs[0], inputs[1], margin=AdaptiveMargin("released")).loss
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs) for loss in losses))


def test_latency_prints_a_table_and_writes_json_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latency.json"
    arguments = ["--pairs", "3", "5", "--rounds", "2", "--repeats", "2", "--out", str(out)]
    all_variants = latency.variants

    def eager_variants(device: str) -> dict[str, latency.Variant]:
        return {name: variant for name, variant in all_variants(device).items() if name.endswith("eager")}

    monkeypatch.setattr(sys, "argv", ["latency", *arguments])
    monkeypatch.setattr(latency, "variants", eager_variants)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    latency.main()
    torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["rows"]
    expected = [(latency.BASELINE, latency.LOSS_ONLY), *(("amapo_loss, eager", output) for output in latency.OUTPUTS)]
    assert [(row["pairs"], row["variant"], row["outputs"]) for row in rows] == [
        (pairs, *variant_and_outputs) for pairs in (3, 5) for variant_and_outputs in expected
    ]
    assert all(row["ratio"] == 1 for row in rows if row["variant"] == latency.BASELINE)
    # A machine without a GPU must write null for these, not an estimate.
    assert all(row["device_us"] is row["launches"] is row["synchronizations"] is None for row in rows)
    printed = capsys.readouterr().out
    assert "summary" in printed
    assert latency.BASELINE in printed
    assert out.with_suffix(".png").exists()


def test_the_picture_of_the_heads_shows_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """The panels of a case share their vertical axis, which must fit the slowest head."""
    figures = list[Figure]()
    monkeypatch.setattr(head, "write_picture", lambda path, figure: figures.append(figure))
    costs = {("frozen", "a"): 2.0, ("frozen", "b"): 1.0, ("trainable", "a"): 9.0, ("trainable", "b"): None}
    rows = [
        {"case": "small", "head": kind, "variant": variant, "ms": ms, "workspace_mb": 10}
        for (kind, variant), ms in costs.items()
    ]
    head.draw(Path("head.png"), rows)
    panels = figures[0].axes
    shown = [[y for points in panel.collections for _, y in np.asarray(points.get_offsets())] for panel in panels]
    assert shown == [[2.0, 1.0], [9.0]]
    assert all(panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > 9 for panel in panels)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from packages that TRL imports
def test_head_prints_tables_and_writes_json_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All gradients must also be close to those of float64.

    In bfloat16, the gradients of this library must be closer to them than those of the baseline.
    """
    out = tmp_path / "head.json"
    small = head.CASES["small"]._replace(hidden_size=32, vocab_size=500, sequences=4, length=32)
    all_variants = head.variants

    def eager_variants(device: str, trainable: bool) -> dict[str, head.SequenceLogps]:
        return {name: step for name, step in all_variants(device, trainable).items() if "torch.compile" not in name}

    monkeypatch.setattr(sys, "argv", ["head", "--rounds", "2", "--out", str(out)])
    monkeypatch.setattr(head, "CASES", {"small": small})
    monkeypatch.setattr(head, "PRECISION_CASE", small._replace(dtype=torch.bfloat16))
    monkeypatch.setattr(head, "variants", eager_variants)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    head.main()
    results = json.loads(out.read_text())
    rows, ours, baseline = results["rows"], results["precision"][head.OURS], results["precision"][head.BASELINE]
    assert {row["variant"] for row in rows} >= {head.ALL_TOKENS, head.BASELINE, head.OURS, head.OURS_CACHED}
    assert all(error < 1e-4 for row in rows for error in row["errors"])
    assert all(row["ratio"] == 1 for row in rows if row["variant"] == head.BASELINE)
    assert ours["grad_hidden_error_confident"] < baseline["grad_hidden_error_confident"]
    assert ours["grad_weight_changed"] < 0.01
    assert "out of memory" not in capsys.readouterr().out
    assert out.with_suffix(".png").exists()


def test_runs_writes_json_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes must also be visible in the first step."""
    out = tmp_path / "runs.json"
    small = ["--imitation-steps", "30", "--steps", "3", "--batch-size", "16", "--pairs", "64"]
    monkeypatch.setattr(sys, "argv", ["runs", *small, "--out", str(out)])
    runs.main()
    results = json.loads(out.read_text())
    first_steps = {run: dict(zip(results["metrics"], history[0])) for run, history in results["runs"].items()}
    assert first_steps.keys() == runs.runs(batch_size=16).keys()
    healthy, summed, swapped = (first_steps[run] for run in ("healthy", "summed log-probs", "swapped answers"))
    assert swapped["rewards/accuracies"] == pytest.approx(1 - healthy["rewards/accuracies"])
    assert summed["amapo/margin_mean"] > healthy["amapo/margin_mean"]
    assert first_steps["beta 0.1"]["loss"] < healthy["loss"]
    last_steps = {run: dict(zip(results["metrics"], history[-1])) for run, history in results["runs"].items()}
    assert last_steps["window of 16 steps"]["loss"] != last_steps["healthy"]["loss"], "the window has other scores"
    assert out.with_suffix(".png").exists()


def test_estimators_prints_a_table_and_writes_json_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "estimators.json"
    arguments = ["--pairs", "4", "16", "--batch", "16", "--steps", "12", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["estimators", *arguments])
    estimators.main()
    micro_batch, whole_batch = json.loads(out.read_text())["rows"]
    assert micro_batch["ScoreWindow"] < micro_batch["itself"]
    assert whole_batch["itself"] == 0
    assert whole_batch["ScoreWindow"] == pytest.approx(0, abs=1e-5)
    assert micro_batch.keys() == {"pairs", *estimators.estimators(4, 16)}
    assert "4 of 16" in capsys.readouterr().out
    assert out.with_suffix(".png").exists()
    monkeypatch.setattr(sys, "argv", ["estimators", "--pairs", "3", "--batch", "16"])
    with pytest.raises(SystemExit, match="2"):
        estimators.main()


def test_the_empty_kernel_launches_and_has_a_backward() -> None:
    inputs = [torch.randn(4, device=triton_loss.device, requires_grad=True) for _ in range(2)]
    empty_kernel(inputs[0], inputs[1]).backward()
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in inputs)


def test_formulas_writes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "formulas.png"
    monkeypatch.setattr(sys, "argv", ["formulas", "--out", str(out)])
    formulas.main()
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_gpu_script_runs_its_steps_without_a_gpu_as_well(tmp_path: Path) -> None:
    """The sizes are small. The tests for a GPU are collected and skipped. The step `head` has a test of its own."""
    environment = {
        "PYTHON": sys.executable,
        "STEPS": "report essentials latency tests trainer",
        "LATENCY_ARGS": "--pairs 2 --rounds 1 --repeats 1",
        "TRAINER_ARGS": "--rounds 1 --steps 3 --batch-size 2 --vocabulary 258 --width 32 --layers 1",
        "TESTS_ARGS": "--numprocesses 0",
    }
    script = Path(latency.__file__).with_name("gpu.sh")
    result = subprocess.run(
        ["bash", str(script), str(tmp_path)], env=os.environ | environment, capture_output=True, check=False
    )
    log = (tmp_path / "log.txt").read_text()
    assert result.returncode == 0, log[-3000:]
    assert len(re.findall(r"^== \w+: \d+ s$", log, flags=re.MULTILINE)) == 5
    for name in ("latency", "trainer"):
        assert json.loads((tmp_path / f"{name}_gpu.json").read_text())["rows"]
    assert log.count("skipped") >= 2


def test_the_gpu_script_runs_the_given_steps_and_names_those_that_failed(tmp_path: Path) -> None:
    script = Path(latency.__file__).with_name("gpu.sh")
    environment = os.environ | {"PYTHON": sys.executable, "STEPS": "report nonsense"}
    result = subprocess.run(["bash", str(script), str(tmp_path)], env=environment, capture_output=True, check=False)
    log = (tmp_path / "log.txt").read_text()
    assert result.returncode == 1, log
    assert "== report: " in log
    assert "amapo-loss" in log
    assert "failed: nonsense" in log
