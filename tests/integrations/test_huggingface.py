"""Check on small Hugging Face models that hidden states give the same loss and gradients as logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amapo_loss import amapo_loss, linear_sequence_logps, sequence_logps
from tests.support.ranks import on_ranks

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers announces changes of its own

IGNORE_INDEX = -100
VOCAB_SIZE = 97
CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# For each model family, the entries that it adds to the configuration, and the options that its head then needs.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama": ({}, {}),
    "Qwen2": ({"tie_word_embeddings": True}, {}),
    "Gemma2": ({"final_logit_softcapping": 2.0}, {"final_logit_softcapping": 2.0}),
    "Cohere": ({"logit_scale": 0.25}, {"logit_scale": 0.25}),
    "Granite": ({"logits_scaling": 4.0}, {"logit_scale": 1 / 4.0}),
}


def tiny_model(family: str) -> Any:
    torch.manual_seed(0)
    own_entries, _ = MODELS[family]
    config = getattr(transformers, f"{family}Config")(**CONFIG | own_entries)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def make_batch() -> dict[str, Tensor]:
    """Return two pairs of sequences of different lengths. The chosen answers come first."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, VOCAB_SIZE, (4, 12), generator=generator)
    lengths, prompt_lengths = torch.tensor([12, 9, 10, 7]), torch.tensor([4, 3, 4, 3])
    position = torch.arange(12)
    mask = (position < lengths[:, None]).long()
    labels = input_ids.masked_fill((position < prompt_lengths[:, None]) | (mask == 0), IGNORE_INDEX)
    return {"input_ids": input_ids * mask, "attention_mask": mask, "labels": labels}


def loss_and_gradients(
    model: Any,
    logps: Tensor,  # [4]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and its gradient with respect to each trainable parameter."""
    loss = amapo_loss(*logps.chunk(2), beta=2.0).loss
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss, dict(zip(trainable, torch.autograd.grad(loss, list(trainable.values()), retain_graph=True)))


def logps_from_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probs [4] by `log_softmax` and `gather`, and check `sequence_logps` against them."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    token_logps: Tensor = logits[:, :-1].log_softmax(-1).gather(2, labels[..., None].clamp(min=0)).squeeze(2)
    counted = labels != IGNORE_INDEX
    logps = (token_logps * counted).sum(1) / counted.sum(1)
    torch.testing.assert_close(sequence_logps(logits, batch["labels"]), logps)
    return logps


def logps_from_hidden_states(
    decoder: Any,  # the model without its head
    weight: Tensor,  # [V, H]
    batch: dict[str, Tensor],
    **options: Any,
) -> Tensor:
    """Return the log-probs [4] by `linear_sequence_logps`."""
    output = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logps: Tensor = linear_sequence_logps(output.last_hidden_state, weight, batch["labels"], **options)
    return logps


@pytest.mark.parametrize("keep_bytes", [0, 10**6])
@pytest.mark.parametrize("family", MODELS)
def test_hidden_states_give_the_loss_and_gradients_of_logits(family: str, keep_bytes: int) -> None:
    model, batch = tiny_model(family), make_batch()
    _, options = MODELS[family]
    logps = logps_from_hidden_states(model.model, model.lm_head.weight, batch, keep_bytes=keep_bytes, **options)
    expected = loss_and_gradients(model, logps_from_logits(model, batch))
    torch.testing.assert_close(loss_and_gradients(model, logps), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora_gets_the_gradients_of_logits(target_modules: list[str]) -> None:
    """An adapter on the decoder leaves the head frozen. With one on the head, the weight depends on the adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False, task_type="CAUSAL_LM")
    model, batch = peft.get_peft_model(tiny_model("Llama"), config), make_batch()
    model.eval()
    base_model = model.get_base_model()
    weight = base_model.lm_head.weight
    if "lm_head" in target_modules:
        weight = weight + base_model.lm_head.get_delta_weight("default")
    assert weight.requires_grad == ("lm_head" in target_modules)
    actual = loss_and_gradients(model, logps_from_hidden_states(base_model.model, weight, batch))
    _, gradients = actual
    assert all("lora" in name for name in gradients)
    expected = loss_and_gradients(model, logps_from_logits(model, batch))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_does_not_change_the_gradients() -> None:
    model, batch = tiny_model("Llama"), make_batch()
    expected = loss_and_gradients(model, logps_from_hidden_states(model.model, model.lm_head.weight, batch))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    actual = loss_and_gradients(model, logps_from_hidden_states(model.model, model.lm_head.weight, batch))
    torch.testing.assert_close(actual, expected)


def sequences() -> list[dict[str, list[int]]]:
    """Return the rows of `make_batch` without their padding, as a dataset has them."""
    batch = make_batch()
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        {name: batch[name][row, :length].tolist() for name in ("input_ids", "labels")}
        for row, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("collator", ["transformers", "trl", "trl, with a padded tail"])
def test_padding_free_batches_give_the_loss_and_gradients_of_padded_ones(collator: str) -> None:
    if collator == "transformers":
        collate: Any = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    else:
        sft = pytest.importorskip("trl.trainer.sft_trainer")
        multiple = 16 if collator.endswith("tail") else None
        collate = sft.DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=multiple)
    batch, model = collate(sequences()), tiny_model("Llama")
    labels, position_ids = batch["labels"], batch["position_ids"]
    # Without a cache, the model keeps its attention within the sequences.
    output = model(input_ids=batch["input_ids"], position_ids=position_ids, output_hidden_states=True, use_cache=False)
    hidden, weight = output.hidden_states[-1], model.lm_head.weight
    results = [
        sequence_logps(output.logits, labels, position_ids=position_ids),
        linear_sequence_logps(hidden, weight, labels, position_ids=position_ids),
    ]
    if not collator.endswith("tail"):  # its offsets name each token of the padding as a sequence
        results.append(linear_sequence_logps(hidden, weight, labels, cu_seqlens=batch["cu_seq_lens_q"]))
    expected = loss_and_gradients(model, logps_from_logits(model, make_batch()))
    for logps in results:
        actual = loss_and_gradients(model, logps)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def check_tensor_parallel(rank: int, group: Any, folder: str) -> None:
    """Compare a model whose body and head are split by its own plan with the whole model."""
    from torch.distributed.tensor import DTensor, Shard
    from transformers.distributed.configuration_utils import DistributedConfig

    config = DistributedConfig(tp_plan="auto", tp_size=2)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, distributed_config=config).eval()
    weight = model.lm_head.weight
    assert isinstance(weight, DTensor)
    assert weight.placements == (Shard(0),)
    batch = make_batch()
    logps = logps_from_hidden_states(model.model, weight, batch)
    loss, split_gradients = loss_and_gradients(model, logps)
    gradients = {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in split_gradients.items()
    }
    whole = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    expected = loss_and_gradients(whole, logps_from_logits(whole, batch))
    torch.testing.assert_close((loss, gradients), expected, rtol=1e-4, atol=1e-6)


def test_a_model_under_its_tensor_parallel_plan(tmp_path: Path) -> None:
    """The vocabulary of 97 is not a multiple of the 2 ranks."""
    tiny_model("Llama").save_pretrained(tmp_path)
    on_ranks(2, check_tensor_parallel, str(tmp_path))
