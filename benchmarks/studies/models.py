"""The models of the studies, a byte-level Transformer or a Hugging Face model, and the conversion of text to tensors.

Depends on torch, and on transformers for Hugging Face models only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY = 257  # 256 bytes and END
END = 256  # the token id before a prompt, after an answer, and in the padding
IGNORED = -100  # the label of positions that do not count


class ByteLM(nn.Module):
    """A pre-norm Transformer language model over bytes.

    Args:
        width: size of the hidden states.
        layers: number of layers.
        max_length: largest number of tokens in a sequence.
    """

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
        """Map tokens [N, T] to the logits [N, T, 257] of the token after each position.

        There is no padding mask. Padding comes last and attention is causal, so no other position attends to it.
        """
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.token(tokens) + self.position.weight[:length]
        logits: Tensor = self.head(self.body(hidden, mask=mask, is_causal=True))
        return logits


class HuggingFaceLM(nn.Module):
    """A causal language model from a local Hugging Face directory, with the interface of `ByteLM`."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        # Every run loads the model, and each time its progress bar would break into the one of the study.
        disable_progress_bar: Any = logging.disable_progress_bar
        disable_progress_bar()
        # from_pretrained returns the model in evaluation mode, and nothing here calls train(). With dropout, the
        # log-probs of the reference and of the evaluation would be random.
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [N, T] to the logits [N, T, V] of the token after each position.

        The attention mask is all ones. Padding comes last and attention is causal, so no other position attends to it.
        """
        logits: Tensor = self.model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        return logits


class Tokenizer(NamedTuple):
    """Functions that turn text into token ids, and the token ids that enclose a text."""

    encode_prompt: Callable[[str], list[int]]
    encode_answer: Callable[[str], list[int]]
    start: list[int]  # before a prompt
    end: int  # after an answer, and in the padding


BYTES = Tokenizer(lambda text: list(text.encode()), lambda text: list(text.encode()), start=[END], end=END)


def hugging_face_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of a local directory. If it has a chat template, prompts are formatted with it.

    Raises:
        ValueError: if the tokenizer has no end-of-text token.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{directory}: the tokenizer has no end-of-text token (eos_token), which is required")

    def encode_prompt(text: str) -> list[int]:
        if tokenizer.chat_template is not None:
            chat = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_answer(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    # A chat template writes the start token itself, and adding it here would repeat it.
    candidates = [] if tokenizer.chat_template is not None else [tokenizer.bos_token_id, tokenizer.eos_token_id]
    start = [token for token in candidates if token is not None][:1]
    return Tokenizer(encode_prompt, encode_answer, start, tokenizer.eos_token_id)


class Texts(NamedTuple):
    """Token ids and labels of N texts, padded to T tokens.

    A label is the token id at the same position, or `IGNORED` in the prompt and in the padding.
    """

    tokens: Tensor  # [N, T] int64
    labels: Tensor  # [N, T] int64

    def select(self, indices: Tensor) -> "Texts":
        """Return the texts with these indices [M], without the columns that are padding in all of them."""
        tokens, labels = self.tokens[indices], self.labels[indices]
        length = int((labels >= 0).any(0).nonzero().max()) + 1
        return Texts(tokens[:, :length], labels[:, :length])


def tensors(
    texts: list[tuple[str, str]], max_prompt: int, max_answer: int, tokenizer: Tokenizer = BYTES
) -> tuple[Texts, int]:
    """Convert (prompt, answer) texts to token ids and labels.

    Args:
        texts: the (prompt, answer) texts.
        max_prompt: number of tokens kept from the end of a prompt.
        max_answer: number of tokens kept from the start of an answer. The end token counts as one of them.
        tokenizer: converts text to token ids; the default uses bytes.

    Returns:
        The texts as tensors, and the number of texts that were truncated. The end token has a label, but a truncated
        answer has no end token.
    """
    tokens, labels, num_truncated = [], [], 0
    for prompt, answer in texts:
        prompt_ids = tokenizer.encode_prompt(prompt)
        answer_ids = [*tokenizer.encode_answer(answer), tokenizer.end]
        num_truncated += len(prompt_ids) > max_prompt or len(answer_ids) > max_answer
        prompt_ids = [*tokenizer.start, *prompt_ids[-max_prompt:]]
        answer_ids = answer_ids[:max_answer]
        tokens.append(torch.tensor(prompt_ids + answer_ids))
        labels.append(torch.tensor([IGNORED] * len(prompt_ids) + answer_ids))
    padded_tokens = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=tokenizer.end)
    padded_labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return Texts(padded_tokens, padded_labels), num_truncated


def check_fit(directory: Path, texts: list[Texts]) -> None:
    """Check that the Hugging Face model of a directory can process the texts.

    Raises:
        ValueError: if a text is longer than the model's context, or if a token id is outside its vocabulary.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
    longest = max(group.tokens.shape[1] for group in texts)
    limit = getattr(config, "max_position_embeddings", None) or longest
    if longest > limit:
        raise ValueError(f"{directory}: the model accepts at most {limit} tokens, but the longest text has {longest}")
    largest = max(int(group.tokens.max()) for group in texts)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{directory}: the model has a vocabulary of {config.vocab_size}, but its tokenizer uses the id {largest}"
        )
