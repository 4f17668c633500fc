"""Set the environment variables that Triton and the Hugging Face libraries read when they are imported."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests make their own models and data, and must not depend on a network

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU, Triton interprets its kernels on the CPU
