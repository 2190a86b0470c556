"""The files that make a tokenizer."""

import re
from pathlib import Path

from moetrain.errors import DataError

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # what the Hub's client is asked for
# What a tokenizer's folder may hold; its content decides what text becomes.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of `folder` that decide what text becomes."""
    return [folder / file for file in FILES if (folder / file).is_file()]


def check_folder(folder: Path) -> None:
    """DataError when `folder` is none, or holds no tokenizer."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no tokenizer folder. Give a folder, builtin:NAME or a Hub name"
            " (org/name)."
        )
    if not tokenizer_files(folder):
        raise DataError(
            f"{folder} holds no tokenizer (tokenizer.json). Name one with model.tokenizer."
        )
