"""Running without values, where some are known: what comes from the host (masks, roles, lengths)
keeps its values on the meta device, so that shapes that depend on them are right.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moetrain.planner.watch import Watch, tensors_in

_NAME = "_values_on_host"  # the attribute of a tensor on meta that has its values on the host


def values_of(tensor: Tensor) -> Tensor | None:
    """The values of a tensor on meta, on the host, where they are known."""
    return getattr(tensor, _NAME, None)


class MetaWatch(Watch):
    """A watch over the meta device."""

    def __init__(self, *, timeline: bool = False) -> None:
        super().__init__(torch.device("meta"), timeline=timeline)
        self._results: dict[Any, Any] = {}  # of operations on shapes, which layers repeat

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        on_meta = [x for x in tensors if x.is_meta]
        if not tensors:
            return func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            return _copied(func, args, kwargs)
        if not on_meta:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            known = values_of(args[0])
            return 1.0 if known is None else known.item()
        if all(not x.is_meta or values_of(x) is not None for x in tensors):
            return _with_values(func, args, kwargs)
        if func._schema.is_mutable:
            result = func(*_by_numbers(func, args), **kwargs)
            if values_of(on_meta[0]) is not None:
                delattr(on_meta[0], _NAME)  # something unknown was written into it
            return result
        args = _by_numbers(func, args)
        if func.is_view or func.namespace != "aten":
            return func(*args, **kwargs)
        return self._as_before(func, args, kwargs)

    def _as_before(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A new tensor of the shape that this operation gave on such shapes: many of torch's own
        rules for shapes are Python, and slow.
        """
        key = (func, _shapes(args), _shapes(kwargs))
        if key in self._results:
            return _alike(self._results[key])
        result = _in_bf16(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in (*tensors_in(args), *tensors_in(kwargs))}
        if not any(x.untyped_storage()._cdata in given for x in tensors_in(result)):
            self._results[key] = _alike(result)  # _unsafe_view, for one, makes nothing
        return result

    def flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Of sequences as long as they are: without values torch takes all for the longest."""

        def known(x: Any) -> Any:
            values = values_of(x) if isinstance(x, Tensor) else None
            return x if values is None else values

        return super().flops(func, tree_map(known, args), kwargs, result)


def _copied(func: Any, args: Any, kwargs: Any) -> Any:
    """From one device to the other: values go along; what is not known is 0 on the host."""
    source, target = args[0], kwargs.get("device")
    known = values_of(source) if source.is_meta else source
    to_host = source.is_meta and target is not None and torch.device(target).type != "meta"
    if to_host:
        given = torch.zeros(source.shape, dtype=source.dtype) if known is None else known
        return func(given, *args[1:], **kwargs)
    result = func(*args, **kwargs)
    if result.is_meta and known is not None:
        here = {
            name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")
        }
        setattr(result, _NAME, func(known, *args[1:], **here))
    return result


def _with_values(func: Any, args: Any, kwargs: Any) -> Any:
    """On the values, and results of the same shapes on meta."""

    def known(x: Any) -> Any:
        return values_of(x) if isinstance(x, Tensor) and x.is_meta else x

    on_host = func(*tree_map(known, args), **tree_map(known, kwargs) | _here(kwargs))
    if func.is_view or func._schema.is_mutable:
        result = func(*args, **kwargs)
    else:
        result = _alike(on_host)
    for made, value in zip(tensors_in(result), tensors_in(on_host), strict=True):
        if made.is_meta:
            setattr(made, _NAME, value)
    return result


def _here(kwargs: Any) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}


def _in_bf16(func: Any, args: Any, kwargs: Any) -> Any:
    """torch 2.13's meta kernel of grouped products takes bf16 alone, unlike those of CPU and CUDA:
    a product of other numbers, by the shape of one in bf16. None for other operations.
    """
    dtype = args[0].dtype if func is torch.ops.aten._grouped_mm.default else torch.bfloat16
    if dtype == torch.bfloat16:
        return None

    def as_bf16(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != dtype:
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device="meta")

    return func(*map(as_bf16, args), **kwargs).to(dtype)


def _shapes(value: Any) -> Any:
    """What an operation's result has its shape from, as a key."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_shapes, value))
    if isinstance(value, dict):
        return tuple((name, _shapes(x)) for name, x in value.items())
    return type(value), value


def _alike(result: Any) -> Any:
    return tree_map(lambda x: _like(x) if isinstance(x, Tensor) else x, result)


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _by_numbers(func: Any, args: Any) -> Any:
    """Masks among the indices of what has no values, as the numbers of what they choose."""
    if func._overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put):
        return args

    def numbered(index: Any) -> list[Any]:
        known = values_of(index) if isinstance(index, Tensor) else None
        if known is None or known.dtype != torch.bool:
            return [index]
        return [_like(x) for x in known.nonzero(as_tuple=True)]

    indices = [one for index in args[1] for one in numbered(index)]
    return (args[0], indices, *args[2:])
