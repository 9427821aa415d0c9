"""Which device this process computes on: a GPU if there is one, or what LLADA_DEVICE says."""

from __future__ import annotations

import os

from llada.errors import UserError

VARIABLE = "LLADA_DEVICE"
"""Environment variable. `cpu`: never use a GPU. `cuda`: refuse to start without a GPU. Unset or
empty: use a GPU if there is one.
"""


def hide_unwanted_gpus() -> None:
    """Hide all GPUs from this process and its children if LLADA_DEVICE is `cpu`.

    Torch and Megatron-Core each look for GPUs on their own, and CUDA reads its variable only once:
    call this before either is imported.
    """
    if os.environ.get(VARIABLE) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def gpu_available() -> bool:
    """Whether this process computes on a GPU.

    Raises:
        UserError: LLADA_DEVICE is neither `cpu` nor `cuda`, or is `cuda` and torch has no GPU.
    """
    import torch

    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "cpu", "cuda"):
        raise UserError(
            f"{VARIABLE}: '{choice}' is not a device; use cpu or cuda, or unset it to use a GPU if"
            " there is one"
        )
    if choice == "cpu":
        return False
    available = torch.cuda.is_available()
    # An explicit `cuda` never falls back: a failed driver would turn a run on a cluster into one on
    # its CPUs without a word.
    if choice == "cuda" and not available:
        raise UserError(f"{VARIABLE}: cuda needs a GPU, and {_why_no_gpu()}")
    return available


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    return f"torch's CUDA {torch.version.cuda} finds none; does nvidia-smi list one?"
