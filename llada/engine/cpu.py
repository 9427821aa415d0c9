"""Lets Megatron-Core run on a machine without a GPU, and with one optimizer everywhere.

Megatron-Core 0.16.1 has no CPU mode: it asks torch.cuda for the current device, allocates with
device="cuda", compares tensor type strings and keeps random states of the GPU. `before_import`
redirects those names to the CPU, where there is no GPU; `after_import` mends what must be patched
inside Megatron-Core. Both are process-wide and happen once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from llada.device import gpu_available

_FIRST_CALL_RACE = (
    "sin",
    "cos",
    "tan",
    "exp",
    "log",
    "tanh",
    "erf",
    "sqrt",
    "expm1",
    "log1p",
    "sigmoid",
)


def settle_math() -> None:
    """Call every vectorised math function once on one element.

    The first multi-threaded call of such a function in a process can return low precision in one
    thread's part (a race in the math library's dispatch); a one-element call first avoids it.
    Without this, two runs of the same step may differ.
    """
    for dtype in (torch.float32, torch.float64):
        for name in _FIRST_CALL_RACE:
            getattr(torch.ones(1, dtype=dtype), name)()


def available() -> bool:
    """Whether this process computes on the CPU."""
    return not gpu_available()


@functools.cache
def before_import() -> None:
    """Redirect the CUDA names that Megatron-Core reaches for. Call before the first import of
    megatron.core.
    """
    if not available():
        return
    # tracing costs 19 s in the first step and gains nothing here
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    settle_math()
    _redirect_devices()
    _redirect_random_state()
    _redirect_streams()


@functools.cache
def after_import() -> None:
    """Mend Megatron-Core itself. Call after the first import of megatron.core."""
    import megatron.core.optimizer as optimizer
    import megatron.core.tensor_parallel.random as random

    # On a GPU too, even where Transformer Engine or Apex are installed: it leaves out a step on the
    # device.
    optimizer.Adam = torch.optim.AdamW
    # else it hands AdamW the arguments of Transformer Engine's or Apex's Adam
    optimizer.USING_PYTORCH_OPTIMIZER = True
    if not available():
        return
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(
        new_state
    )
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    # It warns that the CPU state changed inside a GPU random context: here they are one and the
    # same.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if isinstance(device, (str, torch.device)) else False


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # no page-locked allocator in a CPU build
        return factory(*args, **kwargs)

    return wrapped


def _redirect_devices() -> None:
    from torch.utils._device import _device_constructors

    # cached on first use: it must see the original factories, or `with torch.device(...)` ignores
    # ours
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.empty_cache = lambda: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    original_type = torch.Tensor.type
    names = {
        torch.float32: "torch.cuda.FloatTensor",
        torch.float16: "torch.cuda.HalfTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
    }

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and self.dtype in names:
            return names[self.dtype]
        return original_type(self, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


def _redirect_random_state() -> None:
    import torch.cuda.random

    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    modules: tuple[Any, ...] = (torch.cuda, torch.cuda.random)
    for module in modules:
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


class _NoStream:
    """Stands in for a CUDA stream where there is only one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, *args: Any) -> None:
        return

    def wait_event(self, *args: Any) -> None:
        return

    def synchronize(self, *args: Any) -> None:
        return

    def record_event(self, *args: Any) -> _NoStream:
        return self


def _redirect_streams() -> None:
    @contextlib.contextmanager
    def stream(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    torch.cuda.Stream = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.stream = stream  # type: ignore[assignment]
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()  # type: ignore[assignment]
    torch.cuda.default_stream = torch.cuda.current_stream
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]
