"""The Python examples of README.md and docs/ run as they stand there, and their relative links lead somewhere."""

import ast
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.tensor import DTensor

from benchmarks import tables
from tests.frameworks.test_frameworks import FRAMEWORKS
from tests.support.ranks import on_ranks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Example(NamedTuple):
    page: str
    number: int
    code: str


AFTER = "# after the example above"  # the first line of an example that needs the names of the one before it

# tests/frameworks runs the recipes for the frameworks.
EXAMPLES = [
    Example(page.name, number, code)
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
    if not re.search(rf"^from ({'|'.join(FRAMEWORKS)})\b", code, flags=re.MULTILINE)
]
ON_RANKS = [example for example in EXAMPLES if re.search("init_device_mesh|DistributedDataParallel", example.code)]


def example_containing(text: str, page: str) -> str:
    (code,) = (example.code for example in EXAMPLES if example.page == page and text in example.code)
    return code


def test_all_examples_are_found() -> None:
    assert len(EXAMPLES) + len(FRAMEWORKS) == sum(page.read_text().count("```python") for page in PAGES) >= 17


def names_of_the_reader(folder: Path) -> dict[str, Any]:
    """Return what the examples take as the reader's own: a tiny model, a tokenizer, and a little data."""
    from benchmarks.speed.trainer import byte_tokenizer
    from tests.support.trl import pairs, tiny_llama

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, 258, (4, 9), generator=torch.Generator().manual_seed(rows[0]))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    return {
        "model": tiny_llama(),
        "tokenizer": byte_tokenizer(),
        "dataset": pairs(4),
        "pairs": list(range(4)),
        "collate": collate,
        "loader": torch.utils.data.DataLoader(list(range(2)), batch_size=1, collate_fn=collate),
        "held_out_loader": torch.utils.data.DataLoader(list(range(2)), batch_size=1, collate_fn=collate),
        "FOLDER": str(folder),
    }


# Replacements that keep an example that trains short, on the CPU, and inside the test's folder.
REPLACEMENTS = {
    '    "out",\n    beta=2.5': '    FOLDER, beta=2.5, use_cpu=True, bf16=False, max_steps=1, report_to="none"',
    '"Qwen/Qwen3-0.6B",': "model, processing_class=tokenizer,",
    'load_dataset("trl-lib/ultrafeedback_binarized", split="train")': "dataset",
    'TrainingArguments("out"': 'TrainingArguments(FOLDER, use_cpu=True, max_steps=2, logging_steps=1, report_to="none"',
    "Trainer(max_epochs=1,": 'Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,',
    "accumulation_steps = 16\n": "accumulation_steps = 2\n",
    "accumulation_steps, window, totals = 16,": "accumulation_steps, window, totals = 2,",
    "Accelerator(gradient_accumulation_steps=16)": "Accelerator(gradient_accumulation_steps=2, cpu=True)",
    "Fabric()": 'Fabric(accelerator="cpu", devices=1)',
}


def run_on_a_rank(rank: int, group: Any, code: str, folder: Path) -> list[torch.Tensor]:
    """Run an example for several ranks, and return the gradients of its hidden states and its weight."""
    names = names_of_the_reader(folder) if "model" in code else {}
    if "policy" in code:  # the ranks have different batches
        names["loader"] = [names["collate"]([rank])]
    exec(code, names)
    if "policy" in names:
        names["chosen_logps"].sum().backward()
        gradient = names["model"].lm_head.weight.grad
        return [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient]
    return [names["hidden"].grad, names["weight"].grad.full_tensor()]


@pytest.mark.parametrize("example", ON_RANKS, ids=lambda example: f"{example.page}-{example.number}")
def test_the_example_runs_on_two_ranks(example: Example, tmp_path: Path) -> None:
    of_first, of_second = on_ranks(2, run_on_a_rank, example.code, tmp_path)
    for gradient, other in zip(of_first, of_second):
        assert torch.equal(gradient, other)
        assert gradient.any()


def test_the_head_under_ddp_and_fsdp2_has_the_mean_gradient_of_the_ranks(tmp_path: Path) -> None:
    code = example_containing("class LogProbs", "logps.md")
    under_ddp, _ = on_ranks(2, run_on_a_rank, code, tmp_path)
    sharded = "from torch.distributed.fsdp import fully_shard\n" + code.replace(
        "DistributedDataParallel(", "fully_shard("
    )
    under_fsdp2, _ = on_ranks(2, run_on_a_rank, sharded, tmp_path)
    names = names_of_the_reader(tmp_path)
    for rank in range(2):
        names["loader"] = [names["collate"]([rank])]
        exec(code.replace("DistributedDataParallel(", "("), names)
        names["chosen_logps"].sum().backward()
    expected = names["model"].lm_head.weight.grad / 2
    torch.testing.assert_close(under_ddp[0], expected)
    torch.testing.assert_close(under_fsdp2[0], expected)


@pytest.mark.parametrize(
    "example",
    [example for example in EXAMPLES if example not in ON_RANKS],
    ids=lambda example: f"{example.page}-{example.number}",
)
def test_the_example_runs(example: Example, tmp_path: Path) -> None:
    code = example.code
    assert code.count("\n") <= 28, "an example fits on one screen"
    if code.startswith(AFTER):
        previous = EXAMPLES[EXAMPLES.index(example) - 1]
        assert previous.page == example.page
        code = previous.code + code
    for original, replacement in REPLACEMENTS.items():
        code = code.replace(original, replacement)
    names_used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    if not {"model", "tokenizer"} & names_used:
        exec(code, {})
        return
    for module in ("trl", "transformers", "lightning", "accelerate"):
        pytest.importorskip(module)
    names = names_of_the_reader(tmp_path)
    before = names["model"].lm_head.weight.clone()
    names["model"].eval()  # as `from_pretrained` returns it
    modes = set()
    names["model"].register_forward_pre_hook(lambda model, _: modes.add((torch.is_grad_enabled(), model.training)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks warn about their own next versions
        exec(code, names)
    model = getattr(names["model"], "module", names["model"])  # Fabric wraps the model
    trains = re.search(r"optimizer\.step\(\)|\.fit\(|\)\.train\(\)|trainer\.train\(\)", code) is not None
    # An adapter leaves the weights as they are. Its second matrix is 0 before training.
    adapter_is_trained = any(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)
    assert (adapter_is_trained or not torch.equal(model.lm_head.weight, before)) is trains
    assert trains or re.search("^(def collate|class .*Trainer)", code, flags=re.MULTILINE)
    assert modes <= {(True, True), (False, False)}, "it trains in training mode and evaluates in evaluation mode"


def test_the_first_example_prints_the_margins_in_its_comment(capsys: pytest.CaptureFixture[str]) -> None:
    first = EXAMPLES[0].code
    exec(first, {})
    (expected,) = re.findall(r"print\(diagnostics.margins\)  # (tensor\(.*?\)):", first)
    assert capsys.readouterr().out.startswith(expected)


def test_the_collator_of_the_recipe_masks_prompts_and_padding_and_has_the_chosen_responses_first(
    tmp_path: Path,
) -> None:
    pytest.importorskip("trl")
    names = names_of_the_reader(tmp_path)
    exec(example_containing("def collate(rows", "recipes.md"), names)
    rows, tokenizer = list(names["dataset"]), names["tokenizer"]
    batch = names["collate"](rows)
    expected = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    texts = [row["prompt"] + response for row, response in zip(rows * 2, expected)]
    for ids, mask, labels, text, response in zip(*batch.values(), texts, expected):
        assert tokenizer.decode(ids[mask.bool()]) == text + tokenizer.eos_token
        assert tokenizer.decode(labels[labels != -100]) == response + tokenizer.eos_token
        assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert next(iter(names["loader"])).keys() == batch.keys()


def test_the_trainer_recipe_logs_evaluation_under_names_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = example_containing("class PreferenceTrainer", "recipes.md")
    code += example_containing("PreferenceTrainer(model", "recipes.md")
    for original, replacement in REPLACEMENTS.items():
        code = code.replace(original, replacement)
    code = code.replace("PreferenceTrainer(model", "trainer = PreferenceTrainer(model").replace(").train()", ")")
    names = names_of_the_reader(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
        trainer = names["trainer"]
        accumulated = trainer.totals["train"] = names["Totals"].none()  # of the pairs of training since the last log
        first = trainer.evaluate(list(range(3)))
        trainer.predict(list(range(7, 9)))
        assert {name: value for name, value in trainer.evaluate(list(range(3))).items() if "/" in name} == {
            name: value for name, value in first.items() if "/" in name
        }
        named = trainer.evaluate({"a": list(range(3)), "b": list(range(2))})
        assert trainer.totals["train"] is accumulated
        trainer.train()
    assert {"eval_a_rewards/accuracies", "eval_b_rewards/accuracies"} <= named.keys()
    assert all(name.startswith("eval_") for name in first if "/" in name)
    *_, trained, _ = trainer.state.log_history  # the last entry is that of the whole training
    assert "rewards/accuracies" in trained
    assert not any(name.startswith("eval_") for name in trained)


def test_the_micro_batches_of_the_exact_example_add_up_to_the_whole_batch() -> None:
    names: dict[str, Any] = {}
    exec(example_containing("micro_batches", "statistics.md"), names)
    accumulated, weights = names["weights"].grad, names["weights"].detach().requires_grad_()
    whole = names["amapo_loss"](names["features"] @ weights, torch.zeros(128), beta=names["beta"])
    whole.loss.backward()
    torch.testing.assert_close(accumulated, weights.grad, rtol=1e-4, atol=1e-6)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    relative = [link for link in links if not link.startswith(("http://", "https://"))]
    for link in relative:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert target.is_relative_to(ROOT), f"{page.name} links out of the repository: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = PAGES[0].read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme


def test_tables_are_those_of_the_committed_results() -> None:
    """`make tables` writes them, so no number in them can be out of date or mistyped."""
    used = set()
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.with_tables(text) == text, f"run `make tables`: {page.name} differs from the committed results"
        used |= {name for _, name, _ in tables.MARKED.findall(text)}
    assert used == set(tables.TABLES)


def test_the_accuracy_by_author_counts_pairs_and_not_sources() -> None:
    accuracies = {"ground_truth against a": 0.5, "ground_truth against b": 1.0, "a against b": 0.25}
    num_pairs = {"ground_truth against a": 6, "ground_truth against b": 2, "a against b": 4}
    assert tables.accuracy_by_author(accuracies, num_pairs) == {"human": 5 / 8, "model": 0.25}
    assert tables.accuracy_by_author(accuracies, {"a against b": 4}) == {"model": 0.25}
