"""A tiny Llama, a small dataset of pairs, and an `AMaPOTrainer` for them. Depends on TRL."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from amapo_loss.trl import AMaPOConfig, AMaPOTrainer
from benchmarks.speed.trainer import byte_tokenizer, llama


def tiny_llama(seed: int = 0) -> Any:
    """Return a Llama with random weights and the vocabulary of `byte_tokenizer`."""
    return llama(258, 32, 2, seed)


def pairs(n: int = 24) -> Any:
    """Return a dataset of n additions, each with a right and a wrong response. The responses differ in length."""
    terms = [(i * 37 % 100, i * 73 % 1000) for i in range(n)]
    return Dataset.from_list(
        [
            {"prompt": f"{a} + {b} = ", "chosen": f"{a + b}", "rejected": f"{a + b + 1}{' or so' * (a % 3)}"}
            for a, b in terms
        ]
    )


def pairs_with_columns(n: int = 24) -> Any:
    """Return `pairs` with a margin and a weight for each, some of which are 0."""
    dataset = pairs(n).add_column("gap", [i % 5 / 4 for i in range(n)])
    return dataset.add_column("importance", [i % 4 for i in range(n)])


def make_trainer(
    folder: Path,
    model: Any = None,
    config_class: type[Any] = AMaPOConfig,
    **options: Any,
) -> Any:
    """Return a trainer for `pairs` that is ready to train.

    Args:
        folder: where the trainer writes its checkpoints.
        model: the model to train. None takes `tiny_llama`.
        config_class: the class of the trainer's `args`.
        options: arguments of `AMaPOTrainer` (such as `eval_dataset` and `ref_model`) and options of `config_class`.

    """
    trainer_arguments = {
        name: options.pop(name)
        for name in ("peft_config", "train_dataset", "eval_dataset", "ref_model")
        if name in options
    }
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
    }
    return AMaPOTrainer(
        model or tiny_llama(),
        args=config_class(str(folder), **defaults | options),
        processing_class=byte_tokenizer(),
        **{"train_dataset": pairs()} | trainer_arguments,
    )
