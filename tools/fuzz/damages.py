"""Folders of weights, whole ones and how each of their files is damaged."""

import io
import json
import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mutate

INDEX = "model.safetensors.index.json"
NAMES = (
    "../secret", "/etc/passwd", "..", ".", "", "a/b", "/dev/zero", "\0", "a" * 300, "x.safetensors",
    "config.json", "~", "./model.safetensors", "model.safetensors/", "\ud800", "a\nb",
)  # fmt: skip
NUMBERS = (-1, 0, 1, 2, 3, 5, 7, 1000, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, True, 1.5,
           "4", None)  # fmt: skip
WORDS = (
    b"torch", b"Metadata", b"chunks", b"offsets", b"Size", b"Storage", b"_rebuild_tensor_v2",
    b"OrderedDict", b"BFloat16",
)  # fmt: skip
KEPT = 1_000_000  # keys of the largest files


def plain_folder(folder: Path, config: Mapping[str, Any], sides: Mapping[str, Any]) -> None:
    """A Hugging Face folder without a manifest, of random bytes of which none is 0."""
    from moetrain.models import read_model
    from moetrain.weights.hf_files import Target, header

    rng = random.Random(0)
    table = read_model(dict(config)).table
    shapes = {n: s for r in table.values() for n, s in zip(r.hf, r.hf_shapes, strict=True)}
    group = [Target(name, "BF16", shape) for name, shape in sorted(shapes.items())]
    folder.mkdir()
    data = bytes(rng.randrange(1, 127) for one in group for _ in range(one.num_bytes))
    (folder / "model.safetensors").write_bytes(header(group) + data)
    for name, content in {"config.json": config, **sides}.items():
        (folder / name).write_text(json.dumps(content))


def cut_columns(source: Path, folder: Path) -> None:
    """A copy of a checkpoint in which each matrix lies in two halves of its columns, as tensor
    parallel ranks write it.
    """
    from moetrain import manifest
    from moetrain.weights.blobs import tensor_blob
    from moetrain.weights.torch_dist import TorchDist
    from moetrain.weights.torch_index import Chunk, write_index

    shutil.copytree(source, folder)
    read = TorchDist(source)
    tensors = dict(read.index.tensors)
    data = folder / "__1_0.distcp"
    with data.open("wb") as file:
        for key, tensor in tensors.items():
            if len(tensor.shape) != 2:
                continue
            rows, half, chunks = tensor.shape[0], tensor.shape[1] // 2, list[Chunk]()
            values = read.rows(key, (), 0, rows)
            for left in (0, half):
                own = values[:, 2 * left : 2 * left + 2 * half].tobytes()
                blob, start = tensor_blob(tensor.dtype_name, (rows, half)), file.tell()
                file.write(blob.prefix + own + blob.suffix(zlib.crc32(own)))
                length = file.tell() - start
                chunks.append(Chunk((0, left), (rows, half), data.name, start, length))
            tensors[key] = replace(tensor, chunks=tuple(chunks))
    write_index(folder / ".metadata", replace(read.index, tensors=tensors))
    (folder / manifest.NAME).unlink()
    manifest.write(folder, manifest.complete(folder, {}))


def weights(folder: Path) -> dict[str, bytes]:
    """The files of a result that hold weights."""
    found = [*folder.glob("*.safetensors"), *folder.glob("*.distcp")]
    return {path.name: path.read_bytes() for path in found}


def content(folder: Path) -> dict[str, bytes]:
    """All of a result."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def dumped(value: Any) -> bytes:
    """As JSON."""
    try:
        return json.dumps(value).encode(errors="surrogatepass")
    except (RecursionError, ValueError):
        return b'{"a": ' * 100_000


def _numbers(rng: random.Random, value: Any) -> None:
    """Another number, name or shape somewhere in a JSON value."""
    found = [(c, k) for c, k in mutate.places(value) if not isinstance(c[k], dict)]
    if not found:
        return
    container, key = rng.choice(found)
    if isinstance(container[key], list):
        own = list(container[key])
        rng.shuffle(own)
        container[key] = rng.choice((own, [*own, 1], own[1:], [2**62, 0], [10**18, 0], [1] * 70))
    elif isinstance(container[key], str):
        container[key] = rng.choice(NAMES + NUMBERS)
    else:
        container[key] = rng.choice(NUMBERS)


def _json(rng: random.Random, path: Path) -> str:
    """Another JSON file."""
    return _changed(rng, json.loads(path.read_bytes()), path.write_bytes, path.name)


def _changed(
    rng: random.Random, value: Any, write: Callable[[bytes], Any], name: str, rest: bytes = b""
) -> str:
    for _ in range(rng.randrange(1, 4)):
        (_numbers if rng.random() < 0.6 else mutate.change_value)(rng, value)
    raw = dumped(value)
    how = rng.random()
    if how < 0.15:
        raw = mutate.change_bytes(rng, raw)
    elif how < 0.2 and b'": ' in raw:  # a key twice
        raw = raw.replace(b"{", raw[: raw.index(b'": ')] + b'": 1, ', 1)
    write(raw + rest)
    return f"{name} {raw[:200]!r}"


def change_header(rng: random.Random, folder: Path) -> str:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def write(text: bytes) -> None:
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    match rng.randrange(10):
        case 0:
            start = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
            path.write_bytes(struct.pack("<Q", start) + raw[8:])
            return f"a header of {start} bytes"
        case 1:
            path.write_bytes(rng.choice((raw[: rng.randrange(len(raw))], raw + bytes(7))))
            return "of another length"
        case 2:
            place = rng.randrange(8 + length, len(raw))
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            return "another value"
        case 3:
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
            return "a pointer"
        case 4 if rng.random() < 0.02:
            nothing = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
            more = ",".join(f'"k{i}":{nothing}' for i in range(KEPT))
            write(b"{" + more.encode() + b"," + json.dumps(header).encode()[1:])
            return "10^6 keys"
        case 5:  # the places of two tensors, or what one is
            names = [name for name in header if name != "__metadata__"]
            a, b = rng.choice(names), rng.choice(names)
            field = rng.choice(("dtype", "shape", "data_offsets"))
            header[a][field], header[b][field] = header[b][field], header[a][field]
            write(json.dumps(header).encode())
            return f"{field} of {a} and {b} changed places"
        case 6:
            names = [name for name in header if name != "__metadata__"]
            name = rng.choice((*NAMES, "lm_head.weight", "model.layers.9.x", "rotary_emb.inv_freq"))
            header[name] = {"dtype": "F32", "shape": [10**18, 0], "data_offsets": [0, 0]}
            write(dumped(header))
            return f"{name!r} of no bytes"
        case _:
            return _changed(rng, header, write, path.name)


def change_index(rng: random.Random, folder: Path) -> str:
    path = folder / INDEX
    match rng.randrange(6):
        case 0:
            shard = rng.choice(sorted(folder.glob("model-*")))
            rng.choice((shard.unlink, lambda: shard.rename(folder / "model.safetensors")))()
            return f"without {shard.name}"
        case 1:
            shard = rng.choice(sorted(folder.glob("model-*")))
            name = rng.choice(("model.safetensors", "consolidated.safetensors"))
            shutil.copy(shard, folder / name)
            return "a second set"
        case 2 | 3:
            index = json.loads(path.read_bytes())
            key = rng.choice(sorted(index["weight_map"]))
            index["weight_map"][key] = rng.choice((*NAMES, *NUMBERS))
            path.write_bytes(dumped(index))
            return f"{key} at {index['weight_map'][key]!r}"
        case 4 if rng.random() < 0.02:
            index = json.loads(path.read_bytes())
            file = next(iter(index["weight_map"].values()))
            index["weight_map"] |= {f"k{i}": file for i in range(KEPT)}
            path.write_bytes(dumped(index))
            return "10^6 keys"
        case _:
            return _json(rng, path)


def change_config(rng: random.Random, folder: Path) -> str:
    note = folder / "moetrain.json"
    path = note if note.is_file() else folder / "config.json"
    value = json.loads(path.read_bytes())
    config = value["hf"] if path == note else value
    if rng.random() < 0.6:
        key = rng.choice(sorted(config))
        config[key] = rng.choice(NUMBERS)
        path.write_bytes(dumped(value))
        return f"{key} = {config[key]!r}"
    if rng.random() < 0.2:
        config["quantization_config"] = {"quant_method": rng.choice(("fp8", "mxfp4", "awq", 1, []))}
    return _changed(rng, config, lambda raw: _put(path, value, raw), "config")


def _put(path: Path, value: Any, raw: bytes) -> None:
    """A config that may be any bytes, in its note."""
    if path.name == "moetrain.json":
        raw = b'{"hf": ' + raw + b', "dtypes": ' + dumped(value.get("dtypes")) + b"}"
    path.write_bytes(raw)


def change_note(rng: random.Random, folder: Path) -> str:
    names = ["moetrain.json", "moetrain.json", "state.json", "metadata.json"]
    tracker = folder.parent / "latest_checkpointed_iteration.txt"
    if tracker.is_file() and rng.random() < 0.5:
        word = rng.choice((*NAMES, "7", "release", "9" * 100, "-1", "release\n", "²", "\u0663"))
        tracker.write_bytes(word.encode(errors="surrogatepass"))
        return f"the tracker says {word!r}"
    path = folder / rng.choice(names)
    if rng.random() < 0.2:
        path.unlink()
        return f"without {path.name}"
    if path.name == "moetrain.json" and rng.random() < 0.5:
        note = json.loads(path.read_bytes())
        key = rng.choice(sorted(note["dtypes"]))
        words = ("float32", "float16", "int64", "float8_e4m3fn", "torch.float32", *NUMBERS, [], {})
        note["dtypes"][key] = rng.choice(words)
        path.write_bytes(dumped(note))
        return f"{key} was {note['dtypes'][key]!r}"
    return _json(rng, path)


def change_manifest(rng: random.Random, folder: Path) -> str:
    from moetrain import manifest

    path = folder / manifest.NAME
    found = json.loads(path.read_bytes())
    found.pop("sha256")
    if rng.random() < 0.5:
        files, name = found["files"], rng.choice(sorted(found["files"]))
        size, digest = files[name]
        cut = sorted(rng.randrange(size + 2) for _ in range(rng.randrange(4))) if size else []
        match rng.randrange(5):
            case 0:
                files[rng.choice(NAMES)] = files.pop(name)
            case 1:
                files[rng.choice(NAMES)] = [0, digest]
            case 2:
                rng.shuffle(cut)
                found["pieces"][name] = [[stop, digest] for stop in [*cut, size]]
            case 3:
                files[name] = rng.choice(([size, digest, 1], [digest, size], [[], {}], size))
            case _:
                found["block"], found["blocks"] = rng.choice(NUMBERS), {name: [digest] * 3}
    else:
        for _ in range(rng.randrange(1, 3)):
            (_numbers if rng.random() < 0.6 else mutate.change_value)(rng, found)
    try:
        found["sha256"] = manifest._digest(found)
        path.write_bytes(manifest._text(found).encode(errors="surrogatepass"))
    except (RecursionError, TypeError):
        path.write_bytes(dumped(found))
    return f"manifest {dumped(found)[:300]!r}"


def change_side(rng: random.Random, folder: Path) -> str:
    names = ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
    path = folder / rng.choice([*names, "tokenizer.json", "chat_template.jinja"])
    match rng.randrange(5):
        case 0:
            path.unlink(missing_ok=True)
            path.symlink_to(rng.choice(("../../secret", "/dev/null", "config.json", path.name)))
            return f"{path.name} is a link to {os.readlink(path)}"
        case 1:
            path.unlink(missing_ok=True)
            path.mkdir()
            return f"{path.name} is a folder"
        case 2:
            more = folder / "additional_chat_templates"
            more.mkdir()
            (more / "a.jinja").symlink_to(rng.choice(("../../../secret", "../config.json", "..")))
            return "a template is a link"
        case 3 if path.is_file():
            path.write_bytes(mutate.change_bytes(rng, path.read_bytes()))
            return f"other bytes in {path.name}"
        case _ if path.suffix == ".json":
            return _json(rng, path)
    path.write_text("{{ x }}")
    return "a template"


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
            value = rng.choice((getattr(own, name) + rng.randrange(-9, 9), *NUMBERS[:10]))
            chunks[place] = replace(own, **{name: value})
        case 5:
            chunks[place] = replace(own, file=rng.choice((*NAMES[:12], "moetrain.json")))
        case 6:
            tensor = replace(tensor, shape=_other(rng, tensor.shape))
        case _:
            tensor = replace(tensor, dtype_name=rng.choice(("F32", "I16", "F16", "U8", "F8_E5M2")))
    tensors = dict(index.tensors) | {key: replace(tensor, chunks=tuple(chunks))}
    with _any_number():
        write_index(path, replace(index, tensors=tensors))
    return f"{key}: {chunks[place : place + 1]} {tensor.dtype_name} {tensor.shape}"


class _any_number:
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


def after(rng: random.Random, folder: Path, kind: str) -> str:
    """What comes of the manifest of a damaged folder."""
    from moetrain import manifest

    path = folder / manifest.NAME
    if kind == "manifests":
        return "damaged manifest"
    if not path.is_file():
        return "no manifest"
    roll = rng.random()
    if roll < 0.2:
        return "stale manifest"
    path.unlink()
    if roll > 0.7:
        with _any_number():
            manifest.write(folder, manifest.complete(folder, {}))
            return "new manifest"
    return "no manifest"


@dataclass(frozen=True)
class Kind:
    """Of a damage: which folders it is done to."""

    folders: tuple[str, ...]
    change: Callable[[random.Random, Path], str]


_MEGATRON = ("mcore", "columns", "megatron-lm")
KINDS = {
    "headers": Kind(("plain", "single", "sharded"), change_header),
    "places": Kind(("sharded",), change_index),
    "configs": Kind(("plain", "single", "mcore", "megatron-lm"), change_config),
    "metadata": Kind(_MEGATRON, change_metadata),
    "blobs": Kind(_MEGATRON, change_blob),
    "remarks": Kind(("mcore", "megatron-lm"), change_note),
    "manifests": Kind(("single", "sharded", "mcore"), change_manifest),
    "sides": Kind(("plain", "single", "mcore"), change_side),
}


class _KilledError(BaseException):
    """In place of a kill."""


def kill(rng: random.Random, action: str, source: Path, out: Path) -> None:
    """A conversion that ends before its result has its name."""
    from moetrain.weights import convert, stream

    left, put, size = rng.choice((rng.randrange(150), rng.randrange(1000))), stream.put, stream.SYNC

    def some(*given: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _KilledError
        put(*given)

    def never(*given: Any) -> None:
        raise _KilledError

    write, convert.manifest.write = convert.manifest.write, never
    stream.put, stream.SYNC = some, rng.choice((1, 3000))
    try:
        getattr(convert, action)(source, out, convert.Options(workers=1, resume=True))
    except _KilledError:
        pass
    finally:
        stream.put, stream.SYNC, convert.manifest.write = put, size, write


def change_part(rng: random.Random, part: Path, outside: Path) -> str:
    """Damage to what a killed conversion has left. "other bytes": to data that it says is there."""
    journal = part / "journal"
    raw = journal.read_bytes()
    data = sorted(p for p in part.iterdir() if p.suffix in (".safetensors", ".distcp"))
    match rng.randrange(10):
        case 0:
            journal.write_bytes(raw[: rng.randrange(len(raw))])
            return "a torn journal"
        case 1:
            lines = raw.splitlines(keepends=True)
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            journal.write_bytes(b"".join(lines))
            return "a line twice"
        case 2:
            for _ in range(rng.randrange(1, 4)):
                raw = mutate.change_bytes(rng, raw)
            journal.write_bytes(raw)
            return "other bytes in the journal"
        case 3:
            first, *lines = raw.decode().splitlines()
            place = rng.randrange(len(lines)) if lines else 0
            value = json.loads(lines[place].split(" ", 1)[-1]) if lines else []
            mutate.change_value(rng, value)
            lines[place : place + 1] = [json.dumps(value)]
            journal.write_text("\n".join([first, *lines]) + "\n")
            return "an entry that nobody wrote"
        case 4:
            rng.choice(data).unlink()
            return "a file that is gone"
        case 5:
            path = rng.choice(data)
            os.truncate(path, rng.randrange(path.stat().st_size))
            return "a truncated file"
        case 6:
            path = rng.choice(data)
            content = path.read_bytes()
            place = rng.randrange(len(content))
            changed = bytes([content[place] ^ 1 << rng.randrange(8)])
            path.write_bytes(content[:place] + changed + content[place + 1 :])
            return "other bytes"
        case 7:
            path = rng.choice((*data, journal))
            path.unlink()
            path.symlink_to(outside)
            return "a link"
        case 8:
            for name in ("model-00009-of-00009.safetensors", "x", "config.json", ".metadata"):
                (part / name).write_bytes(b"x")
            (part / "folder").mkdir()
            (part / "folder" / "link").symlink_to(outside)
            return "files of another"
        case _:
            return "nothing"
