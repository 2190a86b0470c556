"""CUDA tensors without a GPU: torch's FakeTensorMode, with what a GPU's kernels would refuse.

Branches for CUDA are taken, tensors are on cuda:0 and have no values, and mixing them with a CPU's
is an error, as it is on a GPU. What comes from the host (masks, lengths, indices) keeps its values,
so that shapes that depend on them are right. `fake_cudart.c` answers for the device: its context,
streams and events, so that autograd's backward pass runs too.

Written for torch 2.13: what `REFUSES` says is in its aten/src/ATen/native, GroupedMMUtils.h and
transformers/cuda/flash_attn/flash_api.cpp.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from moetrain.planner.watch import tensors_in

SOURCE = Path(__file__).with_name("fake_cudart.c")
_NAME = "_values_on_host"  # the attribute of a fake tensor that has its values
aten = torch.ops.aten


def environment(folder: Path) -> dict[str, str]:
    """For a process in which torch sees a GPU; a C compiler puts a library into `folder`."""
    library = folder / "libfakecudart.so"
    name = "-Wl,-soname,libcuda.so.1"  # torch looks for that one too
    subprocess.run(["cc", "-shared", "-fPIC", name, "-o", library, SOURCE], check=True)
    # What torch.compile makes of a function is Triton's, and is not looked at here.
    return os.environ | {"LD_PRELOAD": str(library), "TORCHDYNAMO_DISABLE": "1"}


class RefusedError(Exception):
    """A kernel of CUDA's would not take this."""


class FakeCuda(FakeTensorMode):
    """Inside it, tensors on cuda are fake, and those on the CPU are as always."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[str]()  # the operations that REFUSES knows, as far as they were asked for

    def __enter__(self) -> "FakeCuda":
        super().__enter__()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda")
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*tensors_in(args), *tensors_in(kwargs)]
        name = str(func._overloadpacket)
        check = REFUSES.get(name) or REFUSES.get(func.namespace)
        if check is not None:
            self.seen.add(name)
            check(*args, **kwargs)
        if not any(isinstance(x, FakeTensor) for x in given) and not _is_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            known = values_of(args[0])
            return args[0].dtype.is_floating_point * 1.0 if known is None else known.item()
        if func is aten.record_stream.default:
            return None
        known = [values_of(x) for x in given]
        values = None
        if given and all(x is not None for x in known) and _is_function(func):
            values = func(*tree_map(_known, args), **tree_map(_known, kwargs) | _here(kwargs))
        elif func._schema.is_mutable:
            _forget(func, args, kwargs)
        if func is aten._to_copy.default and not _is_cuda(kwargs.get("device", args[0].device)):
            if values is None:
                values = torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
            return values
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0] if values is not None else args[0].zero_()
        args, kwargs = tree_map(self._faked, (_by_numbers(func, args), kwargs))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if values is not None:
            for made, value in zip(tensors_in(result), tensors_in(values), strict=True):
                setattr(made, _NAME, value)
        return result

    def _faked(self, x: Any) -> Any:
        is_real = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
        return self.from_tensor(x) if is_real else x


def values_of(x: Tensor) -> Tensor | None:
    """Its values on the host, where they are known."""
    return getattr(x, _NAME, None) if isinstance(x, FakeTensor) else x


def _known(x: Any) -> Any:
    return values_of(x) if isinstance(x, Tensor) else x


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_function(func: Any) -> bool:
    """Whether it is one of its arguments alone."""
    return func.namespace == "aten" and torch.Tag.nondeterministic_seeded not in func.tags


def _here(kwargs: Any) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}


def _forget(func: Any, args: Any, kwargs: Any) -> None:
    """Something unknown is written into these."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for x in tensors_in([given]):
                if hasattr(x, _NAME):
                    delattr(x, _NAME)


def _by_numbers(func: Any, args: Any) -> Any:
    """Masks among the indices, as the numbers of what they choose."""
    if func._overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
        return args

    def numbered(index: Any) -> list[Any]:
        known = values_of(index) if isinstance(index, Tensor) else None
        if known is None or known.dtype != torch.bool:
            return [index]
        return list(known.nonzero(as_tuple=True))

    return (args[0], [one for index in args[1] for one in numbered(index)], *args[2:])


# What kernels refuse, and fake tensors do not


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise RefusedError(what)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *rest: Any, **more: Any) -> None:
    """Beside the strides, which torch's own fake looks at."""
    for x in (a, b):
        offset = x.storage_offset() * x.element_size()
        _need(offset % 16 == 0, f"grouped_mm: data that begin {offset} bytes into a buffer")
    if offs is not None:
        _need(offs.is_cuda and offs.dtype == torch.int32, f"grouped_mm: ends are {offs.dtype}")


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int,
    *rest: Any,
) -> None:  # fmt: skip
    """q [t, a, d], k and v [t', g, d], ends [n+1]."""
    for x in (q, k, v):
        _need(
            x.dtype in (torch.bfloat16, torch.float16) and x.dtype == q.dtype, f"flash: {x.dtype}"
        )
        _need(x.stride(-1) == 1, f"flash: strides {x.stride()}")
        _need(x.size(-1) % 8 == 0 and x.size(-1) <= 256, f"flash: heads of {x.size(-1)}")
    _need(q.size(1) % k.size(1) == 0, f"flash: {q.size(1)} heads for {k.size(1)}")
    _need(k.shape == v.shape, f"flash: keys {tuple(k.shape)}, values {tuple(v.shape)}")
    for ends, longest, x in ((ends_q, max_q, q), (ends_k, max_k, k)):
        _need(ends.is_cuda and ends.dtype == torch.int32 and ends.is_contiguous(), "flash: ends")
        known = values_of(ends)
        if known is not None:
            lengths = known.diff()
            _need(int(lengths.max()) == longest, f"flash: max_seqlen {longest} of {known.tolist()}")
            _need(int(lengths.min()) >= 0 and int(known[-1]) == len(x), f"flash: {known.tolist()}")


def _varlen_backward(grad: Tensor, q: Tensor, *rest: Any) -> None:
    _need(grad.dtype == q.dtype and grad.stride(-1) == 1, "flash: gradient")


def _collective(*args: Any, **kwargs: Any) -> None:
    """NCCL knows no other device, and no strides."""
    for x in (*tensors_in(args), *tensors_in(kwargs)):
        _need(x.is_cuda, f"nccl: a tensor on {x.device}")
        _need(x.is_contiguous(), f"nccl: strides {x.stride()} of {tuple(x.shape)}")


# An operation, or a namespace -> a check of its arguments
REFUSES: dict[str, Callable[..., None]] = {
    "aten._grouped_mm": _grouped_mm,
    "torch_attn._varlen_attn_backward": _varlen_backward,
    "torch_attn._varlen_attn": _varlen,
    "c10d": _collective,
}
