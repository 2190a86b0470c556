"""When Python looks for garbage, in a command that trains. No torch."""

import subprocess
import sys

CODE = """
import gc
from moetrain import cli, garbage

usual = gc.get_threshold()
assert cli.main(["recipe", "no.yaml"]) == 2
while_importing = gc.get_threshold()
garbage.all_imported()
assert gc.get_threshold() == usual != while_importing
before = gc.get_freeze_count()
garbage.keep_what_is_there()
assert gc.get_freeze_count() > before + 1000


class Circle:
    def __init__(self):
        self.own = self


later = Circle()
del later
assert gc.collect() >= 1, "what comes later is looked for"
print(while_importing[0] > 10 * usual[0])
"""


def test_seldom_while_it_imports_and_never_through_what_stays() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr
