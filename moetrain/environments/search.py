"""A search over a folder of texts as a tool."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetrain.data.parsing import parse_json
from moetrain.environments.base import Tool
from moetrain.environments.toolbox import Toolbox
from moetrain.errors import ConfigError

SUFFIXES = (".txt", ".md", ".jsonl")
PASSAGE = 1000  # characters of a result, about
COLUMNS = ("text", "content", "contents", "passage", "document")  # of a record, the first it has
TITLES = ("title", "id")


class Search(Toolbox):
    """A tool `search` that finds the passages of a folder that have a query's words (BM25).

    Args:
        folder: .txt and .md files, each cut into passages; .jsonl files with a text in each record.
        results: passages that a search returns.
    """

    def __init__(self, folder: str, results: int = 3):
        try:
            import bm25s
        except ImportError as error:
            raise ConfigError(
                "rollout.environment=search needs bm25s: pip install 'moetrain[search]'."
            ) from error
        self.passages = list(passages(Path(folder).expanduser()))
        self._results, self._bm25s = min(results, len(self.passages)), bm25s
        self._index = bm25s.BM25()
        tokens: Any = bm25s.tokenize([text for _, text in self.passages], show_progress=False)
        if not any(tokens.ids):
            raise _nothing_in(Path(folder).expanduser(), "word")
        self._index.index(tokens, show_progress=False)
        super().__init__({"search": self._search}, lambda: [_tool()])

    def _search(self, query: str) -> str:
        tokens = self._bm25s.tokenize([query], show_progress=False)
        records, scores = self._index.retrieve(tokens, k=self._results, show_progress=False)
        best = [
            self.passages[int(number)]
            for number, score in zip(records[0], scores[0], strict=True)
            if score > 0
        ]
        if not best:
            return "Nothing has these words."
        return "\n\n".join(f"[{i}] {title}\n{text}" for i, (title, text) in enumerate(best, 1))


def passages(folder: Path) -> Iterator[tuple[str, str]]:
    """(where it is, the text) of each passage, in the order of the files' names. ConfigError."""
    if not folder.is_dir():
        raise ConfigError(
            f"rollout.environment_options.folder: {folder} is no folder. Give one with"
            f" {', '.join(SUFFIXES)} files."
        )
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    found = False
    for path in files:
        for title, text in _records(path) if path.suffix == ".jsonl" else _parts(path):
            if text.strip():
                found = True
                yield title, text.strip()
    if not found:
        raise _nothing_in(folder, "text")


def _nothing_in(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"rollout.environment_options.folder: {folder} has no {what} in {', '.join(SUFFIXES)}"
        " files. Put some there."
    )


def _parts(path: Path) -> Iterator[tuple[str, str]]:
    """A file's paragraphs, joined until there are PASSAGE characters."""
    part = ""
    for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        if part and len(part) + len(paragraph) > PASSAGE:
            yield path.name, part
            part = ""
        part = f"{part}\n\n{paragraph}" if part else paragraph
    yield path.name, part


def _records(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record: Any = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number} is not JSON ({error}). Remove the line.") from error
        fields = record if isinstance(record, dict) else {"text": record}
        text = next((fields[name] for name in COLUMNS if fields.get(name)), None)
        if text is None:
            raise ConfigError(
                f"{path}:{number} has no {' or '.join(COLUMNS)}. Give each record a text."
            )
        title = next(
            (str(fields[name]) for name in TITLES if fields.get(name)), f"{path.name}:{number}"
        )
        yield title, text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)


def _tool() -> Tool:
    about = "Search the documents for passages that have the words of a query."
    query = {"type": "string", "description": "The words to look for."}
    parameters = {"type": "object", "properties": {"query": query}, "required": ["query"]}
    function = {"name": "search", "description": about, "parameters": parameters}
    return {"type": "function", "function": function}
