"""Run the recipe for axolotl through its `do_cli`."""

import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

OPTIONS = """
base_model: model
datasets: [{path: train.jsonl, ds_type: json, split: train, type: passthrough}]
test_datasets: [{path: eval.jsonl, ds_type: json, split: train, type: passthrough}]
output_dir: out
sequence_len: 64
micro_batch_size: 4
gradient_accumulation_steps: 2
num_epochs: 1
learning_rate: 0.001
optimizer: adamw_torch
lr_scheduler: cosine
logging_steps: 1
eval_steps: 2
save_strategy: "no"
bf16: false
"""


def main() -> None:
    """Train. It is a function, because the processes that `datasets` starts import this file and must not train."""
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1"}
    # Names are imported from these packages, so that empty modules are not enough.
    for name in ("numba", "bitsandbytes", "bitsandbytes.functional", "bitsandbytes.nn", "wandb"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
    sys.modules["numba"].njit = lambda function: function  # type: ignore[attr-defined]

    from axolotl.cli.train import do_cli
    from trl import DPOTrainer

    from tests.frameworks.tiny import EVAL, TRAIN, Expected, save_model

    Path("train.jsonl").write_text("\n".join(map(json.dumps, TRAIN)))
    Path("eval.jsonl").write_text("\n".join(map(json.dumps, EVAL)))
    save_model("model")
    expected, compute_loss = Expected(), DPOTrainer.compute_loss
    trainers: list[Any] = []

    def recorded(self: Any, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        if model.training:
            trainers[:] = [self]
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            expected.add(model, inputs["input_ids"], inputs["attention_mask"], labels)
        return compute_loss(self, model, inputs, *arguments, **options)

    DPOTrainer.compute_loss = recorded
    with open("run.yaml", "a") as file:
        file.write(OPTIONS)
    do_cli("run.yaml")
    losses = [entry["loss"] for entry in trainers[0].state.log_history if "loss" in entry]
    expected.report(losses, trainers[0].window)


if __name__ == "__main__":
    main()
