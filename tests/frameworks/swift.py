"""Run the recipe for ms-swift through its `rlhf_main`."""

import json
from typing import Any

from swift.pipelines import rlhf_main
from swift.rlhf_trainers.rlhf_mixin import RLHFTrainerMixin

from tests.frameworks.tiny import BETA, EVAL, TRAIN, Expected, save_model

OPTIONS = f"""
    --rlhf_type simpo --cpo_alpha 0 --beta {BETA} --external_plugins amapo.py
    --model model --model_type llama --template dummy --tuner_type full --torch_dtype float32 --attn_impl eager
    --dataset train.jsonl --val_dataset eval.jsonl --dataset_num_proc 1 --output_dir out --save_strategy no
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_train_epochs 1 --learning_rate 1e-3
    --eval_strategy steps --eval_steps 2 --logging_steps 1 --use_cpu true --report_to none
"""
save_model("model")
for name, pairs in {"train": TRAIN, "eval": EVAL}.items():
    with open(f"{name}.jsonl", "w") as file:
        for pair in pairs:
            prompt = {"role": "user", "content": pair["prompt"]}
            messages = [prompt, {"role": "assistant", "content": pair["chosen"]}]
            file.write(json.dumps({"messages": messages, "rejected_response": pair["rejected"]}) + "\n")
expected, compute_loss = Expected(), RLHFTrainerMixin.compute_loss
trainers: list[Any] = []


def recorded(self: Any, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
    """Compute the loss, and record what it should be."""
    trainers[:] = [self]
    expected.add(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    return compute_loss(self, model, inputs, *arguments, **options)


RLHFTrainerMixin.compute_loss = recorded
rlhf_main(OPTIONS.split())
losses = [entry["loss"] for entry in trainers[0].state.log_history if "loss" in entry]
expected.report(losses, trainers[0].loss_fn.statistics)
