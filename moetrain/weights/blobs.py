"""One tensor as `torch.save` writes it, made and read without torch and without holding it: the
bytes before the values and those behind them.

A blob is a zip archive that compresses nothing: the pickle that describes the tensor in
`archive/data.pkl`, its values in `archive/data/0`. The layout is that of torch 2.13, which older
versions read.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from moetrain.weights.header import SIZES
from moetrain.weights.pickles import load_small

ALIGNMENT = 64  # bytes; of the values in the file, for who maps it into memory
_LONGEST = 1 << 16  # bytes of a description; it has some hundreds

# safetensors' dtype -> torch's, and the storage that names it in a pickle; the last two have none.
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_STORAGE_OF = {dtype: storage for storage, dtype in _STORAGES.items()}


@dataclass(frozen=True)
class Blob:
    """What stands around the values of a tensor."""

    prefix: bytes
    num_bytes: int  # of the values
    _entries: tuple["_Member", ...]
    _start: int  # of the member that holds the values

    @cached_property
    def size(self) -> int:
        return len(self.prefix) + self.num_bytes + len(self.suffix(0))

    def suffix(self, checksum: int) -> bytes:
        """What follows values with this CRC-32."""
        before = len(self.prefix) + self.num_bytes
        values = _Member("archive/data/0", self._start, checksum, self.num_bytes)
        archive = _Archive(before, values.descriptor())
        members = [*self._entries, values, archive.add("archive/version", b"3\n")]
        return archive.ended(members)

    def is_around(self, prefix: bytes, suffix: bytes) -> bool:
        """Whether these are what stands around values, whatever CRC-32 they have."""
        checksum = int.from_bytes(suffix[4:8], "little")
        return prefix == self.prefix and suffix == self.suffix(checksum)


@dataclass(frozen=True)
class _Member:
    """A file of an archive."""

    name: str
    start: int
    checksum: int
    size: int

    def local(self, extra: int = 0) -> bytes:
        """Its header, whose checksum and size follow the content."""
        padding = struct.pack("<2sH", b"FB", extra - 4) + b"Z" * (extra - 4) if extra else b""
        fields = (b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, len(self.name), len(padding))
        return struct.pack("<4sHHHHHIIIHH", *fields) + self.name.encode() + padding

    def descriptor(self) -> bytes:
        return struct.pack("<4sIII", b"PK\7\x08", self.checksum, self.size, self.size)

    def central(self) -> bytes:
        fields = (b"PK\1\2", 0, 0, 0x808, 0, 0, 0, self.checksum, self.size, self.size)
        rest = (len(self.name), 0, 0, 0, 0, 0, self.start)
        return struct.pack("<4sHHHHHHIIIHHHHHII", *fields, *rest) + self.name.encode()


class _Archive:
    """The bytes of an archive from its byte `begin` on."""

    def __init__(self, begin: int = 0, content: bytes = b""):
        self._begin, self.content = begin, content

    def tell(self) -> int:
        return self._begin + len(self.content)

    def add(self, name: str, content: bytes) -> _Member:
        """A whole member."""
        member = _Member(name, self.tell(), zlib.crc32(content), len(content))
        self.content += member.local() + content + member.descriptor()
        return member

    def ended(self, members: Sequence[_Member]) -> bytes:
        """All of it, with the directory of these members at the end."""
        central = b"".join(member.central() for member in members)
        fields = (b"PK\5\6", 0, 0, len(members), len(members), len(central), self.tell(), 0)
        return self.content + central + struct.pack("<4sHHHHIIH", *fields)


@lru_cache(maxsize=1024)
def tensor_blob(dtype_name: str, shape: tuple[int, ...]) -> Blob:
    """What stands around the values of a tensor [shape], row-major."""
    num_bytes = prod(shape) * SIZES[dtype_name]
    archive = _Archive()
    entries = (
        archive.add("archive/data.pkl", _description(dtype_name, shape)),
        archive.add("archive/byteorder", b"little"),
    )
    values = _Member("archive/data/0", archive.tell(), 0, num_bytes)
    at = archive.tell() + len(values.local())
    prefix = archive.content + values.local(extra=4 + -(at + 4) % ALIGNMENT)
    return Blob(prefix, num_bytes, entries, values.start)


def object_blob(value: Any) -> bytes:
    """Plain values as `torch.save` has them."""
    archive = _Archive()
    members = [
        archive.add("archive/data.pkl", pickle.dumps(value, 2)),
        archive.add("archive/byteorder", b"little"),
        archive.add("archive/version", b"3\n"),
    ]
    return archive.ended(members)


def named(module: str, name: str) -> bytes:
    """The opcode of a pickle that takes a class or a function by its name."""
    return f"c{module}\n{name}\n".encode()


def plain(value: Any) -> bytes:
    """The opcodes of plain values."""
    return pickle.dumps(value, 2)[2:-1]


def _description(dtype_name: str, shape: tuple[int, ...]) -> bytes:
    """The pickle of a contiguous tensor: how to rebuild it from storage 0."""
    storage = _STORAGE_OF.get(dtype_name)
    kind = named("torch.storage", "UntypedStorage") if storage is None else named("torch", storage)
    count = prod(shape) if storage else prod(shape) * SIZES[dtype_name]
    place = [plain("storage"), kind, plain("0"), plain("cpu"), plain(count)]
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    hooks = named("collections", "OrderedDict") + b")R"
    arguments = [
        b"(" + b"".join(place) + b"tQ",
        plain(0),
        plain(shape),
        plain(strides),
        b"\x89",
        hooks,
    ]
    function = "_rebuild_tensor_v2"
    if storage is None:
        function = "_rebuild_tensor_v3"
        arguments.append(named("torch", TORCH_NAMES[dtype_name]))
    return b"\x80\2" + named("torch._utils", function) + b"(" + b"".join(arguments) + b"tR."


@dataclass(frozen=True)
class Found:
    """A tensor in a blob."""

    dtype_name: str
    shape: tuple[int, ...]
    start: int  # of its values in the blob

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * SIZES[self.dtype_name]


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    """What a description says, in place of the tensor."""
    return storage, offset, shape, strides, rest


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.storage", "UntypedStorage"): "bytes",
    **{("torch", storage): dtype for storage, dtype in _STORAGES.items()},
    **{("torch", name): dtype for dtype, name in TORCH_NAMES.items()},
}


def tensor_of(blob: io.BufferedIOBase) -> Found:
    """The tensor of a blob, whose values are not read. ValueError for what is none, or is not
    row-major.
    """
    try:
        with zipfile.ZipFile(blob) as archive:
            root = archive.namelist()[0].split("/")[0]
            described = archive.getinfo(f"{root}/data.pkl")
            if described.file_size > _LONGEST:
                raise ValueError(f"a description of {described.file_size} bytes")
            description = archive.read(described)
            values = archive.getinfo(f"{root}/data/0")
        blob.seek(values.header_offset)
        name, extra = struct.unpack("<26xHH", blob.read(30))
        start = values.header_offset + 30 + name + extra
        size = blob.seek(0, io.SEEK_END)
        storage, offset, shape, strides, rest = load_small(description, _ALLOWED)
        dtype = storage[1] if storage[1] in SIZES else rest[2]
        tensor = Found(dtype, tuple(shape), start)
        kept = [s for s, n in zip(strides, shape, strict=True) if n > 1]
        wanted = [prod(shape[i + 1 :]) for i, n in enumerate(shape) if n > 1]
        lies = offset == 0 and kept == wanted and values.file_size == tensor.num_bytes
    except Exception as error:  # any bytes may be any archive and any instructions
        raise ValueError(f"no tensor as torch.save writes it ({str(error)[:200]})") from None
    if not lies or values.compress_type or start + tensor.num_bytes > size:
        raise ValueError("a tensor that does not lie there row by row")
    return tensor
