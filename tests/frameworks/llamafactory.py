"""Run the recipe for LLaMA-Factory through its `run_exp`."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from tests.frameworks.tiny import PAIRS, Expected, save_model, stub_modules

stub_modules("torchaudio")

from llamafactory.train.dpo.trainer import CustomDPOTrainer  # noqa: E402

OPTIONS = {
    "model_name_or_path": "model",
    "dataset_dir": ".",
    "dataset": "pairs",
    "template": "empty",
    "val_size": 8,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": "true",
}
save_model("model")
Path("pairs.json").write_text(json.dumps(PAIRS))
columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
Path("dataset_info.json").write_text(
    json.dumps({"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}})
)
expected, compute_loss = Expected(), CustomDPOTrainer.compute_loss
trainers: list[Any] = []


def recorded(self: Any, model: Any, inputs: Any, **options: Any) -> Any:
    """Compute the loss, and record what it should be."""
    if model.training:
        trainers[:] = [self]
        expected.add(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    return compute_loss(self, model, inputs, **options)


CustomDPOTrainer.compute_loss = recorded
sys.argv[1:] = ["run.yaml", *(f"{name}={value}" for name, value in OPTIONS.items())]
runpy.run_path("amapo.py", run_name="__main__")
history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
expected.report([entry["loss"] for entry in history if "loss" in entry], trainers[0].loss_fn.statistics)
