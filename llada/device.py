"""Which device this process computes on: a GPU where there is one, unless LLADA_DEVICE says
otherwise.
"""

from __future__ import annotations

import os

from llada.errors import UserError

VARIABLE = "LLADA_DEVICE"
"""Environment variable: `cpu` leaves GPUs alone, `cuda` refuses to start without one; unset or
empty: a GPU where there is one.
"""


def hide_unwanted_gpus() -> None:
    """Hide all GPUs from this process and its children when LLADA_DEVICE is `cpu`.

    Torch and Megatron-Core each look for GPUs themselves, and CUDA reads the variable below once:
    this must run before either is imported.
    """
    if os.environ.get(VARIABLE) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def gpu_available() -> bool:
    """Whether this process computes on a GPU.

    Raises:
        UserError: LLADA_DEVICE has another value than `cpu` or `cuda`, or is `cuda` on a machine
            where torch has no GPU.
    """
    import torch

    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "cpu", "cuda"):
        raise UserError(
            f"{VARIABLE}: '{wanted}' is not a device; use cpu or cuda, or unset it to use a GPU"
            " where there is one"
        )
    if wanted == "cpu":
        return False
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        built = torch.version.cuda
        reason = (
            "this build of torch has no CUDA"
            if built is None
            else f"torch's CUDA {built} finds none; does nvidia-smi list one?"
        )
        raise UserError(f"{VARIABLE}: cuda needs a GPU, and {reason}")
    return available
