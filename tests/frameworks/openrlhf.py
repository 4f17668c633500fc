"""Run the recipe for OpenRLHF through its `train_dpo` and DeepSpeed, which needs a few changes to run on a CPU."""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from tests.frameworks.tiny import BETA, EVAL, TRAIN, Expected, save_model, stub_modules

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
stub_modules(
    *("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"),
    **dict.fromkeys(("index_first_axis", "pad_input", "rearrange", "unpad_input", "all_gather")),
)

import deepspeed  # noqa: E402
import torch  # noqa: E402
from openrlhf.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from openrlhf.utils.deepspeed import deepspeed as strategy  # noqa: E402

OPTIONS = f"""
    --model.model_name_or_path model --model.beta {BETA} --ds.attn_implementation eager --adam.lr 1e-3
    --data.dataset train.jsonl --data.prompt_key prompt --train.micro_batch_size 4 --train.batch_size 8
    --eval.dataset eval.jsonl --eval.split train --eval.steps 2 --ckpt.output_dir out
"""
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # DeepSpeed would compile it for minutes
torch.cuda.current_device, torch.cuda.set_device = lambda: "cpu", lambda _: None  # type: ignore[assignment,return-value]
torch.cuda.synchronize = lambda: None  # type: ignore[assignment,misc]
make_mesh, make_config = strategy.init_device_mesh, strategy.get_train_ds_config


def config_with_torch_adam(*arguments: Any, optim_config: Any = None, **options: Any) -> Any:
    """Return the configuration for DeepSpeed, with an optimizer that need not be compiled."""
    if optim_config is not None:
        optim_config["params"]["torch_adam"] = True
    return make_config(*arguments, optim_config=optim_config, **options)


strategy.init_device_mesh = lambda _, *arguments, **options: make_mesh("cpu", *arguments, **options)
strategy.get_train_ds_config = config_with_torch_adam
save_model("model")
Path("train.jsonl").write_text("\n".join(map(json.dumps, TRAIN)))
Path("eval.jsonl").write_text("\n".join(map(json.dumps, EVAL)))
expected = Expected()
losses: list[float] = []
trainers: list[Any] = []
forward, save_logs = DPOTrainer.concatenated_forward, DPOTrainer.save_logs_and_checkpoints


def recorded(self: Any, model: Any, *batch: Any) -> Any:
    """Compute the log-probs, and record what the loss should be."""
    if model is self.model and model.training:
        trainers[:] = [self]
        input_ids, mask, prompt_lengths = self.concatenated_inputs(*batch)
        is_prompt = torch.arange(input_ids.shape[1]) < torch.tensor(prompt_lengths)[:, None]
        labels = input_ids.masked_fill(is_prompt | (mask == 0), -100)
        expected.add(model.model.module, input_ids, mask, labels)
    return forward(self, model, *batch)


def logged(self: Any, args: Any, step: int, bar: Any, logs: Any, states: Any) -> None:
    """Log, and record the loss of the optimizer step."""
    losses.append(logs["loss_mean"])
    save_logs(self, args, step, bar, logs, states)


DPOTrainer.concatenated_forward, DPOTrainer.save_logs_and_checkpoints = recorded, logged
sys.argv[1:] = OPTIONS.split()
runpy.run_path("amapo.py", run_name="__main__")
expected.report(losses, trainers[0].loss_fn.statistics)
