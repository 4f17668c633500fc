"""Published preference losses as lines of code: each is one call of `amapo_loss`.

The table of docs/losses.md is written from `LOSSES`, `figures/losses.py` draws its pictures with them, and `compare.py`
trains with them, so that the line on the page is the line that runs. A test compares each line with a published formula
in float64. Depends only on torch and amapo_loss.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amapo_loss import AdaptiveMargin, AMaPOOutput, ScoreStatistics, amapo_loss

Both = tuple[Tensor, Tensor]  # [B] of the chosen responses and [B] of the rejected ones


class Batch(NamedTuple):
    """The names that a line may use: what is known of B pairs."""

    sums: Both  # log-probs summed over the tokens of a response
    means: Both  # log-probs averaged over the tokens of a response
    ref_sums: Both  # the same under the reference model
    ref_means: Both
    lengths: Both  # tokens
    ratings: Both  # how good the responses are, by an annotator or a reward model; the chosen one is rated higher
    rewards: Both  # outputs of a reward model that is being trained
    on_policy: Both  # how probable a response is among those of the policy: see WPO
    mean_gap: Tensor  # 0-dim, a running mean of `gap(sums, ref_sums)` over the latest batches


def gap(policy: Both, ref: Both) -> Tensor:
    """Return how much more the policy prefers the chosen responses than the reference model does [B]."""
    return (policy[0] - ref[0]) - (policy[1] - ref[1])


def standardized(x: Tensor) -> Tensor:
    """Return how many standard deviations each entry is above the mean of the batch [B]. No pair may be left out."""
    mean, std, _ = ScoreStatistics.of(x)  # on several ranks: ScoreStatistics.of(x, process_group)
    return (x - mean) / std.clamp(min=1e-6)  # before the first step, the policy is the reference, and every gap is 0


def dynamic_margins(gamma: float, tau: float, steps: int = 20) -> Callable[[Tensor, ScoreStatistics], Tensor]:
    """Return a function that gives the margins of gamma-PO, whose mean is `gamma`.

    They are n * gamma * p, where p minimizes the mean loss plus tau * KL(p, uniform), by exponentiated gradient. No
    pair may be left out.
    """

    def margins(scores: Tensor, _: ScoreStatistics) -> Tensor:
        n, p = len(scores), torch.full_like(scores, 1 / len(scores))
        for _step in range(steps):
            gradient = tau * torch.log(n * p) + gamma * torch.sigmoid(n * gamma * p - scores)
            p = torch.softmax(torch.log(p) - min(0.5 / tau, 1.0) * gradient, dim=0)
        return n * gamma * p

    return margins


class Loss(NamedTuple):
    """A published loss."""

    name: str
    paper: str  # its number on arXiv, or an address
    score: str  # r, in TeX
    margin: str  # h, in TeX
    line: str  # the loss and its diagnostics, with one of the authors' settings
    good_for: str  # in the authors' view
    not_compared: str = ""  # why `compare` does not train with it; empty if it does

    def __call__(self, batch: Batch, **options: Any) -> AMaPOOutput:
        """Run the line on a batch. The options are added to those of the call in the line."""
        names = {"torch": torch, "AdaptiveMargin": AdaptiveMargin, "amapo_loss": partial(amapo_loss, **options)}
        functions = {"gap": gap, "standardized": standardized, "dynamic_margins": dynamic_margins}
        output: AMaPOOutput = eval(
            self.line, names | functions | batch._asdict()
        )  # the line is a constant of this file
        return output


_DPO_SCORE = r"\beta\,(\Delta S - \Delta S_\mathrm{ref})"
_SIMPO_SCORE = r"\beta\,\Delta A"

LOSSES = (
    Loss(
        "DPO",
        "2305.18290",
        _DPO_SCORE,
        "0",
        "amapo_loss(*sums, *ref_sums, beta=0.1, margin=0.0)",
        "alignment without a reward model or reinforcement learning",
    ),
    Loss(
        "cDPO",
        "https://ericmitchell.ai/cdpo.pdf",
        _DPO_SCORE,
        "0",
        "amapo_loss(*sums, *ref_sums, beta=0.1, margin=0.0, label_smoothing=0.1)",
        "labels of which some are swapped (label smoothing)",
    ),
    Loss(
        "length-normalized DPO",
        "2411.15124",
        r"\beta\,(\Delta A - \Delta A_\mathrm{ref})",
        "0",
        "amapo_loss(*means, *ref_means, beta=5.0, margin=0.0)",
        "no preference for long responses",
    ),
    Loss(
        "R-DPO",
        "2403.19159",
        _DPO_SCORE,
        r"\alpha\,(\lvert y_l \rvert - \lvert y_w \rvert)",
        "amapo_loss(*sums, *ref_sums, beta=0.1, margin=0.05 * (lengths[1] - lengths[0]))",
        "no preference for long responses",
    ),
    Loss(
        "ODPO",
        "2402.10571",
        _DPO_SCORE,
        r"\alpha \log(\mathrm{rating}_w - \mathrm{rating}_l)",
        "amapo_loss(*sums, *ref_sums, beta=0.5, margin=1.0 * torch.log(ratings[0] - ratings[1]))",
        "ratings that say how much better a response is; few pairs",
    ),
    Loss(
        "beta-DPO",
        "2407.08639",
        r"\beta_\mathrm{batch}\,(\Delta S - \Delta S_\mathrm{ref})",
        "0",
        "amapo_loss(*sums, *ref_sums, "
        "beta=(0.1 * (1 + 0.6 * (gap(sums, ref_sums).mean() - mean_gap))).clamp(min=1e-3), margin=0.0)",
        "pairs of mixed quality",
    ),
    Loss(
        "WPO",
        "2406.11827",
        _DPO_SCORE,
        "0",
        "amapo_loss(*sums, *ref_sums, beta=0.01, margin=0.0, weights=(on_policy[0] * on_policy[1]).clamp(max=1))",
        "responses of other models than the policy",
    ),
    Loss(
        "Llama 2's reward model",
        "2307.09288",
        r"\Delta \mathrm{reward}",
        r"m(\mathrm{rating}_w - \mathrm{rating}_l)",
        "amapo_loss(*rewards, beta=1.0, margin=(ratings[0] - ratings[1] - 1) / 3)",
        "reward models, with pairs whose ratings say how clear the choice is",
        not_compared="it trains a reward model",
    ),
    Loss(
        "CPO",
        "2401.08417",
        r"\beta\,\Delta S",
        "0",
        "amapo_loss(*sums, beta=0.1, margin=0.0)",
        "machine translation; no reference model",
        not_compared="its authors add an SFT loss",
    ),
    Loss(
        "ORPO",
        "2403.07691",
        r"\Delta \log \frac{e^A}{1 - e^A}",
        "0",
        "amapo_loss(*(x - torch.log(-torch.expm1(x)) for x in means), beta=1.0, margin=0.0)",
        "fine-tuning and preferences in one stage; no reference model",
        not_compared="its authors add an SFT loss",
    ),
    Loss(
        "SimPO",
        "2405.14734",
        _SIMPO_SCORE,
        r"\gamma",
        "amapo_loss(*means, beta=2.0, margin=1.0)",
        "no reference model; a score that is what generation maximizes",
    ),
    Loss(
        "AlphaPO",
        "2501.03884",
        r"\beta\,\Delta \frac{1 - e^{-\alpha A}}{\alpha}",
        r"\gamma",
        "amapo_loss(*(-torch.expm1(-0.25 * x) / 0.25 for x in means), beta=2.5, margin=0.25)",
        "control of how much the log-prob of the chosen response falls",
    ),
    Loss(
        "alpha-DPO",
        "2410.10148",
        _SIMPO_SCORE,
        r"\gamma + \beta\alpha\,s(\Delta A - \Delta A_\mathrm{ref})",
        "amapo_loss(*means, beta=2.5, margin=2.5 * (0.15 + 0.05 * standardized(gap(means, ref_means))))",
        "a margin for each pair, larger for the pairs that the policy separates well",
    ),
    Loss(
        "gamma-PO",
        "2506.03690",
        _SIMPO_SCORE,
        r"n\gamma\,p_i, \; p = \operatorname{argmin}\, \overline{L} + \tau\,\mathrm{KL}(p, \tfrac1n)",
        "amapo_loss(*means, beta=10.0, margin=dynamic_margins(gamma=3.0, tau=3.0))",
        "noisy or ambiguous pairs, whose margins it lowers",
    ),
    Loss(
        "AMaPO, paper",
        "2511.09385",
        _SIMPO_SCORE,
        r"\beta e^{z_i \mu} \text{ where } z_i \mu > 0, \text{ else } 0",
        "amapo_loss(*means, beta=2.0)",
        "misranked pairs, whose gradient it amplifies, while it suppresses that of correct ones",
    ),
    Loss(
        "AMaPO, released code",
        "2511.09385",
        _SIMPO_SCORE,
        r"\beta e^{z_i \bar d} \text{ where } z_i > 0, \text{ else } 0",
        'amapo_loss(*means, beta=2.0, margin=AdaptiveMargin("released"))',
        "the same",
    ),
)


def made_up_batch(n: int = 400, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Return a batch of n pairs with made-up numbers of a usual size. A third of the pairs is misranked."""
    generator = torch.Generator().manual_seed(seed)

    def normal(mean: float, std: float) -> Tensor:
        return mean + std * torch.randn(n, generator=generator, dtype=dtype)

    def both(make: Callable[[], Tensor]) -> Both:
        return make(), make()

    shared_length = torch.randint(40, 200, (n,), generator=generator)
    lengths = both(lambda: (shared_length + torch.randint(-20, 21, (n,), generator=generator)).to(dtype))
    shared = normal(-1.0, 0.15).clamp(max=-0.5)  # some prompts are easier than others
    means = (shared + normal(0.05, 0.12)).clamp(max=-0.05), (shared + normal(-0.05, 0.12)).clamp(max=-0.05)
    # The reference has the same preferences, less pronounced.
    ref_means = (
        shared + 0.8 * (means[0] - shared) + normal(0, 0.01),
        shared + 0.8 * (means[1] - shared) + normal(0, 0.01),
    )
    sums, ref_sums = ((x[0] * lengths[0], x[1] * lengths[1]) for x in (means, ref_means))
    lower = torch.randint(1, 4, (n,), generator=generator)
    steps = torch.randint(1, 5, (n,), generator=generator)  # 1 to 4: from negligibly to significantly better
    return Batch(
        sums,
        means,
        ref_sums,
        ref_means,
        lengths,
        ratings=((lower + steps).to(dtype), lower.to(dtype)),
        rewards=(normal(0.4, 1.0), normal(-0.4, 1.0)),
        on_policy=both(lambda: torch.exp(normal(-0.5, 0.3))),
        mean_gap=torch.tensor(1.0, dtype=dtype),
    )
