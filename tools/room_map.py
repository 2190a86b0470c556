#!/usr/bin/env python
"""The map of rooms in docs/architecture.md, made from the imports. `--check`: is it so?"""

import argparse
import sys
from pathlib import Path

import grimp

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"
BEGIN, END = "```mermaid\n", "```\n"
LEFT_OUT = {
    "__main__",
    "testing",
    "errors",
    "ports",
    "pulse",
    "distributions",
    "garbage",
    "files",
    "manifest",
}  # all rooms, or tests
OUTSIDE = {
    "engine": "megatron([megatron-core])",
    "rollout": "vllm([vLLM, a process of its own])",
    "weights": "hf([transformers, safetensors])",
}


def imports() -> dict[str, set[str]]:
    """Room -> the rooms that it imports, annotations aside."""
    graph = grimp.build_graph("moetrain", exclude_type_checking_imports=True)
    rooms = {name.split(".")[1] for name in graph.find_children("moetrain")} - LEFT_OUT
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for room in rooms:
        for other in rooms - {room}:
            if graph.direct_import_exists(
                importer=f"moetrain.{room}", imported=f"moetrain.{other}", as_packages=True
            ):
                found[room].add(other)
    return found


def arrows(found: dict[str, set[str]]) -> list[tuple[str, str]]:
    """(imported, importer), without those that follow from others."""

    def below(room: str, path: tuple[str, ...] = ()) -> set[str]:
        assert room not in path, f"a circle of imports: {' -> '.join((*path, room))}"
        deeper = (below(other, (*path, room)) for other in found[room])
        return found[room].union(*deeper)

    return sorted(
        (other, room)
        for room, others in found.items()
        for other in others
        if not any(other in below(between) for between in others - {other})
    )


def drawn() -> str:
    """The map's text."""
    lines = [f"  {lower} --> {upper}" for lower, upper in arrows(imports())]
    lines += [f"  {name} -.-> {room}" for room, name in OUTSIDE.items()]
    return "flowchart BT\n" + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = PAGE.read_text()
    start = text.index(BEGIN) + len(BEGIN)
    stop = text.index(END, start)
    made = drawn()
    if args.check:
        return int(text[start:stop] != made)
    PAGE.write_text(text[:start] + made + text[stop:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
