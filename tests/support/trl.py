"""A tiny Llama, pairs and a trainer for the tests that run TRL. Importing it needs TRL."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from datasets import Dataset

from amapo_loss.trl import AMaPOConfig, AMaPOTrainer
from benchmarks.speed.trainer import byte_tokenizer, llama

PAIRS = 24


def tiny_llama(seed: int = 0) -> Any:
    return llama(258, 32, 2, seed)


def pairs(n: int = PAIRS) -> Any:
    """Sums, right and wrong, of several lengths."""
    rows = [(i * 37 % 100, i * 73 % 1000) for i in range(n)]
    return Dataset.from_list(
        [
            {"prompt": f"{a} + {b} = ", "chosen": f"{a + b}", "rejected": f"{a + b + 1}{' or so' * (a % 3)}"}
            for a, b in rows
        ]
    )


def trainer(folder: Path, model: Any = None, config: type[Any] = AMaPOConfig, **options: Any) -> Any:
    others = {name: options.pop(name) for name in ("peft_config", "eval_dataset", "ref_model") if name in options}
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "bf16": False, "learning_rate": 1e-3, "disable_tqdm": True, "save_strategy": "no", "seed": 3,
    }  # fmt: skip
    args = config(str(folder), **defaults | options)
    return AMaPOTrainer(
        model or tiny_llama(), args=args, train_dataset=pairs(), processing_class=byte_tokenizer(), **others
    )
