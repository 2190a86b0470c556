"""The page's section of trajectories: a sample of each run's rollouts with their turns, to filter
by step, ending and reward.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from moetrain.errors import plural
from moetrain.observe.answers import ROLLOUTS, harmless, json_of, shortened, steps_of
from moetrain.observe.figures import number
from moetrain.observe.runs import Run
from moetrain.observe.trajectories import Sampled, Trajectory, Turn, sample

MARK = "<!-- TRAJECTORIES -->"
# A page stays small: so many runs, and of all of them together so many trajectories and characters;
# steps of a run, and bytes of rollouts that are read to choose from.
RUNS, TRAJECTORIES, CHARACTERS, STEPS, READ = 20, 160, 400_000, 20, 1 << 28
PER_STEP = 24  # trajectories, where a run has few steps
TURNS = 12  # of a trajectory: the first ones and the last
SHORTEST, LONGEST, LINES = 120, 3000, 40  # of a text: characters, lines
ENDINGS = {
    "stop": "the model ended it, and the environment had no more to say",
    "length": "cut at a limit of tokens",
    "turns": "at rollout.max_turns",
    "timeout": "the environment was late",
    "crash": "the environment's process died",
    "error": "the environment failed",
}


def section(runs: Sequence[Run]) -> str:
    """HTML of trajectories of the first RUNS runs that have rollouts; empty where none has."""
    having = [run for run in runs if steps_of(run.path / ROLLOUTS)]
    shown = having[:RUNS]
    most, most_bytes = (limit // max(1, len(shown)) for limit in (TRAJECTORIES, READ))
    sampled = [(run, sample(run.path, STEPS, PER_STEP, most, most_bytes)) for run in shown]
    total = sum(len(of_run.trajectories) for _, of_run in sampled)
    if not total:
        return ""
    room = CHARACTERS // total
    rows = [
        _row(i, run, one, room)
        for i, (run, of_run) in enumerate(sampled)
        for one in of_run.trajectories
    ]
    names = [_safe(run.name) for run in shown]
    notes = [_note(of_run) for _, of_run in sampled]
    if len(shown) > 1:
        notes = [f"{name}: {note}" for name, note in zip(names, notes, strict=True)]
    if len(having) > RUNS:
        notes.append(f"{len(having) - RUNS} more with rollouts are not shown.")
    options = "".join(f'<option value="{i}">{name}</option>' for i, name in enumerate(names))
    text = Path(__file__).with_name("report_trajectories.html").read_text(encoding="utf-8")
    before, _, after = text.partition(MARK)
    before = before.replace("<!-- NOTES -->", "".join(f"<br>{note}" for note in notes), 1)
    # In this order: no mark is looked for in what models have said.
    return before.replace("<!-- RUNS -->", options, 1) + "\n".join(rows) + after


def _note(sampled: Sampled) -> str:
    words = (
        f"{len(sampled.trajectories):,} of the {sampled.num_there:,} trajectories of"
        f" {plural(sampled.num_read, 'step')}, of {sampled.num_steps:,} in all"
    )
    return words + f"; {sampled.num_unreadable:,} files cannot be read" * bool(
        sampled.num_unreadable
    )


def _row(index: int, run: Run, one: Trajectory, room: int) -> str:
    """A trajectory in at most about `room` characters of its texts."""
    is_learned = not (one.finish == "length" and run.settings.get("method.truncated") == "mask")
    turns, num_left = one.turns, 0
    if len(turns) > TURNS:
        num_left = len(turns) - TURNS
        turns = (*turns[: TURNS * 2 // 3], *turns[len(turns) - TURNS // 3 :])
    num_texts = 2 + len(turns) + sum(max(1, len(turn.replies) + len(turn.before)) for turn in turns)
    most = max(SHORTEST, min(LONGEST, room // num_texts))
    parts = [_text("prompt", "context: not learned", "", one.prompt, most)]
    if one.columns:
        given = ", ".join(f"{name} {json_of(value)}" for name, value in one.columns.items())
        parts.append(_line("record", given, most))
    for number_, turn in enumerate(turns):
        if num_left and number_ == TURNS * 2 // 3:
            parts.append(_line("", f"{plural(num_left, 'turn')} of the model left out here", most))
        parts += _turn(turn, most, is_learned=is_learned)
    parts.append(_line("verdict", _verdict(one), most, "verdict"))
    reward = "" if one.reward is None else repr(one.reward).replace("inf", "Infinity")
    data = {"run": str(index), "step": str(one.step), "ending": one.finish, "reward": reward}
    attributes = "".join(f' data-{name}="{_safe(value, 200)}"' for name, value in data.items())
    return f"<details{attributes}>{_head(one)}{''.join(parts)}</details>"


def _head(one: Trajectory) -> str:
    """What stands of a trajectory in the list."""
    tokens = sum(turn.tokens or 0 for turn in one.turns)
    calls, errors = (one.counts.get(f"tools/{name}", 0) for name in ("calls", "errors"))
    facts = [plural(len(one.turns), "turn"), plural(tokens, "token")]
    if calls or errors:
        facts.append(plural(round(calls), "call"))
    if errors:
        facts.append(plural(round(errors), "error"))
    reward = "no reward" if one.reward is None else f"reward {number(one.reward)}"
    asked = " ".join(one.prompt.split())
    cells = (
        ("", f"step {one.step:,}"),
        ("num", reward),
        ("", one.finish or "?"),
        ("facts", ", ".join(facts)),
        ("asked", asked if len(asked) <= 160 else f"… {asked[-158:]}"),
    )
    words = "".join(f'<span class="{kind}">{_safe(text, 200)}</span>' for kind, text in cells)
    return f"<summary>{words}</summary>"


def _turn(turn: Turn, most: int, *, is_learned: bool) -> list[str]:
    parts = [_text(who, "context: not learned", "reply", text, most) for who, text in turn.before]
    if turn.is_anew:
        note = "What stood before was rendered anew; from here the model saw that."
        parts.append(_line("", note, most))
    facts = ["" if turn.tokens is None else plural(turn.tokens, "token")]
    facts.append("learned" if is_learned else "not learned (method.truncated: mask)")
    facts.append("cut at a limit" if turn.finish == "length" else "")
    facts.append("" if turn.version is None else f"version {turn.version} of the weights")
    parts.append(_text("model", ", ".join(filter(None, facts)), "model", turn.text, most))
    if turn.calls:
        parts.append(_line("read as", "; ".join(turn.calls), most))
    if turn.malformed:
        parts.append(_line("cannot be read", "; ".join(turn.malformed), most, "bad"))
    for i, (who, text) in enumerate(turn.replies):
        num = turn.reply_tokens if i == 0 else None
        of_all = "" if len(turn.replies) == 1 else " in all replies"
        tokens = "" if num is None else f"{plural(num, 'token')}{of_all}, "
        parts.append(_text(who, f"{tokens}context: not learned", "reply", text, most))
    return parts


def _verdict(one: Trajectory) -> str:
    """The reward and what it is made of, how it ended, what the environment counted."""
    words = [f"reward {number(one.reward)}" if one.reward is not None else "no reward"]
    parts = [f"{k} {'-' if v is None else number(v)}" for k, v in one.parts.items()]
    words[0] += f" ({', '.join(parts)})" * bool(parts)
    words.append(f"{one.finish or '?'}: {ENDINGS[one.finish]}" if one.finish in ENDINGS else "")
    words += [f"{name} {value:g}" for name, value in one.counts.items()]
    words += [f"{name} {json_of(value)}" for name, value in one.extra.items()]
    return "; ".join(filter(None, [*words, one.problem]))


def _text(who: str, facts: str, kind: str, text: str, most: int) -> str:
    head = f'<p><b>{_safe(who, 100)}</b> <span class="facts">{_safe(facts, 200)}</span></p>'
    # A leading end of a line would vanish in a pre.
    return f'<div class="turn {kind}">{head}<pre>\n{_safe(text, most, LINES)}</pre></div>'


def _line(title: str, text: str, most: int, kind: str = "") -> str:
    return f'<p class="line {kind}"><b>{_safe(title)}</b> {_safe(text, most, LINES)}</p>'


def _safe(text: str, most: int = SHORTEST, lines: int = 2) -> str:
    """Cut, and without what a page would act on."""
    return escape(harmless(shortened(text, most, lines)))
