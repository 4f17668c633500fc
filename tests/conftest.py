"""Without a GPU, Triton interprets its kernels on the CPU. It wants to know before anyone imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
