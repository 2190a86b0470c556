"""`.metadata`, the index of a checkpoint of torch's distributed format (Megatron's torch_dist):
which tensors there are and where each chunk of them lies. Read and written without torch.

It is a pickle. Only its own classes are read, as plain records; anything else is refused.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moetrain.errors import CheckpointError
from moetrain.manifest import read_bytes
from moetrain.models.sharding import Shape
from moetrain.weights.blobs import TORCH_NAMES, named, plain
from moetrain.weights.header import SIZES
from moetrain.weights.pickles import Allowed, RefusedError, bounded, load

INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_PLANNER = "torch.distributed.checkpoint.planner"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor: a box of it, in the blob at [start, start + length) of `file`."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Global:
    """A tensor of a checkpoint."""

    dtype_name: str  # safetensors'
    shape: Shape
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * SIZES[self.dtype_name]


@dataclass(frozen=True, slots=True)
class Value:
    """Something that is no tensor, as `torch.save` writes it."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds."""

    tensors: Mapping[str, Global]
    values: Mapping[str, Value]


class _Record:
    """An object of an index: its attributes, or what it was made with."""

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.args = state


# The classes that an index is made of, by module.
CLASSES = {
    _METADATA: "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
    "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    _PLANNER: "SavePlan TensorWriteData WriteItem WriteItemType BytesIOWriteData",
    _FILESYSTEM: "_StorageInfo _StoragePrefix",
}
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"  # 0.12 to 0.15
_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("torch", "device"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", name): dtype for dtype, name in TORCH_NAMES.items()},
    **{(module, name): _Record for module, names in CLASSES.items() for name in names.split()},
    (_MEGATRON, "MCoreMetadata"): _Record,
    (_MEGATRON, "MCoreSavePlan"): _Record,
}


def read_index(folder: Path) -> Index:
    """A checkpoint's index, checked by its manifest.

    Raises:
        CheckpointError: it is missing, no index, names what reading could run, or has a tensor of a
            dtype that safetensors has not, or one that lies outside of the folder.
    """
    return unpickled(folder, _ALLOWED, _index)


def unpickled[T](folder: Path, allowed: Allowed, read: Callable[[Any], T]) -> T:
    """What `read` makes of a checkpoint's index, which is checked by the manifest and made of what
    is allowed. Raises CheckpointError.
    """
    path = folder / INDEX
    try:
        content = read_bytes(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}). Copy the checkpoint again."
        ) from None
    try:
        with bounded(len(content)):
            return read(load(content, allowed))
    except RefusedError as error:
        raise CheckpointError(
            f"{path} is refused: {str(error)[:200]}. An index of torch's needs nothing but its own"
            " classes; reading any other could run code. Take a checkpoint from whom you trust."
        ) from None
    except MemoryError:
        raise CheckpointError(
            f"{path} is no index of a checkpoint (it asks for more memory than any). Copy the"
            " checkpoint again."
        ) from None
    except Exception as error:  # any bytes may be any instructions, which fail in any way
        raise CheckpointError(
            f"{path} is no index of a checkpoint ({type(error).__name__}: {str(error)[:200]})."
            " Copy the checkpoint again."
        ) from None


def _index(metadata: Any) -> Index:
    """ValueError and the like for what is none."""
    places: dict[str, dict[Shape | None, Value]] = {}
    for at, info in metadata.storage_data.items():
        file, start, length = info.relative_path, info.offset, info.length
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise ValueError(f"{file!r} lies outside of the checkpoint")
        if any(type(n) is not int or not 0 <= n < 1 << 62 for n in (start, length)):
            raise ValueError(f"{file} has no place {(start, length)}")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{file} is compressed or encrypted")
        offset = None if getattr(at, "offset", None) is None else _sizes(at.offset)
        places.setdefault(str(at.fqn), {})[offset] = Value(file, start, length)
    tensors: dict[str, Global] = {}
    values: dict[str, Value] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            values[key] = places[key][None]
            continue
        dtype, shape = entry.properties.args[0], _sizes(entry.size)
        if dtype not in SIZES:
            raise ValueError(f"{key} has dtype {dtype}")
        chunks = tuple(
            Chunk(_sizes(c.offsets), _sizes(c.sizes), *_where(places[key][_sizes(c.offsets)]))
            for c in entry.chunks
        )
        for chunk in chunks:
            if not len(chunk.offsets) == len(chunk.sizes) == len(shape) or any(
                o + n > size for o, n, size in zip(chunk.offsets, chunk.sizes, shape, strict=True)
            ):
                raise ValueError(f"a chunk of {key} lies outside of it")
        tensors[str(key)] = Global(dtype, shape, chunks)
    return Index(tensors, values)


def _where(value: Value) -> tuple[str, int, int]:
    return value.file, value.start, value.length


def _sizes(given: Any) -> Shape:
    sizes = tuple(given)
    if len(sizes) > 16 or any(type(n) is not int or not 0 <= n < 1 << 62 for n in sizes):
        raise ValueError(f"{str(sizes)[:80]} are no sizes")
    return sizes


# Writing: the opcodes of the pickle, one piece after the other, since there may be 100,000 chunks.

_FIRST_MEMO = 1 << 10  # what `plain` numbers lies below


class _Names:
    """Classes and functions, each spelt out once and then taken by its number."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}

    def __call__(self, module: str, name: str) -> bytes:
        number = self._numbers.get((module, name))
        if number is not None:
            return b"j" + struct.pack("<I", number)
        number = self._numbers[module, name] = _FIRST_MEMO + len(self._numbers)
        return named(module, name) + b"r" + struct.pack("<I", number)


def write_index(path: Path, index: Index) -> None:
    """Write it as torch 2.13 does. Raises OSError."""
    names = _Names()
    with path.open("wb") as file:
        file.write(b"\x80\2")
        file.writelines(_object(names(_METADATA, "Metadata"), _content(names, index)))
        file.write(b".")


def _object(kind: bytes, state: Iterable[bytes]) -> Iterator[bytes]:
    yield kind + b")\x81"
    yield from state
    yield b"b"


def _mapping(pairs: Iterable[tuple[bytes, Iterable[bytes]]]) -> Iterator[bytes]:
    yield b"}"
    for key, value in pairs:
        yield key
        yield from value
        yield b"s"


def _attributes(**values: Iterable[bytes]) -> Iterator[bytes]:
    return _mapping((plain(name), value) for name, value in values.items())


def _content(names: _Names, index: Index) -> Iterator[bytes]:
    meta = _attributes(
        checkpoint_id=[plain(None)],
        save_id=[plain(None)],
        load_id=[plain(None)],
        modules=[b"]"],
    )
    return _attributes(
        state_dict_metadata=_mapping(_described(names, index)),
        planner_data=[plain(None)],
        storage_data=_mapping(_stored(names, index)),
        storage_meta=_object(names(_METADATA, "StorageMeta"), meta),
        version=[plain("1.0.0")],
    )


def _described(names: _Names, index: Index) -> Iterator[tuple[bytes, Iterable[bytes]]]:
    for key, tensor in index.tensors.items():
        properties = b"".join(
            [
                b"(" + names("torch", TORCH_NAMES[tensor.dtype_name]),
                names("torch.serialization", "_get_layout") + plain("torch.strided") + b"\x85R",
                b"\x89",  # requires no gradient
                names(_METADATA, "_MEM_FORMAT_ENCODING") + plain(0) + b"\x85R",
                b"\x89t",  # not pinned
            ]
        )
        state = _attributes(
            properties=_object(names(_METADATA, "TensorProperties"), [properties]),
            size=[_size(names, tensor.shape)],
            chunks=_chunks(names, tensor),
        )
        yield plain(key), _object(names(_METADATA, "TensorStorageMetadata"), state)
    for key in index.values:
        kind = names(_METADATA, "BytesStorageMetadata")
        yield plain(key), _object(kind, [b"}"])


def _chunks(names: _Names, tensor: Global) -> Iterator[bytes]:
    yield b"]"
    for chunk in tensor.chunks:
        places = _attributes(
            offsets=[_size(names, chunk.offsets)], sizes=[_size(names, chunk.sizes)]
        )
        yield from _object(names(_METADATA, "ChunkStorageMetadata"), places)
        yield b"a"


def _stored(names: _Names, index: Index) -> Iterator[tuple[bytes, Iterable[bytes]]]:
    for key, tensor in index.tensors.items():
        for chunk in tensor.chunks:
            yield _at(names, key, _size(names, chunk.offsets)), _info(names, chunk)
    for key, value in index.values.items():
        yield _at(names, key, plain(None)), _info(names, value)


def _at(names: _Names, key: str, offset: bytes) -> bytes:
    state = _attributes(fqn=[plain(key)], offset=[offset], index=[plain(None)])
    return b"".join(_object(names(_METADATA, "MetadataIndex"), state))


def _info(names: _Names, place: Chunk | Value) -> Iterator[bytes]:
    state = _attributes(
        relative_path=[plain(place.file)],
        offset=[plain(place.start)],
        length=[plain(place.length)],
    )
    return _object(names(_FILESYSTEM, "_StorageInfo"), state)


def _size(names: _Names, shape: Shape) -> bytes:
    return names("torch", "Size") + plain(shape) + b"\x85R"
