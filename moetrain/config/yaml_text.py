"""YAML as people write it, to values that can be worked with and back.

A recipe can come from anybody, so what it says is bounded before it is built: how long it is, how
deep, how many values its aliases come to, how many digits a number has.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

import yaml

from moetrain.errors import ConfigError

MAX_CHARS = 2_000_000  # of a text; PyYAML reads about 200,000 a second
MAX_DEPTH = 100  # of sections and lists in each other
MAX_VALUES = 100_000  # with every alias put in
MAX_DIGITS = 1000

_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
# No path and no text of ours holds these, and the system or an encoding fails on them later.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_FOREIGN = ("binary", "set", "omap", "pairs")  # what no key of ours takes


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 wants 1.0e-4) and a key may stand only once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: list[list[int]] = []  # (values, depth below) of the nodes that are being read
        self._known: dict[int, tuple[int, int]] = {}  # the same of those that are read

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One more node, within the bounds; of an alias what it stands for counts again."""
        event = cast(Any, self).peek_event()
        mark = event.start_mark
        if len(self._open) >= MAX_DEPTH:
            raise _too("nested too deeply", MAX_DEPTH, "levels", mark)
        self._open.append([1, 0])
        node: Any = super().compose_node(parent, index)
        values, depth = self._open.pop()
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._known:
                problem = f"the alias *{cast(Any, event).anchor} is inside of what it refers to"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            values, depth = self._known[id(node)]
        self._known[id(node)] = values, depth
        if values > MAX_VALUES:
            raise _too("too many values", MAX_VALUES, "with every alias put in", mark)
        if len(self._open) + depth >= MAX_DEPTH:
            raise _too("nested too deeply", MAX_DEPTH, "levels", mark)
        if self._open:
            outer = self._open[-1]
            self._open[-1] = [outer[0] + values, max(outer[1], depth + 1)]
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if unusable := _UNUSABLE.search(node.value):
            problem = f"a text holds {unusable[0]!a}, which no path or text can have"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise _too("a number is too long", MAX_DIGITS, "digits", node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            # `<<` may repeat, and the keys it brings are meant to be overridden.
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key.value}' is given twice; keep one",
                    problem_mark=key.start_mark,
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _too(what: str, limit: int, unit: str, mark: Any) -> yaml.MarkedYAMLError:
    problem = f"{what} (more than {limit:,} {unit})"
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for numbers, such as a run id of 12e45."""


for _side in (_Loader, _Dumper):
    cast(Any, _side).add_implicit_resolver(
        "tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789.")
    )
for _name in _FOREIGN:
    cast(Any, _Loader).add_constructor(
        f"tag:yaml.org,2002:{_name}", cast(Any, yaml.SafeLoader).construct_undefined
    )


def parse_value(text: str, where: str) -> Any:
    """What a YAML text says. Raises ConfigError, with the place, for one that is none or that goes
    beyond the bounds.
    """
    if len(text) > MAX_CHARS:
        raise ConfigError(
            f"{where}: {len(text):,} characters of YAML; at most {MAX_CHARS:,} are read"
        )
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ConfigError(f"{where}:{place} not YAML ({problem})") from None
    except RecursionError:
        raise ConfigError(f"{where}: not YAML (nested too deeply)") from None
    except ValueError as error:  # a date such as 2026-13-45, which YAML's pattern lets pass
        raise ConfigError(f"{where}: not YAML ({error}); quote it to have text") from None


def dump_content(content: Mapping[str, Any]) -> str:
    """A recipe's content as YAML, as far as it goes."""
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
