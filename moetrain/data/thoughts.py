"""Where a model's thought ends and its answer begins."""

import re

# (what begins a thought, what ends it)
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
_LONGEST = 64  # characters at the end of a prompt in which a thought can begin
_ENDS = re.compile(r"<\|(?:return|end|call)\|>\s*$")


def opened_by(prompt: str) -> str:
    """The thought that a rendered prompt begins for the answer, such as "<think>\\n"; else ""."""
    tail = prompt[-_LONGEST:]
    for begin, _ in MARKS:
        place = tail.rfind(begin)
        if place >= 0 and not tail[place + len(begin) :].strip():
            return tail[place:]
    return ""


def after_thought(text: str, opened: str = "") -> str | None:
    """The answer behind the last thought; None where the thought was cut. `opened` is what the
    prompt has begun (`opened_by`).
    """
    whole = opened + text
    for begin, end in MARKS:
        if end in whole:
            whole = _ENDS.sub("", whole.rpartition(end)[2])
        if begin in whole:
            return None
    return whole
