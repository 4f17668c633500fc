"""A small byte-level causal language model, and text as its tensors. Knows nothing of preferences."""

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
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=True
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


def tensors(texts: list[tuple[str, str]], max_prompt: int, max_answer: int) -> tuple[Tensor, Tensor, int]:
    """(prompt, answer) pairs as tokens and labels, [N, T] int64 both, and how many of the texts were cut.

    The last `max_prompt` bytes of a prompt and the first `max_answer` of an answer are kept. Labels count the answer
    and, where it was not cut, its end.
    """
    tokens, labels, cut = [], [], 0
    for prompt, answer in texts:
        context, target = list(prompt.encode()), [*answer.encode(), END]
        cut += len(context) > max_prompt or len(target) > max_answer
        context, target = [END, *context[-max_prompt:]], target[:max_answer]
        tokens.append(torch.tensor(context + target))
        labels.append(torch.tensor([IGNORED] * len(context) + target))
    return (
        nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=END),
        nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        cut,
    )
