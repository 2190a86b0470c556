"""Python as a tool, in the sandbox that grades programs."""

from collections.abc import Sequence

from moetrain.environments.base import Tool, Unable
from moetrain.environments.toolbox import Toolbox
from moetrain.rewards.sandbox import MB, Limits, Sandbox

MOST = 16 * MB  # bytes of output that a program may write; of it a reply has rollout.reply_chars
SAID = 800  # characters of the end of its standard error, where the reason stands
# Says what the last line is, as an interpreter does, where it is an expression.
_RUN = b"""
import ast, sys
with open("code.py", encoding="utf-8", errors="replace") as file:
    tree = ast.parse(file.read(), "code.py")
last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
names = {"__name__": "__main__"}
exec(compile(tree, "code.py", "exec"), names)
if last is not None:
    value = eval(compile(ast.Expression(last.value), "code.py", "eval"), names)
    if value is not None:
        print(value)
"""
TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Run Python code and return what it prints, and the value of its last line."
        " Nothing is kept from one call to the next; there is no network.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The code to run."}},
            "required": ["code"],
        },
    },
}


class ProgramError(Exception):
    """A program did not end well."""


class Python(Toolbox):
    """A tool `python` that runs `code`.

    Args:
        seconds: of a program, by the clock; below rollout.environment_seconds.
        memory_mb: address space of a process.
        sandbox: auto, bubblewrap or namespaces.
        python: the interpreter; None: this one, without its environment's packages.
        read: further folders that programs may read.
    """

    def __init__(
        self,
        seconds: float = 10.0,
        memory_mb: int = 512,
        sandbox: str = "auto",
        python: str | None = None,
        read: Sequence[str] = (),
    ):
        super().__init__({"python": self._run}, lambda: [TOOL])
        self._limits = Limits(seconds, memory_mb * MB, MOST)
        self._sandbox = Sandbox(sandbox, read, python)

    def _run(self, code: str) -> str:
        ran = self._sandbox.run(
            [self._sandbox.python, "-I", "run.py"],
            files={"run.py": (_RUN, 0o644), "code.py": (code.encode(errors="replace"), 0o644)},
            limits=self._limits,
        )
        if ran.end == "broken":
            raise Unable(f"the sandbox: {ran.said}")
        out = ran.out.decode(errors="replace")
        if ran.end == "timeout":
            raise ProgramError(f"it ran for over {self._limits.seconds:g} s. {out}")
        if ran.end == "output":
            raise ProgramError(f"it printed over {MOST // MB} MiB. {out}")
        if ran.code:
            output = ran.said.strip()[-SAID:] or f"it ended with code {ran.code}"
            raise ProgramError(f"{output}\n{out}".strip())
        return out
