"""Conversions that were killed, and damage to what they leave."""

import json
import os
import random
from pathlib import Path
from typing import Any

import mutate


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
            try:
                lines[place : place + 1] = [json.dumps(value)]
            except RecursionError:  # json reads deeper than it writes
                lines[place : place + 1] = ["[" * 5000]
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
