"""The page's section of answers: the best, worst, longest and cut ones of each run's newest
evaluation.
"""

from collections.abc import Iterator, Sequence
from html import escape

from moetrain.errors import MoetrainError
from moetrain.observe.answers import (
    ANSWERS,
    ROLLOUTS,
    TITLES,
    Answer,
    Summary,
    describe_reward,
    harmless,
    ranked,
    read_answers,
    shortened,
    steps_of,
)
from moetrain.observe.runs import Run

MARK = "<!-- ANSWERS -->"
# A page stays small: so many runs, characters in all their texts, and bounds of a text.
RUNS, CHARACTERS, LONGEST, SHORTEST, LINES = 20, 300_000, 1200, 120, 24
BEST, WORST, LONG, CUT = 3, 3, 2, 2
_STYLE = """<style>
.answers > details { margin-top: 12px; } .answers summary { font-size: 14px; overflow-wrap: anywhere; }
.answer { border-top: 1px solid var(--line); margin-top: 12px; padding-top: 10px; max-width: 115ch; }
.answer p { margin: 0; font-size: 13px; overflow-wrap: anywhere; } .answer b { font-weight: 650; }
.answer pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 0; padding: 8px 11px;
  font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; background: var(--soft); border-radius: 5px; }
.answer pre.prompt { background: none; border-left: 3px solid var(--line); border-radius: 0; color: var(--muted); }
</style>"""  # noqa: E501


def section(runs: Sequence[Run]) -> str:
    """HTML of the answers of the first RUNS runs that have some; empty where none has."""
    shown: list[tuple[Run, str, list[Answer]]] = []
    num_left = 0
    for run in runs:
        if len(shown) == RUNS:  # files of rollouts can be large: they are not read to be counted
            num_left += any(steps_of(run.path / name) for name in (ANSWERS, ROLLOUTS))
        elif (newest := _newest(run)) is not None:
            shown.append((run, *newest))
    if not shown:
        return ""
    most = CHARACTERS // (2 * (BEST + WORST + LONG + CUT) * len(shown))
    most = max(SHORTEST, min(LONGEST, most))
    parts = [_of_run(*group, most=most, is_open=i == 0) for i, group in enumerate(shown)]
    note = "Of each run's newest evaluation; <code>moetrain show RUN</code> has the others."
    if num_left:
        note += f" {num_left} more runs have answers."
    head = f'<div class="bar"><h2>Answers</h2></div><p class="note">{note}</p>'
    return f'{_STYLE}\n<section class="answers" id="answers">{head}\n{"".join(parts)}</section>'


def _newest(run: Run) -> tuple[str, list[Answer]] | None:
    """(what they are, the answers) of the newest evaluation; of a run without, of its newest batch.
    What cannot be read is not there.
    """
    for folder in (ANSWERS, ROLLOUTS):
        try:
            for step, path in reversed(steps_of(run.path / folder).items()):
                return f"{TITLES[folder]} of step {step}", read_answers(path)
        except (MoetrainError, OSError):
            continue
    return None


def chosen(answers: Sequence[Answer]) -> Iterator[tuple[str, Answer]]:
    """(why, the answer) of those to look at, each once."""
    why: dict[int, list[str]] = {}
    order = ranked(answers)
    longest = sorted(answers, key=lambda a: -a.tokens)
    groups = {
        "best": order[:BEST],
        "worst": order[max(len(order) - WORST, BEST) :][::-1],
        "longest": longest[:LONG],
        "cut at the limit": [a for a in longest if a.was_cut][:CUT],
    }
    if not order:  # nobody has graded them
        groups = {"": answers[: BEST + WORST]} | groups
    for name, group in groups.items():
        for answer in group:
            why.setdefault(answer.number, []).append(name)
    by_number = {answer.number: answer for answer in answers}
    for number, names in why.items():
        yield ", ".join(filter(None, names)), by_number[number]


def _of_run(run: Run, title: str, answers: list[Answer], *, most: int, is_open: bool) -> str:
    head = f"{escape(harmless(run.name))}: {title}"
    parts = [_of_answer(why, answer, most) for why, answer in chosen(answers)]
    return (
        f"<details{' open' if is_open else ''}><summary>{head}</summary>"
        f'<p class="note">{escape(Summary.of(answers).describe())}</p>{"".join(parts)}</details>\n'
    )


def _of_answer(why: str, answer: Answer, most: int) -> str:
    facts = [describe_reward(answer), f"{answer.tokens} tokens", "cut" if answer.was_cut else ""]
    note = shortened(", ".join(filter(None, facts)), most, LINES)
    return (
        f'<div class="answer"><p><b>{escape(why)}</b> {escape(harmless(note))}</p>'
        f'<pre class="prompt">{_text(answer.prompt, most // 2)}</pre>'
        f"<pre>{_text(answer.text, most)}</pre></div>"
    )


def _text(text: str, most: int) -> str:
    """Cut, and without what a page would act on; a leading end of a line would vanish in a pre."""
    return "\n" + escape(harmless(shortened(text, most, LINES)))
