"""An experiment: imitate, learn a preference from that checkpoint with one loss, evaluate. Knows no files, no tables.

Everything here is a function of its arguments: the same seed gives the same figures, on one thread bit by bit.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from amapo_loss import AdaptiveMargin, AMaPOOutput, amapo_loss, dpo_loss, sequence_logps, simpo_loss
from benchmarks.studies.estimators import estimators
from benchmarks.studies.models import Texts

EVALUATION_BATCH = 128
Figures = dict[str, Any]


class Logps(NamedTuple):
    """Summed log-probs and lengths of some pairs under one model, [B] each."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    def ranking(self) -> Tensor:
        """Difference of the average log-probs, nats a token: which answer the model itself prefers."""
        return (self.chosen / self.chosen_lengths - self.rejected / self.rejected_lengths).detach()

    def rows(self, rows: Tensor | slice) -> "Logps":
        """Those of some pairs."""
        return Logps(*(values[rows] for values in self))


# Policy and reference log-probs in, a loss for each pair and diagnostics out.
Objective = Callable[[Logps, Logps], AMaPOOutput]


def averaged(loss: Callable[..., AMaPOOutput], **options: Any) -> Objective:
    """A loss without a reference, on log-probs averaged over the answer."""
    return lambda policy, _: loss(
        policy.chosen,
        policy.rejected,
        chosen_lengths=policy.chosen_lengths,
        rejected_lengths=policy.rejected_lengths,
        **options,
    )


@dataclass(frozen=True)
class Treatment:
    """One way to learn the preference, as data."""

    loss: Literal["amapo", "simpo", "dpo"] = "amapo"
    beta: float = 2.0
    gamma: float = 0.0  # SimPO's margin, in score units
    margin: AdaptiveMargin = AdaptiveMargin()
    batch_size: int | None = None  # pairs a step, where it is not the setting's; steps times pairs stay the same
    micro_batch: int | None = None  # pairs that a statistic is taken over; None: the whole batch
    estimator: str = "itself"  # one of benchmarks.studies.estimators
    flipped: float = 0.0  # share of the training pairs whose answers are swapped
    misranked: float | None = None  # share of every batch that the checkpoint ranks wrong; None: as they come

    def objective(self, batch_size: int, device: str | torch.device = "cpu") -> Objective:
        """The loss, with a state of its own where the estimator has one."""
        if self.loss == "dpo":
            return lambda policy, ref: dpo_loss(
                policy.chosen, policy.rejected, ref.chosen, ref.rejected, beta=self.beta, reduction="none"
            )
        if self.loss == "simpo":
            return averaged(simpo_loss, beta=self.beta, gamma=self.gamma, reduction="none")
        statistics = None
        if self.estimator != "itself":
            statistics = estimators(self.micro_batch or batch_size, batch_size, device)[self.estimator]
        return averaged(amapo_loss, beta=self.beta, margin=self.margin, statistics=statistics, reduction="none")

    def unified_margin(self, margins: Tensor, ref: Logps) -> Tensor:
        """The margin over the policy's own score, [B]: DPO's is what its reference contributes."""
        return margins + self.beta * (ref.chosen - ref.rejected) if self.loss == "dpo" else margins

    def rewards(self, sums: Tensor, lengths: Tensor, ref_sums: Tensor) -> Tensor:
        """Of answers, [N]: what the loss itself ranks by."""
        return self.beta * (sums - ref_sums if self.loss == "dpo" else sums / lengths)


class Optimization(NamedTuple):
    """How the preference is learned, whatever the loss."""

    steps: int
    batch_size: int
    learning_rate: float
    probe_every: int | None = None
    """Steps from one measurement of the parameters' gradients to the next; None: never."""


class Trace(NamedTuple):
    """What happened in training."""

    ranking: Tensor  # [steps, B] nats a token, before the step
    margins: Tensor  # [steps, B] over the policy's own score
    weights: Tensor  # [steps, B] gradient weights
    gradient_error: Tensor  # [steps] of the margins against those of the whole batch's statistics, relative
    probes: list[tuple[int, float, float, float]]  # step; gradient norm of the correct pairs, the misranked, all


def answer_logps(model: nn.Module, texts: Texts, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Summed log-probs and lengths of the answers in these rows, [N] each, on the model's device."""
    device = next(model.parameters()).device
    tokens, labels = (values.to(device) for values in texts.rows(rows))
    return sequence_logps(model(tokens), labels, average=False), (labels >= 0).sum(1)


def pair_logps(model: nn.Module, texts: Texts, pairs: Tensor) -> Logps:
    """Of the pairs with these numbers, where `texts` has all chosen answers first, then all rejected ones."""
    sums, lengths = answer_logps(model, texts, torch.cat([pairs, pairs + len(texts.tokens) // 2]))
    return Logps(*sums.chunk(2), *lengths.chunk(2))


@torch.no_grad()
def all_logps(model: nn.Module, texts: Texts, description: str = "") -> tuple[Tensor, Tensor]:
    """Summed log-probs and lengths of every answer, [N] each, in memory."""
    batches = torch.arange(len(texts.tokens)).split(EVALUATION_BATCH)
    parts = [
        [values.cpu() for values in answer_logps(model, texts, batch)]
        for batch in track(batches, description, disable=not description)
    ]
    sums, lengths = map(torch.cat, zip(*parts))
    return sums, lengths


def as_pairs(sums: Tensor, lengths: Tensor) -> Logps:
    """All chosen answers come first."""
    return Logps(*sums.chunk(2), *lengths.chunk(2))


def shuffled_batches(n: int, batch_size: int, steps: int, seed: int = 0) -> Tensor:
    """[steps, batch_size] numbers below n, epoch after epoch in a new order."""
    needed = steps * batch_size
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(n, generator=generator) for _ in range(-(-needed // n))]
    return torch.cat(epochs)[:needed].view(steps, batch_size)


def composed_batches(misranked: Tensor, share: float, batch_size: int, steps: int, seed: int = 0) -> Tensor:
    """The same, with a given share of misranked pairs in every batch; `misranked` is a mask of the pairs, [n].

    Raises:
        ValueError: if there is none of a kind that the share asks for.
    """
    wrong = round(share * batch_size)
    parts = []
    for count, pool in ((wrong, misranked), (batch_size - wrong, ~misranked)):
        numbers = pool.nonzero()[:, 0]
        if count and not len(numbers):
            raise ValueError(f"a share of {share:g} misranked pairs needs pairs of both kinds, the checkpoint has one")
        if count:
            parts.append(numbers[shuffled_batches(len(numbers), count, steps, seed)])
    return torch.cat(parts, dim=1)


def imitate(
    model: nn.Module, texts: Texts, steps: int, batch_size: int, learning_rate: float = 2e-3,
    seed: int = 0, description: str = "",
) -> None:  # fmt: skip
    """Supervised fine-tuning, in place."""
    if steps == 0:
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    batches = list(shuffled_batches(len(texts.tokens), batch_size, steps, seed))
    for rows in track(batches, description, disable=not description):
        sums, lengths = answer_logps(model, texts, rows)
        loss = -(sums / lengths).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def prefer(
    model: nn.Module, treatment: Treatment, texts: Texts, ref: tuple[Tensor, Tensor], optimization: Optimization,
    seed: int = 0, description: str = "",
) -> Trace:  # fmt: skip
    """Preference training, in place; `ref` are the checkpoint's log-probs and lengths of the texts."""
    pairs, device = len(texts.tokens) // 2, next(model.parameters()).device
    if treatment.flipped:
        texts, ref = flipped(texts, ref, treatment.flipped, seed)
    ref_pairs = as_pairs(*(values.to(device) for values in ref))
    batch = treatment.batch_size or optimization.batch_size
    steps = max(1, optimization.steps * optimization.batch_size // batch)
    if treatment.misranked is None:
        batches = shuffled_batches(pairs, batch, steps, seed)
    else:
        batches = composed_batches(ref_pairs.ranking().cpu() <= 0, treatment.misranked, batch, steps, seed)

    objective = treatment.objective(batch, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=optimization.learning_rate)
    records, probes = [], []
    for step, rows in enumerate(track(list(batches), description, disable=not description)):
        policy, reference = pair_logps(model, texts, rows), ref_pairs.rows(rows.to(device))
        micro_batches = torch.arange(batch, device=device).split(treatment.micro_batch or batch)
        outputs = [objective(policy.rows(part), reference.rows(part)) for part in micro_batches]
        losses = torch.cat([output.loss for output in outputs])
        margins, weights = (
            torch.cat([getattr(output.diagnostics, name) for output in outputs])
            for name in ("margins", "gradient_weights")
        )
        ranking = policy.ranking()
        if optimization.probe_every and step % optimization.probe_every == 0:
            probes.append((step, *gradient_norms(model, losses, ranking)))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

        exact = weights
        if treatment.loss == "amapo" and (treatment.micro_batch or treatment.estimator != "itself"):
            whole = averaged(amapo_loss, beta=treatment.beta, margin=treatment.margin)
            exact = whole(Logps(*(values.detach() for values in policy)), reference).diagnostics.gradient_weights
        error = (weights - exact).norm() / exact.norm()
        records.append((ranking, treatment.unified_margin(margins, reference), weights, error))
    ranking, margins, weights, errors = (torch.stack(values).cpu() for values in zip(*records))
    return Trace(ranking, margins, weights, errors, probes)


def gradient_norms(model: nn.Module, losses: Tensor, ranking: Tensor) -> tuple[float, float, float]:
    """Norm of what the correct pairs, the misranked ones and all contribute to the parameters' gradient of the mean."""
    norms = []
    for group in (ranking > 0, ranking <= 0, torch.ones_like(ranking, dtype=torch.bool)):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        part = torch.where(group, losses, 0).sum() / len(losses)
        gradients = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
        norms.append(nn.utils.get_total_norm([g for g in gradients if g is not None]).item())
    correct, misranked, everything = norms
    return correct, misranked, everything


def flipped(texts: Texts, ref: tuple[Tensor, Tensor], share: float, seed: int) -> tuple[Texts, tuple[Tensor, Tensor]]:
    """The answers of a share of the pairs swapped, the same ones for the same seed."""
    pairs = len(texts.tokens) // 2
    # Not the generator of the batches: by the same permutation, the first of them would be the flipped pairs alone.
    swapped = torch.tensor(random.Random(seed).sample(range(pairs), round(share * pairs)), dtype=torch.int64)
    order = torch.arange(2 * pairs)
    order[swapped], order[swapped + pairs] = swapped + pairs, swapped
    return Texts(texts.tokens[order], texts.labels[order]), (ref[0][order], ref[1][order])
