"""Tests of benchmarks/studies: the numbers, the tables, and the command with its interruptions and its errors.

Depends on NumPy and torch.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from amapo_loss import AdaptiveMargin
from benchmarks.studies import __main__ as command
from benchmarks.studies import studies
from benchmarks.studies.data import (
    Corpus,
    Pair,
    StyledPair,
    both_answers,
    count_trained_prompts,
    file_corpus,
    generated_corpus,
    read_pairs,
    read_rm_bench,
    sample,
    split_off_validation,
)
from benchmarks.studies.evaluation import (
    confidence_correlations,
    identical_answers,
    indices_by_source,
    indices_in_band,
    ranked_correctly,
    share_of,
    spearman,
    style_accuracies,
    training_metrics,
)
from benchmarks.studies.harness import (
    AnswerLogps,
    Optimization,
    Treatment,
    all_logps,
    as_pairs,
    composed_batches,
    flip_labels,
    gradient_norms,
    pair_logps,
    prefer,
    shuffled_batches,
)
from benchmarks.studies.jobs import (
    RUN_MODULES,
    Job,
    dump_code,
    new_model,
    perform_job,
    result_path,
    run_files,
    store_key,
)
from benchmarks.studies.models import ByteLM, Texts, tensors
from benchmarks.studies.report import (
    ERROR_OVER_PROMPTS,
    draw_tuning,
    error_over_prompts,
    format_summary,
    metric_at,
    tabulate,
)
from benchmarks.studies.sweep import BATCH_ACCURACY, IMITATION, TUNED_ACCURACY, Run, start_workers, sweep
from tests.support.studies import ROOT, command_line, run_command

RM_BENCH_ENTRY = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}


def small_experiment(pairs: int = 64) -> tuple[ByteLM, Texts, AnswerLogps]:
    """Return an untrained model, the texts of generated pairs, and the model's log-probs of these texts."""
    corpus = generated_corpus(pairs + 8, held_out=8, demonstrations=8, seed=0)
    texts, _ = tensors(both_answers(corpus.train[:pairs]), 32, 16)
    torch.manual_seed(0)
    model = ByteLM(width=16, layers=1, max_length=49)
    return model, texts, all_logps(model, texts)


@pytest.mark.parametrize("confidence", ["-0.1", "1.5", '"high"', "true", "[]", "NaN"])
def test_reading_pairs_rejects_an_invalid_confidence(tmp_path: Path, confidence: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": "a", "chosen": "b", "rejected": "c", "confidence": {confidence}}}\n')
    with pytest.raises(ValueError, match="line 1: 'confidence' must be a number from 0 to 1"):
        list(read_pairs(path))


def test_reading_pairs_keeps_confidence_and_source(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "confidence": 1, "source": "s"}\n')
    assert list(read_pairs(path)) == [Pair("a", "b", "c", 1, "s")]


def test_reading_rm_bench_returns_the_styled_answers(tmp_path: Path) -> None:
    path = tmp_path / "rm.json"
    path.write_text(json.dumps([RM_BENCH_ENTRY | {"id": 1}]))
    assert read_rm_bench(path) == [("p", ("a", "b", "c"), ("d", "e", "f"))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "rm.json: not valid JSON"),
        ("{}", "rm.json: expected a JSON list of RM-Bench entries, got dict"),
        ("[]", "rm.json: expected a JSON list of RM-Bench entries, got an empty list"),
        ([RM_BENCH_ENTRY, 3], "entry 2: expected a JSON object"),
        ([{"prompt": "p", "chosen": []}], "entry 1: the key 'rejected' is missing"),
        ([RM_BENCH_ENTRY | {"prompt": None}], "entry 1: 'prompt' must be a string, got NoneType"),
        (
            [RM_BENCH_ENTRY | {"chosen": ["a", "b"]}],
            r"'chosen' must be a list of 3 non-empty answers \(concise, plain, markdown\)",
        ),
        ([RM_BENCH_ENTRY | {"rejected": ["a", "", "b"]}], "entry 1: 'rejected' must be a list of 3 non-empty answers"),
        ([RM_BENCH_ENTRY | {"rejected": "abc"}], "entry 1: 'rejected' must be a list of 3 non-empty answers"),
    ],
)
def test_reading_rm_bench_rejects_an_invalid_file(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "rm.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_rm_bench(path)


def test_training_and_validation_share_no_prompt() -> None:
    pairs = [Pair(str(i % 25), str(i), "r") for i in range(100)]
    train, validation = split_off_validation(pairs)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in validation}
    assert sorted(train + validation) == sorted(pairs)
    assert len({pair.prompt for pair in validation}) == 3
    with pytest.raises(ValueError, match="at least two different prompts, one of them for validation, got 1"):
        split_off_validation([Pair("a", "b", "c"), Pair("a", "d", "e")])


@pytest.mark.parametrize(("with_imitation", "count"), [(False, 1), (True, 2)])
def test_prompts_of_the_evaluation_that_are_trained_on_are_counted(with_imitation: bool, count: int) -> None:
    styled = [StyledPair(prompt, ("a", "b", "c"), ("d", "e", "f")) for prompt in ("trained", "demonstrated", "new")]
    trained, held_out = Pair("trained", "g", "h"), Pair("new", "i", "j")
    corpus = Corpus([("demonstrated", "g")], [trained], [], [held_out], {"styled": styled}, {"further": [trained] * 2})
    counts = count_trained_prompts(corpus, with_imitation)
    assert counts == {"held out": 0, "further": 2, "styled": count}


def test_rm_bench_accuracies_equal_a_computation_by_hand() -> None:
    """The chosen answers of the first prompt score 1, 2, 3 and its rejected answers 0, 2, 4.

    Those of the second prompt score 5, 5, 5 and 6, 4, 5.
    """
    scores = torch.tensor([1.0, 2, 3, 0, 2, 4, 5, 5, 5, 6, 4, 5])
    accuracies = style_accuracies(scores, torch.zeros(2, 3, 3, dtype=torch.bool))
    assert accuracies["matrix"] == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, 1, 0]]
    assert accuracies["easy"] == pytest.approx((0.5 + 0.5 + 1) / 3)  # the chosen answer has the richer style
    assert accuracies["normal"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert accuracies["hard"] == pytest.approx((0.5 + 0 + 0) / 3)  # the rejected answer has the richer style
    assert accuracies["ties"] == 0


def test_identical_answers_do_not_count_as_correct() -> None:
    """Truncation to two tokens makes "ab", "abx" and "abz" identical."""
    texts, _ = tensors([("p", answer) for answer in ("ab", "abx", "c", "abz", "d", "e")], max_prompt=4, max_answer=2)
    identical = identical_answers(texts)
    assert identical.tolist() == [[[True, False, False], [True, False, False], [False, False, False]]]
    accuracies = style_accuracies(torch.tensor([1.0, 1, 1, 0, 0, 0]), identical)
    assert accuracies["matrix"] == [[0, 1, 1], [0, 1, 1], [1, 1, 1]]
    assert accuracies["ties"] == pytest.approx(2 / 9)


def test_pairs_are_ranked_by_the_average_log_prob_by_its_change_and_by_the_own_score_of_the_loss() -> None:
    """The second pair is ranked correctly only relative to the reference. The third is identical after the cut.

    The chosen answer of the fourth pair has lost 2 nats with 4 tokens, and its rejected answer 1 nat with one token.
    """
    answers = ("a", "b", "cx", "f", "d", "ee", "cy", "g")
    texts, _ = tensors([("p", answer) for answer in answers], max_prompt=4, max_answer=1)
    lengths = torch.tensor([1.0, 1, 1, 4, 1, 1, 1, 1])
    policy = torch.tensor([-1.0, -3, -1, -8, -2, -2, -2, -3]), lengths
    ref = torch.tensor([-1.0, -5, -1, -6, -1, -2, -2, -2]), lengths
    dpo = ranked_correctly(Treatment("dpo", beta=0.1), texts, policy, ref)
    assert dpo.by_logp.tolist() == [True, False, False, True]
    assert dpo.by_own_score.tolist() == [True, True, False, False]
    assert dpo.by_change.tolist() == [True, True, False, True]
    simpo = ranked_correctly(Treatment("simpo"), texts, policy, ref)
    assert torch.equal(simpo.by_own_score, dpo.by_logp)
    assert torch.equal(simpo.by_change, dpo.by_change)
    assert share_of(dpo.by_own_score) == pytest.approx(1 / 2)
    assert (share_of(dpo.by_logp, [1, 2]), share_of(dpo.by_logp, [])) == (0, None)


def test_spearman_equals_a_computation_by_hand() -> None:
    x, y = torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 30, 20, 40])
    assert spearman(x, y) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman(x, x.exp()) == pytest.approx(1)
    # The ranks are 1.5, 1.5, 3 and 1, 2.5, 2.5.
    assert spearman(torch.tensor([1.0, 1, 2]), torch.tensor([0.0, 1, 1])) == pytest.approx(0.5)
    # The ranks are 1.5, 1.5, 3, 4 and 1, 2, 3, 4.
    assert spearman(torch.tensor([1.0, 1, 2, 3]), x) == pytest.approx(4.5 / 22.5**0.5)
    assert spearman(x, torch.ones(4)) is None


def test_pairs_are_grouped_by_source_and_by_confidence() -> None:
    pairs = [
        Pair("", "", "", 0.9, "b"),
        Pair("", "", "", 0.1, "a"),
        Pair("", "", "", None, "b"),
        Pair("", "", "", 1.0, "b"),
    ]
    sums = torch.tensor([-1.0, -4, -1, -1, -2, -2, -1, -3])
    correlations = confidence_correlations((sums, torch.ones(8)), pairs)
    assert correlations["all"]["log-prob"] == pytest.approx(1)  # the three pairs with a confidence have gaps 1, -2, 2
    assert correlations["a"] == {"log-prob": None, "perplexity": None}
    assert indices_by_source(pairs) == {"a": [1], "b": [0, 2, 3]}
    assert indices_in_band(pairs, (0.5, 1.01)) == [0, 3]
    assert indices_in_band(pairs, (0.1, 0.9)) == [1]


def test_composed_batches_have_the_given_share_of_misranked_pairs() -> None:
    misranked = torch.arange(100) % 5 == 0
    batches = composed_batches(misranked, 0.25, batch_size=16, steps=10)
    assert (misranked[batches].sum(1) == 4).all()
    assert batches.shape == (10, 16)
    counts = batches[misranked[batches]].bincount(minlength=100)[misranked]
    assert counts.tolist() == [2] * 20  # no pair is drawn twice before all are drawn once
    assert torch.equal(composed_batches(misranked, 0.0, 4, 3), composed_batches(misranked, 0.0, 4, 3))
    assert not misranked[composed_batches(misranked, 0.0, 4, 3)].any()
    with pytest.raises(ValueError, match=r"a share of 0\.5 misranked pairs needs both correct and misranked pairs"):
        composed_batches(torch.ones(8, dtype=torch.bool), 0.5, 4, 3)


def test_flip_labels_swaps_the_given_share_of_pairs() -> None:
    model, texts, ref = small_experiment()
    flipped_texts, flipped_ref = flip_labels(texts, ref, 0.25, seed=1)
    swapped = as_pairs(*flipped_ref).chosen == as_pairs(*ref).rejected
    assert swapped.sum() == 16
    assert torch.equal(as_pairs(*flipped_ref).rejected[swapped], as_pairs(*ref).chosen[swapped])
    first_half = shuffled_batches(64, 8, 4, seed=1).flatten()
    assert 0 < swapped[first_half].sum() < 16  # the batches with the same seed do not start with the flipped pairs
    torch.testing.assert_close(all_logps(model, flipped_texts), flipped_ref)


def test_preference_training_learns_the_flipped_labels() -> None:
    traces = {}
    for share in (0.0, 1.0):
        model, texts, ref = small_experiment()
        traces[share] = prefer(model, Treatment("dpo", beta=0.1, flipped=share), texts, ref, Optimization(1, 8, 1e-3))
    torch.testing.assert_close(traces[1.0].ranking, -traces[0.0].ranking)
    torch.testing.assert_close(traces[1.0].margins, -traces[0.0].margins)  # the reference is flipped, too


@pytest.mark.parametrize(
    "treatment",
    [
        Treatment(),
        Treatment(micro_batch=4, estimator="ScoreWindow", flipped=0.2),
        Treatment("simpo", gamma=1.0, misranked=0.5),
        Treatment("dpo", beta=0.1, batch_size=16),
    ],
)
def test_training_is_reproducible_and_raises_the_ranking(treatment: Treatment) -> None:
    optimization = Optimization(steps=12, batch_size=8, learning_rate=3e-3, probe_every=4)
    traces = []
    for seed in (0, 0, 1):
        model, texts, ref = small_experiment()
        traces.append(prefer(model, treatment, texts, ref, optimization, seed))
    first, repeated, other_seed = traces
    assert all(torch.equal(a, b) for a, b in zip(first[:4], repeated[:4]))  # all fields that are tensors
    assert first.probes == repeated.probes
    assert not torch.equal(first.ranking, other_seed.ranking)
    batch_size = treatment.batch_size or 8
    assert first.ranking.shape == (12 * 8 // batch_size, batch_size)
    assert first.ranking[-3:].mean() > first.ranking[:3].mean()
    assert training_metrics(first)["weight misranked"] > 0


def test_the_trace_of_a_step_agrees_with_the_definition_of_dpo() -> None:
    model, texts, ref = small_experiment()
    batch = shuffled_batches(64, 8, 1)[0]
    policy, reference = pair_logps(model, texts, batch), as_pairs(*ref).select(batch)
    beta = 0.1
    policy_score = beta * (policy.chosen - policy.rejected)
    ref_score = beta * (reference.chosen - reference.rejected)
    losses = torch.nn.functional.softplus(ref_score - policy_score)
    is_correct = policy.ranking() > 0
    expected_gradients = [
        torch.autograd.grad(group.sum() / 8, list(model.parameters()), retain_graph=True)
        for group in (losses[is_correct], losses[~is_correct], losses)
    ]
    expected_norms = [torch.cat([g.flatten() for g in gradients]).norm().item() for gradients in expected_gradients]
    assert 0 < is_correct.sum() < 8  # otherwise one of the groups would be empty
    assert gradient_norms(model, losses, policy.ranking()) == pytest.approx(expected_norms, rel=1e-4)

    trace = prefer(model, Treatment("dpo", beta=beta), texts, ref, Optimization(1, 8, 1e-3, probe_every=1))
    assert trace.probes[0][1:] == pytest.approx(expected_norms, rel=1e-4)
    torch.testing.assert_close(trace.ranking[0], policy.ranking())
    torch.testing.assert_close(trace.margins[0], ref_score.detach())
    torch.testing.assert_close(trace.weights[0], torch.sigmoid(ref_score - policy_score).detach())
    assert trace.gradient_error.item() == 0


def test_only_statistics_of_smaller_micro_batches_have_an_error() -> None:
    optimization, errors = Optimization(steps=2, batch_size=8, learning_rate=1e-4), {}
    for micro_batch in (None, 8, 2):
        model, texts, ref = small_experiment()
        trace = prefer(model, Treatment(micro_batch=micro_batch), texts, ref, optimization)
        errors[micro_batch] = trace.gradient_error.mean().item()
    assert errors[None] == errors[8] == 0
    assert errors[2] > 0.05


def test_curves_of_the_four_cases_add_up() -> None:
    model, texts, ref = small_experiment()
    trace = prefer(model, Treatment(), texts, ref, Optimization(3, 16, 1e-3))
    curves = training_metrics(trace)["curves"]
    shares = [curve for name, curve in curves.items() if name.startswith("share")]
    spent = [curve for name, curve in curves.items() if name.startswith("spent")]
    assert len(shares) == len(spent) == 4
    assert [sum(step) for step in zip(*shares)] == pytest.approx([1] * 3, abs=1e-3)
    assert [sum(step) for step in zip(*spent)] == pytest.approx(trace.weights.mean(1).tolist(), rel=1e-3)


def test_rewards_are_those_of_the_loss() -> None:
    sums, lengths, ref = torch.tensor([-4.0, -9.0]), torch.tensor([2, 3]), torch.tensor([-1.0, -8.0])
    assert Treatment(beta=2.0).rewards(sums, lengths, ref).tolist() == [-4, -6]
    assert Treatment("dpo", beta=0.5).rewards(sums, lengths, ref).tolist() == [-1.5, -0.5]


def test_each_seed_has_its_own_model() -> None:
    _, settings, _ = command.parse_args(["beta", "--scale", "smoke"])
    first, repeated, other_seed = (new_model(settings, seed, "cpu").state_dict()["head.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, repeated)
    assert not torch.equal(first, other_seed)


def test_tables_have_means_standard_deviations_and_differences_from_the_baseline() -> None:
    accuracies = {("a", 0): 0.5, ("a", 1): 0.75, ("b", 1): 0.8, ("b", 0): 0.6}
    runs = [
        Run(name, seed, {"held out": accuracy, "bands": {"low": None}}) for (name, seed), accuracy in accuracies.items()
    ]
    columns = {"held out": metric_at("held out"), "low": metric_at("bands", "low"), "none": metric_at("x", "y")}
    rows = tabulate(runs, columns, baseline="a")
    assert rows["a"]["low"] is rows["a"]["none"] is None
    assert rows["a"]["held out"] == pytest.approx((0.625, 0.1767767))
    assert rows["b"]["over a"] == pytest.approx((0.075, 0.05 * 0.5**0.5))  # the differences are 0.1 and 0.05
    others = tabulate(runs, columns, "a", {"a": "b", "b": "b"}, compared="solved")  # no run has "solved"
    assert others["a"]["over a"] == pytest.approx((-0.075, 0.05 * 0.5**0.5))  # now a is compared with b
    assert "over a" not in others["b"]
    for run in runs:
        run.metrics["held out, own score"] = 1 - run.metrics["held out"]
    by_own_score = tabulate(runs, columns, "a", compared="held out, own score")
    assert by_own_score["b"]["over a, own score"] == pytest.approx((-0.075, 0.05 * 0.5**0.5))
    assert format_summary("over a", rows["b"]["over a"]) == "+7.5 (3.5)"
    assert format_summary("held out", rows["a"]["held out"]) == "62.5 (17.7)"
    assert format_summary("held out", (0.5, None)) == "50.0"
    assert format_summary("margin", (1.234, 0.056)) == "1.23 (0.056)"


def runs_with_outcomes(outcomes: dict[str, list[str]]) -> list[Run]:
    """Return a run for each treatment and seed with these outcomes of the held-out pairs."""
    return [
        Run(name, seed, {"held out": digits.count("1") / len(digits), "outcomes": {"held out": digits}})
        for name, of_seeds in outcomes.items()
        for seed, digits in enumerate(of_seeds)
    ]


@given(st.integers(2, 40), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_error_over_independent_prompts_is_that_of_a_mean(num_pairs: int, seeds: int, seed: int) -> None:
    """With one pair per prompt, it is the standard deviation over the pairs divided by the root of their number.

    If each pair stands there k times, with the same prompt, the error stays what it was.
    """
    generator = np.random.default_rng(seed)
    digits = {name: generator.integers(0, 2, (seeds, num_pairs)) for name in "ab"}
    differences = (digits["a"] - digits["b"]).mean(0)
    for copies in (1, 3):
        runs = runs_with_outcomes(
            {name: ["".join(map(str, row.repeat(copies))) for row in rows] for name, rows in digits.items()}
        )
        prompts = np.arange(num_pairs).repeat(copies).tolist()
        error = error_over_prompts(runs, "a", "b", "held out", prompts)
        assert error == pytest.approx(differences.std(ddof=1) / num_pairs**0.5, abs=1e-12)
        assert tabulate(runs, {}, "b", prompts=prompts)["a"][ERROR_OVER_PROMPTS] == (error, None)


def test_the_error_over_prompts_is_that_of_a_bootstrap_over_prompts() -> None:
    """The pairs of a prompt tend to agree, and their number differs from prompt to prompt."""
    generator = np.random.default_rng(0)
    prompts = np.sort(generator.integers(0, 200, 1000))
    gains = generator.normal(0.2, 1, 200)[prompts] + generator.normal(0, 0.5, 1000) > 0
    runs = runs_with_outcomes({"a": ["".join(map(str, gains.astype(int)))], "b": ["01" * 500]})
    difference = gains - np.tile([0.0, 1.0], 500)
    sums, counts = np.bincount(prompts, difference, 200), np.bincount(prompts, minlength=200)
    drawn = generator.integers(0, 200, (4000, 200))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    error = error_over_prompts(runs, "a", "b", "held out", prompts.tolist())
    assert error == pytest.approx(means.std(), rel=0.05)
    assert means.std() > 1.2 * difference.std() / 1000**0.5  # that of independent pairs is too small


def test_the_error_over_prompts_needs_outcomes_and_prompts() -> None:
    runs = runs_with_outcomes({"a": ["101"], "b": ["011"]})
    assert ERROR_OVER_PROMPTS in tabulate(runs, {}, "b", prompts=[0, 1, 1])["a"]
    assert ERROR_OVER_PROMPTS not in tabulate(runs, {}, "b")["a"]
    assert ERROR_OVER_PROMPTS not in tabulate(runs, {}, "b", prompts=[0, 0, 0])["a"]
    del runs[0].metrics["outcomes"]
    assert ERROR_OVER_PROMPTS not in tabulate(runs, {}, "b", prompts=[0, 1, 1])["a"]
    assert command.numbered(["x", "y", "x", "z"]) == [0, 1, 0, 2]


def test_the_best_gamma_is_chosen_on_the_validation_pairs() -> None:
    validation = {"SimPO, gamma 0.5": (0.6, 0.7), "SimPO, gamma 1": (0.5, 0.9), "SimPO, gamma 2": (0.68, 0.68)}
    runs = [
        Run(name, seed, {"validation": accuracy, "held out": 1 - accuracy})
        for name, accuracies in validation.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    assert studies.best_simpo(runs) == "SimPO, gamma 1"


def test_names_of_treatments_agree_with_their_options() -> None:
    for study in studies.STUDIES.values():
        assert study.baseline in study.treatments
    margin = studies.ABLATIONS["no normalization, no exponential"].margin
    assert margin == AdaptiveMargin(normalize=False, scaling="linear")
    micro_batches = [treatment.micro_batch for treatment in studies.BATCH_SIZES.values()]
    assert micro_batches == [None, 2, 4, 8, 16, 32, 64, 2, 8, 32]


def test_the_store_key_covers_every_module_that_computes_a_run() -> None:
    names = {str(path.relative_to(ROOT)) for path in run_files()}
    assert {"kernels/pair_loss.py", "amapo_loss/_moments.py", "benchmarks/studies/harness.py"} <= names
    modules = {path.stem for path in (ROOT / "benchmarks" / "studies").glob("*.py")}
    assert modules - {*RUN_MODULES} == {"__init__", "__main__", "pretrained", "report", "studies", "sweep"}


def test_every_study_runs_and_continues_with_the_same_numbers(tmp_path: Path) -> None:
    """At the smallest scale, each study writes its table, JSON and picture.

    When half of the runs are removed from the store, the command repeats only these, with the same numbers.
    """
    store, out = tmp_path / "store", tmp_path / "out"
    completed = run_command("all", "--scale", "smoke", "--store", store, "--out", out)
    assert completed.returncode == 0, completed.stderr
    for name, study in studies.STUDIES.items():
        record = json.loads((out / f"{name}.json").read_text())
        assert {(run["treatment"], run["seed"]) for run in record["runs"]} == {
            (treatment, seed) for treatment in (IMITATION, *study.treatments) for seed in (0, 1)
        }
        assert all(0 <= run["figures"]["held out"] <= 1 for run in record["runs"])
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert study.question in " ".join(completed.stdout.split())
    assert not list(tmp_path.rglob("*.partial"))

    results = sorted(store.glob("*.json"))
    contents = {path: path.read_bytes() for path in results}
    ranking_runs = json.loads((out / "ranking.json").read_text())["runs"]
    kept, removed = results[::2], results[1::2]
    for path in removed:
        path.unlink()
    times = {path: path.stat().st_mtime_ns for path in kept}
    repeated = run_command("ranking", "--scale", "smoke", "--store", store, "--out", out, "--jobs", 1)
    assert repeated.returncode == 0, repeated.stderr
    assert times == {path: path.stat().st_mtime_ns for path in kept}  # finished runs are not repeated
    assert json.loads((out / "ranking.json").read_text())["runs"] == ranking_runs
    repeated_contents = {path: path.read_bytes() for path in store.glob("*.json")}
    assert repeated_contents.items() <= contents.items()  # the number of processes does not change the numbers

    (out / "ranking.png").unlink()
    assert run_command("ranking", "--redraw", "--out", out).returncode == 0
    assert (out / "ranking.png").exists()

    sizes = tmp_path / "sizes"
    flow = json.loads((out / "gradient-flow.json").read_text())
    model = ByteLM(16, 1, 1 + 32 + 24)
    assert flow["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for name, parameters in (("larger", 10_000_000), ("smaller", 100_000)):
        (sizes / name).mkdir(parents=True)
        (sizes / name / "gradient-flow.json").write_text(json.dumps(flow | {"parameters": parameters}))
    command_of_sizes = [sys.executable, "-m", "benchmarks.figures.sizes", "--folder", sizes]
    subprocess.run(command_of_sizes, cwd=ROOT, check=True, capture_output=True)
    tables = json.loads((sizes / "sizes.json").read_text())["misranked pairs"]
    probes = [
        probe for run in flow["runs"] if run["treatment"] == "SimPO, gamma 0" for probe in run["figures"]["probes"]
    ]
    assert len(probes) == 4  # two of each seed
    norms = (
        [sum(probe[i] for probe in probes[:2]) for i in (1, 2)],
        [sum(probe[i] for probe in probes[2:]) for i in (1, 2)],
    )
    expected = sum(misranked / (correct + misranked) for correct, misranked in norms) / 2
    for treatment, row in tables["share of the gradient norm"].items():
        assert list(row) == ["share, smaller", "share, larger"]
        assert row["share, smaller"] == row["share, larger"]
        if treatment == "SimPO, gamma 0":
            assert row["share, larger"][0] == pytest.approx(expected)
    ratios = tables.pop("mean weight over that of correct pairs")
    assert all(0 < mean < 1 for table in tables.values() for row in table.values() for mean, _ in row.values())
    seeds = [run["figures"]["curves"] for run in flow["runs"] if run["treatment"] == "SimPO, gamma 0"]
    means = [
        [sum(sum(curves[f"{quantity}, {ranked}, {margin}"]) for margin in ("margin", "no margin")) for curves in seeds]
        for ranked in ("misranked", "correct")
        for quantity in ("spent", "share")
    ]
    expected = sum(a / b / (c / d) for a, b, c, d in zip(*means)) / 2
    assert ratios["SimPO, gamma 0"]["ratio, larger"][0] == pytest.approx(expected, rel=1e-3)


def test_some_treatments_of_a_study_run_with_the_same_numbers(tmp_path: Path) -> None:
    """The comparison with the baseline, and the own picture of a study, need treatments that are missing here."""
    common = ("--scale", "smoke", "--store", tmp_path / "store", "--learning-rate", 1e-3, 1e-2)
    arguments = ("ranking", *common)
    some, every = tmp_path / "some", tmp_path / "all"
    completed = run_command(*arguments, "--out", some, "--treatments", "AMaPO, paper", "DPO")
    assert completed.returncode == 0, completed.stderr
    record = json.loads((some / "ranking.json").read_text())
    assert [*record["treatments"]] == ["DPO", "AMaPO, paper"]  # in the order of the study
    assert (some / "ranking.png").exists()
    assert (some / "ranking-rates.png").exists()
    assert run_command("perplexity", *common, "--out", some, "--treatments", "AMaPO, paper").returncode == 0
    assert (some / "perplexity.png").exists()
    assert run_command(*arguments, "--out", every).returncode == 0
    runs = json.loads((every / "ranking.json").read_text())["runs"]
    assert all(run in runs for run in record["runs"])
    assert len(record["runs"]) == 3 * 2
    for run in runs:  # before training, no log-prob has changed
        assert (run["figures"]["held out, change"] is None) == (run["treatment"] == IMITATION)


def test_a_tuning_alone_is_that_of_the_whole_study(tmp_path: Path) -> None:
    common = ("--scale", "smoke", "--store", tmp_path / "store", "--learning-rate", 1e-3, 1e-2)
    arguments = ("ranking", *common, "--treatments", "DPO", "AMaPO, paper")
    tuned, whole = tmp_path / "tuned", tmp_path / "whole"
    completed = run_command(*arguments, "--out", tuned, "--only-tune")
    assert completed.returncode == 0, completed.stderr
    assert {path.name for path in tuned.iterdir()} == {"ranking.json", "ranking-rates.png"}
    assert "training the treatments" not in completed.stdout
    finished = {*(tmp_path / "store").glob("*.json")}
    assert len(finished) == 1 + 2 * 2  # a checkpoint, and two rates of two losses
    assert run_command(*arguments, "--out", whole).returncode == 0
    assert len({*(tmp_path / "store").glob("*.json")} - finished) == 2 + 2 * 2  # those of two seeds
    records = [json.loads((folder / "ranking.json").read_text()) for folder in (tuned, whole)]
    assert records[0][command.TUNING] == records[1][command.TUNING]
    assert records[0]["treatments"] == records[1]["treatments"]
    assert records[0]["runs"] == []


def test_an_interrupted_study_continues_from_its_finished_runs(tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    arguments = ("oracle", "--scale", "smoke", "--jobs", 1, "--store", store, "--out", out)
    process = subprocess.Popen(
        command_line(*arguments),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore SIGINT
    )
    deadline = time.monotonic() + 120
    while len(list(store.glob("*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends the signal to all processes of the group, too
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    expected = f"interrupted; the finished runs are in {store}, and the same command continues from them"
    assert expected in error.decode()
    assert not out.exists()
    finished = {path: path.stat().st_mtime_ns for path in store.glob("*.json")}
    assert 4 <= len(finished) < 30
    assert run_command(*arguments).returncode == 0
    assert all(path.stat().st_mtime_ns == modified for path, modified in finished.items())
    assert (out / "oracle.json").exists()


def test_a_full_disk_causes_an_error_and_leaves_no_partial_file(tmp_path: Path) -> None:
    """The operating system refuses to write files larger than 8,192 bytes, and a checkpoint is larger."""
    store, out = tmp_path / "store", tmp_path / "out"

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    completed = run_command("beta", "--scale", "smoke", "--store", store, "--out", out, preexec_fn=limit_file_size)
    assert completed.returncode == 1
    assert f"studies: {store}" in completed.stderr
    assert "cannot be written: File too large" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert not list(store.iterdir())
    assert not out.exists()


def test_an_invalid_file_is_reported_before_any_run(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n')
    store, out = tmp_path / "store", tmp_path / "out"
    completed = run_command("beta", "--data", path, "--eval", path, "--store", store, "--out", out)
    assert completed.returncode == 1
    assert completed.stderr.strip() == f"studies: {path}, line 1: the key 'chosen' is missing, found 'prompt'"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["beta", "--data", "x"], "--data and --eval must be given together"),
        (["beta", "--rm-bench", "x"], "--rm-bench and --also-eval need --data and --eval"),
        (["beta", "--model", "x"], "--model needs --learning-rate"),
        (["beta", "--only-tune", "--learning-rate", "1e-3"], "--only-tune needs two or more values"),
        (
            ["beta", "--model", "x", "--learning-rate", "1", "--width", "8"],
            "--width and --layers set the size of the built-in model",
        ),
        (["beta", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["beta", "--width", "0"], "--width must be at least 1, got 0"),
        (["beta", "--imitation-steps", "-1"], "--imitation-steps must be at least 0, got -1"),
        (["beta", "--trained-blocks", "2"], "--trained-blocks needs --model"),
        (["beta", "--scale", "pretrained"], "--scale pretrained needs --model"),
        (["beta", "--dtype", "float32"], "--dtype needs --model"),
        (["perplexity", "--treatments", "DPO"], "--treatments has 'DPO', but the treatments of perplexity are"),
        (["beta", "--eval-pairs", "5"], "--train-pairs and --eval-pairs need --data and --eval"),
        (["all", "--model", "x", "--learning-rate", "1"], "the generated pairs of reasoning need the built-in model"),
        (["reasoning", "--max-answer", "9"], "cannot be set for the generated pairs of reasoning"),
        (
            ["beta", "--data", "x", "--eval", "x", "--also-eval", "a/validation.jsonl"],
            "no file of --rm-bench and --also-eval can be called validation",
        ),
        (
            ["beta", "--data", "x", "--eval", "x", "--also-eval", "a/x.jsonl", "--rm-bench", "b/x.json"],
            "can be called x: this name is already taken",
        ),
        (["gamma"], "invalid choice: 'gamma'"),
    ],
)
def test_invalid_arguments_are_reported(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_a_command_takes_several_studies_in_their_order_or_all() -> None:
    assert command.parse_args(["beta", "ranking"])[0].studies == ["beta", "ranking"]
    assert command.parse_args(["all"])[0].studies == list(studies.STUDIES)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_makefile_compares_four_models(tmp_path: Path) -> None:
    """The path of the model has a space, and the options of the files reach the command."""
    variables = ["MODEL=some where/model/", "DATA=a.jsonl", "EVAL=b.jsonl", "ALSO_EVAL=c.jsonl", f"SIZES={tmp_path}"]
    print_arguments = ["make", "-s", "--old-file", ".venv/ready", "RUN=printf '%s\\n'", "sizes", *variables]
    env = {"PATH": os.environ["PATH"]}  # without the variables of a `make test` that this test runs in
    printed = subprocess.run(print_arguments, cwd=ROOT, check=True, capture_output=True, text=True, env=env).stdout
    _, *commands = printed.removesuffix("benchmarks.figures.sizes\n").split("benchmarks.studies\n")
    parsed = [command.parse_args(arguments.splitlines())[:2] for arguments in commands]
    assert [args.studies for args, _ in parsed] == [["gradient-flow"]] * 4
    assert [args.out.name for args, _ in parsed] == ["0.1M", "1M", "10M", "model"]
    assert all(settings.data == Path("a.jsonl") and settings.eval == Path("b.jsonl") for _, settings in parsed)
    (_, *_, (_, of_model)) = parsed
    assert of_model.model == Path("some where/model")
    assert of_model.also_eval == (Path("c.jsonl"),)
    for (args, settings), parameters in zip(parsed, (1e5, 1e6, 1e7)):
        assert args.out.parent == tmp_path
        assert 0.5 * parameters < command.count_parameters(settings) < 2 * parameters
        assert (settings.steps, settings.batch_size) == (of_model.steps, of_model.batch_size)
        assert (settings.train_pairs, settings.eval_pairs) == (of_model.train_pairs, of_model.eval_pairs)


@pytest.mark.parametrize("treatment", [Treatment(), Treatment("dpo", beta=0.1), Treatment(micro_batch=4, sft=1.0)])
def test_an_interrupted_training_continues_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, treatment: Treatment
) -> None:
    optimization, path = Optimization(steps=6, batch_size=8, learning_rate=3e-3, probe_every=2), tmp_path / "x.state"
    model, texts, ref = small_experiment()
    expected = prefer(model, treatment, texts, ref, optimization)
    expected_weights = model.state_dict()

    monkeypatch.setattr("benchmarks.studies.harness.SAVE_SECONDS", -1)
    steps = []

    def interrupt(pairs: int) -> None:
        steps.append(pairs)
        if len(steps) == 4:
            raise KeyboardInterrupt

    model, texts, ref = small_experiment()
    with pytest.raises(KeyboardInterrupt):
        prefer(model, treatment, texts, ref, optimization, state_path=path, advance=interrupt)
    model, texts, ref = small_experiment()
    repeated = list[int]()
    continued = prefer(model, treatment, texts, ref, optimization, state_path=path, advance=repeated.append)
    assert repeated == [24, 8, 8, 8]  # three steps were saved, and three were left
    assert all(torch.equal(a, b) for a, b in zip(continued[:4], expected[:4]))
    assert continued.probes == expected.probes
    torch.testing.assert_close(model.state_dict(), expected_weights, rtol=0, atol=0)


def test_a_training_with_an_estimator_that_remembers_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.studies.harness.SAVE_SECONDS", -1)
    model, texts, ref = small_experiment()
    path, treatment = tmp_path / "x.state", Treatment(micro_batch=4, estimator="ScoreWindow")
    prefer(model, treatment, texts, ref, Optimization(2, 8, 1e-3), state_path=path)
    assert not path.exists()


def test_the_supervised_term_adds_the_negative_log_prob_of_the_chosen_answers() -> None:
    model, texts, ref = small_experiment()
    batch = shuffled_batches(64, 8, 1)[0]
    policy = pair_logps(model, texts, batch)
    preference = torch.nn.functional.softplus(
        -2 * (policy.chosen / policy.chosen_lengths - policy.rejected / policy.rejected_lengths)
    )
    loss = (preference - 0.5 * policy.chosen / policy.chosen_lengths).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm().item()
    trace = prefer(model, Treatment("simpo", sft=0.5), texts, ref, Optimization(1, 8, 1e-3, probe_every=1))
    assert trace.probes[0][3] == pytest.approx(expected, rel=1e-4)


def test_each_loss_gets_the_learning_rate_that_ranks_validation_pairs_best(tmp_path: Path) -> None:
    """The rates of one loss are tried with its first treatment, and its other treatments take the best one."""
    _, settings, _ = command.parse_args(["reasoning", "--scale", "smoke", "--steps", "8"])
    treatments = {
        "first": Treatment("simpo"),
        "second": Treatment("simpo", gamma=1.0),
        "paper": Treatment(),
        "released": Treatment(margin=AdaptiveMargin(formula="released")),
        "with SFT": Treatment("simpo", sft=1.0),
    }
    losses = {"first": "simpo", "paper": "amapo, paper", "released": "amapo, released", "with SFT": "simpo, with SFT"}
    rates = (1e-9, 1e-2)
    with start_workers(1) as workers:
        result = sweep(settings, treatments, 1, workers, tmp_path, "cpu", rates)
    assert [(entry["loss"], entry["learning rate"]) for entry in result.tuning] == [
        (loss, rate) for loss in losses.values() for rate in sorted(rates)
    ]
    for name, loss in (losses | {"second": "simpo"}).items():
        tried = [(entry[TUNED_ACCURACY], -entry["learning rate"]) for entry in result.tuning if entry["loss"] == loss]
        best = max(tried)
        assert result.treatments[name].learning_rate == -best[1]
    assert len({run.metrics["validation"] for run in result.runs if run.treatment == "first"}) == 1
    assert all(entry["chosen log-prob"] < 0 <= entry["validation, change"] for entry in result.tuning)


def test_a_training_of_a_tuning_has_the_validation_metrics_of_the_whole_run(tmp_path: Path) -> None:
    _, settings, _ = command.parse_args(["ranking", "--scale", "smoke", "--learning-rate", "1e-2"])
    treatment = Treatment("dpo")
    jobs = [Job(None, 0), Job(treatment, 0), Job(treatment, 0, only_validate=True)]
    for job in jobs:
        perform_job(settings, job, "cpu", tmp_path)
    _, whole, tuned = (json.loads(result_path(settings, job, "cpu", tmp_path).read_text()) for job in jobs)
    for name in ("validation, own score", "validation, change"):
        assert tuned[name] == whole[name]
    assert tuned["validation, own score"] != tuned["validation, change"]  # else they could be swapped unnoticed


def test_an_interrupted_study_has_trained_all_losses_with_the_first_seeds(tmp_path: Path) -> None:
    _, settings, _ = command.parse_args(["ranking", "--scale", "smoke"])
    started: list[Job] = []

    def submit(function: Any, settings: Any, job: Job, device: str, store: Path) -> Future[None]:
        started.append(job)
        result_path(settings, job, device, store).write_text("{}")
        future: Future[None] = Future()
        future.set_result(None)
        return future

    workers: Any = SimpleNamespace(pool=SimpleNamespace(submit=submit), trained_pairs=SimpleNamespace(value=0))
    sweep(settings, {"a": Treatment("dpo"), "b": Treatment("simpo")}, 2, workers, tmp_path, "cpu")
    trained = [(job.treatment.loss, job.seed) for job in started if job.treatment is not None]
    assert trained == [("dpo", 0), ("simpo", 0), ("dpo", 1), ("simpo", 1)]


def test_a_tuning_is_printed_and_drawn(tmp_path: Path) -> None:
    """The picture shows the course of training with the best rate, or with the smaller one of two that are equal."""
    accuracies = {"dpo": {1e-4: 0.5, 1e-3: 0.7, 1e-2: 0.7}, "simpo": {1e-4: 0.4, 1e-3: 0.3, 1e-2: 0.6}}
    entries = [
        {
            "loss": loss,
            "learning rate": rate,
            "validation": accuracy,
            "validation, change": 1 - accuracy,
            "chosen log-prob": -10 * accuracy,
            BATCH_ACCURACY: [rate * k for k in range(12)],
        }
        for loss, by_rate in accuracies.items()
        for rate, accuracy in by_rate.items()
    ]
    figure = Figure()
    draw_tuning(figure, entries)
    rate_axes, change_axes, logp_axes, step_axes = figure.axes
    lines = zip(rate_axes.lines, change_axes.lines, logp_axes.lines, strict=True)
    for (line, changes, logps), (loss, by_rate), best in zip(lines, accuracies.items(), (1e-3, 1e-2), strict=True):
        assert dict(zip(*line.get_data(), strict=True)) == by_rate
        assert dict(zip(*changes.get_data(), strict=True)) == {rate: 1 - share for rate, share in by_rate.items()}
        assert dict(zip(*logps.get_data(), strict=True)) == {rate: -10 * share for rate, share in by_rate.items()}
        (curve,) = (line for line in step_axes.lines if str(line.get_label()).startswith(f"{loss}, "))
        assert curve.get_label() == f"{loss}, 1e-{3 if loss == 'dpo' else 2}"
        # A sixth of 12 steps is 2, and the mean over the steps k and k + 1 is drawn between them.
        assert curve.get_xdata() == pytest.approx([k + 0.5 for k in range(11)])
        assert curve.get_ydata() == pytest.approx([best * (k + 0.5) for k in range(11)])

    with (ROOT / "benchmarks/results/studies/ranking.json").open() as file:
        record = json.load(file)
    (tmp_path / "ranking.json").write_text(json.dumps(record | {command.TUNING: entries}))
    completed = run_command("ranking", "--redraw", "--out", tmp_path)
    assert completed.returncode == 0, completed.stderr
    rows = [line.split() for line in completed.stdout.splitlines()]
    assert rows.index(["1e-4", "1e-3", "1e-2"]) < rows.index(["dpo", "50.0", "70.0", "70.0"])
    assert ["simpo", "40.0", "30.0", "60.0"] in rows
    assert ["dpo", "50.0", "30.0", "30.0"] in rows
    assert ["simpo", "-4", "-3", "-6"] in rows
    assert (tmp_path / "ranking-rates.png").read_bytes().startswith(b"\x89PNG")


def test_a_key_depends_on_the_code_but_not_on_its_comments() -> None:
    code = 'def f(x: int) -> int:\n    """Doc."""\n    return x  # why\n'
    assert dump_code(code) == dump_code(code.replace("Doc.", "Other.").replace("why", "because"))
    assert dump_code(code) != dump_code(code.replace("return x", "return -x"))


def test_a_learning_rate_gives_the_same_key_wherever_it_is_given() -> None:
    _, settings, _ = command.parse_args(["ranking", "--learning-rate", "1e-3"])
    _, other, _ = command.parse_args(["ranking", "--learning-rate", "1e-4"])
    keys = {
        store_key(settings, Job(Treatment(), 0), "cpu"),
        store_key(other, Job(Treatment(learning_rate=1e-3), 0), "cpu"),
    }
    assert len(keys) == 1
    assert store_key(other, Job(Treatment(), 0), "cpu") not in keys
    assert store_key(settings, Job(Treatment(), 0, only_validate=True), "cpu") not in keys


def test_files_are_sampled_in_their_order_and_further_files_are_evaluated(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{i}", "chosen": "a" * (1 + i % 5), "rejected": "b"}) for i in range(60)]
    path, entries = tmp_path / "pairs.jsonl", tmp_path / "styles.json"
    path.write_text("\n".join(lines))
    entries.write_text(json.dumps([RM_BENCH_ENTRY | {"prompt": str(i)} for i in range(9)]))
    shutil.copy(path, tmp_path / "further.jsonl")
    corpus = file_corpus(path, path, [entries], [path], train_pairs=20, eval_pairs=5, styled_entries=4)
    sizes = (len(corpus.train), len(corpus.validation), len(corpus.held_out), len(corpus.demonstrations))
    assert sizes == (20, 5, 5, 54)
    assert len(corpus.styled["styles"]) == 4
    assert corpus.further == {"pairs": corpus.held_out}
    everything = list(read_pairs(path))
    assert [everything.index(pair) for pair in corpus.held_out] == sorted(everything.index(p) for p in corpus.held_out)
    assert sample(everything, 60) == sample(everything, None) == everything

    files = ("--data", path, "--eval", path, "--also-eval", tmp_path / "further.jsonl")
    arguments = ("perplexity", *files, "--scale", "smoke", "--seeds", 1)
    completed = run_command(*arguments, "--store", tmp_path / "store", "--out", tmp_path)
    assert completed.returncode == 0, completed.stderr
    for run in json.loads((tmp_path / "perplexity.json").read_text())["runs"]:
        figures = run["figures"]
        assert figures["further"]["further"] == {
            "accuracy": figures["held out"],
            "own score": figures["held out, own score"],
            "chosen log-prob": figures["chosen log-prob"],
        }
