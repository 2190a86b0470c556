"""Where an answer stands in a text that marks none."""

import re
from collections.abc import Iterator, Sequence

from moetrain.rewards.plain import even
from moetrain.rewards.scales import BEHIND

LONGEST_TEXT = 20_000  # characters, from its end, in which an answer is looked for
_OPERATOR = re.compile(
    r"(?:^|[\s\d])(?:mod|div|log|ln|sqrt|choose)$|[*\\^/<>+]$|\\(?:le|ge|times|cdot|div|pm)$"
)
SAID = re.compile(
    r"(?:\banswers?\s*(?:is|are|:)|\b(?:solutions|roots|values|numbers) are)\s*:?\s*([^\n]+)"
    r"|(?:答案|答え|正解|答)\s*(?:是|为|為|は|[::])\s*([^\n]+)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"(?<=[^\s.])[.!](?:\s+(?=[^\s\d])|$)|[。!]"
    r"|,?\s+(?=(?:not|and not|because|since|as|which|where|but)\b)"
)
_OPENS = re.compile(r"\$\$|\\\[|\\\(|(?<!\\)\$")
_CLOSES = {"$$": "$$", "\\[": "\\]", "\\(": "\\)"}
_INLINE = re.compile(r"([^$\n]+)(?<!\\)\$")
_NUMERAL = re.compile(
    r"(?:US\$|[$€£¥₹₩])?\s*(?<![a-zA-Z0-9_.^{/])-?(?:\d+\s+\d+\s*/\s*\d+(?!\d)|\d[\d.,'_]*(?:[eE][-+]?\d+)?(?:\s*/\s*\d[\d.,]*)?"
    r"|\.\d+)(?:\s*\^\s*\{?-?\d+\}?)?(?:\s*\\?%)?"
)
_OR_SO = re.compile(  # between two that are one answer, or a choice
    r"[\s$]*(?:,?\s*(?:and|or)|和|或者?|または|[^\W\d_]{0,2}[かと])[\s$]*"
)
_COMMA = re.compile(r"[\s$]*[,、][\s$]*")
_DENIED = re.compile(  # before what is not the answer
    r"(?:\b(?:not|never|cannot|neither|nor)|n't)"
    r"(?:\s+(?:be|been|equals?|to|the|an?|right|correct|answer|have))*\s*$"
    r"|不(?:是|等于|为|為|会是|可能是|能是)?\s*$|并非\s*$|\\ne\s*$",
    re.IGNORECASE,
)
_REFUTED = re.compile(  # behind it
    r"\$?\s*(?:(?:is|was)(?:\s+not|n't)\s+(?:it|(?:the\s+|an?\s+)?"
    r"(?:right|correct|answer|solution|root))\b|(?:is|was)\s+(?:wrong|incorrect|false)\b"
    r"|[^\d\s。、,.]{0,3}\s*(?:では|じゃ)(?:な|あり)|[^\d\s]{0,2}\s*아니|不对|是错)"
)
_NOT = re.compile(r"\s*(?:not\b|never\b|不)", re.IGNORECASE)
_NEAR = 60  # characters beside a number that can say what it is

Span = tuple[int, int, str]  # start, end, content


def candidates(text: str, numbers: bool = True) -> Iterator[str]:
    """All of it, where it says what the answer is, the last formula, the last number: each with
    those that it is listed with, and none of which is said that it is not the answer.
    """
    text = text.strip()[-LONGEST_TEXT:]
    if "\n" not in text:
        yield text
    statements = [one or other for one, other in SAID.findall(text) if not _NOT.match(one or other)]
    if statements:
        yield _SENTENCE.split(statements[-1])[0]
        text = text[text.rindex(statements[-1]) :]
    every = _formulas(text)
    formulas = [one for one in every if not _denied(text, one)]
    if formulas:
        yield ", ".join(content for *_, content in _last(text, formulas))
    if not numbers:
        return
    if not formulas and every:
        ends = [0, *(end for _, end, _ in every)]
        starts = [*(start for start, *_ in every), len(text)]
        text = " ".join(text[a:b] for a, b in zip(ends, starts, strict=True))
    text = even(text)
    spans = [(one.start(), one.end(), one[0]) for one in _NUMERAL.finditer(text)]
    while spans:
        run = _last(text, spans)
        if not _denied(text, (run[0][0], run[-1][1], "")):
            if not _OPERATOR.search(text[: run[0][0]].rstrip()[-_NEAR:]):
                behind = BEHIND.match(text, run[-1][1])
                yield text[run[0][0] : behind.end() if behind else run[-1][1]]
            return
        del spans[-len(run) :]


def _last(text: str, spans: Sequence[Span]) -> Sequence[Span]:
    """The last one, and those before it that it is listed with."""
    first = len(spans) - 1
    while first:
        gap = text[spans[first - 1][1] : spans[first][0]]
        is_listed = first < len(spans) - 1 or _name(spans[first - 1]) == _name(spans[first]) != ""
        if not (_OR_SO.fullmatch(gap) or (is_listed and _COMMA.fullmatch(gap))):
            break
        first -= 1
    return spans[first:]


def _name(one: Span) -> str:
    return one[2].partition("=")[0].strip() if "=" in one[2] else ""


def _denied(text: str, one: Span) -> bool:
    start, end, _ = one
    before = even(text[max(0, start - _NEAR) : start]).rstrip(" $([\\")
    return bool(_DENIED.search(before) or _REFUTED.match(text[end : end + _NEAR]))


def _formulas(text: str) -> list[Span]:
    """What stands in $$...$$, \\[...\\], \\(...\\) and, on a line, in $...$; in one pass."""
    spans: list[Span] = []
    last = {closed: text.rfind(closed) for closed in _CLOSES.values()}
    place = 0
    while opened := _OPENS.search(text, place):
        place, start = opened.start() + 1, opened.end()
        closed = _CLOSES.get(opened[0])
        if closed is None:
            if inline := _INLINE.match(text, start):
                spans.append((opened.start(), inline.end(), inline[1]))
                place = inline.end()
        elif start < last[closed]:
            end = text.index(closed, start + 1)
            place = end + len(closed)
            spans.append((opened.start(), place, text[start:end]))
    return spans
