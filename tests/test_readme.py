"""The README's Python runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_finds_them() -> None:
    assert len(EXAMPLES) == README.count("```python") >= 4


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example: str) -> None:
    exec(example, {})


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
