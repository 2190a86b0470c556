"""Values of Python that travel as JSON, and whether two are the same."""

from collections.abc import Mapping
from typing import Any


class Other:
    """A value that no data is equal to."""

    __slots__ = ()


def read(value: Any) -> Any:
    """What caller.py's `plain` has written. Raises TypeError for a key that cannot be one."""
    if isinstance(value, list):
        return [read(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "tuple":
            return tuple(read(one) for one in inner)
        case "set" | "frozenset":
            return {read(one) for one in inner}
        case "dict":
            return {read(key): read(one) for key, one in inner}
        case _:
            return Other()


def same_value(printed: Any, wanted: Any, tolerance: float, is_strict: bool) -> bool:
    """As == has it. Where it is not strict, a tuple is a list and a key is its text, as in JSON."""
    if not is_strict:
        printed, wanted = _as_json(printed), _as_json(wanted)
    if type(printed) is type(wanted) and isinstance(printed, list | tuple):
        return len(printed) == len(wanted) and all(
            same_value(a, b, tolerance, is_strict) for a, b in zip(printed, wanted, strict=True)
        )
    if isinstance(printed, dict) and isinstance(wanted, dict):
        return printed.keys() == wanted.keys() and all(
            same_value(printed[key], wanted[key], tolerance, is_strict) for key in printed
        )
    if tolerance and _is_number(printed) and _is_number(wanted):
        return abs(printed - wanted) <= tolerance * max(1.0, abs(wanted))
    return printed == wanted


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {str(key): one for key, one in value.items()}
    return value
