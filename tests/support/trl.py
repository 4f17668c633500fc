"""Tiny models, small datasets of pairs, and an `AMaPOTrainer` for them. Depends on TRL."""

from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from amapo_loss.trl import AMaPOConfig, AMaPOTrainer
from benchmarks.speed.trainer import byte_tokenizer, llama
from tests.support.additions import additions


def tiny_llama(seed: int = 0) -> Any:
    """Return a Llama with random weights and the vocabulary of `byte_tokenizer`."""
    return llama(258, 32, 2, seed)


def tiny_mixtral() -> Any:
    """Return a mixture of four experts with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, **tokens, num_local_experts=4))


def tiny_llava(seed: int = 0) -> tuple[Any, Any]:
    """Return a vision-language model with random weights, and its processor for images of 16 x 16 pixels."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = (
        "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        images, tokenizer, 8, "default", chat_template=text, num_additional_image_tokens=1
    )
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        text_config=llama(259, 32, 2).config,
        image_token_index=258,
    )
    torch.manual_seed(seed)
    return transformers.LlavaForConditionalGeneration(config), processor


def pairs_with_images(n: int = 12) -> Any:
    """Return a dataset of n questions on an image, each with a right and a wrong response."""
    return Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (16, 16), (16 * i, 0, 0))],
                "prompt": [{"role": "user", "content": "How red is this?"}],
                "chosen": [{"role": "assistant", "content": f"{16 * i}"}],
                "rejected": [{"role": "assistant", "content": f"{16 * i}{' or so' * (1 + i % 3)}"}],
            }
            for i in range(n)
        ]
    )


def pairs(n: int = 24) -> Any:
    """Return `additions` as a dataset."""
    return Dataset.from_list(additions(n))


def pairs_with_columns(n: int = 24) -> Any:
    """Return `pairs` with a margin and a weight for each, some of which are 0."""
    dataset = pairs(n).add_column("gap", [i % 5 / 4 for i in range(n)])
    return dataset.add_column("importance", [(i + 1) % 4 for i in range(n)])


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
        for name in (
            "peft_config",
            "train_dataset",
            "eval_dataset",
            "ref_model",
            "processing_class",
            "compute_metrics",
        )
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
        **{"train_dataset": pairs(), "processing_class": byte_tokenizer()} | trainer_arguments,
    )
