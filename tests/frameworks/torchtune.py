"""Run the recipe for torchtune through its `tune run`."""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torchtune
from safetensors.torch import save_file
from torchtune import config, rlhf
from torchtune._cli.tune import main
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.llama2 import llama2

from amapo_loss import AMaPOLoss
from tests.frameworks.tiny import TRAIN, Expected

SIZES = {"vocab_size": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "embed_dim": 32, "max_seq_len": 128}
OPTIONS = f"""
output_dir: out
model:
  _component_: torchtune.models.llama2.lora_llama2
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: true
  lora_rank: 8
  lora_alpha: 16
{"".join(f"  {name}: {value}" + chr(10) for name, value in SIZES.items())}
tokenizer: {{_component_: torchtune.models.llama2.llama2_tokenizer, path: tokenizer.model, max_seq_len: 128}}
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: model
  checkpoint_files: [model.safetensors]
  output_dir: out
  model_type: LLAMA2
resume_from_checkpoint: false
dataset: {{_component_: torchtune.datasets.preference_dataset, source: json, data_files: train.json, split: train}}
seed: 0
shuffle: true
batch_size: 4
optimizer: {{_component_: torch.optim.AdamW, lr: 1e-2}}
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 2
compile: false
metric_logger: {{_component_: torchtune.training.metric_logging.DiskLogger, log_dir: logs}}
device: cpu
dtype: fp32
enable_activation_checkpointing: false
"""
with open("run.yaml", "a") as file:
    file.write(OPTIONS)
rows = []
for pair in TRAIN:
    prompt = {"role": "user", "content": pair["prompt"]}
    rows.append({name: [prompt, {"role": "assistant", "content": pair[name]}] for name in ("chosen", "rejected")})
Path("train.json").write_text(json.dumps(rows))
Path("text").write_text("\n".join(f"[INST] {pair['prompt']} [/INST] {pair['rejected']}" for pair in TRAIN))
sentencepiece.SentencePieceTrainer.train(
    input="text", model_prefix="tokenizer", model_type="char", vocab_size=40, hard_vocab_limit=False, pad_id=3
)
torch.manual_seed(0)
heads = {"num_heads": SIZES["num_heads"], "num_kv_heads": SIZES["num_kv_heads"], "dim": SIZES["embed_dim"]}
weights = tune_to_hf(llama2(**SIZES).state_dict(), **heads)
Path("model").mkdir()
save_file({name: weight.contiguous() for name, weight in weights.items()}, "model/model.safetensors")
Path("model/config.json").write_text(
    json.dumps({"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": SIZES["embed_dim"]})
)
shutil.copy(Path(torchtune.__file__).parents[1] / "recipes/lora_dpo_single_device.py", "lora_dpo.py")  # `tune cp`
expected, get_batch_log_probs, instantiate = Expected(), rlhf.get_batch_log_probs, config.instantiate
modules: list[AMaPOLoss] = []


def recorded(logits: Any, labels: Any, **options: Any) -> Any:
    """Compute the log-probs, and record what the loss should be."""
    if logits.requires_grad:
        expected.add_logits(logits, labels)
    return get_batch_log_probs(logits, labels, **options)


def instantiate_and_store(*arguments: Any, **options: Any) -> Any:
    """Build a component of the recipe, and keep the loss."""
    component = instantiate(*arguments, **options)
    if isinstance(component, AMaPOLoss):
        modules.append(component)
    return component


rlhf.get_batch_log_probs, config.instantiate = recorded, instantiate_and_store
sys.argv = ["tune", "run", "amapo.py", "--config", "run.yaml"]
with contextlib.suppress(SystemExit):
    main()
(log,) = Path("logs").iterdir()
losses = [float(loss) for loss in re.findall(r"loss:(\S+)", log.read_text())]
expected.report(losses, modules[0].statistics)
