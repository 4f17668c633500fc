"""Train a model in the two phases of a study: imitation, then preference training with one of the losses.

Depends on torch, rich, amapo_loss, benchmarks.record, and on estimators.py and models.py.

Every result is a function of the arguments alone. With one thread, the same seed gives bitwise the same numbers.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amapo_loss import AdaptiveMargin, AMaPOOutput, amapo_loss, dpo_loss, simpo_loss
from benchmarks.record import write_tensors
from benchmarks.studies.estimators import estimators
from benchmarks.studies.models import LanguageModel, Texts, length_batches

EVALUATION_BATCH_SIZE = 128  # largest number of texts per forward pass without gradients
SAVE_SECONDS = 60  # time between two saved states of a training

Metrics = dict[str, Any]  # the measurements of one run: numbers and nested dictionaries, as in the JSON
AnswerLogps = tuple[Tensor, Tensor]  # summed log-probs [N] and lengths in tokens [N] of the answers of N texts


class Logps(NamedTuple):
    """Summed log-probs and lengths in tokens of the answers of B pairs under one model."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [B]
    chosen_lengths: Tensor  # [B]
    rejected_lengths: Tensor  # [B]

    def ranking(self) -> Tensor:
        """Return the difference of the average log-probs, [B] in nats per token, detached.

        The model ranks a pair correctly where the difference is above 0.
        """
        return (self.chosen / self.chosen_lengths - self.rejected / self.rejected_lengths).detach()

    def select(self, indices: Tensor) -> "Logps":
        """Return the pairs with these indices [M]."""
        return Logps(*(tensor[indices] for tensor in self))


# An objective maps the log-probs of the policy and of the reference to the loss and its diagnostics.
Objective = Callable[[Logps, Logps], AMaPOOutput]


def averaged(loss: Callable[..., AMaPOOutput], **options: Any) -> Objective:
    """Return an objective that calls a loss without reference on log-probs averaged over the tokens of an answer."""
    return lambda policy, _: loss(
        policy.chosen,
        policy.rejected,
        chosen_lengths=policy.chosen_lengths,
        rejected_lengths=policy.rejected_lengths,
        **options,
    )


@dataclass(frozen=True)
class Treatment:
    """A preference loss and the conditions under which it is trained.

    The names of the fields are keys of the JSON that a study writes.
    """

    loss: Literal["amapo", "simpo", "dpo"] = "amapo"
    beta: float = 2.0
    gamma: float = 0.0  # the margin of SimPO, in score units
    margin: AdaptiveMargin = AdaptiveMargin()  # the margin of AMaPO
    batch_size: int | None = None
    """Pairs per step; None: the batch size of `Optimization`.

    The number of steps changes with it, so that all treatments see the same number of pairs.
    """
    sft: float = 0.0
    """Factor of a supervised fine-tuning loss that is added: the negative average log-prob of the chosen answer."""
    micro_batch: int | None = None  # pairs that the statistics are taken over; None: the whole batch
    estimator: str = "itself"  # a key of `estimators.estimators`, which gives the statistics of a micro-batch
    learning_rate: float | None = None  # None: that of `Optimization`
    flipped: float = 0.0  # share of the training pairs whose answers are swapped
    misranked: float | None = None  # share of each batch that the checkpoint ranks wrongly; None: random batches

    def objective(self, batch_size: int, device: str | torch.device = "cpu") -> Objective:
        """Return the objective that gives a loss per pair. If its estimator has a state, the state is new."""
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
        """Return the margin [B] by which the policy's own score must exceed 0, in score units.

        For DPO, the score difference under the reference acts as such a margin.

        Args:
            margins: [B] margins of the loss.
            ref: log-probs of the reference.
        """
        return margins + self.beta * (ref.chosen - ref.rejected) if self.loss == "dpo" else margins

    def rewards(self, sums: Tensor, lengths: Tensor, ref_sums: Tensor) -> Tensor:
        """Return the implicit rewards [N] of answers, whose differences are the scores that the loss ranks pairs by.

        Args:
            sums: [N] summed log-probs under the policy.
            lengths: [N] lengths in tokens.
            ref_sums: [N] summed log-probs under the reference.
        """
        return self.beta * (sums - ref_sums if self.loss == "dpo" else sums / lengths)


class Optimization(NamedTuple):
    """The options of preference training that do not depend on the loss."""

    steps: int
    batch_size: int
    learning_rate: float
    probe_every: int | None = None
    """Number of steps between two measurements of the gradient norms; None: no measurement."""


class Trace(NamedTuple):
    """What happened at each step of preference training, measured before the optimizer's update."""

    ranking: Tensor  # [steps, B] differences of the average log-probs, nats per token
    margins: Tensor  # [steps, B] unified margins, score units
    weights: Tensor  # [steps, B] gradient weights
    gradient_error: Tensor  # [steps] relative error of the weights against those with the whole batch's statistics
    probes: list[tuple[int, float, float, float]]  # (step, gradient norm of correct pairs, misranked pairs, all pairs)


def answer_logps(model: LanguageModel, texts: Texts, indices: Tensor) -> AnswerLogps:
    """Return the summed log-probs and the lengths of the answers with these indices [N], on the model's device.

    The model reads as many texts at a time as its `forward_tokens` allow. The result keeps the graph of all of them, so
    a loss over the whole batch has the gradient of one forward pass. With `model.recompute`, the graph holds no
    activations, and the backward pass computes them again.
    """
    selected = texts.select(indices)
    batches = length_batches(selected.lengths(), model.forward_tokens)
    sums, device = [], next(model.parameters()).device
    for batch in batches:
        part = selected.select(batch)
        inputs, labels = part.inputs.to(device), part.labels.to(device)
        if model.recompute and torch.is_grad_enabled():
            sums.append(checkpoint(model.answer_logps, inputs, labels, use_reentrant=False))
        else:
            sums.append(model.answer_logps(inputs, labels))
    inverse = torch.cat(batches).argsort().to(device)
    return torch.cat(sums)[inverse], (selected.labels >= 0).sum(1).to(device)


def pair_logps(model: LanguageModel, texts: Texts, pairs: Tensor) -> Logps:
    """Return the log-probs of the pairs with these indices [B], on the model's device.

    `texts` holds all chosen answers, followed by all rejected answers in the same order.
    """
    return as_pairs(*answer_logps(model, texts, torch.cat([pairs, pairs + len(texts.tokens) // 2])))


@torch.no_grad()
def all_logps(model: LanguageModel, texts: Texts, description: str = "") -> AnswerLogps:
    """Return the summed log-probs and the lengths of all answers, on the CPU.

    Args:
        model: the model.
        texts: the texts.
        description: title of a progress bar; the default draws no progress bar.
    """
    order = texts.lengths().argsort(stable=True)  # texts of similar length need little padding
    parts = [
        [tensor.cpu() for tensor in answer_logps(model, texts, batch)]
        for batch in track(order.split(EVALUATION_BATCH_SIZE), description, disable=not description)
    ]
    sums, lengths = (torch.cat(tensors)[order.argsort()] for tensors in zip(*parts))
    return sums, lengths


def as_pairs(sums: Tensor, lengths: Tensor) -> Logps:
    """Return sums [2B] and lengths [2B] as pairs. The first B entries belong to the chosen answers."""
    return Logps(*sums.chunk(2), *lengths.chunk(2))


def shuffled_batches(n: int, batch_size: int, steps: int, seed: int = 0) -> Tensor:
    """Return batches of the indices 0 to n - 1, [steps, batch_size]. Every epoch is a new permutation of them."""
    needed = steps * batch_size
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(n, generator=generator) for _ in range(-(-needed // n))]
    return torch.cat(epochs)[:needed].view(steps, batch_size)


def composed_batches(misranked: Tensor, share: float, batch_size: int, steps: int, seed: int = 0) -> Tensor:
    """Return batches of pair indices, [steps, batch_size], that all have the same share of misranked pairs.

    Args:
        misranked: [n] bool, which pairs are misranked.
        share: share of misranked pairs in each batch, from 0 to 1.
        batch_size: pairs per batch.
        steps: number of batches.
        seed: seed of the order.

    Raises:
        ValueError: if batches need misranked pairs and there are none, or correct pairs and there are none.
    """
    num_misranked = round(share * batch_size)
    parts = []
    for count, mask in ((num_misranked, misranked), (batch_size - num_misranked, ~misranked)):
        if count == 0:
            continue
        indices = mask.nonzero()[:, 0]
        if not len(indices):
            raise ValueError(
                f"a share of {share:g} misranked pairs needs both correct and misranked pairs, "
                "but the checkpoint has only one of them"
            )
        parts.append(indices[shuffled_batches(len(indices), count, steps, seed)])
    return torch.cat(parts, dim=1)


def imitate(
    model: LanguageModel,
    texts: Texts,
    steps: int,
    batch_size: int,
    learning_rate: float = 2e-3,
    seed: int = 0,
    description: str = "",
) -> None:
    """Train the model in place by supervised fine-tuning on the answers.

    Args:
        model: the model.
        texts: the demonstrations.
        steps: number of steps; 0 leaves the model as it is.
        batch_size: texts per step.
        learning_rate: peak of the one-cycle schedule.
        seed: seed of the order of the texts.
        description: title of a progress bar; the default draws no progress bar.
    """
    if steps == 0:
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    batches = list(shuffled_batches(len(texts.tokens), batch_size, steps, seed))
    for batch in track(batches, description, disable=not description):
        sums, lengths = answer_logps(model, texts, batch)
        loss = -(sums / lengths).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def prefer(
    model: LanguageModel,
    treatment: Treatment,
    texts: Texts,
    ref: AnswerLogps,
    optimization: Optimization,
    seed: int = 0,
    description: str = "",
    state_path: Path | None = None,
    advance: Callable[[int], None] = lambda pairs: None,
) -> Trace:
    """Train the model in place on preference pairs and return what happened at each step.

    With `state_path`, an interrupted training continues from its last saved state, with the same numbers. Estimators
    that remember earlier scores are not part of this state, so trainings with them start again.

    Args:
        model: the checkpoint to start from.
        treatment: the loss and its conditions.
        texts: all chosen answers, followed by all rejected answers in the same order.
        ref: log-probs and lengths of `texts` under the checkpoint, which is the reference.
        optimization: the number of steps, the batch size and the learning rate.
        seed: seed of the order of the pairs and of the choice of flipped pairs.
        description: title of a progress bar; the default draws no progress bar.
        state_path: file of the training's state, written every `SAVE_SECONDS`. The caller deletes it.
        advance: called after each step with the number of its pairs.
    """
    num_pairs, device = len(texts.tokens) // 2, next(model.parameters()).device
    if treatment.flipped:
        texts, ref = flip_labels(texts, ref, treatment.flipped, seed)
    ref_pairs = as_pairs(*(tensor.to(device) for tensor in ref))
    batch_size = treatment.batch_size or optimization.batch_size
    steps = max(1, optimization.steps * optimization.batch_size // batch_size)
    if treatment.misranked is None:
        batches = shuffled_batches(num_pairs, batch_size, steps, seed)
    else:
        misranked = ref_pairs.ranking().cpu() <= 0
        batches = composed_batches(misranked, treatment.misranked, batch_size, steps, seed)

    objective = treatment.objective(batch_size, device)
    is_estimated = treatment.loss == "amapo" and (treatment.micro_batch or treatment.estimator != "itself")
    exact_objective = averaged(amapo_loss, beta=treatment.beta, margin=treatment.margin)
    micro_batches = torch.arange(batch_size, device=device).split(treatment.micro_batch or batch_size)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=treatment.learning_rate or optimization.learning_rate)
    records, probes, first_step, saved_at = [], [], 0, time.monotonic()
    if treatment.estimator not in ("itself", "median, MAD"):
        state_path = None
    if state_path and state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["trained"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        records, probes, first_step = state["records"], state["probes"], len(state["records"])
        advance(first_step * batch_size)
    for step in track(range(first_step, steps), description, disable=not description):
        batch = batches[step]
        policy, reference = pair_logps(model, texts, batch), ref_pairs.select(batch.to(device))
        outputs = [objective(policy.select(indices), reference.select(indices)) for indices in micro_batches]
        losses = torch.cat([output.loss for output in outputs])
        if treatment.sft:
            losses = losses - treatment.sft * policy.chosen / policy.chosen_lengths
        margins = torch.cat([output.diagnostics.margins for output in outputs])
        weights = torch.cat([output.diagnostics.gradient_weights for output in outputs])
        ranking = policy.ranking()
        if optimization.probe_every and step % optimization.probe_every == 0:
            probes.append((step, *gradient_norms(model, losses, ranking)))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

        exact_weights = weights
        if is_estimated:
            detached = Logps(*(tensor.detach() for tensor in policy))
            exact_weights = exact_objective(detached, reference).diagnostics.gradient_weights
        error = (weights - exact_weights).norm() / exact_weights.norm()
        records.append((ranking, treatment.unified_margin(margins, reference), weights, error))
        advance(batch_size)
        if state_path and time.monotonic() - saved_at > SAVE_SECONDS:
            state = {"trained": trained, "optimizer": optimizer.state_dict(), "records": records, "probes": probes}
            write_tensors(state_path, state)
            saved_at = time.monotonic()
    ranking, margins, weights, errors = (torch.stack(tensors).cpu() for tensors in zip(*records))
    return Trace(ranking, margins, weights, errors, probes)


def gradient_norms(model: LanguageModel, losses: Tensor, ranking: Tensor) -> tuple[float, float, float]:
    """Return the norms of the parameter gradients that the correct pairs, the misranked pairs and all pairs contribute.

    The gradient of a group is that of its summed losses divided by the batch size, so the gradients of the correct and
    of the misranked pairs add up to the gradient of all pairs.

    Args:
        model: the model.
        losses: [B] loss per pair, with its graph. The graph is kept.
        ranking: [B] differences of the average log-probs.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(group: Tensor) -> list[Tensor]:
        group_loss = torch.where(group, losses, 0).sum() / len(losses)
        of_group = torch.autograd.grad(group_loss, parameters, retain_graph=True, allow_unused=True)
        return [gradient for gradient in of_group if gradient is not None]

    correct, misranked = gradients(ranking > 0), gradients(ranking <= 0)
    all_pairs = [a + b for a, b in zip(correct, misranked)]
    correct_norm, misranked_norm, norm = (nn.utils.get_total_norm(g).item() for g in (correct, misranked, all_pairs))
    return correct_norm, misranked_norm, norm


def flip_labels(texts: Texts, ref: AnswerLogps, share: float, seed: int) -> tuple[Texts, AnswerLogps]:
    """Return the texts and their reference log-probs with the answers swapped in a random share of the pairs.

    Args:
        texts: all chosen answers, followed by all rejected answers in the same order.
        ref: log-probs and lengths of `texts` under the reference.
        share: share of the pairs whose answers are swapped, from 0 to 1.
        seed: seed of the choice of pairs.
    """
    num_pairs = len(texts.tokens) // 2
    # The order of the pairs comes from torch's generator with the same seed. With the same permutation here, the first
    # batches would consist of flipped pairs alone, so Python's generator chooses the pairs.
    flipped = torch.tensor(random.Random(seed).sample(range(num_pairs), round(share * num_pairs)), dtype=torch.int64)
    order = torch.arange(2 * num_pairs)
    order[flipped], order[flipped + num_pairs] = flipped + num_pairs, flipped
    return texts.select(order), (ref[0][order], ref[1][order])
