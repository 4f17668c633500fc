"""A training step of AMaPOTrainer against one of TRL's own DPOTrainer, on the same model and the same pairs.

    python -m benchmarks.speed.trainer

DPO with precomputed reference log-probs, so that neither runs a second model. Short runs take turns, so that whatever
else the machine does meets all of them; a ratio is taken within a turn, and its median over the turns is reported. The
first steps of a run do not count. Prints a table, writes JSON.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from datasets.utils import disable_progress_bars
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer

from amapo_loss.trl import AMaPOConfig, AMaPOTrainer
from benchmarks.record import RESULTS, version_of, write_json
from benchmarks.speed.memory import peak_bytes

WARM_UP = 2  # steps


def byte_tokenizer() -> Any:
    """A token for every byte, and two more."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    of_bytes = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_bytes.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=of_bytes, pad_token="<pad>", eos_token="<eos>")


def llama(vocabulary: int, width: int, layers: int, seed: int = 0) -> Any:
    """With random weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width // 2, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Clock(transformers.TrainerCallback):
    """Seconds of each step of a run."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop, when the device has done it, too."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def pairs(n: int) -> Any:
    """Prompts of 64 bytes, answers of 64 or 60."""
    texts = [{"prompt": f"{i:064d}", "chosen": f"{7 * i:064d}", "rejected": f"{11 * i:060d}"} for i in range(n)]
    return Dataset.from_list(texts)


# Configuration, trainer, and options of its own.
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DPOTrainer, precomputed": (DPOConfig, DPOTrainer, {"precompute_ref_log_probs": True}),
    "AMaPOTrainer": (AMaPOConfig, AMaPOTrainer, {}),
    "AMaPOTrainer, window": (AMaPOConfig, AMaPOTrainer, {"statistics_window": 128}),
}


def run(kind: str, folder: str, steps: int, batch: int, make_model: Callable[[], Any]) -> Any:
    """A trainer, not yet run, and its clock."""
    config, trainer_of, own = KINDS[kind]
    on_gpu = torch.cuda.is_available()
    args = config(
        folder, per_device_train_batch_size=batch, max_steps=steps, logging_steps=1, report_to="none",
        use_cpu=not on_gpu, bf16=on_gpu, disable_tqdm=True, save_strategy="no", learning_rate=1e-6, **own,
    )  # fmt: skip
    clock = Clock()
    of_kind = trainer_of(
        make_model(),
        args=args,
        train_dataset=pairs(steps * batch),
        processing_class=byte_tokenizer(),
        callbacks=[clock],
    )
    of_kind.remove_callback(transformers.PrinterCallback)
    return of_kind, clock


def main() -> None:
    """Take turns, then one run each for the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of a run")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / f"trainer_{device}.json")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")  # of theirs there are many
    transformers.logging.set_verbosity_error()
    disable_progress_bars()

    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        make = partial(
            run, folder=folder, steps=args.steps, batch=args.batch_size,
            make_model=partial(llama, args.vocabulary, args.width, args.layers),
        )  # fmt: skip
        for _ in track(range(args.rounds), "taking turns"):
            for kind in KINDS:
                trainer, clock = make(kind)
                trainer.train()
                seconds[kind].append(statistics.median(clock.seconds[WARM_UP:]))
        memory = {}
        for kind in KINDS:
            trainer, _ = make(kind, steps=1)
            memory[kind] = peak_bytes(trainer.train, device)

    base = next(iter(KINDS))
    rows: list[dict[str, Any]] = [
        {
            "trainer": kind,
            "ms": statistics.median(seconds[kind]) * 1e3,
            "ratio": statistics.median(mine / of_base for mine, of_base in zip(seconds[kind], seconds[base])),
            "peak_mb": memory[kind] / 2**20,
        }
        for kind in KINDS
    ]
    table = Table(title="A training step", box=SIMPLE)
    for column in ("", "ms", "ratio", "MB at the peak"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(row["trainer"], f"{row['ms']:,.0f}", f"{row['ratio']:.2f}", f"{row['peak_mb']:,.0f}")
    console = Console()
    console.print(table)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    packages = {package: version_of(package) for package in ("trl", "transformers", "accelerate")}
    write_json(args.out, "benchmarks.speed.trainer", {"settings": settings, "packages": packages, "rows": rows})
    console.print(f"wrote {args.out.name} in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
