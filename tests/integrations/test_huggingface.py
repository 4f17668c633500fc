"""Under real models of Hugging Face: the loss and every parameter's gradient are those through the logits."""

from typing import Any

import pytest
import torch

from amapo_loss import amapo_loss, linear_sequence_logps, sequence_logps

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about its own next version

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[
    str, tuple[dict[str, Any], dict[str, Any]]
] = {  # what else the configuration says, and what the head then needs to know
    "Llama": ({}, {}),
    "Qwen2": ({"tie_word_embeddings": True}, {}),
    "Gemma2": ({"final_logit_softcapping": 2.0}, {"final_logit_softcapping": 2.0}),
    "Cohere": ({"logit_scale": 0.25}, {"logit_scale": 0.25}),
    "Granite": ({"logits_scaling": 4.0}, {"logit_scale": 1 / 4.0}),
}


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    options, _ = MODELS[family]
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def batch() -> dict[str, torch.Tensor]:
    """Two pairs, chosen answers first, of several lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (4, 12), generator=generator)
    lengths, prompts = torch.tensor([12, 9, 10, 7]), torch.tensor([4, 3, 4, 3])
    place = torch.arange(12)
    mask = (place < lengths[:, None]).long()
    labels = ids.masked_fill((place < prompts[:, None]) | (mask == 0), -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def gradients(model: Any, logps: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = amapo_loss(*logps.chunk(2), beta=2.0).loss
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    return loss, dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))


def through_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    tokens: torch.Tensor = (
        logits[:, :-1].log_softmax(-1).gather(2, inputs["labels"][:, 1:, None].clamp(min=0)).squeeze(2)
    )
    counted = inputs["labels"][:, 1:] != -100
    logps = (tokens * counted).sum(1) / counted.sum(1)
    torch.testing.assert_close(sequence_logps(logits, inputs["labels"]), logps)
    return logps


def through_hidden(body: Any, weight: torch.Tensor, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    hidden: torch.Tensor = body(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    return linear_sequence_logps(hidden, weight, inputs["labels"], **options)


@pytest.mark.parametrize("keep_bytes", [0, 10**6])
@pytest.mark.parametrize("family", MODELS)
def test_the_same_loss_and_gradients(family: str, keep_bytes: int) -> None:
    model, inputs = tiny(family), batch()
    _, options = MODELS[family]
    logps = through_hidden(model.model, model.lm_head.weight, inputs, keep_bytes=keep_bytes, **options)
    expected = gradients(model, through_logits(model, inputs))
    torch.testing.assert_close(gradients(model, logps), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora(targets: list[str]) -> None:
    """On the body, with a frozen head; and on the head, whose weight then is a function of what is trained."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model, inputs = peft.get_peft_model(tiny("Llama"), config), batch()
    model.eval()
    causal = model.get_base_model()
    weight = causal.lm_head.weight
    if "lm_head" in targets:
        weight = weight + causal.lm_head.get_delta_weight("default")
    assert weight.requires_grad == ("lm_head" in targets)
    got = gradients(model, through_hidden(causal.model, weight, inputs))
    assert all("lora" in name for name in got[1])
    torch.testing.assert_close(got, gradients(model, through_logits(model, inputs)), rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing() -> None:
    model, inputs = tiny("Llama"), batch()
    expected = gradients(model, through_hidden(model.model, model.lm_head.weight, inputs))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    got = gradients(model, through_hidden(model.model, model.lm_head.weight, inputs))
    torch.testing.assert_close(got, expected)
