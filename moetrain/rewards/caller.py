"""Run in a sandbox beside solution.py: asks a function of it, and prints the value as JSON. The
standard library alone.

Asked on standard input: {name, arguments}; {setup, expression}; or {setup, check, word}, where
`check` is run and `word` is printed when nothing was raised.
"""

import json
import os
import sys
import types

out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the program itself prints
sys.set_int_max_str_digits(0)
sys.setrecursionlimit(100_000)
# What LeetCode imports for a program.
PRELUDE = """
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string
from typing import *
from collections import *
from functools import *
from heapq import *
from bisect import *
from itertools import *
from math import *
from builtins import *
"""


def found(module, name):
    if hasattr(getattr(module, "Solution", None), name):
        return getattr(module.Solution(), name)
    return getattr(module, name)


def given(value):
    if isinstance(value, dict):
        return {key: one for key, one in value["pairs"]}
    return value


def plain(value):
    """As JSON, so that values.read makes the same of it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [plain(one) for one in value]}
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {"dict": [[plain(key), plain(one)] for key, one in value.items()]}
    return {"other": type(value).__name__}


def checked(names, check):
    """Run a check, and the functions test_* that it defines."""
    before = set(names)
    exec(compile(check, "check", "exec"), names)
    for name in [name for name in names if name.startswith("test_") and name not in before]:
        names[name]()


def main():
    asked = json.load(sys.stdin)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    names = vars(module)
    exec(PRELUDE, names)
    with open("solution.py", encoding="utf-8", errors="replace") as file:
        exec(compile(file.read(), "solution.py", "exec"), names)
    if "name" in asked:
        value = found(module, asked["name"])(*map(given, asked["arguments"]))
    elif "expression" in asked:
        exec(compile(asked["setup"], "setup", "exec"), names)
        value = eval(compile(asked["expression"], "expression", "eval"), names)
    else:
        exec(compile(asked["setup"], "setup", "exec"), names)
        checked(names, asked["check"])
        value = asked["word"]
    data = memoryview(json.dumps(plain(value)).encode())
    while data:
        data = data[os.write(out, data) :]
    os._exit(0)


main()
