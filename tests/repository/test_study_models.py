"""Tests of the models of benchmarks/studies: a Hugging Face model with frozen blocks, and generated arithmetic.

Depends on torch, and on transformers for the Hugging Face models.
"""

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.studies.__main__ import count_parameters, parse_args
from benchmarks.studies.arithmetic import (
    MAX_PROMPT,
    MAX_SOLUTION,
    TRIES,
    arithmetic_problems,
    generate,
    is_right,
    own_mistakes,
    own_pairs,
    share_solved,
    solve,
    text_before_end,
)
from benchmarks.studies.data import Pair, both_answers, generated_corpus
from benchmarks.studies.harness import Treatment, all_logps, pair_logps
from benchmarks.studies.jobs import path_digest, with_mistakes
from benchmarks.studies.models import (
    END,
    ByteLM,
    HuggingFaceLM,
    Texts,
    check_fit,
    frozen_activations,
    hugging_face_tokenizer,
    length_batches,
    tensors,
)
from tests.support.studies import run_command


def tiny_hugging_face_model(directory: Path, positions: int = 64, vocabulary: int = 300, **options: object) -> Path:
    """Write a Llama of three blocks with random weights, and a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers")
    from benchmarks.speed.trainer import byte_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=positions, **sizes, **options)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_all_parameters_of_a_hugging_face_model_are_counted(tmp_path: Path) -> None:
    """Frozen ones count, and an output embedding that is the input embedding counts once."""
    directory = tiny_hugging_face_model(tmp_path, tie_word_embeddings=True)
    files = ["--data", "a", "--eval", "b"]
    settings = parse_args(["ranking", "--model", str(directory), "--learning-rate", "1e-3", *files])[1]
    model = HuggingFaceLM(directory)
    assert settings.trained_blocks == 2
    assert count_parameters(settings) == sum(parameter.numel() for parameter in model.parameters())


def hugging_face_texts(directory: Path, pairs: int = 12) -> Texts:
    corpus = generated_corpus(64, held_out=8, demonstrations=8, seed=0)
    answers = [(prompt, answer * (1 + i % 3)) for i, (prompt, answer) in enumerate(both_answers(corpus.train[:pairs]))]
    return tensors(answers, 32, 24, hugging_face_tokenizer(directory))[0]


@pytest.mark.parametrize("trained_blocks", [1, 2, 3])
def test_activations_of_frozen_blocks_give_the_log_probs_of_the_whole_model(
    tmp_path: Path, trained_blocks: int
) -> None:
    """They are computed in several batches here, the first of them before an interruption."""
    model = tiny_hugging_face_model(tmp_path / "model", pad_token_id=0)
    texts = hugging_face_texts(model)
    whole = HuggingFaceLM(model)
    expected, lengths = all_logps(whole, texts)
    logits = whole.body(input_ids=texts.tokens).last_hidden_state @ whole.head.weight.T
    reference = logits.log_softmax(-1)[:, :-1].gather(2, texts.tokens[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(expected, (reference * (texts.labels[:, 1:] >= 0)).sum(1), check_dtype=False)

    path, advanced = tmp_path / "x.activations", list[int]()

    class InterruptionError(Exception):
        pass

    def interrupt(count: int) -> None:
        advanced.append(count)
        if len(advanced) == 2:
            raise InterruptionError

    arguments = (model, trained_blocks, texts, path, torch.float32, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceLM, "forward_tokens", 256)
        with pytest.raises(InterruptionError):
            frozen_activations(*arguments, interrupt)
        activations = frozen_activations(*arguments, advanced.append)
    assert advanced[0] == 0
    assert advanced[1] == advanced[2] > 0  # what was computed before the interruption is not computed again
    assert sum(advanced[2:]) == len(texts.tokens)
    assert len(advanced) > 4

    frozen = HuggingFaceLM(model, trained_blocks)
    torch.testing.assert_close(all_logps(frozen, texts._replace(activations=activations)), (expected, lengths))
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in trained} == {str(block) for block in range(trained_blocks)}
    assert all(name.startswith("body.layers.") for name in trained)


def test_micro_batches_have_the_log_probs_and_the_gradient_of_one_batch(tmp_path: Path) -> None:
    """A frozen model keeps its activations, and a trained one computes them again in the backward pass."""
    directory = tiny_hugging_face_model(tmp_path)
    texts = hugging_face_texts(directory)
    results = []
    for max_tokens, recompute in ((None, False), (100, False), (100, True)):
        model = HuggingFaceLM(directory)
        assert model.recompute  # all weights are trained
        model.forward_tokens, model.recompute = max_tokens, recompute
        policy = pair_logps(model, texts, torch.tensor([3, 0, 7, 5]))
        amapo = Treatment().objective(4)(policy, policy)
        amapo.loss.mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append((policy.chosen.detach(), policy.rejected.detach(), amapo.diagnostics.statistics, gradients))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_a_hugging_face_model_is_the_checkpoint_and_must_fit_the_texts(tmp_path: Path) -> None:
    """The model needs a context that is long enough and a vocabulary that holds the tokenizer's ids."""
    tiny_hugging_face_model(tmp_path / "fits")
    scale = ("--scale", "smoke", "--learning-rate", "1e-3", "--seeds", 1, "--trained-blocks", 2)
    folders = ("--store", tmp_path / "store", "--out", tmp_path)
    completed = run_command("perplexity", "--model", tmp_path / "fits", *scale, *folders)
    assert completed.returncode == 0, completed.stderr
    record = json.loads((tmp_path / "perplexity.json").read_text())
    assert record["settings"]["model"] == str(tmp_path / "fits")
    assert record["settings"]["trained_blocks"] == 2
    assert record["settings"]["imitation_steps"] == 0
    for name, message, options in (
        ("short context", "the model accepts at most 20 tokens, but the longest text has", {"positions": 20}),
        ("small vocabulary", "the model has a vocabulary of 100", {"vocabulary": 100}),
    ):
        with pytest.raises(ValueError, match=message):
            check_fit(tiny_hugging_face_model(tmp_path / name, **options), [hugging_face_texts(tmp_path / "fits")])


def test_the_digest_of_a_model_covers_all_its_files(tmp_path: Path) -> None:
    """Some directories have folders of their own, which need not be read as files."""
    digests = set()
    for content in ("a", "b"):
        directory = tmp_path / content
        (directory / "folder").mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        (directory / "folder" / "weights").write_text(content)
        digests.add(path_digest(directory))
    assert len(digests) == 2


@pytest.mark.parametrize("trained_blocks", [1, 2])
def test_frozen_blocks_keep_the_kind_of_attention_of_each_block(tmp_path: Path, trained_blocks: int) -> None:
    """Its blocks alternate between a sliding window of four tokens and full attention."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=300, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, layer_types=kinds, **sizes
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    model = tiny_hugging_face_model(tmp_path / "tokenizer")
    texts = hugging_face_texts(model)
    expected = all_logps(HuggingFaceLM(tmp_path), texts)
    activations = frozen_activations(tmp_path, trained_blocks, texts, tmp_path / "x", torch.float32, "cpu")
    torch.testing.assert_close(
        all_logps(HuggingFaceLM(tmp_path, trained_blocks), texts._replace(activations=activations)), expected
    )


def test_a_model_that_scales_its_logits_is_rejected(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GraniteConfig(vocab_size=300, logits_scaling=8.0, num_key_value_heads=2, **sizes)
    transformers.GraniteForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="need a model whose logits are its head's output"):
        HuggingFaceLM(tmp_path)


def test_more_trained_blocks_than_the_model_has_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--trained-blocks is 4, but the model has 3 blocks"):
        HuggingFaceLM(tiny_hugging_face_model(tmp_path), trained_blocks=4)


def test_a_model_without_a_list_of_blocks_can_only_be_trained_as_a_whole(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    HuggingFaceLM(tmp_path)
    with pytest.raises(ValueError, match="needs a model whose blocks are in a list called layers, and GPT2Model has"):
        HuggingFaceLM(tmp_path, trained_blocks=1)


def test_a_full_disk_is_reported_before_activations_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = tiny_hugging_face_model(tmp_path / "model")
    monkeypatch.setattr("os.posix_fallocate", fail)
    path = tmp_path / "x.activations"
    with pytest.raises(OSError, match=r"x\.activations cannot be written: No space left on device"):
        frozen_activations(model, 1, hugging_face_texts(model), path, torch.float32, "cpu")
    assert not path.exists()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_length_batches_hold_every_text_once_and_few_tokens(lengths: list[int], max_tokens: int) -> None:
    batches = length_batches(torch.tensor(lengths), max_tokens)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch.tolist())
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
    assert [batch.tolist() for batch in length_batches(torch.tensor(lengths), None)] == [list(range(len(lengths)))]


@given(st.integers(100, 999), st.integers(100, 999))
def test_solutions_are_right_in_every_step(a: int, b: int) -> None:
    prompt = f"{a}+{b}="
    *steps, result = solve(prompt).split(";")
    assert int(result) == a + b
    for step in steps:
        terms, total = step.split("=")
        assert sum(map(int, terms.split("+"))) == int(total)
    assert is_right(prompt, solve(prompt))
    assert is_right(prompt, result)
    assert not is_right(prompt, solve(prompt) + "0")
    assert not is_right(prompt, "")
    assert len(prompt) <= MAX_PROMPT
    assert len(solve(prompt)) < MAX_SOLUTION  # one token is for the end


def test_groups_of_problems_do_not_overlap() -> None:
    groups = arithmetic_problems({"train": 300, "held out": 200})
    assert [len(set(prompts)) for prompts in groups.values()] == [300, 200]
    assert not {*groups["train"]} & {*groups["held out"]}
    assert groups == arithmetic_problems({"train": 300, "held out": 200})


def test_generation_takes_the_most_probable_tokens_and_mistakes_are_wrong() -> None:
    torch.manual_seed(0)
    model = ByteLM(16, 1, 1 + MAX_PROMPT + MAX_SOLUTION)
    prompts = ["123+456=", "999+111="]
    tokens = torch.tensor([[END, *prompt.encode()] for prompt in prompts])
    with torch.no_grad():
        for _ in range(MAX_SOLUTION):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert generate(model, prompts) == [text_before_end(row) for row in tokens[:, 1 + MAX_PROMPT - 0 :].tolist()]
    assert share_solved(model, prompts) == 0
    mistakes = own_mistakes(model, prompts, seed=1)
    assert list(mistakes) == prompts
    assert mistakes == own_mistakes(model, prompts, seed=1) != own_mistakes(model, prompts, seed=2)
    with pytest.raises(ValueError, match="makes no mistakes in the train problems"):
        with_mistakes(parse_args(["reasoning"])[1], None, {"train": {}})
    assert own_pairs(mistakes)[0] == Pair(prompts[0], solve(prompts[0]), mistakes[prompts[0]])


def test_solutions_are_sampled_until_one_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first problem is solved wrongly at once, the second at the third try, and the third never."""
    prompts = ["123+456=", "999+111=", "100+100="]
    asked = []

    def generate_in_order(model: object, remaining: list[str], generator: object) -> list[str]:
        asked.append(list(remaining))
        is_wrong = {prompts[0]: True, prompts[1]: len(asked) == 3, prompts[2]: False}
        return [f"wrong {prompt}" if is_wrong[prompt] else solve(prompt) for prompt in remaining]

    monkeypatch.setattr("benchmarks.studies.arithmetic.generate", generate_in_order)
    mistakes = own_mistakes(ByteLM(16, 1, 1 + MAX_PROMPT + MAX_SOLUTION), prompts, seed=0)
    assert mistakes == {prompt: f"wrong {prompt}" for prompt in prompts[:2]}
    assert asked == [prompts, prompts[1:], prompts[1:], *[prompts[2:]] * (TRIES - 3)]
