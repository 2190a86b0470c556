"""What Megatron Core asks of torch.cuda, answered on a machine without a GPU.

Written for torch 2.11 to 2.13 and megatron-core 0.19. Megatron names "cuda" in literals and asks
torch.cuda for streams, memory figures and random state. Where a GPU is, nothing here is installed.
Can go when megatron-core builds a model on gloo without it (tests/test_compat.py says when).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = (
    "empty zeros ones full tensor arange rand randn randint linspace eye empty_like zeros_like "
    "ones_like full_like "
    "as_tensor triu_indices tril_indices randperm"
).split()
_target: torch.device | None = None  # where "cuda" is, once this is installed


class _Stream:
    """A stream on a device that has one: everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: Any) -> None:
        pass


class _Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _redirect(device: Any) -> Any:
    if isinstance(device, str) and device.startswith("cuda"):
        return _target
    if isinstance(device, torch.device) and device.type == "cuda":
        return _target
    return device


def _factory(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _redirect(kwargs["device"])
        return make(*args, **kwargs)

    return made


def install(target: torch.device) -> None:
    """Answer for torch.cuda with `target` (cpu or meta) from now on. Only where no GPU is."""
    global _target
    first, _target = _target is None, target
    if not first:
        return
    _install_cuda_namespace()
    # `with torch.device(...)` knows the factories by identity, from a set made at its first use.
    # Made after this, it would hold the wrappers, the context would do nothing, and transformers
    # would leave a model's rotary frequencies uninitialised.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _redirect(kwargs["device"])
        return tensor_to(self, *(_redirect(a) for a in args), **kwargs)

    def typed(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # DistributedOptimizer accepts only tensors whose type() is a torch.cuda one.
        if dtype is not None:
            dtype = dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype
            return tensor_type(self, dtype, *args, **kwargs)
        name = tensor_type(self)
        return (
            name
            if "cuda" in name
            else name.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.")
        )

    torch.Tensor.to = to  # type: ignore[method-assign]
    torch.Tensor.type = typed  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]


def _install_cuda_namespace() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *a: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_device = lambda: _target
    cuda.device_count = lambda: 0
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *a: 0
    cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *a, **k: None)
