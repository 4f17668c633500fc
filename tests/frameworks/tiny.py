"""A tiny model and a few pairs, and the losses that a recipe has to give for them. For the scripts of this folder.

A script runs a recipe of docs/recipes.md in the real framework, on a CPU. Its last line of output is the report.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor

from amapo_loss import AdaptiveMargin, ScoreStatistics, amapo_loss, sequence_logps
from tests.support.additions import additions

BETA = 2.5
MICRO_BATCHES = 2  # of each optimizer step
PAIRS = additions(40)
TRAIN, EVAL = PAIRS[:32], PAIRS[32:]


def stub_modules(*names: str, **contents: Any) -> None:
    """Put empty modules in place of packages that need a GPU or a compiler, and that a recipe does not use."""
    for name in names:
        module = sys.modules[name] = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)


def save_model(folder: str) -> None:
    """Save a Llama with random weights, and a tokenizer with a token for each byte."""
    tokenizer = transformers.ByT5Tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = transformers.LlamaConfig(**sizes, **tokens, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


class Expected:
    """The losses of the released formula: averaged log-probs, no reference, statistics over all scores so far."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self.losses: list[float] = []

    def add(
        self,
        model: Any,
        input_ids: Tensor,  # [2B, T], the chosen responses first
        attention_mask: Tensor,  # [2B, T]
        labels: Tensor,  # [2B, T]
    ) -> None:
        """Add a micro-batch of training."""
        with torch.no_grad():
            self.add_logits(model(input_ids=input_ids, attention_mask=attention_mask).logits, labels)

    def add_logits(
        self,
        logits: Tensor,  # [2B, T, V], the chosen responses first
        labels: Tensor,  # [2B, T]
    ) -> None:
        """Add a micro-batch of training whose logits are at hand."""
        logps = sequence_logps(logits.detach(), labels).chunk(2)
        self.scores.append(amapo_loss(*logps, beta=BETA).diagnostics.scores)
        statistics = ScoreStatistics.of(torch.cat(self.scores))
        loss, _ = amapo_loss(*logps, beta=BETA, margin=AdaptiveMargin("released"), statistics=statistics)
        self.losses.append(loss.item())

    def report(self, losses: list[float], window: Any) -> None:
        """Print the losses that the framework has logged beside these, and the numbers of scores and of pairs."""
        expected = torch.tensor(self.losses).view(-1, MICRO_BATCHES).mean(1).tolist()
        pairs = sum(map(len, self.scores))
        print(json.dumps({"losses": losses, "expected": expected, "seen": window.seen.item(), "pairs": pairs}))
