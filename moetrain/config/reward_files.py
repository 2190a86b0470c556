"""Whether the functions that a recipe names are in their files: read, not run."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from moetrain.config.rewards import RewardConfig
from moetrain.errors import ConfigError, nearest


def check_reward_files(rewards: Sequence[RewardConfig]) -> None:
    """Raises ConfigError for a file or function that is not there, before anything is loaded."""
    for reward in rewards:
        if ":" in reward.name:
            check_reward_file(reward.name)


def check_reward_file(name: str) -> None:
    """Of FILE.py:FUNCTION. Raises ConfigError."""
    file, _, function = name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"rewards: {name}: {path} is not a file. Check the path.")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:  # a ValueError for NUL bytes
        said = str(error).partition("\n")[0]
        raise ConfigError(
            f"rewards: {path} cannot be run: {type(error).__name__}: {said}"
        ) from error
    names = list(_names(tree.body))
    if function not in names and "*" not in names:
        raise ConfigError(
            f"rewards: {path} has no function {function}.{nearest(function, names)} It has"
            f" {', '.join(names) or 'none'}."
        )


def _names(body: Sequence[ast.stmt]) -> Iterator[str]:
    """What statements of a module give names to; "*" for names that only running it would tell."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                for one in node.names:
                    yield one.asname or one.name.partition(".")[0]
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            yield part.id
            case ast.If() | ast.Try() | ast.With() | ast.For() | ast.While() | ast.TryStar():
                for name in ("body", "orelse", "finalbody"):
                    yield from _names(getattr(node, name, []))
                for handler in getattr(node, "handlers", []):
                    yield from _names(handler.body)
            case ast.Expr(value=ast.Call(func=ast.Name(id="exec" | "globals" | "setattr"))):
                yield "*"
            case _:
                pass
