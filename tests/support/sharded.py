"""Train with a model that is sharded over the processes, on CPUs: `accelerate launch --module tests.support.sharded`.

Depends on TRL and PEFT, and on DeepSpeed if accelerate is configured to use it.
"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from tests.support.trl import make_trainer, pairs, tiny_llama

CASES = ("full", "full, reference", "LoRA", "LoRA, reference")
RESUMED = ("full", "LoRA, reference")


def train(folder: Path, case: str) -> dict[str, Any]:
    """Train for three steps with a checkpoint after the second, evaluate, and return what `_result` returns.

    The steps and their micro-batches have the same pairs with any number of processes.
    """
    trainer = _trainer(folder, case, seed=0)
    trainer.train()
    trainer.evaluate()
    return _result(trainer, folder / "trained")


def resume(folder: Path, case: str) -> dict[str, Any]:
    """Train other weights for one step, from the checkpoint of `train`, and return what `_result` returns."""
    trainer = _trainer(folder, case, seed=9)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return _result(trainer, folder / "resumed")


def _result(trainer: Any, folder: Path) -> dict[str, Any]:
    """Return the weights that `save_model` writes, the logs, the window, and the share of AdamW's first moment here."""
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    (path,) = folder.glob("*.safetensors")  # those of the adapter, with LoRA
    weights = load_file(path)
    share = _moments_held(trainer) / sum(weight.numel() for weight in weights.values())
    return {
        "weights": weights,
        "logs": trainer.state.log_history,
        "window": trainer.window.state_dict(),
        "share of moments": share,
    }


def _trainer(folder: Path, case: str, seed: int) -> Any:
    """Return a trainer. Its weights depend on the seed, except those of the frozen model under LoRA."""
    AcceleratorState._reset_state()  # accelerate takes a configuration of DeepSpeed only once
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options: dict[str, Any] = {"learning_rate": 1e-3}
    model = tiny_llama(0 if "LoRA" in case else seed)
    torch.manual_seed(seed)
    if "LoRA" in case:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        options = {"learning_rate": 1e-2, "peft_config": config}
    if "reference" in case:
        options["reference_free"] = False
        if "LoRA" not in case:
            options["ref_model"] = tiny_llama(7)
    if processes > 1:
        # With `use_cpu`, accelerate would leave DeepSpeed out.
        options |= {"ddp_backend": "gloo", "use_cpu": not _uses_deepspeed()}
    return make_trainer(
        folder,
        model,
        max_steps=3,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2,
        statistics_window=12,
        eval_dataset=pairs(7),  # with two processes, accelerate repeats a pair
        per_device_eval_batch_size=4 // processes,
        save_strategy="steps",
        save_steps=2,
        # With the default of 1e-8, AdamW moves a weight whose gradient is rounding noise by the whole learning rate.
        adam_epsilon=1e-3,
        **options,
    )


def _moments_held(trainer: Any) -> int:
    """Return the number of entries of AdamW's first moment that are stored in this process."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate and DeepSpeed wrap it
        optimizer = optimizer.optimizer
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    return sum(getattr(moment, "_local_tensor", moment).numel() for moment in moments)


def _uses_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


class _StateThatShardsOnCPUs(AcceleratorState):  # type: ignore[misc]
    """accelerate's state, which otherwise ignores a configuration of FSDP in processes that compute on CPUs."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if options.get("fsdp_plugin") is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(*arguments, **options)


def main() -> None:
    """Run all cases, and save the results of this process in the folder that the command line names."""
    torch.set_num_threads(1)
    if _uses_deepspeed():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # DeepSpeed would compile it for minutes
    folder = Path(sys.argv[1])
    with patch("accelerate.accelerator.AcceleratorState", _StateThatShardsOnCPUs):
        results = {case: train(folder / case, case) for case in CASES}
        results |= {f"{case}, resumed": resume(folder / case, case) for case in RESUMED}
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
