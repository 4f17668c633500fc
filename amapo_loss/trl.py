"""TRL's DPO trainer with the AMaPO loss: its datasets, collator, fused head, metrics and checkpoints are TRL's own.

Needs TRL 1.16, and nothing else of the package does. Knows that and the package's public names.
"""

from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amapo_loss import _checks
from amapo_loss._checks import Formula, Scaling
from amapo_loss.functional import amapo_loss
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import ScoreWindow

try:
    if version("trl").split(".")[:2] != ["1", "16"]:
        raise ImportError(
            f"amapo_loss.trl needs trl>=1.16,<1.17, found {version('trl')}: `pip install 'amapo-loss[trl]'`"
        )
except PackageNotFoundError:
    raise ImportError("amapo_loss.trl needs TRL: `pip install 'amapo-loss[trl]'`") from None

from trl import DPOConfig, DPOTrainer

# Of DPOConfig, what has no meaning for this loss; said rather than ignored.
OF_OTHER_LOSSES = (
    "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting",
    "discopop_tau",
)  # fmt: skip
OF_A_REFERENCE = ("precompute_ref_log_probs", "sync_ref_model")
WINDOW_FILE = "score_window.pt"  # of a checkpoint
TITLE = "AMaPO: Adaptive Margin-attached Preference Optimization for Language Model Alignment"
CITATION = """@inproceedings{deng2026amapo,
    title     = {{AMaPO: Adaptive Margin-attached Preference Optimization for Language Model Alignment}},
    author    = {Ruibo Deng and Duanyu Feng and Wenqiang Lei},
    booktitle = {AAAI},
    year      = 2026,
    note      = {arXiv 2511.09385}
}"""


@dataclass
class AMaPOConfig(DPOConfig):
    r"""`DPOConfig` with the options of `amapo_loss`.

    Args:
        reference_free: no reference model is built or run. `False`: DPO's score, with the reference that `DPOTrainer`
            would take, or its precomputed log-probs.
        length_average: divide log-probs by the number of tokens in the answer, as the paper does. `False`: sums.
        beta: scale of the ranking score. The authors took 2.0 to 3.0, on averages; sums want some 0.1.
        label_smoothing: share of pairs believed to be labelled the wrong way round, in [0, 0.5).
        formula: of the margin, `"paper"` or `"released"`; like the three that follow, see `AdaptiveMargin`.
        normalize: by the standard deviation.
        scaling: `"exp"` or `"linear"`.
        clip: no margin for pairs that rank well.
        sft_weight: that of TRL's own SFT loss on the chosen answers, added to this one.
        statistics_window: in training, take the statistics over so many of the latest scores, of all processes,
            with a `ScoreWindow`. Makes up for small batches and gradient accumulation.

    Raises:
        ValueError: for an option of another loss, or one of a reference together with `reference_free`.
    """

    beta: float = field(default=2.0, metadata={"help": "Scale of the ranking score."})
    reference_free: bool = field(default=True, metadata={"help": "Build and run no reference model."})
    length_average: bool = field(default=True, metadata={"help": "Divide log-probs by the length of the answer."})
    formula: Formula = field(default="paper", metadata={"help": "Of the margin."})
    normalize: bool = field(default=True, metadata={"help": "Measure hardness in standard deviations."})
    scaling: Scaling = field(default="exp", metadata={"help": "Of the margin."})
    clip: bool = field(default=True, metadata={"help": "No margin for pairs that rank well."})
    sft_weight: float = field(default=0.0, metadata={"help": "Of the SFT loss on the chosen answers."})
    statistics_window: int | None = field(default=None, metadata={"help": "Scores behind the statistics."})

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        for name in OF_OTHER_LOSSES + (OF_A_REFERENCE if self.reference_free else ()):
            value, default = getattr(self, name), defaults[name]
            if value != default:
                why = "of DPO's other losses" if name in OF_OTHER_LOSSES else "of a reference, and reference_free is on"
                raise ValueError(f"{name} is {why}: leave it at {default!r}, got {value!r}")
        _checks.number("beta", self.beta, above=0)
        _checks.number("label_smoothing", self.label_smoothing, at_least=0, below=0.5)
        _checks.number("sft_weight", self.sft_weight, at_least=0)
        if self.statistics_window is not None:
            _checks.integer("statistics_window", self.statistics_window, at_least=1)
        _ = self.margin  # raises for what is none

    @property
    def margin(self) -> AdaptiveMargin:
        """What the four options say."""
        return AdaptiveMargin(self.formula, self.normalize, self.scaling, self.clip)


_NO_REFERENCE: Any = object()  # passed where DPOTrainer would otherwise build a second model


class AMaPOTrainer(DPOTrainer):
    """`DPOTrainer` with the AMaPO loss, used exactly like it, with an `AMaPOConfig`.

    The statistics are those of all processes. Logs what `DPOTrainer` logs, with the rewards of this loss, and the other
    entries of its summary under `amapo/`. Checkpoints hold the window of scores, so that a resumed run goes on bitwise.

    Example:
        >>> args = AMaPOConfig("out", beta=2.5, learning_rate=6e-7)  # doctest: +SKIP
        >>> trainer = AMaPOTrainer("Qwen/Qwen3-0.6B", args=args, train_dataset=dataset)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    Source: arXiv 2511.09385.
    """

    _tag_names = ["trl", "amapo"]  # noqa: RUF012
    _name = "AMaPO"
    _paper = {"title": TITLE, "id": "2511.09385", "citation": CITATION}  # noqa: RUF012

    precompute_ref_logps: bool

    def __init__(
        self, model: Any, ref_model: Any = None, args: AMaPOConfig | None = None, *others: Any, **options: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = AMaPOConfig(f"{name.split('/')[-1]}-AMaPO")
        if not isinstance(args, AMaPOConfig):
            raise TypeError(f"args must be an AMaPOConfig, got {type(args).__name__}")
        if args.reference_free and ref_model is not None:
            raise ValueError("ref_model was given, and reference_free is on: pass AMaPOConfig(reference_free=False)")
        super().__init__(model, _NO_REFERENCE if args.reference_free else ref_model, args, *others, **options)
        size = args.statistics_window
        self.window = None if size is None else ScoreWindow(size).to(self.accelerator.device)
        # What DPOTrainer's own loss has left to compute: the SFT term, or nothing, and the metrics.
        self.loss_types = ["sft"] if args.sft_weight else ["sigmoid"]
        self.loss_weights = [args.sft_weight]

    @property
    def ref_model(self) -> Any:
        """As `DPOTrainer` has it; None without a reference."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        self._ref_model = None if model is _NO_REFERENCE else model

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        policy: list[Any] = []

        def heard(*arguments: Any, **options: Any) -> Any:
            policy.append(model(*arguments, **options))
            return policy[-1]

        inputs = inputs | self._reference_logps(inputs)  # which DPOTrainer then takes, and no forward pass of its own
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            rest = super()._compute_loss(heard, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss = self._amapo_loss(policy[0].log_probs, inputs) + (rest[0] if return_outputs else rest)
        return (loss, rest[1]) if return_outputs else loss

    def _reference_logps(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Sums, as if precomputed; of no reference, zeros."""
        if self.precompute_ref_logps:
            return {}
        if self.args.reference_free:
            chosen = rejected = torch.zeros(len(inputs["input_ids"]) // 2, device=self.accelerator.device)
        else:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _amapo_loss(self, token_logps: Tensor, inputs: dict[str, Any]) -> Tensor:
        """From the log-probs of all tokens; logs its summary in place of DPO's."""
        counted = inputs["completion_mask"][:, 1:]
        chosen_logps, rejected_logps = token_logps[:, -counted.shape[1] :].sum(1).chunk(2)
        reference = [None, None]
        if not self.args.reference_free:
            reference = [inputs[name].to(token_logps.device) for name in ("ref_chosen_logps", "ref_rejected_logps")]
        chosen_lengths, rejected_lengths = counted.sum(1).chunk(2) if self.args.length_average else (None, None)
        training = self.model.training
        loss, diagnostics = amapo_loss(
            chosen_logps, rejected_logps, *reference,
            chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
            beta=self.args.beta, label_smoothing=self.args.label_smoothing, margin=self.args.margin,
            statistics=self.window if training else None,
            process_group=dist.group.WORLD if self.accelerator.num_processes > 1 else None,
        )  # fmt: skip
        summary = diagnostics.summary()
        averages = self.accelerator.gather(torch.stack(list(summary.values()))).view(-1, len(summary)).mean(0)
        metrics = self._metrics["train" if training else "eval"]
        # In place of what DPOTrainer has just appended, or beside it.
        for name, value in zip(summary, averages.tolist()):
            metrics[name][len(metrics["rewards/margins"]) - 1 :] = [value]
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.window is not None and self.args.should_save:
            torch.save(self.window.state_dict(), Path(output_dir) / WINDOW_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.window is not None and checkpoint is not None and (Path(checkpoint) / WINDOW_FILE).exists():
            self.window.load_state_dict(torch.load(Path(checkpoint) / WINDOW_FILE, weights_only=True))
