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
_BEGINS = "|".join(re.escape(begin) for begin, _ in MARKS)
_SPOKEN = re.compile(  # of a mark, as "the tag <think> is"; a thought has a line to itself
    rf"(?<=[a-zA-Z] )(?:{_BEGINS})(?= [a-z]|[,.;:?!)])|`[^`\n]*(?:{_BEGINS})[^`\n]*`"
    rf"|[\"'“](?:{_BEGINS})[\"'”]"
)
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
    prompt has begun (`opened_by`). A mark in the midst of a sentence, or quoted, begins none.
    """
    whole = opened + text
    for begin, end in MARKS:
        if end in whole:
            whole = _ENDS.sub("", whole.rpartition(end)[2])
        if begin in _SPOKEN.sub("", whole):
            return None
    return whole


def thought_of(text: str, opened: str = "") -> str:
    """What stands before the answer, its marks with it; all where the thought was cut."""
    whole, answer = opened + text, after_thought(text, opened)
    if answer is None:
        return whole
    return whole[: whole.rindex(answer)]
