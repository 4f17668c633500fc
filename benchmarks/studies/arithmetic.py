"""Arithmetic problems that a small model learns from scratch, and whose generated solutions can be scored exactly.

Depends on torch, and on data.py and models.py.

A problem is a sum of two numbers of three digits. A solution adds digit by digit, from the right, and ends with the
result: "347+586=" has the solution "7+6=13;4+8+1=13;3+5+1=9;933".
"""

import random

import torch

from benchmarks.studies.data import Pair
from benchmarks.studies.models import END, ByteLM

DIGITS = 3
MAX_PROMPT = 2 * DIGITS + 2
MAX_SOLUTION = 9 * DIGITS + DIGITS + 2  # with the end token
TRIES = 8  # number of solutions that are sampled for a problem at most, to find a wrong one
GENERATION_BATCH_SIZE = 512  # problems that are solved at a time


def solve(prompt: str) -> str:
    """Return the correct solution of a problem."""
    a, b = prompt.removesuffix("=").split("+")
    steps, carry = [], 0
    for digit_a, digit_b in zip(reversed(a), reversed(b)):
        total = int(digit_a) + int(digit_b) + carry
        steps.append(f"{digit_a}+{digit_b}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ";".join([*steps, str(int(a) + int(b))])


def is_right(prompt: str, solution: str) -> bool:
    """Return whether the result at the end of a solution is the right one, whatever the steps before it are."""
    return solution.rpartition(";")[2] == solve(prompt).rpartition(";")[2]


def arithmetic_problems(counts: dict[str, int], seed: int = 0) -> dict[str, list[str]]:
    """Return different problems for each group, such as "train", with as many problems as `counts` says."""
    rng = random.Random(seed)
    smallest, largest = 10 ** (DIGITS - 1), 10**DIGITS - 1
    prompts: dict[str, None] = {}
    while len(prompts) < sum(counts.values()):
        prompts[f"{rng.randint(smallest, largest)}+{rng.randint(smallest, largest)}="] = None
    remaining = iter(prompts)
    return {group: [next(remaining) for _ in range(count)] for group, count in counts.items()}


@torch.no_grad()
def generate(model: ByteLM, prompts: list[str], generator: torch.Generator | None = None) -> list[str]:
    """Return the model's solutions of problems.

    Args:
        model: the model.
        prompts: the problems, all of the same length.
        generator: for sampling at temperature 1; None takes the most probable token each time.
    """
    solutions = []
    for start in range(0, len(prompts), GENERATION_BATCH_SIZE):
        batch = [[END, *prompt.encode()] for prompt in prompts[start : start + GENERATION_BATCH_SIZE]]
        tokens = torch.tensor(batch, device=model.head.weight.device)
        prompt_length = tokens.shape[1]
        for _ in range(MAX_SOLUTION):
            logits = model(tokens)[:, -1].cpu()
            if generator is None:
                new = logits.argmax(1, keepdim=True)
            else:
                new = torch.multinomial(logits.softmax(1), 1, generator=generator)
            tokens = torch.cat([tokens, new.to(tokens.device)], dim=1)
            if (tokens[:, prompt_length:] == END).any(1).all():
                break
        solutions += [text_before_end(row) for row in tokens[:, prompt_length:].tolist()]
    return solutions


def text_before_end(tokens: list[int]) -> str:
    """Return the bytes before the first end token as text."""
    end = tokens.index(END) if END in tokens else len(tokens)
    return bytes(tokens[:end]).decode(errors="replace")


def share_solved(model: ByteLM, prompts: list[str]) -> float:
    """Return the share of problems that the model solves when it always takes the most probable token."""
    return sum(map(is_right, prompts, generate(model, prompts))) / len(prompts)


def own_mistakes(model: ByteLM, prompts: list[str], seed: int) -> dict[str, str]:
    """Return a wrong solution of the model for each problem, sampled at temperature 1.

    A problem is left out if all of its `TRIES` solutions have the right result.
    """
    generator = torch.Generator().manual_seed(seed)
    mistakes: dict[str, str] = {}
    for _ in range(TRIES):
        remaining = [prompt for prompt in prompts if prompt not in mistakes]
        solutions = generate(model, remaining, generator)
        mistakes |= {prompt: text for prompt, text in zip(remaining, solutions) if not is_right(prompt, text)}
    return {prompt: mistakes[prompt] for prompt in prompts if prompt in mistakes}


def own_pairs(mistakes: dict[str, str]) -> list[Pair]:
    """Return pairs of the correct solution and the model's own wrong one."""
    return [Pair(prompt, solve(prompt), mistake) for prompt, mistake in mistakes.items()]
