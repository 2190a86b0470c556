"""`moetrain grade`: the rewards of completions in a file, as a run would pay them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from moetrain.config.load import explain
from moetrain.config.reward_files import check_reward_files
from moetrain.config.rewards import RewardConfig, RewardList
from moetrain.config.yaml_text import parse_value
from moetrain.data.parsing import parse_json
from moetrain.data.samples import write_lines
from moetrain.data.thoughts import opened_by
from moetrain.errors import ConfigError, DataError
from moetrain.observe.progress import CountDisplay
from moetrain.rewards import Completion, Grader, Verdict

WINDOW = 256  # completions, and more where a prompt has more, between two looks at the progress
BINS = 10
WIDTH = 40  # characters of the longest bar
SHOWN = 3  # worst and best


def grade(path: Path, rewards: str, out: Path | None, workers: int, seconds: float) -> int:
    """Grade the completions of `path` by `rewards`, names with commas between them or a YAML list
    as in a recipe, with a line of `out` for each. Returns the exit code.

    Raises MoetrainError in one line: for a record that is none, before anything is graded.
    """
    configs = parse_rewards(rewards)
    check_reward_files(configs)
    items = read_items(path)
    if out is not None and out.exists() and out.samefile(path):
        raise DataError(f"--out {out} is the file that is graded. Give another one.")
    grader = Grader(configs, max(1, min(workers, len(items))), seconds)
    results: list[Verdict] = []
    display = CountDisplay("graded", len(items))
    try:
        for window in _windows(items):
            results += grader.grade_completions(window)
            for _ in window:
                display.advance()
    except KeyboardInterrupt:
        raise DataError(f"stopped after {len(results)} of {len(items)} completions.") from None
    finally:
        display.close()
        grader.close()
    if out is not None:
        rows = ({"reward": one.reward, "parts": dict(one.parts)} for one in results)
        try:
            write_lines(out, rows)
        except OSError as error:
            raise DataError(f"--out {out} cannot be written: {error.strerror}.") from None
    _show(path, configs, items, results, grader)
    return 0


def parse_rewards(text: str) -> list[RewardConfig]:
    """`accuracy,./mine.py:f`, or a list as in a recipe. Raises ConfigError."""
    given: Any = [name.strip() for name in text.split(",") if name.strip()]
    if text.lstrip().startswith(("[", "{")):
        given = parse_value(text, "--rewards")
        given = given if isinstance(given, list) else [given]
    if not given:
        raise ConfigError("--rewards names none. Give at least one, such as accuracy.")
    try:
        return RewardList.model_validate({"rewards": given}).rewards
    except ValidationError as error:
        raise ConfigError(f"--rewards: {explain(error, RewardList)}") from None


def read_items(path: Path) -> list[Completion]:
    """The completions of a file, in order. Raises DataError for the first line that has none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give a JSONL file.") from None
    items: list[Completion] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(_item(len(items), parse_json(line)))
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}.") from None
    if not items:
        raise DataError(f'{path} has no record. Give JSONL of {{"completion": …, columns…}}.')
    return items


def _item(number: int, record: Any) -> Completion:
    """Raises ValueError with what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is an object, not {type(record).__name__}")
    if "completion" not in record:
        keys = ", ".join(map(str, record)) or "none"
        raise ValueError(f"it has no `completion`; its keys are {keys}")
    prompt, ids = record.get("prompt"), record.get("completion_ids")
    columns = {name: value for name, value in record.items() if name != "completion"}
    if prompt is None:
        columns.pop("prompt", None)
    elif not isinstance(prompt, str) and not _are_messages(prompt):
        raise ValueError("`prompt` is neither a text nor messages with role and content")
    is_text = isinstance(prompt, str)
    return Completion(
        number,
        _completion(record["completion"]),
        columns,
        opened=opened_by(prompt) if isinstance(prompt, str) else "",
        is_text=is_text,
        tokens=tuple(ids) if isinstance(ids, list) else None,
    )


def _completion(value: Any) -> str:
    if isinstance(value, str):
        return value
    if _are_messages(value) and len(value) == 1 and isinstance(value[0]["content"], str):
        return value[0]["content"]
    raise ValueError("`completion` is neither a text nor a list with one message")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
    )


def _windows(items: Sequence[Completion]) -> Iterator[list[Completion]]:
    """Completions that are graded together; answers to one prompt stay so."""
    window: list[Completion] = []
    for _, group in groupby(items, lambda item: item.columns.get("prompt")):
        window += group
        if len(window) >= WINDOW:
            yield window
            window = []
    if window:
        yield window


# What is shown


def _show(
    path: Path,
    configs: Sequence[RewardConfig],
    items: Sequence[Completion],
    found: Sequence[Verdict],
    grader: Grader,
) -> None:
    console = Console(highlight=False, soft_wrap=True)

    def say(line: str = "") -> None:
        console.print(line, markup=False)

    graded = [one.reward for one in found if one.reward is not None]
    say(f"{path}: {_mean(graded, len(found))}")
    for config in configs:
        values = [v for one in found if (v := one.parts.get(config.label)) is not None]
        say(f"  {config.label}: {_mean(values, len(found))}")
    notes = ", ".join(f"{num} {name}" for name, num in grader.counts.items())
    if notes:
        say(f"  {notes}" + f"; the last fault: {grader.said}" * bool(grader.said))
    elif len(graded) < len(found):
        num = len(found) - len(graded)
        say(f"  no reward applies to {num}: they lack the columns, or a gold that can be read")
    if not graded:
        return
    say()
    for label, num in histogram(graded):
        bar = "█" * max(1, round(WIDTH * num / len(graded))) if num else ""
        say(f"{label:>17}  {bar} {num}")
    order = sorted(
        (i for i, one in enumerate(found) if one.reward is not None),
        key=lambda i: (found[i].reward or 0.0, i),
    )
    worst, best = order[:SHOWN], order[len(order) - min(SHOWN, len(order) - SHOWN) :]
    for name, numbers in (("worst", worst), ("best", best[::-1] if len(order) > SHOWN else [])):
        if numbers:
            say(f"\n{name}")
        for i in numbers:
            text = " ".join(items[i].text.split())
            shown = text if len(text) <= 100 else f"{text[:60]} … {text[-37:]}"
            say(f"  {found[i].reward:g}  record {i + 1} ({_parts(found[i].parts)})  {shown}")


def _mean(values: Sequence[float], num: int) -> str:
    of = f"{len(values)} of {num} graded"
    return f"mean {fmean(values):.4f}, {of}" if values else f"no score, {of}"


def _parts(parts: Mapping[str, float | None]) -> str:
    shown = ((name, "none" if value is None else f"{value:g}") for name, value in parts.items())
    return ", ".join(f"{name} {value}" for name, value in shown)


def histogram(values: Sequence[float]) -> list[tuple[str, int]]:
    """(value or range, how many): each value where there are few, else ranges of a width."""
    counts = Counter(values)
    if len(counts) <= BINS:
        return [(f"{value:g}", counts[value]) for value in sorted(counts)]
    low, high = min(values), max(values)
    width = (high - low) / BINS
    nums = Counter(min(BINS - 1, int((value - low) / width)) for value in values)
    ends = [low + i * width for i in range(BINS)] + [high]
    return [(f"{ends[i]:.3g} to {ends[i + 1]:.3g}", nums[i]) for i in range(BINS)]
