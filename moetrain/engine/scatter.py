"""Sending each pipeline stage of each data-parallel replica its part of what one rank holds.

A part is any object that pickles. Its tensors travel apart, as bytes laid end to end and cut into
pieces of one size, so that nobody has more than a piece of them twice, on the host or on a GPU.
"""

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

PIECE = 64 * 2**20  # bytes
T = TypeVar("T")


class Run(NamedTuple):
    """Bytes of one tensor that lie in a piece."""

    tensor: int
    start: int  # in the tensor
    place: int  # in the piece
    size: int


def pieces(sizes: Sequence[int], piece: int) -> Iterator[list[Run]]:
    """What lies in each piece of tensors of these bytes that are laid end to end."""
    runs: list[Run] = []
    used = 0
    for number, size in enumerate(sizes):
        start = 0
        while start < size:
            fits = min(size - start, piece - used)
            runs.append(Run(number, start, used, fits))
            start, used = start + fits, used + fits
            if used == piece:
                yield runs
                runs, used = [], 0
    if runs:
        yield runs


@dataclass
class Parcel:
    """An object without its tensors, and these, each once."""

    skeleton: bytes = b""
    tensors: list[Tensor] = field(default_factory=list[Tensor])

    @classmethod
    def of(cls, value: Any) -> "Parcel":
        """Tensors on the host, laid out in their order."""
        parcel, file = cls(), io.BytesIO()
        _Pickler(file, parcel.tensors).dump(value)
        parcel.skeleton = file.getvalue()
        return parcel

    @property
    def head(self) -> bytes:
        """What a receiver needs before the tensors' bytes."""
        return pickle.dumps((self.skeleton, [(one.dtype, one.shape) for one in self.tensors]))

    @classmethod
    def expected(cls, head: bytes) -> "Parcel":
        """With room for the tensors."""
        skeleton, kinds = pickle.loads(head)
        return cls(skeleton, [torch.empty(shape, dtype=dtype) for dtype, shape in kinds])

    @property
    def flat(self) -> list[Tensor]:
        """The bytes of each tensor, where they lie."""
        return [one.view(-1).view(torch.uint8) for one in self.tensors]

    def open(self) -> Any:
        """The object with its tensors."""
        return _Unpickler(io.BytesIO(self.skeleton), self.tensors).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors, self._numbers = tensors, dict[int, int]()

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        number = self._numbers.setdefault(id(obj), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(obj.contiguous())
        return number


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]


Carry = Callable[[Tensor], Tensor]
"""Moves bytes to a target's ranks: what the first rank has in them, all of these have after it."""


def send(value: Any, carry: Carry, device: torch.device) -> None:
    """On the rank that has `value`."""
    parcel = Parcel.of(value)
    head = torch.frombuffer(bytearray(parcel.head), dtype=torch.uint8)
    carry(torch.tensor([head.numel()], device=device))
    carry(head.to(device))
    flat = parcel.flat
    buffer = _buffer(flat, device)
    for runs in pieces([tensor.numel() for tensor in flat], PIECE):
        for run in runs:
            tensor = flat[run.tensor][run.start : run.start + run.size]
            buffer[run.place : run.place + run.size].copy_(tensor)
        carry(buffer[: runs[-1].place + runs[-1].size])


def receive(carry: Carry, device: torch.device) -> Any:
    """On a rank that gets what `send` was given: the tensors on the host."""
    size = int(carry(torch.zeros(1, dtype=torch.int64, device=device)))
    head = carry(torch.empty(size, dtype=torch.uint8, device=device))
    parcel = Parcel.expected(head.cpu().numpy().tobytes())
    flat = parcel.flat
    buffer = _buffer(flat, device)
    for runs in pieces([tensor.numel() for tensor in flat], PIECE):
        carry(buffer[: runs[-1].place + runs[-1].size])
        for run in runs:
            tensor = buffer[run.place : run.place + run.size]
            flat[run.tensor][run.start : run.start + run.size].copy_(tensor)
    return parcel.open()


def _buffer(flat: Sequence[Tensor], device: torch.device) -> Tensor:
    size = min(PIECE, sum(tensor.numel() for tensor in flat))
    return torch.empty(size, dtype=torch.uint8, device=device)
