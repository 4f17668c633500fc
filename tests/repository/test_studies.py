"""The experiments of benchmarks/: what they compute, that they go on, repeat and fail as they say."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amapo_loss import AdaptiveMargin
from benchmarks.studies import studies
from benchmarks.studies.data import Pair, both_answers, generated_corpus, read_pairs, read_styled, split
from benchmarks.studies.harness import (
    Optimization,
    Treatment,
    all_logps,
    as_pairs,
    composed_batches,
    flipped,
    gradient_norms,
    pair_logps,
    prefer,
    shuffled_batches,
)
from benchmarks.studies.models import ByteLM, Texts, tensors
from benchmarks.studies.report import of, shown, tabulate
from benchmarks.studies.sweep import (
    IMITATION,
    Run,
    by_source,
    correlations,
    curves,
    in_band,
    new_model,
    same_answers,
    spearman,
    style_figures,
)

ROOT = Path(__file__).parents[2]
ENTRY = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}


def small_experiment(pairs: int = 64) -> tuple[ByteLM, Texts, tuple[Tensor, Tensor]]:
    corpus = generated_corpus(pairs + 8, held_out=8, demonstrations=8, seed=0)
    texts, _ = tensors(both_answers(corpus.train[:pairs]), 32, 16)
    torch.manual_seed(0)
    model = ByteLM(width=16, layers=1, max_length=49)
    return model, texts, all_logps(model, texts)


# ---- data


@pytest.mark.parametrize("confidence", ["-0.1", "1.5", '"high"', "true", "[]", "NaN"])
def test_a_confidence_that_is_none_is_named(tmp_path: Path, confidence: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": "a", "chosen": "b", "rejected": "c", "confidence": {confidence}}}\n')
    with pytest.raises(ValueError, match="line 1: 'confidence' must be a number from 0 to 1"):
        list(read_pairs(path))


def test_reads_confidence_and_source(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "confidence": 1, "source": "s"}\n')
    assert list(read_pairs(path)) == [Pair("a", "b", "c", 1, "s")]


def test_reads_rm_bench(tmp_path: Path) -> None:
    path = tmp_path / "rm.json"
    path.write_text(json.dumps([ENTRY | {"id": 1}]))
    assert read_styled(path) == [("p", ("a", "b", "c"), ("d", "e", "f"))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "rm.json: not valid JSON"),
        ("{}", "rm.json: expected a JSON list of RM-Bench entries, got dict"),
        ("[]", "rm.json: expected a JSON list of RM-Bench entries, got list"),
        ([ENTRY, 3], "entry 2: expected a JSON object"),
        ([{"prompt": "p", "chosen": []}], "entry 1: the key 'rejected' is missing"),
        ([ENTRY | {"prompt": None}], "entry 1: 'prompt' must be a string, got NoneType"),
        ([ENTRY | {"chosen": ["a", "b"]}], "entry 1: 'chosen' must be 3 answers, concise, plain, markdown"),
        ([ENTRY | {"rejected": ["a", "", "b"]}], "entry 1: 'rejected' must be 3 answers"),
        ([ENTRY | {"rejected": "abc"}], "entry 1: 'rejected' must be 3 answers"),
    ],
)
def test_bad_rm_bench_is_named(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "rm.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_styled(path)


def test_no_prompt_is_in_training_and_validation() -> None:
    pairs = [Pair(str(i % 25), str(i), "r") for i in range(100)]
    train, validation = split(pairs)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in validation}
    assert sorted(train + validation) == sorted(pairs)
    assert len({pair.prompt for pair in validation}) == 3
    with pytest.raises(ValueError, match="two different prompts or more"):
        split([Pair("a", "b", "c"), Pair("a", "d", "e")])


# ---- what is computed


def test_the_rm_bench_matrix_by_hand() -> None:
    """Two prompts; chosen scores 1, 2, 3 against rejected 0, 2, 4, and 5, 5, 5 against 6, 4, 5."""
    scores = torch.tensor([1.0, 2, 3, 0, 2, 4, 5, 5, 5, 6, 4, 5])
    found = style_figures(scores, torch.zeros(2, 3, 3, dtype=torch.bool))
    assert found["matrix"] == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, 1, 0]]
    assert found["easy"] == pytest.approx((0.5 + 0.5 + 1) / 3)  # chosen in the richer style
    assert found["normal"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["hard"] == pytest.approx((0.5 + 0 + 0) / 3)  # rejected in the richer style
    assert found["ties"] == 0


def test_answers_that_read_the_same_are_no_win() -> None:
    texts, _ = tensors([("p", answer) for answer in ("ab", "abx", "c", "abz", "d", "e")], max_prompt=4, max_answer=2)
    same = same_answers(texts)
    assert same.tolist() == [[[True, False, False], [True, False, False], [False, False, False]]]
    found = style_figures(torch.tensor([1.0, 1, 1, 0, 0, 0]), same)
    assert found["matrix"] == [[0, 1, 1], [0, 1, 1], [1, 1, 1]]
    assert found["ties"] == pytest.approx(2 / 9)


def test_correlations_of_ranks() -> None:
    x, y = torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 30, 20, 40])
    assert spearman(x, y) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(torch.tensor([1.0, 1, 2]), torch.tensor([0.0, 1, 1])) == pytest.approx(
        0.5
    )  # ranks 1.5 1.5 3, 1 2.5 2.5
    assert spearman(torch.tensor([1.0, 1, 2, 3]), x) == pytest.approx(4.5 / 22.5**0.5)  # ranks 1.5 1.5 3 4
    assert spearman(x, torch.ones(4)) is None
    pairs = [
        Pair("", "", "", 0.9, "b"),
        Pair("", "", "", 0.1, "a"),
        Pair("", "", "", None, "b"),
        Pair("", "", "", 1.0, "b"),
    ]
    sums = torch.tensor([-1.0, -4, -1, -1, -2, -2, -1, -3])
    found = correlations((sums, torch.ones(8)), pairs)
    assert found["all"]["log-prob"] == pytest.approx(1)  # gaps 1, -2, 2 of the three that are judged
    assert found["a"] == {"log-prob": None, "perplexity": None}
    assert by_source(pairs) == {"a": [1], "b": [0, 2, 3]}
    assert in_band(pairs, (0.5, 1.01)) == [0, 3]
    assert in_band(pairs, (0.1, 0.9)) == [1]


def test_a_batch_has_the_share_of_misranked_pairs() -> None:
    misranked = torch.arange(100) % 5 == 0
    batches = composed_batches(misranked, 0.25, batch_size=16, steps=10)
    assert (misranked[batches].sum(1) == 4).all()
    assert batches.shape == (10, 16)
    counts = batches[misranked[batches]].bincount(minlength=100)[misranked]
    assert counts.tolist() == [2] * 20  # none is drawn twice before all are drawn once
    assert torch.equal(composed_batches(misranked, 0.0, 4, 3), composed_batches(misranked, 0.0, 4, 3))
    assert not misranked[composed_batches(misranked, 0.0, 4, 3)].any()
    with pytest.raises(ValueError, match=r"a share of 0.5 misranked pairs needs pairs of both kinds"):
        composed_batches(torch.ones(8, dtype=torch.bool), 0.5, 4, 3)


def test_labels_are_flipped_for_a_share() -> None:
    model, texts, ref = small_experiment()
    other, other_ref = flipped(texts, ref, 0.25, seed=1)
    swapped = as_pairs(*other_ref).chosen == as_pairs(*ref).rejected
    assert swapped.sum() == 16
    assert torch.equal(as_pairs(*other_ref).rejected[swapped], as_pairs(*ref).chosen[swapped])
    first_half = shuffled_batches(64, 8, 4, seed=1).flatten()
    assert 0 < swapped[first_half].sum() < 16  # spread over training, whatever the seed has in common
    again = all_logps(model, other)
    torch.testing.assert_close(again, other_ref)


def test_flipped_labels_are_learned() -> None:
    first = {}
    for share in (0.0, 1.0):
        model, texts, ref = small_experiment()
        first[share] = prefer(model, Treatment("dpo", beta=0.1, flipped=share), texts, ref, Optimization(1, 8, 1e-3))
    torch.testing.assert_close(first[1.0].ranking, -first[0.0].ranking)
    torch.testing.assert_close(first[1.0].margins, -first[0.0].margins)  # the reference is flipped with them


@pytest.mark.parametrize(
    "treatment",
    [
        Treatment(),
        Treatment(micro_batch=4, estimator="ScoreWindow", flipped=0.2),
        Treatment("simpo", gamma=1.0, misranked=0.5),
        Treatment("dpo", beta=0.1, batch_size=16),
    ],
)
def test_training_repeats_for_a_seed_and_lowers_the_loss(treatment: Treatment) -> None:
    optimization = Optimization(steps=12, batch_size=8, learning_rate=3e-3, probe_every=4)
    traces = []
    for seed in (0, 0, 1):
        model, texts, ref = small_experiment()
        traces.append(prefer(model, treatment, texts, ref, optimization, seed))
    first, again, other = traces
    assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4]))
    assert first.probes == again.probes
    assert not torch.equal(first.ranking, other.ranking)
    size = treatment.batch_size or 8
    assert first.ranking.shape == (12 * 8 // size, size)
    assert first.ranking[-3:].mean() > first.ranking[:3].mean()
    assert curves(first)["weight misranked"] > 0


def test_what_the_trace_says_of_a_step() -> None:
    """Ranking, weights, margins and gradient norms of the first step, against the definition."""
    model, texts, ref = small_experiment()
    rows = shuffled_batches(64, 8, 1)[0]
    policy, reference = pair_logps(model, texts, rows), as_pairs(*ref).rows(rows)
    beta = 0.1
    own = beta * (policy.chosen - policy.rejected)
    from_ref = beta * (reference.chosen - reference.rejected)
    losses = torch.nn.functional.softplus(from_ref - own)
    correct = policy.ranking() > 0
    expected = [
        torch.autograd.grad(part.sum() / 8, list(model.parameters()), retain_graph=True)
        for part in (losses[correct], losses[~correct], losses)
    ]
    norms = [torch.cat([g.flatten() for g in gradients]).norm().item() for gradients in expected]
    assert 0 < correct.sum() < 8  # there are both
    assert gradient_norms(model, losses, policy.ranking()) == pytest.approx(norms, rel=1e-4)

    trace = prefer(model, Treatment("dpo", beta=beta), texts, ref, Optimization(1, 8, 1e-3, probe_every=1))
    assert trace.probes[0][1:] == pytest.approx(norms, rel=1e-4)
    torch.testing.assert_close(trace.ranking[0], policy.ranking())
    torch.testing.assert_close(trace.margins[0], from_ref.detach())
    torch.testing.assert_close(trace.weights[0], torch.sigmoid(from_ref - own).detach())
    assert trace.gradient_error.item() == 0


def test_micro_batches_have_statistics_of_their_own() -> None:
    """Those of the whole batch have no error; statistics of two pairs have."""
    optimization, errors = Optimization(steps=2, batch_size=8, learning_rate=1e-4), {}
    for micro_batch in (None, 8, 2):
        model, texts, ref = small_experiment()
        trace = prefer(model, Treatment(micro_batch=micro_batch), texts, ref, optimization)
        errors[micro_batch] = trace.gradient_error.mean().item()
    assert errors[None] == errors[8] == 0
    assert errors[2] > 0.05


def test_curves_add_up() -> None:
    model, texts, ref = small_experiment()
    trace = prefer(model, Treatment(), texts, ref, Optimization(3, 16, 1e-3))
    found = curves(trace)["curves"]
    shares = [values for name, values in found.items() if name.startswith("share")]
    spent = [values for name, values in found.items() if name.startswith("spent")]
    assert len(shares) == len(spent) == 4
    assert [sum(step) for step in zip(*shares)] == pytest.approx([1] * 3, abs=1e-3)
    assert [sum(step) for step in zip(*spent)] == pytest.approx(trace.weights.mean(1).tolist(), rel=1e-3)


def test_each_loss_ranks_by_its_own_score() -> None:
    sums, lengths, ref = torch.tensor([-4.0, -9.0]), torch.tensor([2, 3]), torch.tensor([-1.0, -8.0])
    assert Treatment(beta=2.0).rewards(sums, lengths, ref).tolist() == [-4, -6]
    assert Treatment("dpo", beta=0.5).rewards(sums, lengths, ref).tolist() == [-1.5, -0.5]


def test_a_seed_has_a_model_of_its_own() -> None:
    _, settings, _ = studies.parse_args(["beta", "--scale", "smoke"])
    first, again, other = (new_model(settings, seed, "cpu").state_dict()["head.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- tables


def test_tables_have_mean_spread_and_the_difference_seed_by_seed() -> None:
    found = {("a", 0): 0.5, ("a", 1): 0.75, ("b", 1): 0.8, ("b", 0): 0.6}
    runs = [Run(name, seed, {"held out": value, "bands": {"low": None}}) for (name, seed), value in found.items()]
    rows = tabulate(runs, {"held out": of("held out"), "low": of("bands", "low"), "none": of("x", "y")}, baseline="a")
    assert rows["a"]["low"] is rows["a"]["none"] is None
    assert rows["a"]["held out"] == pytest.approx((0.625, 0.1767767))
    assert rows["b"]["over a"] == pytest.approx((0.075, 0.05 * 0.5**0.5))  # +0.1, +0.05
    assert shown("over a", rows["b"]["over a"]) == "+7.5 (3.5)"
    assert shown("held out", rows["a"]["held out"]) == "62.5 (17.7)"
    assert shown("held out", (0.5, None)) == "50.0"
    assert shown("margin", (1.234, 0.056)) == "1.23 (0.056)"


def test_gamma_is_chosen_on_validation_pairs() -> None:
    validation = {"SimPO, gamma 0.5": (0.6, 0.7), "SimPO, gamma 1": (0.5, 0.9), "SimPO, gamma 2": (0.68, 0.68)}
    runs = [
        Run(name, seed, {"validation": value, "held out": 1 - value})
        for name, of_seeds in validation.items()
        for seed, value in enumerate(of_seeds)
    ]
    assert studies.tuned(runs) == "SimPO, gamma 1"


def test_the_studies_are_what_they_say() -> None:
    for study in studies.STUDIES.values():
        assert study.baseline in study.treatments
    ablations = studies.ABLATIONS
    assert ablations["no normalization, no exponential"].margin == AdaptiveMargin(normalize=False, scaling="linear")
    assert [t.micro_batch for t in studies.BATCH_SIZES.values()] == [None, 2, 4, 8, 16, 32, 64, 2, 8, 32]


# ---- the command


def command(*arguments: object, preexec_fn: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.studies", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=preexec_fn)


def test_every_study_runs_goes_on_and_repeats(tmp_path: Path) -> None:
    """At the smallest scale: table, JSON and picture of each; from the store at once, and anew to the same digits."""
    store, out = tmp_path / "store", tmp_path / "out"
    arguments = ("all", "--scale", "smoke", "--store", store, "--out", out)
    ran = command(*arguments)
    assert ran.returncode == 0, ran.stderr
    for name, study in studies.STUDIES.items():
        written = json.loads((out / f"{name}.json").read_text())
        assert {(run["treatment"], run["seed"]) for run in written["runs"]} == {
            (treatment, seed) for treatment in (IMITATION, *study.treatments) for seed in (0, 1)
        }
        assert all(0 <= run["figures"]["held out"] <= 1 for run in written["runs"])
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert study.asks in " ".join(ran.stdout.split())
    assert not list(tmp_path.rglob("*.partial"))

    runs = sorted(store.glob("*.json"))
    before = {path: path.read_bytes() for path in runs}
    ranking = json.loads((out / "ranking.json").read_text())["runs"]
    kept, lost = runs[::2], runs[1::2]
    for path in lost:
        path.unlink()
    times = {path: path.stat().st_mtime_ns for path in kept}
    again = command("ranking", "--scale", "smoke", "--store", store, "--out", out, "--jobs", 1)
    assert again.returncode == 0, again.stderr
    assert times == {path: path.stat().st_mtime_ns for path in kept}  # what was finished is not done again
    assert json.loads((out / "ranking.json").read_text())["runs"] == ranking
    found = {path: path.read_bytes() for path in store.glob("*.json")}
    assert found.items() <= before.items()  # on one process as on two

    (out / "ranking.png").unlink()
    assert command("ranking", "--redraw", "--out", out).returncode == 0
    assert (out / "ranking.png").exists()


def test_an_interrupted_study_goes_on(tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    arguments = ("oracle", "--scale", "smoke", "--jobs", 1, "--store", store, "--out", out)
    line = [sys.executable, "-m", "benchmarks.studies", *map(str, arguments)]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(store.glob("*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"interrupted; finished runs are in {store}, the same command goes on" in error.decode()
    assert not out.exists()
    finished = {path: path.stat().st_mtime_ns for path in store.glob("*.json")}
    assert 4 <= len(finished) < 30
    assert command(*arguments).returncode == 0
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert (out / "oracle.json").exists()


def test_a_full_disk_leaves_an_error_and_nothing_half_written(tmp_path: Path) -> None:
    """The kernel refuses to make a file larger than 2,000 bytes, which the checkpoint is."""
    store, out = tmp_path / "store", tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    ran = command("beta", "--scale", "smoke", "--store", store, "--out", out, preexec_fn=limit)
    assert ran.returncode == 1
    assert f"studies: {store}" in ran.stderr
    assert "cannot be written: File too large" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(store.iterdir())
    assert not out.exists()


def test_a_bad_file_is_named_before_any_work(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    ran = command("beta", "--data", bad, "--eval", bad, "--store", tmp_path / "store", "--out", tmp_path / "out")
    assert ran.returncode == 1
    assert ran.stderr.strip() == f"studies: {bad}, line 1: the key 'chosen' is missing, found 'prompt'"
    assert list(tmp_path.iterdir()) == [bad]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["beta", "--data", "x"], "--data and --eval go together"),
        (["beta", "--rm-bench", "x"], "--rm-bench needs --data and --eval"),
        (["beta", "--model", "x"], "--model needs --learning-rate"),
        (["beta", "--model", "x", "--learning-rate", "1", "--width", "8"], "--width and --layers are of the built-in"),
        (["beta", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["gamma"], "invalid choice: 'gamma'"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        studies.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_a_model_of_hugging_face(tmp_path: Path) -> None:
    """Is the checkpoint itself, unless it is to imitate first; one that does not fit is named."""
    transformers = pytest.importorskip("transformers")
    from benchmarks.speed.trainer import byte_tokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = byte_tokenizer()
    for name, vocabulary, positions in (("fits", 300, 64), ("short", 300, 20), ("small", 100, 64)):
        config = transformers.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=positions, **sizes)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options = (
        "--scale",
        "smoke",
        "--learning-rate",
        "1e-3",
        "--seeds",
        1,
        "--store",
        tmp_path / "s",
        "--out",
        tmp_path,
    )
    ran = command("perplexity", "--model", tmp_path / "fits", *options)
    assert ran.returncode == 0, ran.stderr
    written = json.loads((tmp_path / "perplexity.json").read_text())
    assert written["settings"]["model"] == str(tmp_path / "fits")
    assert "imitation_steps" not in written["settings"]
    for name, message in (
        ("short", "the model takes 20 tokens, and the longest text has"),
        ("small", "knows 100 tokens"),
    ):
        ran = command("perplexity", "--model", tmp_path / name, *options)
        assert ran.returncode == 1
        assert message in ran.stderr
