"""Folders of weights, whole ones and how each of their files is damaged."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import mutate

INDEX = "model.safetensors.index.json"
KEPT = 1_000_000  # keys of the largest files


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
        container[key] = rng.choice(mutate.NAMES + mutate.NUMBERS)
    else:
        container[key] = rng.choice(mutate.NUMBERS)


def _json(rng: random.Random, path: Path) -> str:
    """Another JSON file."""
    return changed(rng, json.loads(path.read_bytes()), path.write_bytes, path.name)


def changed(
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
            name = rng.choice(
                (*mutate.NAMES, "lm_head.weight", "model.layers.9.x", "rotary_emb.inv_freq")
            )
            header[name] = {"dtype": "F32", "shape": [10**18, 0], "data_offsets": [0, 0]}
            write(dumped(header))
            return f"{name!r} of no bytes"
        case _:
            return changed(rng, header, write, path.name)


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
            index["weight_map"][key] = rng.choice((*mutate.NAMES, *mutate.NUMBERS))
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
        config[key] = rng.choice(mutate.NUMBERS)
        path.write_bytes(dumped(value))
        return f"{key} = {config[key]!r}"
    if rng.random() < 0.2:
        config["quantization_config"] = {"quant_method": rng.choice(("fp8", "mxfp4", "awq", 1, []))}
    return changed(rng, config, lambda raw: _put(path, value, raw), "config")


def _put(path: Path, value: Any, raw: bytes) -> None:
    """A config that may be any bytes, in its note."""
    if path.name == "moetrain.json":
        raw = b'{"hf": ' + raw + b', "dtypes": ' + dumped(value.get("dtypes")) + b"}"
    path.write_bytes(raw)


def change_note(rng: random.Random, folder: Path) -> str:
    names = ["moetrain.json", "moetrain.json", "state.json", "metadata.json"]
    tracker = folder.parent / "latest_checkpointed_iteration.txt"
    if tracker.is_file() and rng.random() < 0.5:
        word = rng.choice(
            (*mutate.NAMES, "7", "release", "9" * 100, "-1", "release\n", "²", "\u0663")
        )
        tracker.write_bytes(word.encode(errors="surrogatepass"))
        return f"the tracker says {word!r}"
    path = folder / rng.choice(names)
    if rng.random() < 0.2:
        path.unlink()
        return f"without {path.name}"
    if path.name == "moetrain.json" and rng.random() < 0.5:
        note = json.loads(path.read_bytes())
        key = rng.choice(sorted(note["dtypes"]))
        words = (
            "float32",
            "float16",
            "int64",
            "float8_e4m3fn",
            "torch.float32",
            *mutate.NUMBERS,
            [],
            {},
        )
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
                files[rng.choice(mutate.NAMES)] = files.pop(name)
            case 1:
                files[rng.choice(mutate.NAMES)] = [0, digest]
            case 2:
                rng.shuffle(cut)
                found["pieces"][name] = [[stop, digest] for stop in [*cut, size]]
            case 3:
                files[name] = rng.choice(([size, digest, 1], [digest, size], [[], {}], size))
            case _:
                found["block"], found["blocks"] = rng.choice(mutate.NUMBERS), {name: [digest] * 3}
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
        with checkpoints.any_number():
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
    "headers": Kind(("plain", "single", "sharded", "mxfp4"), change_header),
    "places": Kind(("sharded",), change_index),
    "configs": Kind(("plain", "single", "mcore", "megatron-lm", "mxfp4"), change_config),
    "metadata": Kind(_MEGATRON, checkpoints.change_metadata),
    "blobs": Kind(_MEGATRON, checkpoints.change_blob),
    "remarks": Kind(("mcore", "megatron-lm"), change_note),
    "manifests": Kind(("single", "sharded", "mcore"), change_manifest),
    "sides": Kind(("plain", "single", "mcore"), change_side),
}
