"""Damage to a Megatron checkpoint: its index, and the archives in which its tensors lie."""

import io
import random
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutate

WORDS = (
    b"torch", b"Metadata", b"chunks", b"offsets", b"Size", b"Storage", b"_rebuild_tensor_v2",
    b"OrderedDict", b"BFloat16",
)  # fmt: skip


def change_metadata(rng: random.Random, folder: Path) -> str:
    path = folder / ".metadata"
    if rng.random() < 0.4:
        raw, what = _pickle(rng, path.read_bytes())
        path.write_bytes(raw)
        return what
    from moetrain.weights.torch_index import read_index, write_index

    index = read_index(folder)
    key = rng.choice(sorted(index.tensors))
    tensor = index.tensors[key]
    place = rng.randrange(len(tensor.chunks))
    chunks = list(tensor.chunks)
    own = chunks[place]
    match rng.randrange(8):
        case 0:
            chunks[place] = replace(own, offsets=_other(rng, own.offsets))
        case 1:
            chunks[place] = replace(own, sizes=_other(rng, own.sizes))
        case 2:
            del chunks[place]
        case 3:
            chunks.append(replace(own, offsets=_other(rng, own.offsets)))
        case 4:
            name = rng.choice(("start", "length"))
            value = rng.choice((getattr(own, name) + rng.randrange(-9, 9), *mutate.NUMBERS[:10]))
            chunks[place] = replace(own, **{name: value})
        case 5:
            chunks[place] = replace(own, file=rng.choice((*mutate.NAMES[:12], "moetrain.json")))
        case 6:
            tensor = replace(tensor, shape=_other(rng, tensor.shape))
        case _:
            tensor = replace(tensor, dtype_name=rng.choice(("F32", "I16", "F16", "U8", "F8_E5M2")))
    tensors = dict(index.tensors) | {key: replace(tensor, chunks=tuple(chunks))}
    with any_number():
        write_index(path, replace(index, tensors=tensors))
    return f"{key}: {chunks[place : place + 1]} {tensor.dtype_name} {tensor.shape}"


class any_number:
    """What cannot be written leaves the file half written, which is a damage too."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, *rest: Any) -> bool:
        return kind is not None and issubclass(kind, ValueError | TypeError | struct.error)


def _other(rng: random.Random, sizes: Sequence[int]) -> tuple[int, ...]:
    """Other offsets or sizes."""
    result = list(sizes)
    if not result or rng.random() < 0.1:
        return (*sizes, 1)
    place = rng.randrange(len(result))
    result[place] = rng.choice((0, 1, 2, 8, result[place] + 1, result[place] // 2, 2**40, 2**61))
    return tuple(result)


def _pickle(rng: random.Random, raw: bytes) -> tuple[bytes, str]:
    """A pickle with other instructions."""
    match rng.randrange(7):
        case 0:
            call = b"cposix\nmkdir\n(Vexecuted\ntR"
            return raw[:2] + call + raw[2:], "it makes a folder"
        case 1:
            names = (b"cbuiltins\neval\n", b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93")
            name = rng.choice(names)
            return raw[:2] + name + b"0" + raw[2:], f"it names {name!r}"
        case 2:
            bomb = rng.choice((
                b"]r\xff\xff\xff\x7f", b"\x96" + struct.pack("<Q", 2**40), b"\x95" + b"\xff" * 8,
                b"\x8e" + struct.pack("<Q", 2**62), b"\x8b\xff\xff\xff\x7f", b"(" * 100_000,
                b"]" * 100_000 + b"a" * 99_999, b"J\xff\xff\xff\x7f\x85", b"h\xff", b"\x81", b"Q",
                b"I" + b"9" * 6000 + b"\n", b"\x82\x01", b"(i" + b"os\nsystem\n",
            ))  # fmt: skip
            return raw[:2] + bomb + b"0" + raw[2:], f"{bomb[:20]!r} in it"
        case 3:
            old = rng.choice([word for word in WORDS if word in raw])
            new = rng.choice((old[::-1], b"Half".ljust(len(old), b"x"), b"x" * len(old)))
            return raw.replace(old, new, rng.randrange(1, 3)), f"{old!r} -> {new!r}"
        case _:
            for _ in range(rng.randrange(1, 4)):
                raw = mutate.change_bytes(rng, raw)
            return raw, "other bytes in a pickle"


def change_blob(rng: random.Random, folder: Path) -> str:
    """Of one chunk: the frame of its archive, or an archive of another description."""
    from moetrain.weights.torch_index import read_index, write_index

    index = read_index(folder)
    key = rng.choice(sorted(index.tensors))
    tensor = index.tensors[key]
    place = rng.randrange(len(tensor.chunks))
    own = tensor.chunks[place]
    path = folder / own.file
    raw = path.read_bytes()
    blob = raw[own.start : own.start + own.length]
    if rng.random() < 0.4:
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice((rng.randrange(len(blob)), len(blob) - rng.randrange(1, 400)))
            at = max(0, at)
            byte = rng.choice((blob[at] ^ 1 << rng.randrange(8), 0, 255))
            blob = blob[:at] + bytes([byte]) + blob[at + 1 :]
        path.write_bytes(raw[: own.start] + blob + raw[own.start + own.length :])
        return f"other bytes in the blob of {key}"
    blob, what = _archive(rng, blob)
    path.write_bytes(raw + blob)
    chunks = list(tensor.chunks)
    chunks[place] = replace(own, start=len(raw), length=len(blob))
    tensors = dict(index.tensors) | {key: replace(tensor, chunks=tuple(chunks))}
    write_index(folder / ".metadata", replace(index, tensors=tensors))
    return f"the blob of {key}: {what}"


def _archive(rng: random.Random, blob: bytes) -> tuple[bytes, str]:
    """It, made anew with something else."""
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    packed, what, more = zipfile.ZIP_STORED, "as it was", 0
    match rng.randrange(5):
        case 0:
            packed, what = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)), "compressed"
        case 1:
            more = rng.choice((10, 10, 10, 10, 300 << 20))
            packed, what = zipfile.ZIP_DEFLATED, "a description of many bytes"
        case 2:
            gone = rng.choice(sorted(members))
            del members[gone]
            what = f"without {gone}"
        case _:
            members["archive/data.pkl"], what = _pickle(rng, members["archive/data.pkl"])
    if rng.random() < 0.1:
        values = members.get("archive/data/0", b"")
        members["archive/data/0"] = rng.choice((b"", bytes(5), values * 2))
        what += ", other values"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", packed, compresslevel=1) as archive:
        for name, data in members.items():
            with archive.open(name, "w") as file:
                file.write(data)
                for start in range(0, more if name == "archive/data.pkl" else 0, 1 << 20):
                    file.write(bytes(min(1 << 20, more - start)))
    return content.getvalue(), what
