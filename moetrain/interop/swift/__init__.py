"""ms-swift's `megatron` commands and recipes, each from the other."""

from moetrain.interop.swift.convert import (
    Exported,
    Imported,
    command_text,
    from_swift,
    to_swift,
    write_text,
)
from moetrain.interop.swift.survey import survey

__all__ = [
    "Exported",
    "Imported",
    "command_text",
    "from_swift",
    "survey",
    "to_swift",
    "write_text",
]
