"""A benchmark's questions as prompts."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetrain.config.bench import BenchConfig
from moetrain.data import assets
from moetrain.data.chat import Chat
from moetrain.data.messages import FormatError
from moetrain.data.prompts import AGAIN, read_prompt
from moetrain.data.rejects import Reject
from moetrain.data.samples import Prompt
from moetrain.data.sources import find_sources, read_rows
from moetrain.errors import ConfigError, DataError


def locate(bench: BenchConfig, folder: Path) -> Path:
    """The benchmark's file; `folder` is that of its YAML. DataError when it is not there."""
    if assets.is_builtin(bench.data):
        return assets.resolve(bench.data)
    path = folder / Path(bench.data).expanduser()
    if not path.exists():
        hint = f" {bench.source}" if bench.source else " Check `data`."
        raise DataError(f"{bench.name}: its questions are not in {path}.{hint}")
    return path


def read_questions(
    bench: BenchConfig, path: Path, chat: Chat, room: int, notes: Counter[str] | None = None
) -> list[Prompt]:
    """Every question, in the file's order; `room` is the most tokens of a prompt. `notes` takes
    what of how many is not rendered.

    Raises DataError for the first record that cannot be asked: a benchmark that loses questions is
    another benchmark.
    """
    prompts: list[Prompt] = []
    ids: dict[str, int] = {}
    for row in (row for source in find_sources([path], held_out=True) for row in read_rows(source)):
        where = f"{row.file}:{row.line}"
        if isinstance(row, Reject):
            raise DataError(f"{where}: {row.reason}. Mend the file.")
        if any(row.value.get(key) != value for key, value in bench.where.items()):
            continue
        try:
            prompt, prompt_notes = read_prompt(_asked(bench, row.value, where), chat, room)
        except FormatError as error:
            raise DataError(f"{where}: {error}.") from None
        if notes is not None:
            notes.update(prompt_notes)
        prompt = replace(prompt, source=row.file)
        number = ids[prompt.id] = ids.get(prompt.id, 0) + 1
        prompts.append(prompt if number == 1 else replace(prompt, id=f"{prompt.id}{AGAIN}{number}"))
        if len(prompts) == bench.limit:
            break
    if not prompts:
        only = f" with {bench.where}" if bench.where else ""
        raise DataError(f"{path} has no record{only}. Check `data` and `where` of {bench.name}.")
    return prompts


def _asked(bench: BenchConfig, record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The record as one to answer: messages under `prompt`, the right answer under `answer`."""
    for column in filter(None, (bench.question, bench.answer)):
        if record.get(column) in (None, ""):
            raise DataError(
                f"{where} has no {column!r}; its keys are {', '.join(record)}. Set `question` and"
                f" `answer` of {bench.name}."
            )
    columns = {str(name): value for name, value in record.items()}
    try:
        text = bench.prompt.format_map(columns | {"question": record[bench.question]})
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{bench.name}: prompt cannot be filled in ({error}); {where} has {', '.join(columns)}."
            " Write {{ and }} for braces."
        ) from None
    messages = [{"role": "system", "content": bench.system}] if bench.system else []
    messages.append({"role": "user", "content": text})
    others = {name: value for name, value in columns.items() if name != "messages"}
    if bench.answer is not None:
        others["answer"] = record[bench.answer]
    return others | {"prompt": messages}
