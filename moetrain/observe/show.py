"""`moetrain show`: answers of a run in the terminal, with what their rewards are made of."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from moetrain.errors import MoetrainError
from moetrain.observe.answers import (
    ANSWERS,
    ROLLOUTS,
    TITLES,
    Answer,
    Summary,
    describe_reward,
    harmless,
    picked,
    read_answers,
    shortened,
    steps_of,
)

# Characters and lines of a text, and characters of the other columns of a prompt.
PROMPT, ANSWER, COLUMNS = (600, 12), (1500, 30), 200


def show(
    path: Path,
    step: int | None,
    best: int,
    worst: int,
    *,
    folders: Sequence[str] = (ROLLOUTS, ANSWERS),
    full: bool = False,
) -> int:
    """Print answers of the run (or of the file) at `path`: of `step`, or of the newest batch and
    the newest evaluation. Returns the exit code. Raises MoetrainError.
    """
    console = Console(highlight=False)
    for number, (title, file) in enumerate(_files(path, step, folders)):
        answers = read_answers(file)
        console.print("\n" * (number > 0) + title, style="bold", markup=False)
        console.print(Text(harmless(str(file)), style="dim"), overflow="fold")
        console.print(Summary.of(answers).describe(), markup=False)
        for name, answer in picked(answers, best, worst):
            _print(console, name, answer, full=full)
    return 0


def _files(path: Path, step: int | None, folders: Sequence[str]) -> list[tuple[str, Path]]:
    """(title, file) of what is to be shown."""
    if path.is_file() and step is None:
        return [(harmless(path.name), path)]
    if not path.is_dir():
        raise MoetrainError(
            f"{path} is no run's folder. Give one; a file of answers has no --step."
        )
    steps = {name: steps_of(path / name) for name in folders}
    files: list[tuple[str, Path]] = []
    for name, paths in steps.items():
        at = step if step is not None else max(paths, default=None)
        if at in paths:
            files.append((f"{TITLES[name]} of step {at}", paths[at]))
    if files:
        return files
    if not any(steps.values()):
        raise MoetrainError(
            f"{path} has no {' and no '.join(TITLES[name] for name in folders)}: runs that sample"
            " have them, and others with train.sample_prompts."
        )
    there = [f"{TITLES[name]} of {_listed(list(paths))}" for name, paths in steps.items() if paths]
    raise MoetrainError(f"{path} has no answers of step {step}; it has {' and '.join(there)}.")


def _listed(steps: list[int]) -> str:
    """Numbers, of many the first and the last."""
    texts = [str(step) for step in steps]
    few = ", ".join(texts if len(texts) < 12 else [*texts[:5], "...", *texts[-5:]])
    return f"step{'s' if len(texts) > 1 else ''} {few}"


def _print(console: Console, title: str, answer: Answer, *, full: bool) -> None:
    end = "cut at the limit" if answer.was_cut else "ended by itself"
    words = [
        title,
        f"answer {answer.number}",
        describe_reward(answer),
        f"{answer.tokens} tokens",
        end,
    ]
    head = Text(harmless("\n" + "  ".join(word for word in words if word)), style="bold")
    console.print(head, overflow="fold")
    _text(console, "prompt", answer.prompt, None if full else PROMPT)
    if note := _columns(answer.columns):
        _text(console, "", note, None if full else (COLUMNS, 3), style="dim")
    _text(console, "answer", answer.text, None if full else ANSWER)


def _text(
    console: Console, title: str, text: str, limits: tuple[int, int] | None, style: str = ""
) -> None:
    """A text under its title, behind a margin that no text can leave."""
    if title:
        console.print(Text(f"  {title}", style="cyan"))
    shown = harmless(text if limits is None else shortened(text, *limits))
    note = Text(shown or "(nothing)", style=style, overflow="fold")
    console.print(Padding(note, (0, 0, 0, 4), expand=False))


def _columns(columns: Mapping[str, Any]) -> str:
    """What a record has beside its prompt, such as the right answer."""
    values = {name: value for name, value in columns.items() if value not in (None, "", [], {})}
    return "  ".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in values.items())
