#!/usr/bin/env bash
# math-verify 0.9.0 (latex2sympy2_extended 1.11.0): letters behind a number that its list of units holds ("ab", "o", "m", "prime", "per"
# and more) are taken away as a unit, also where they are a product of symbols; and symbols are read without their case.
# Expected: \boxed{2ab} is a product and not 2; \boxed{2A} and \boxed{2a} differ.
# Seen:
#   \boxed{2ab} equals 2: True
#   \boxed{2m} equals 2: True
#   \boxed{2A} equals \boxed{2a}: True
# A grader that wants the product has to read it before math-verify does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check math-verify==0.9.0 latex2sympy2_extended==1.11.0
"$work/env/bin/python" - <<'PY'
from importlib.metadata import version

from math_verify import parse, verify

print("versions: math-verify", version("math-verify"), "latex2sympy2_extended", version("latex2sympy2_extended"))
seen = {
    r"\boxed{2ab} equals 2": verify(parse("2"), parse(r"\boxed{2ab}")),
    r"\boxed{2m} equals 2": verify(parse("2"), parse(r"\boxed{2m}")),
    r"\boxed{2A} equals \boxed{2a}": verify(parse(r"\boxed{2A}"), parse(r"\boxed{2a}")),
}
for what, result in seen.items():
    print(f"{what}: {result}")
assert all(seen.values()), "this has changed"
PY
