"""Cases that are asserts: MBPP's and AceCode's list of them, HumanEval's and LeetCode's check, and
pytest's functions.

An assert that compares with a value is taken apart: what is left of == is asked of the program, and
compared outside of it. What cannot be taken apart is run in the program's own process, where one
that sets out to can say that all is well.
"""

import ast
import secrets

from moetrain.rewards.calls import Ask, Case


def assert_cases(source: str, setup: str) -> list[Case]:
    """Of Python with asserts, each of them a case where nothing else stands there."""
    body = ast.parse(source).body
    if all(isinstance(one, ast.Assert) for one in body) and body:
        return [_case(one, setup) for one in body if isinstance(one, ast.Assert)]
    if not any(isinstance(one, ast.Assert) for one in ast.walk(ast.parse(source))):
        raise ValueError(f"a test has no assert in it: {source[:60]!r}")
    return [_check(source, setup)]


def check_cases(source: str, entry: str, setup: str) -> list[Case]:
    """Of a text that defines check(candidate), which is called with `entry`, a function's name or
    `Solution().name`; or of any text with asserts.
    """
    tree = ast.parse(source)
    check = next(
        (one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == "check"), None
    )
    if check is None or not entry:
        return assert_cases(source, setup)
    body = [one for one in check.body if not _is_idle(one)]
    asserts = [one for one in body if isinstance(one, ast.Assert)]
    if not asserts or len(asserts) < len(body) or not check.args.args:
        return assert_cases(f"{source}\ncheck({entry})\n", setup)
    rest = [one for one in tree.body if one is not check and not _calls_check(one)]
    start = "\n".join(
        [setup, ast.unparse(ast.Module(rest, [])), f"{check.args.args[0].arg} = {entry}"]
    )
    return [_case(one, start) for one in asserts]


def _is_idle(one: ast.stmt) -> bool:
    return isinstance(one, ast.Pass) or (
        isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
    )


def _calls_check(one: ast.stmt) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "check" for node in ast.walk(one))


def _case(one: ast.Assert, setup: str) -> Case:
    match one.test:
        case ast.Compare(left, [ast.Eq()], [right]):
            for asked, value in ((left, right), (right, left)):
                try:
                    wanted = ast.literal_eval(value)
                except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                    continue
                asks = {"setup": setup, "expression": ast.unparse(asked)}
                return Case(Ask(asks, is_strict=True), wanted)
    return _check(ast.unparse(one), setup)


def _check(source: str, setup: str) -> Case:
    word = secrets.token_hex(8)  # said by who has come to the end
    return Case(Ask({"setup": setup, "check": source, "word": word}, is_strict=True), word)
