"""Rewards that read the text alone."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from moetrain.data.thoughts import MARKS, thought_of
from moetrain.rewards.base import Scores, text_of

THINKING = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL
)
_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿]|\w+")


def format(
    completions: Sequence[Any],
    pattern: str | None = None,
    opened: list[str] | None = None,
    **columns: Any,
) -> Scores:
    """1 when the whole completion, with what the prompt has begun of it, is
    <think>…</think><answer>…</answer> (or matches `pattern`).
    """
    wanted = THINKING if pattern is None else re.compile(pattern, re.DOTALL)
    openings = opened or [""] * len(completions)
    return [
        float(wanted.fullmatch(start + text_of(text)) is not None)
        for start, text in zip(openings, completions, strict=True)
    ]


def tag_count(
    completions: Sequence[Any],
    tags: Sequence[str] = ("think", "answer"),
    newlines: bool = False,
    opened: list[str] | None = None,
    **columns: Any,
) -> Scores:
    """The share of the tags <NAME> and </NAME> of `tags` that stand in the completion, with what
    the prompt has begun of it, exactly once. With `newlines` a tag counts with a newline on each
    side alone, but before the first and behind the last: open-r1's tag_count_reward.

    It pays for a part of what `format` asks for, which a model that never does all of it can learn.
    """
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if newlines:
        marks = [f"\n{mark}\n" for mark in marks]
        marks[0], marks[-1] = marks[0][1:], marks[-1][:-1]
    openings = opened or [""] * len(completions)
    wholes = [start + text_of(text) for start, text in zip(openings, completions, strict=True)]
    return [sum(whole.count(mark) == 1 for mark in marks) / len(marks) for whole in wholes]


def code_format(
    completions: Sequence[Any],
    code_language: str = "python",
    language: list[Any] | None = None,
    opened: list[str] | None = None,
    **columns: Any,
) -> Scores:
    """1 for <think>, </think>, <answer> and </answer>, each in a line of its own, with a fenced
    block in the answer: in the language of the column `language`, or where that is empty in
    `code_language`. open-r1's code_format.
    """
    num = len(completions)
    scores: Scores = []
    for text, own, start in zip(
        map(text_of, completions), language or [None] * num, opened or [""] * num, strict=True
    ):
        block = rf"```{re.escape(str(own or code_language))}.*?```"
        wanted = rf"<think>\n.*?\n</think>\n<answer>\n.*?{block}.*?\n</answer>\s*"
        scores.append(float(re.fullmatch(wanted, start + text, re.DOTALL) is not None))
    return scores


_STEP = re.compile(r"Step \d+:|\A\d+\.|\n[-*]|(?:First|Second|Next|Finally),")


def reasoning_steps(completions: Sequence[Any], steps: int = 3, **columns: Any) -> Scores:
    """1 with `steps` marks of a step or more, else their share: "Step 3:", "First," and the like, a
    line that begins with - or *, and a number with a full stop at the very beginning. open-r1's
    reasoning_steps, for which 3 are enough.
    """
    return [min(1.0, len(_STEP.findall(text)) / steps) for text in map(text_of, completions)]


def words(text: str) -> list[str]:
    """Words in lower case; each Chinese or Japanese character is one."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def repetition(
    completions: Sequence[Any], n: int = 3, max_penalty: float = 1.0, **columns: Any
) -> Scores:
    """From 0 down to -max_penalty: the share of n-grams that stood there before (arXiv 2502.03373,
    section 3.3).
    """
    return [-max_penalty * _repeated(words(text_of(text)), n) for text in completions]


def repetition_penalty(
    completions: Sequence[Any], ngram_size: int = 3, max_penalty: float = -1.0, **columns: Any
) -> Scores:
    """As `repetition`, with words as open-r1 and ms-swift have them: what stands between blanks, in
    lower case, with its punctuation. A text without blanks, such as Chinese, is one word.
    """
    texts = [text_of(text).lower().split() for text in completions]
    return [max_penalty * _repeated(words_of_text, ngram_size) for words_of_text in texts]


def _repeated(words_of_text: list[str], n: int) -> float:
    """The share of n-grams that stood there before."""
    grams = [tuple(words_of_text[i : i + n]) for i in range(len(words_of_text) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


SCRIPTS = ("LATIN", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI",
           "GREEK", "HEBREW", "THAI")  # fmt: skip


def script_of(text: str) -> str | None:
    """The script of most letters; text with kana is Japanese. None without letters."""
    counts: dict[str, int] = {}
    for letter in text:
        if letter.isalpha():
            name = unicodedata.name(letter, "").split(" ")[0]
            if name in SCRIPTS:
                counts[name] = counts.get(name, 0) + 1
    kana = counts.pop("HIRAGANA", 0) + counts.pop("KATAKANA", 0)
    if kana:
        counts["JAPANESE"] = kana + counts.pop("CJK", 0)
    return max(counts, key=lambda name: counts[name]) if counts else None


def language(
    completions: Sequence[Any],
    prompt: list[Any] | None = None,
    script: str | None = None,
    score: Literal["most", "share"] = "most",
    of: Literal["all", "thought"] = "all",
    opened: list[str] | None = None,
    **columns: Any,
) -> Scores:
    """1 when most letters of the completion are in the prompt's script (or in `script`), 0 when
    not; with `score: share`, the share of its words that are. `of: thought` looks at the thought
    alone. None when either has no letters.

    Scripts, not languages: what goes wrong in practice is an answer that slips into another script,
    and no model is needed to see it. `score: share` of the thought is DeepSeek-R1's language
    consistency (arXiv 2501.12948, section 2.3.2).
    """
    num = len(completions)
    scores: Scores = []
    for text, asked, start in zip(
        map(text_of, completions), prompt or [""] * num, opened or [""] * num, strict=True
    ):
        own = text if of == "all" else _TAGS.sub(" ", thought_of(text, start))
        found, wanted = script_of(own), script or script_of(text_of(asked))
        if found is None or wanted is None:
            scores.append(None)
        elif score == "share":
            scores.append(_share_in(_TAGS.sub(" ", own), wanted))
        else:
            scores.append(float(found == wanted))
    return scores


_TAGS = re.compile(
    "|".join(re.escape(tag) for pair in (*MARKS, ("<answer>", "</answer>")) for tag in pair)
)


def _share_in(text: str, script: str) -> float:
    """The share of a text's words, of those with letters, that are in a script."""
    scripts = [one for one in map(script_of, words(text)) if one is not None]
    also = "CJK" if script == "JAPANESE" else script  # of a word alone: kanji are Japanese, too
    return sum(one in (script, also) for one in scripts) / len(scripts)
