"""A file of answers, which grows while they are drawn and graded: what `moetrain sample` and
`moetrain eval` write.

`F` has a prompt with its answers a line, as a run's rollouts do. Answers that wait for the rest of
their prompt, or for a grade, are in `F.partial*`, each as it ends. `F`'s manifest says what they
are answers of.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, TextIO

from moetrain import files
from moetrain.data.cache import key_of
from moetrain.data.samples import Prompt, open_lines, read_as, read_lines, write_lines
from moetrain.data.trajectories import Trajectory, from_json, to_json
from moetrain.errors import DataError
from moetrain.loops.rollouts import Drawing, journal, verdicts
from moetrain.loops.store import readable, row_of
from moetrain.observe.progress import CountDisplay
from moetrain.rewards import Grader
from moetrain.run.folder import environment

WINDOW = 512  # answers that are drawn together, while those before them are graded
AnswerRow = dict[str, Any]
Identity = Mapping[str, tuple[Any, str]]
"""What answers are of, by what a user calls it: (what must be equal, how it is reported)."""


def manifest_of(path: Path) -> Path:
    """Where the manifest of an output lies."""
    return path.with_name(path.stem + ".manifest.json")


def check_manifest(path: Path, identity: Identity) -> dict[str, Any]:
    """The manifest of `path`, {} where neither is there. DataError when it is one of other
    contents.
    """
    try:
        content: dict[str, Any] = json.loads(manifest_of(path).read_text(encoding="utf-8"))
        before = content["of"]
        if not isinstance(before, dict):
            raise TypeError(f"of is {type(before).__name__}")
    except FileNotFoundError:
        if path.exists():
            raise DataError(
                f"{path} exists and has no {manifest_of(path).name}. Give another --out, or remove"
                " it."
            ) from None
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{manifest_of(path)} is not readable ({error}). Remove it and {path}."
        ) from None
    for name in dict.fromkeys([*identity, *before]):
        value, new_text = identity.get(name, (None, "nothing"))
        old, old_text = _before(before, name)
        if old != json.loads(json.dumps(value)):
            raise DataError(
                f"{path} was made with {name} {old_text}, this is {name} {new_text}. Give another"
                " --out, or remove the file."
            )
    return content


def _before(found: dict[str, Any], name: str) -> tuple[Any, Any]:
    """(what it was made with, how that is told)."""
    pair = found.get(name)
    return tuple(pair) if isinstance(pair, list) and len(pair) == 2 else (None, "nothing")


class AnswerFile:
    """`num` answers to each prompt in `path`, to be entered; a second process is kept out.

    Raises DataError when the file is one of another identity.
    """

    def __init__(self, path: Path, identity: Identity, num: int, notes: Mapping[str, Any]):
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        self.path, self.identity, self.num, self.notes = path, identity, num, notes
        self.finished: set[str] = set()  # prompts
        self.waiting: dict[tuple[str, int], Trajectory] = {}
        self._lock: TextIO | None = None
        self._file: TextIO | None = None

    def __enter__(self) -> "AnswerFile":
        before = check_manifest(self.path, self.identity)
        self._lock = self._locked()
        if not before:
            self._note({"started": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        self._resume()
        self._file = open_lines(self.path, "a")
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._file is not None and self._lock is not None
        self._file.close()
        self._lock.close()

    def partial(self, number: int, done: Iterable[Trajectory]) -> TextIO:
        """The file for a window's answers, those that are there already in it. A window may take
        the place of the second last one.
        """
        path = self._partial(str(number % 2))
        write_lines(path, map(to_json, done))
        return open_lines(path, "a")

    def write(self, rows: Iterable[AnswerRow]) -> None:
        """Add whole prompts."""
        assert self._file is not None
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.flush()

    def finish(self, counts: Mapping[str, Any]) -> None:
        """All is there."""
        for path in self._partials():
            path.unlink()
        self._note({"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "counts": dict(counts)})

    def rows(self) -> Iterator[AnswerRow]:
        """What is whole."""
        return read_lines(self.path)

    def _note(self, more: Mapping[str, Any]) -> None:
        try:
            manifest = json.loads(manifest_of(self.path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            manifest = {}
        of = {name: list(pair) for name, pair in self.identity.items()}
        content = manifest | {"of": of, "answers": self.num} | dict(self.notes) | environment()
        files.write_text(manifest_of(self.path), json.dumps(content | dict(more), indent=1) + "\n")

    def _locked(self) -> TextIO:
        file = self.path.with_name(f".{self.path.name}.lock").open("w")
        if not files.locked(file.fileno()):
            file.close()
            raise DataError(
                f"{self.path} is being written by another process. Stop it, or give another --out."
            )
        return file

    def _partial(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.name}.partial{name}")

    def _partials(self) -> list[Path]:
        return [path for name in ("", "0", "1") if (path := self._partial(name)).exists()]

    def _resume(self) -> None:
        """Take up what an earlier start left: whole prompts stay, other answers wait."""
        cut = self.path.exists() and not _ends_with_newline(self.path)
        for name, made in read_as(self.path, self._taken):
            if made is None:
                self.finished.add(name)
            else:
                self._wait(made)
        for path in self._partials():
            self._wait(read_as(path, from_json))
        if self.waiting:
            write_lines(self._partial(""), map(to_json, self.waiting.values()))
        if self.waiting or cut:
            write_lines(self.path, (row for row in read_lines(self.path) if self._is_whole(row)))

    def _taken(self, row: AnswerRow) -> tuple[str, list[Trajectory] | None]:
        """(a prompt's id, its answers where some are still missing)."""
        made = [from_json(answer) for answer in row["answers"]]
        name = row["prompt"]["id"]
        if not isinstance(name, str):
            raise TypeError(f"the prompt's id is {type(name).__name__}")
        return name, None if self._is_whole(row) else made

    def _wait(self, made: Iterable[Trajectory]) -> None:
        for one in made:  # one that was lost is drawn again, as one whose reward failed is graded
            if one.prompt_id not in self.finished and not one.is_lost:
                self.waiting[one.prompt_id, one.index] = one

    def _is_whole(self, row: AnswerRow) -> bool:
        """Enough answers, all of them graded as far as they can be."""
        answers = row["answers"]
        return len(answers) >= self.num and not any(a.get("fault") for a in answers)


@dataclass
class Answering:
    """How answers are drawn and graded."""

    drawing: Drawing
    grader: Grader
    num: int

    def run(self, prompts: Sequence[Prompt], file: AnswerFile, name: str) -> None:
        """Fill `file` with answers to `prompts`; the file holds what is finished at any moment."""
        todo = [prompt for prompt in prompts if prompt.id not in file.finished]
        total, missing = len(prompts) * self.num, len(todo) * self.num
        mine = {prompt.id for prompt in todo}
        known = sum(key[0] in mine and not one.is_open for key, one in file.waiting.items())
        display = CountDisplay(name, total, total - missing + known)
        seen = {"num": 0.0, "reward": 0.0}

        def told() -> None:
            mean = f"reward {seen['reward'] / seen['num']:.3f}" if seen["num"] else ""
            display.advance(mean)

        graded: Future[None] | None = None
        try:
            with ThreadPoolExecutor(1) as pool:
                for number, window in enumerate(batched(todo, max(1, WINDOW // self.num))):
                    ids = {prompt.id for prompt in window}
                    done = {key: s for key, s in file.waiting.items() if key[0] in ids}
                    with file.partial(number, done.values()) as part:
                        ended = {key for key, one in done.items() if not one.is_open}
                        keep = journal(part, ended, told)
                        self.drawing.draw(window, self.num, done, keep)
                    if graded is not None:
                        graded.result()
                    graded = pool.submit(self._grade, window, done, file, seen)
            if graded is not None:
                graded.result()
        finally:
            display.close()

    def _grade(
        self,
        prompts: Sequence[Prompt],
        done: Mapping[tuple[str, int], Trajectory],
        file: AnswerFile,
        seen: dict[str, float],
    ) -> None:
        pairs = [(p, done[p.id, i]) for p in prompts for i in range(self.num)]
        graded = verdicts(self.grader, pairs)
        for number, prompt in enumerate(prompts):
            places = range(number * self.num, (number + 1) * self.num)
            made = readable([pairs[i][1] for i in places])
            file.write([row_of(prompt, made, [graded[i] for i in places])])
        rewards = [one.reward for one in graded if one.reward is not None]
        seen["num"] += len(rewards)
        seen["reward"] += sum(rewards)


def prompts_key(prompts: Iterable[Prompt]) -> str:
    """A name for prompts as the model sees them: records, template and tokenizer."""
    return key_of([(prompt.id, prompt.tokens) for prompt in prompts])


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"
