"""Lets Megatron-Core run without a GPU, and with one optimizer everywhere.

Megatron-Core 0.16.1 has no CPU mode: it asks torch.cuda for the current device, allocates with
device="cuda", compares the names of tensor types, and keeps random states of the GPU.
`before_import` redirects these names to the CPU if there is no GPU. `after_import` patches
Megatron-Core itself. Both act on the whole process, once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator

import torch
from torch.distributed import ProcessGroup

from llada.device import gpu_available

_VECTORIZED_FUNCTIONS = (
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


def warm_up_math() -> None:
    """Call every vectorized math function once, on one element.

    The first call of such a function in a process, if it is multi-threaded, can return low
    precision in the part of one thread (a race in the dispatch of the math library). Then two runs
    of the same step differ. A first call on one element is not multi-threaded.
    """
    for dtype in (torch.float32, torch.float64):
        for name in _VECTORIZED_FUNCTIONS:
            getattr(torch.ones(1, dtype=dtype), name)()


def available() -> bool:
    """Whether this process computes on the CPU."""
    return not gpu_available()


@functools.cache
def before_import() -> None:
    """Redirect the CUDA names that Megatron-Core uses. Call before importing megatron.core."""
    if not available():
        return
    # Tracing costs 19 s in the first step and gains nothing on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    warm_up_math()
    _redirect_devices()
    _redirect_random_state()
    _redirect_streams()


@functools.cache
def after_import() -> None:
    """Patch Megatron-Core itself. Call after importing megatron.core."""
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.optimizer as optimizer
    import megatron.core.tensor_parallel.random as random

    # On a GPU too, even if Transformer Engine or Apex is installed: torch's AdamW can skip a step
    # on the device, without waiting for it.
    optimizer.Adam = torch.optim.AdamW
    # Otherwise AdamW would get the arguments of Transformer Engine's or Apex's Adam.
    optimizer.USING_PYTORCH_OPTIMIZER = True
    if not available():
        return
    buffers.dist_reduce_scatter_func = _among_several(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = _among_several(buffers.dist_all_gather_func)
    random._set_cuda_rng_state = _set_rng_state
    random._get_cuda_rng_state = _get_rng_state
    # Megatron-Core warns if the CPU's random state changes inside a GPU random context. Here they
    # are the same state.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _among_several(collective: Callable[..., object]) -> Callable[..., object]:
    """Leave out a reduce-scatter or all-gather of a buffer onto itself, as in a group of one rank.

    Gloo would copy the whole buffer. It does so in a thread of its own, for which OpenMP starts
    more threads. Once there are more of them than cores, OpenMP lets a thread that waits sleep at
    once, so that every operation of the model has to wake one: 5 % of a step on two cores.
    """

    @functools.wraps(collective)
    def call(
        output: torch.Tensor,
        source: torch.Tensor,
        *args: object,
        group: ProcessGroup,
        **kwargs: object,
    ) -> object:
        if group.size() == 1 and output.data_ptr() == source.data_ptr():
            return None
        return collective(output, source, *args, group=group, **kwargs)

    return call


# Megatron-Core and torch.cuda pass a device and further options, which have no meaning here.


def _get_rng_state(*_: object, **__: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(new_state)


def _do_nothing(*_: object, **__: object) -> None:
    return None


def _is_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that replaces device="cuda" by the CPU."""

    @functools.wraps(factory)
    def wrapped(*args: object, **kwargs: object) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        # A CPU build of torch has no allocator of page-locked memory.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _redirect_devices() -> None:
    from torch.utils._device import _device_constructors

    # torch caches this list on first use. It must contain the original factories, or
    # `with torch.device(...)` would ignore ours.
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = _do_nothing
    torch.cuda.empty_cache = _do_nothing
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    original_type: Callable[..., object] = torch.Tensor.type
    # Megatron-Core compares `tensor.type()` with these names.
    cuda_names = {
        torch.float32: "torch.cuda.FloatTensor",
        torch.float16: "torch.cuda.HalfTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
    }

    def type_(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        if not args and not kwargs and self.dtype in cuda_names:
            return cuda_names[self.dtype]
        return original_type(self, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


def _redirect_random_state() -> None:
    import torch.cuda.random

    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    # Both modules export the functions, and Megatron-Core uses either.
    torch.cuda.get_rng_state = _get_rng_state
    torch.cuda.set_rng_state = _set_rng_state
    torch.cuda.random.get_rng_state = _get_rng_state
    torch.cuda.random.set_rng_state = _set_rng_state


class _NoStream:
    """Stands in for a CUDA stream: on a CPU everything runs in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, *args: object) -> None:
        return

    def wait_event(self, *args: object) -> None:
        return

    def synchronize(self, *args: object) -> None:
        return

    def record_event(self, *args: object) -> _NoStream:
        return self


def _redirect_streams() -> None:
    @contextlib.contextmanager
    def stream(*args: object, **kwargs: object) -> Iterator[None]:
        yield

    torch.cuda.Stream = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.stream = stream  # type: ignore[assignment]
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()  # type: ignore[assignment]
    torch.cuda.default_stream = torch.cuda.current_stream
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]
