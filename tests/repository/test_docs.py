"""The README's Python runs as it stands there."""

import ast
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amapo_loss import amapo_loss

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_finds_them() -> None:
    assert len(EXAMPLES) == README.count("```python") >= 4


def given(folder: Path) -> dict[str, Any]:
    """What examples take as the reader's own; for Hugging Face's and Lightning's, as little of it as there can be."""
    from benchmarks.speed.trainer import byte_tokenizer
    from tests.support.trl import pairs, tiny_llama

    def batch(first: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, 258, (4, 9), generator=torch.Generator().manual_seed(first))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return batch(rows[0])

    return {
        "model": tiny_llama(), "tokenizer": byte_tokenizer(), "dataset": pairs(4), "pairs": list(range(4)),
        "collate": collate, "loader": torch.utils.data.DataLoader(list(range(2)), batch_size=1, collate_fn=collate),
    }  # fmt: skip


# Of an example that trains, what keeps it short, and on the CPU.
SHORTER = {
    'AMaPOConfig("out"': 'AMaPOConfig(FOLDER, use_cpu=True, bf16=False, max_steps=1, report_to="none"',
    'TrainingArguments("out"': 'TrainingArguments(FOLDER, use_cpu=True, max_steps=2, logging_steps=1, report_to="none"',
    "Trainer(max_epochs=1)": 'Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)',
    "Fabric()": 'Fabric(accelerator="cpu", devices=1)',
}


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example: str, tmp_path: Path) -> None:
    assert example.count("\n") <= 25
    if "model" not in {node.id for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Name)}:
        exec(example, {})
        return
    for module in ("trl", "transformers", "lightning"):
        pytest.importorskip(module)
    for long, short in SHORTER.items():
        example = example.replace(long, short)
    names = given(tmp_path) | {"FOLDER": str(tmp_path)}
    before = names["model"].lm_head.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of theirs there are many
        exec(example, names)
    model = getattr(names["model"], "module", names["model"])  # as Fabric wraps it
    assert not torch.equal(model.lm_head.weight, before), "it trains"


def test_takes_the_place_of_torchtunes_later_losses() -> None:
    (example,) = (text for text in EXAMPLES if "reference.chosen_logps" in text)
    names: dict[str, Any] = {}
    exec(example, names)
    policy, reference = (
        SimpleNamespace(
            chosen_logps=torch.randn(4), rejected_logps=torch.randn(4), chosen_logits=None, rejected_logits=None
        )
        for _ in range(2)
    )
    losses, chosen_rewards, rejected_rewards = names["Loss"](beta=0.1)(policy, reference)
    expected = amapo_loss(
        policy.chosen_logps, policy.rejected_logps, reference.chosen_logps, reference.rejected_logps, beta=0.1
    )
    assert torch.equal(losses.mean(), expected.loss)
    assert torch.equal(chosen_rewards > rejected_rewards, expected.diagnostics.scores > 0)


def test_the_first_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    exec(EXAMPLES[0], {})
    (said,) = re.findall(r"print\(diagnostics.margins\)  # (tensor\(.*?\)):", EXAMPLES[0])
    assert capsys.readouterr().out.startswith(said)


def test_the_micro_batches_of_the_example_add_up() -> None:
    (example,) = (text for text in EXAMPLES if "micro_batches" in text)
    names: dict[str, Any] = {}
    exec(example, names)
    got, weights = names["weights"].grad, names["weights"].detach().requires_grad_()
    whole = names["amapo_loss"](names["features"] @ weights, torch.zeros(128), beta=names["beta"])
    whole.loss.backward()
    torch.testing.assert_close(got, weights.grad, rtol=1e-4, atol=1e-6)
