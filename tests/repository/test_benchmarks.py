"""The scripts of benchmarks/: they run, write what they say, and name the line of a bad file."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amapo_loss import AdaptiveMargin, amapo_loss
from benchmarks import demo
from benchmarks.figures import formulas, runs
from benchmarks.speed import head, latency
from benchmarks.speed.floor import empty_kernel
from benchmarks.studies import estimators
from benchmarks.studies.data import SLIP_RATES, Pair, generated_corpus, read_pairs
from benchmarks.studies.models import END, IGNORED, ByteLM, tensors
from tests.support.backends import triton_loss

GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
SMALL = [
    "--imitation-steps",
    "2",
    "--steps",
    "2",
    "--batch-size",
    "4",
    "--width",
    "8",
    "--layers",
    "1",
    "--max-prompt",
    "8",
    "--max-answer",
    "8",
]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_reads_pairs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = (GOOD + '{"chosen": "ü\\n", "rejected": "e", "prompt": "", "source": 1}\n').encode()
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
def test_a_bad_line_is_named(tmp_path: Path, second_line: bytes, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD.encode() + second_line)
    with pytest.raises(ValueError, match="pairs.jsonl, " + message.replace("[", r"\[")):
        list(read_pairs(path))


def test_an_empty_or_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 1000)[:-20])
    (tmp_path / "plain.jsonl.gz").write_text(GOOD)
    for name, message in (("empty.jsonl", "is empty"), ("cut.jsonl.gz", "ended before"), ("plain.jsonl.gz", "gzipped")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            list(read_pairs(tmp_path / name))


def test_generated_pairs_have_the_difficulty_they_say() -> None:
    corpus = generated_corpus(pairs=3000, held_out=500, demonstrations=6000, seed=1)
    assert len(corpus.train) == 2700
    assert len(corpus.validation) == 300
    assert len(corpus.held_out) == 500
    assert not {pair.prompt for pair in corpus.train} & {pair.prompt for pair in corpus.held_out + corpus.validation}
    assert all(pair.chosen != pair.rejected for pair in corpus.train)
    by_prompt = {pair.prompt: pair for pair in corpus.train}
    for difficulty, (least, most) in SLIP_RATES.items():
        of_this = [pair for pair in corpus.train if pair.source == difficulty]
        assert {round(1 - (pair.confidence or 0), 6) for pair in of_this} >= {least, most}
        imitated = [(by_prompt[p], answer) for p, answer in corpus.demonstrations if by_prompt[p].source == difficulty]
        slips = sum(answer == pair.rejected for pair, answer in imitated) / len(imitated)
        assert abs(slips - (least + most) / 2) < 0.05
    assert corpus == generated_corpus(pairs=3000, held_out=500, demonstrations=6000, seed=1)
    with pytest.raises(ValueError, match="at most"):
        generated_corpus(pairs=10**5, held_out=1, demonstrations=1, seed=0)


def test_text_becomes_tokens_and_labels() -> None:
    (tokens, labels), cut = tensors([("ab", "xyz"), ("c", "é")], max_prompt=1, max_answer=3)
    assert tokens.tolist() == [[END, ord("b"), *b"xyz"], [END, ord("c"), *"é".encode(), END]]
    assert labels.tolist() == [[IGNORED, IGNORED, *b"xyz"], [IGNORED, IGNORED, *"é".encode(), END]]
    assert cut == 1


def test_the_model_looks_back_only() -> None:
    model = ByteLM(width=8, layers=2, max_length=10)
    tokens = torch.randint(257, (1, 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6:] = 0
    torch.testing.assert_close(model(tokens)[0, :6], model(changed)[0, :6])


@pytest.mark.parametrize("own_data", [False, True])
def test_the_demo_writes_table_json_and_picture(
    own_data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "results" / "demo.json", tmp_path / "pairs.jsonl"
    data.write_text(GOOD * 6 + '{"prompt": "long enough to cut", "chosen": "b", "rejected": "c"}\n')
    files = ["--data", str(data), "--eval", str(data)] * own_data
    monkeypatch.setattr(sys, "argv", ["demo", *SMALL, *files, "--out", str(out)])
    demo.main()
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert figures["models"].keys() == {"imitation alone", *demo.TREATMENTS}
    for name in demo.TREATMENTS:
        assert name in printed
        assert 0 <= figures["models"][name]["ranked right"] <= 1
    assert ("hard" in printed) != own_data
    assert ("are cut" in printed) == own_data or not own_data
    assert figures["versions"]["torch"] == torch.__version__
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.parent.glob("*.partial"))


def test_the_demo_names_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.jsonl").write_text(GOOD + "{}\n")
    monkeypatch.setattr(sys, "argv", ["demo", "--data", f"{tmp_path}/bad.jsonl", "--eval", f"{tmp_path}/bad.jsonl"])
    with pytest.raises(SystemExit, match=r"bad.jsonl, line 2: the key 'prompt' is missing, found none"):
        demo.main()
    monkeypatch.setattr(sys, "argv", ["demo", "--data", f"{tmp_path}/none.jsonl", "--eval", f"{tmp_path}/bad.jsonl"])
    with pytest.raises(SystemExit, match=r"none\.jsonl"):
        demo.main()
    monkeypatch.setattr(sys, "argv", ["demo", "--data", f"{tmp_path}/bad.jsonl"])
    with pytest.raises(SystemExit, match="2"):
        demo.main()


def test_the_baseline_computes_the_released_loss() -> None:
    """What the library is timed against is the same loss."""
    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(64, generator=generator) - mean).requires_grad_() for mean in (1.0, 1.4)]

    def ours(chosen: Tensor, rejected: Tensor) -> Tensor:
        return amapo_loss(chosen, rejected, margin=AdaptiveMargin("released")).loss

    losses = latency.released_arithmetic(inputs[0], inputs[1]), ours(inputs[0], inputs[1])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs) for loss in losses))


def test_latency_writes_table_json_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latency.json"
    arguments = ["--pairs", "3", "5", "--rounds", "2", "--repeats", "2", "--out", str(out)]
    every = latency.variants

    def eager_only(device: str) -> dict[str, latency.Variant]:
        return {name: variant for name, variant in every(device).items() if ":" not in name}

    monkeypatch.setattr(sys, "argv", ["latency", *arguments])
    monkeypatch.setattr(latency, "variants", eager_only)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    latency.main()
    torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["rows"]
    expected = [(latency.BASELINE, "loss"), *(("amapo_loss", reading) for reading in latency.READS)]
    assert [(row["pairs"], row["variant"], row["reading"]) for row in rows] == [
        (n, *e) for n in (3, 5) for e in expected
    ]
    assert all(row["ratio"] == 1 for row in rows if row["variant"] == latency.BASELINE)
    assert all(row["device_us"] is row["launches"] is row["waits"] is None for row in rows)  # never guessed
    printed = capsys.readouterr().out
    assert "and summary" in printed
    assert "released arithmetic" in printed
    assert out.with_suffix(".png").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what TRL imports
def test_head_writes_tables_json_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And everyone's gradient is that of float64, about; ours, in bfloat16, the nearest."""
    out = tmp_path / "head.json"
    small = head.CASES["small"]._replace(width=32, vocabulary=500, sequences=4, length=32)
    every = head.variants

    def not_compiled(device: str, with_weight: bool) -> dict[str, head.Step]:
        return {name: step for name, step in every(device, with_weight).items() if "compiled" not in name}

    monkeypatch.setattr(sys, "argv", ["head", "--rounds", "2", "--out", str(out)])
    monkeypatch.setattr(head, "CASES", {"small": small})
    monkeypatch.setattr(head, "PRECISION", small._replace(dtype=torch.bfloat16))
    monkeypatch.setattr(head, "variants", not_compiled)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    head.main()
    written = json.loads(out.read_text())
    assert {row["variant"] for row in written["rows"]} >= {head.ALL_TOKENS, head.BASELINE, "ours", "ours, keep_bytes"}
    assert all(error < 1e-4 for row in written["rows"] for error in row["errors"])
    assert all(row["ratio"] == 1 for row in written["rows"] if row["variant"] == head.BASELINE)
    precision = written["precision"]
    assert precision["ours"]["confident"] < precision[head.BASELINE]["confident"]
    assert precision["ours"]["changed_weight"] < 0.01
    assert "out of memory" not in capsys.readouterr().out
    assert out.with_suffix(".png").exists()


def test_runs_write_table_json_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the mistakes show."""
    out = tmp_path / "runs.json"
    small = ["--imitation-steps", "30", "--steps", "3", "--batch-size", "16", "--pairs", "64"]
    monkeypatch.setattr(sys, "argv", ["runs", *small, "--out", str(out)])
    runs.main()
    written = json.loads(out.read_text())
    first = {run: dict(zip(written["entries"], steps[0])) for run, steps in written["runs"].items()}
    assert first.keys() == runs.RUNS.keys()
    right, wrong = (first[run]["rewards/accuracies"] for run in ("healthy", "answers swapped"))
    assert wrong == pytest.approx(1 - right)
    assert first["sums, not averages"]["amapo/margin_mean"] > first["healthy"]["amapo/margin_mean"]
    assert out.with_suffix(".png").exists()


def test_estimators_write_table_json_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "estimators.json"
    arguments = ["--pairs", "4", "16", "--batch", "16", "--steps", "12", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["estimators", *arguments])
    estimators.main()
    few, whole = json.loads(out.read_text())["rows"]
    assert few["ScoreWindow"] < few["itself"]
    assert whole["itself"] == 0  # the micro-batch is the batch
    assert whole["ScoreWindow"] == pytest.approx(0, abs=1e-5)
    assert few.keys() == {"pairs", *estimators.estimators(4, 16)}
    assert "4 of 16" in capsys.readouterr().out
    assert out.with_suffix(".png").exists()
    monkeypatch.setattr(sys, "argv", ["estimators", "--pairs", "3", "--batch", "16"])
    with pytest.raises(SystemExit, match="2"):
        estimators.main()


def test_the_floor_launches_a_kernel() -> None:
    inputs = [torch.randn(4, device=triton_loss.device, requires_grad=True) for _ in range(2)]
    empty_kernel(inputs[0], inputs[1]).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)


def test_formulas_draws_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "formulas.png"
    monkeypatch.setattr(sys, "argv", ["formulas", "--out", str(out)])
    formulas.main()
    assert out.read_bytes().startswith(b"\x89PNG")
