"""The models of the experiments, bytes or Hugging Face's, and text as their tensors. Knows no loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY = 257
END = 256  # before a prompt, after an answer, and as padding
IGNORED = -100


class ByteLM(nn.Module):
    """A pre-norm Transformer over bytes: [N, T] int64 in, [N, T, 257] logits out."""

    def __init__(self, width: int, layers: int, max_length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(max_length, width)
        layer = nn.TransformerEncoderLayer(
            width, nhead=max(4, width // 64), dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits at every position for the token after it; padding comes last, so nothing that counts attends to it."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.token(tokens) + self.position.weight[:length]
        logits: Tensor = self.head(self.body(hidden, mask=mask, is_causal=True))
        return logits


class HuggingFaceLM(nn.Module):
    """A causal language model of a local directory, called as `ByteLM` is."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        quiet: Any = logging.disable_progress_bar
        quiet()  # of loading, once a run
        # It comes with its dropout off, and stays so: a pair has one score in a step.
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits at every position for the token after it; padding comes last, so nothing that counts attends to it."""
        logits: Tensor = self.model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        return logits


class Tokenizer(NamedTuple):
    """Text to token ids, and the ids that stand around it."""

    prompt: Callable[[str], list[int]]
    answer: Callable[[str], list[int]]
    start: list[int]  # before a prompt
    end: int  # after an answer, and as padding


BYTES = Tokenizer(lambda text: list(text.encode()), lambda text: list(text.encode()), start=[END], end=END)


def hugging_face_tokenizer(directory: Path) -> Tokenizer:
    """That of a local directory: a prompt takes its chat template if it has one, else stands as it is.

    Raises:
        ValueError: if it has no token that ends a text.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{directory}: the tokenizer needs an end-of-text token (eos_token), and has none")

    def prompt(text: str) -> list[int]:
        if tokenizer.chat_template is not None:
            chat = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    def answer(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    # A chat template writes the first token itself.
    first = [] if tokenizer.chat_template is not None else [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return Tokenizer(prompt, answer, [token for token in first if token is not None][:1], tokenizer.eos_token_id)


class Texts(NamedTuple):
    """Tokens and labels of some texts, [N, T] int64 each."""

    tokens: Tensor
    labels: Tensor

    def rows(self, rows: Tensor) -> "Texts":
        """Some of them, without the columns that only pad."""
        tokens, labels = self.tokens[rows], self.labels[rows]
        length = int((labels >= 0).any(0).nonzero().max()) + 1
        return Texts(tokens[:, :length], labels[:, :length])


def tensors(
    texts: list[tuple[str, str]], max_prompt: int, max_answer: int, tokenizer: Tokenizer = BYTES
) -> tuple[Texts, int]:
    """(prompt, answer) pairs as tokens and labels, and how many of the texts were cut.

    The last `max_prompt` tokens of a prompt and the first `max_answer` of an answer are kept. Labels count the answer
    and, where it was not cut, its end.
    """
    tokens, labels, cut = [], [], 0
    for prompt, answer in texts:
        context, target = tokenizer.prompt(prompt), [*tokenizer.answer(answer), tokenizer.end]
        cut += len(context) > max_prompt or len(target) > max_answer
        context, target = [*tokenizer.start, *context[-max_prompt:]], target[:max_answer]
        tokens.append(torch.tensor(context + target))
        labels.append(torch.tensor([IGNORED] * len(context) + target))
    padded = (
        nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        for rows, padding in ((tokens, tokenizer.end), (labels, IGNORED))
    )
    return Texts(*padded), cut


def check_fit(directory: Path, texts: list[Texts]) -> None:
    """Raise ValueError where a text is too long for the model of a directory, or has a token that it does not know."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
    longest = max(these.tokens.shape[1] for these in texts)
    limit = getattr(config, "max_position_embeddings", None) or longest
    if longest > limit:
        raise ValueError(f"{directory}: the model takes {limit} tokens, and the longest text has {longest}")
    largest = max(int(these.tokens.max()) for these in texts)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{directory}: the model knows {config.vocab_size} tokens, and its tokenizer uses id {largest}"
        )
