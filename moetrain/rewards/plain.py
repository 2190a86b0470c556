"""Answers in one notation: Unicode, LaTeX and ASCII ways to write the same become one."""

import re
import unicodedata

_CJK = r"\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₋₊", "0123456789-+", strict=True))
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_LOWERED_RUN = re.compile(f"[{''.join(_LOWERED)}]+")
_SIGNS = {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\ufe63": "-",
    "\u00d7": "\\times ", "\u22c5": "\\cdot ", "\u00b7": "\\cdot ", "\u00f7": "\\div ",
    "\u2264": "\\le ", "\u2266": "\\le ", "\u2a7d": "\\le ", "\u2265": "\\ge ", "\u2267": "\\ge ",
    "\u2a7e": "\\ge ", "\u2260": "\\ne ", "\u221e": "\\infty ", "\u03c0": "\\pi ",
    "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2208": "\\in ", "\u211d": "\\mathbb{R}",
    "\u00b1": "\\pm ", "\u03b8": "\\theta ", "\u2205": "\\emptyset ", "\u2044": "/",
    "\u2220": "\\angle ", "\u3001": ", ", "\u02da": "°", "\u00ba": "°", "\u201c": '"',
    "\u201d": '"', "\u2019": "'",
}  # fmt: skip
_NAMES = (
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|mathstrut|hfill)(?![a-zA-Z])\s*", ""),
    (r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])", r"\\le"),
    (r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])", r"\\ge"),
    (r"\\[lr]?vert(?![a-zA-Z])", "|"),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\neq(?![a-zA-Z])", r"\\ne"),
    (r"\\colon(?![a-zA-Z])", ":"),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\(?:varnothing|empty)(?![a-zA-Z])", r"\\emptyset"),
    (r"(?<=\d)(?:\\,|\\;|\\:|\\ |~|\\thinspace|\{\s*\})(?=\d{3}(?!\d))", ","),
    (r"\{,\}", ","),
    (r"\\(?:quad|qquad|thinspace|enspace|hspace\{[^{}]*\})(?![a-zA-Z])|(?<!\\)\\[,;:! ]|~", " "),
    (r"\\frac\s*\{\s*\\(?:text|mathrm|rm)\s*\{([^{}]*)\}\s*\}\s*\{\s*\\(?:text|mathrm|rm)\s*\{([^{}]*)\}\s*\}",
     r" \1/\2 "),
    (r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|operatorname|rm"
     r"|bf)\s*\{([^{}]*)\}", r" \1 "),
    (r"\s*\^\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?|\\(?:circ|degree)(?![a-zA-Z])", "°"),
    (r"°\s+(?=[CF](?![a-zA-Z]))", "°"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=", r"\\ne "),
    (r"\+-|\+/-", r"\\pm "),
    (r"\*\*(?=-?[\d(a-z])(?<=[\dA-Za-z)\]]\*\*)", "^"),
    (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])sqrt\s*(\d+|[a-z](?![a-z]))", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan)"
     r"(?=\s*[\d(x\\^_]|\s+[a-z](?![a-z]))", r"\\\1 "),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<![\\a-zA-Z])(?:infinity|oo|inf)(?![a-zA-Z])", r"\\infty "),
)  # fmt: skip
_RULES = [(re.compile(pattern), new) for pattern, new in _NAMES]
_BESIDE = re.compile(
    rf"(?<=[{_CJK}])(?=[-\d$\\(\[+.])|(?<=[\d%$}})\]])(?=[{_CJK}])"
)  # words that touch numbers
_PAIRS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"),
          ("__", "__"), ('"', '"'), ("'", "'"))  # fmt: skip
_STOPS = " \t\n\r.。;,:"
_MONEY = "\ue000"  # for \\$, which encloses nothing


def even(text: str) -> str:
    """In one notation; what it says is as it was."""
    text = "".join(map(_folded, text))
    text = _RAISED_RUN.sub(lambda m: "^{" + "".join(_RAISED[c] for c in m[0]) + "}", text)
    text = _LOWERED_RUN.sub(lambda m: "_{" + "".join(_LOWERED[c] for c in m[0]) + "}", text)
    for old, new in _SIGNS.items():
        text = text.replace(old, new)
    for pattern, new in _RULES:
        text = pattern.sub(new, text)
    return text


def whole(text: str) -> str:
    """`text` as an answer that stands for itself: in one notation, without what encloses it."""
    text = " ".join(_BESIDE.sub(" ", even(text.replace("\\$", _MONEY))).split())
    while True:
        before = text
        text = text.rstrip(_STOPS).lstrip(" \t\n\r:,;=")
        for left, right in _PAIRS:
            if (
                len(text) > len(left) + len(right)
                and text.startswith(left)
                and text.endswith(right)
                and left not in text[len(left) : -len(right)]
            ):
                text = text[len(left) : -len(right)].strip()
        if text == before:
            return text.replace(_MONEY, "$")


def _folded(letter: str) -> str:
    """A letter in its usual width. A vulgar fraction stands apart from what is before it, and the
    power of a square unit (㎠) stays one.
    """
    if letter in _RAISED or letter in _LOWERED or letter.isascii():
        return letter
    if letter in "℃℉":
        return "°" + unicodedata.normalize("NFKC", letter)[-1]
    plain = unicodedata.normalize("NFKC", letter)
    if "\u2044" in plain:
        return " " + plain.replace("\u2044", "/") if plain[-1] != "\u2044" else plain
    if "\u3380" <= letter <= "\u33df" and plain[-1] in "23":
        return f"{plain[:-1]}^{plain[-1]}"
    return plain if letter not in _SIGNS else letter
