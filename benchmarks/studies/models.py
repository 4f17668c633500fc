"""The models of the studies, a byte-level Transformer or a Hugging Face model, and the conversion of text to tensors.

Depends on torch and amapo_loss, and on transformers for Hugging Face models only.

A model has three members that harness.py uses: the method `answer_logps`, and the attributes `forward_tokens`, the
number of tokens that one forward pass may have, and `recompute`, whether a training step computes the activations a
second time in its backward pass instead of keeping those of the whole batch.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amapo_loss import linear_sequence_logps, sequence_logps

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

    forward_tokens: int | None = None  # so small a model never runs out of memory
    recompute = False

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

    def answer_logps(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the summed log-probs [N] of the labels [N, T] after the tokens [N, T]."""
        return sequence_logps(self(tokens), labels, average=False)


class HuggingFaceLM(nn.Module):
    """A causal language model from a local Hugging Face directory.

    With `trained_blocks`, only the last blocks are trained. The blocks below give the same activations in every step,
    so they are computed once, by `frozen_activations`, and this model starts from them instead of from tokens. LoRA
    would not allow that: it changes all blocks, so every step would pass through all of them.

    Args:
        directory: the directory.
        trained_blocks: number of blocks to train, counted from the last one; 0 trains all weights.
        dtype: torch.float32, or a dtype for autocast. The weights stay in float32.

    Raises:
        ValueError: if the model has no such number of blocks, or if its log-probs are not those of its blocks and its
            head alone, for example because it scales its logits.
    """

    forward_tokens: int | None = 2**13

    def __init__(self, directory: Path, trained_blocks: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        model = load_hugging_face_model(directory)
        self.body: Any = model.get_decoder()
        self.head: Any = model.get_output_embeddings()
        self.dtype = torch.float32
        self.recompute = trained_blocks == 0
        tokens = torch.arange(8)[None]
        with torch.no_grad():
            output = model(tokens, use_cache=False, output_hidden_states=True)
            expected = sequence_logps(output.logits, tokens, average=False)
        inputs = tokens
        if trained_blocks:
            inputs = output.hidden_states[first_trained_block(directory, self.body, trained_blocks)]
            self.requires_grad_(False)
            self.body.layers = self.body.layers[-trained_blocks:].requires_grad_()
            if types := getattr(self.body.config, "layer_types", None):  # the kind of attention of each block
                self.body.config.layer_types = types[-trained_blocks:]
        with torch.no_grad():
            if not torch.allclose(self.answer_logps(inputs, tokens), expected, rtol=1e-4):
                raise ValueError(
                    f"{directory}: the studies need a model whose logits are its head's output for its last hidden "
                    "state, and this model computes something else"
                )
        self.dtype = dtype

    def answer_logps(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the summed log-probs [N] of the labels [N, T].

        The attention mask is all ones. Padding comes last and attention is causal, so no other position attends to it.

        Args:
            inputs: [N, T] tokens, or [N, T, H] inputs of the first trained block.
            labels: [N, T] labels.
        """
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        options = {name: inputs, "attention_mask": labels.new_ones(labels.shape), "use_cache": False}
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.body(**options).last_hidden_state
            return linear_sequence_logps(hidden, self.head.weight, labels, self.head.bias, average=False)


def load_hugging_face_model(directory: Path) -> Any:
    """Load the causal language model of a local directory, with weights in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # Every run loads the model, and each time its progress bar would break into the one of the study.
    disable_progress_bar: Any = logging.disable_progress_bar
    disable_progress_bar()
    # from_pretrained returns the model in evaluation mode, and nothing here calls train(). With dropout, the log-probs
    # of the reference and of the evaluation would be random.
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)


def first_trained_block(directory: Path, body: Any, trained_blocks: int) -> int:
    """Return the index of the first block to train.

    Raises:
        ValueError: if `body` has no list of blocks called `layers`, or fewer blocks than `trained_blocks`.
    """
    blocks = getattr(body, "layers", None)
    if blocks is None:
        raise ValueError(
            f"{directory}: --trained-blocks needs a model whose blocks are in a list called layers, "
            f"and {type(body).__name__} has none; --trained-blocks 0 trains all weights"
        )
    if len(blocks) < trained_blocks:
        raise ValueError(f"{directory}: --trained-blocks is {trained_blocks}, but the model has {len(blocks)} blocks")
    return len(blocks) - trained_blocks


LanguageModel = ByteLM | HuggingFaceLM


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
    activations: Tensor | None = None
    """[N, T, H] inputs of the model's first trained block; None: the model starts from the tokens."""

    @property
    def inputs(self) -> Tensor:
        """What the model starts from."""
        return self.tokens if self.activations is None else self.activations

    def lengths(self) -> Tensor:
        """Return the number of tokens of each text, without the padding, [N]."""
        positions = torch.arange(1, self.labels.shape[1] + 1)
        return (positions * (self.labels >= 0)).amax(1)

    def select(self, indices: Tensor) -> "Texts":
        """Return the texts with these indices [M], without the columns that are padding in all of them."""
        tokens, labels = self.tokens[indices], self.labels[indices]
        length = int((labels >= 0).any(0).nonzero().max()) + 1
        activations = None if self.activations is None else self.activations[indices, :length]
        return Texts(tokens[:, :length], labels[:, :length], activations)


def length_batches(lengths: Tensor, max_tokens: int | None) -> list[Tensor]:
    """Return batches of indices of texts of similar length. With padding, each has at most `max_tokens` tokens.

    A text that is longer than that is a batch of its own. The longest texts come first, so that a batch that needs too
    much memory fails at once.

    Args:
        lengths: [N] number of tokens of each text.
        max_tokens: largest number of tokens of a batch; None returns one batch, in the order of the texts.
    """
    if max_tokens is None:
        return [torch.arange(len(lengths))]
    order = lengths.argsort(descending=True, stable=True)
    batches, start = [], 0
    while start < len(order):
        size = max(1, max_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def reserve(path: Path, size: int) -> None:
    """Create a file of this size in bytes, if it does not exist, so that it can be mapped.

    Raises:
        OSError: if the disk has no room for it. Without this check, a write to the mapped file would end the process.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


@torch.no_grad()
def frozen_activations(
    directory: Path,
    trained_blocks: int,
    texts: Texts,
    path: Path,
    dtype: torch.dtype,
    device: str,
    advance: Callable[[int], None] = lambda texts: None,
) -> Tensor:
    """Return the inputs of the first trained block for all texts, [N, T, H] float32, from a file that is mapped.

    Computes what is missing in the file. Positions in the padding are 0.

    Args:
        directory: directory of a Hugging Face model.
        trained_blocks: number of blocks that are trained, at least 1.
        texts: the texts.
        path: the file. The number of finished batches is in a file beside it.
        dtype: see `HuggingFaceLM`.
        device: device of the model.
        advance: called with the number of texts that were computed or found.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
    shape = (*texts.tokens.shape, config.hidden_size)
    reserve(path, 4 * math.prod(shape))
    activations = torch.from_file(str(path), shared=True, size=math.prod(shape)).view(shape)
    batches = length_batches(texts.lengths(), HuggingFaceLM.forward_tokens)
    counter = path.with_suffix(".count")
    finished = int(counter.read_text()) if counter.exists() else 0
    advance(sum(map(len, batches[:finished])))
    if finished < len(batches):
        body = load_hugging_face_model(directory).get_decoder().to(device)
        first = first_trained_block(directory, body, trained_blocks)
    for number, batch in enumerate(batches[finished:], start=finished + 1):
        tokens = texts.select(batch).tokens.to(device)
        options = {"attention_mask": torch.ones_like(tokens), "use_cache": False, "output_hidden_states": True}
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            activations[batch, : tokens.shape[1]] = body(tokens, **options).hidden_states[first].float().cpu()
        counter.write_text(str(number))
        advance(len(batch))
    return activations


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
