"""`$((...))` over whole numbers: + - * / % ** and brackets, with C's division."""

import re
from collections.abc import Callable

_TOKEN = re.compile(r"\s*(\d+|[A-Za-z_]\w*|\*\*|[-+*/%()])")
_LIMIT = 2**63  # as in the shell; nothing of a launch script comes near it


class Unknown(Exception):
    """The text does not say what this is."""


def evaluate(text: str, number: Callable[[str], int]) -> int:
    """The value; `number` gives that of a name. Raises Unknown for all that is not simple."""
    tokens: list[str] = []
    at = 0
    text = text.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or len(tokens) > 200:
            raise Unknown
        tokens.append(match[1])
        at = match.end()
    reader = _Sum(tokens, number)
    value = reader.added()
    if reader.tokens:
        raise Unknown
    return value


class _Sum:
    def __init__(self, tokens: list[str], number: Callable[[str], int]) -> None:
        self.tokens, self.number = tokens, number

    def _next(self, *wanted: str) -> str | None:
        if self.tokens and (not wanted or self.tokens[0] in wanted):
            return self.tokens.pop(0)
        return None

    def added(self) -> int:
        value = self._times()
        while sign := self._next("+", "-"):
            other = self._times()
            value = _within(value + other if sign == "+" else value - other)
        return value

    def _times(self) -> int:
        value = self._power()
        while sign := self._next("*", "/", "%"):
            other = self._power()
            if sign == "*":
                value = _within(value * other)
                continue
            if other == 0:
                raise Unknown
            whole = abs(value) // abs(other)
            whole = whole if (value < 0) == (other < 0) else -whole
            value = whole if sign == "/" else value - whole * other
        return value

    def _power(self) -> int:
        value = self._one()
        if self._next("**"):
            exponent = self._power()
            if not 0 <= exponent < 64:
                raise Unknown
            value = _within(value**exponent)
        return value

    def _one(self) -> int:
        token = self._next()
        if token is None or token in ("*", "/", "%", "**", ")"):
            raise Unknown
        if token in "+-":
            return -self._one() if token == "-" else self._one()
        if token == "(":
            value = self.added()
            if self._next(")") is None:
                raise Unknown
            return value
        if token[0].isdigit():
            if len(token) > 18 or (token[0] == "0" and len(token) > 1):  # octal
                raise Unknown
            return int(token)
        return self.number(token)


def _within(value: int) -> int:
    if abs(value) >= _LIMIT:
        raise Unknown
    return value
