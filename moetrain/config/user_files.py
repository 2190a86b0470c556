"""Whether what a recipe names as FILE.py:NAME is in its file. The file is read, not run."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from moetrain.errors import ConfigError, nearest


def split_name(name: str) -> tuple[Path, str]:
    """FILE.py:NAME as (file, name)."""
    file, _, own = name.rpartition(":")
    return Path(file).expanduser(), own


def parsed_file(name: str, where: str) -> Sequence[ast.stmt]:
    """The statements of FILE.py:NAME's file; `where` is the recipe's key. Raises ConfigError."""
    path, _ = split_name(name)
    if not path.is_file():
        raise ConfigError(f"{where}: {name}: {path} is not a file. Check the path.")
    try:
        return ast.parse(path.read_bytes(), str(path)).body
    except (SyntaxError, ValueError) as error:  # a ValueError for NUL bytes
        message = str(error).partition("\n")[0]
        raise ConfigError(
            f"{where}: {path} cannot be run: {type(error).__name__}: {message}"
        ) from error


def check_named(name: str, where: str, kind: str) -> None:
    """That a file has a `kind` ("function") of that name. Raises ConfigError."""
    path, own = split_name(name)
    names = list(_names(parsed_file(name, where)))
    if own not in names and "*" not in names:
        raise ConfigError(
            f"{where}: {path} has no {kind} {own}.{nearest(own, names)} It has"
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
