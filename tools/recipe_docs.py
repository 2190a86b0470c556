#!/usr/bin/env python3
"""Write docs/recipes.md from the recipe's models, or with --check say whether it is up to date."""

import sys
from pathlib import Path

from moetrain.config.describe import Key, groups, plain_keys

DOC = Path(__file__).parent.parent / "docs" / "recipes.md"
HEAD = """# Recipes

A recipe is one YAML file; `moetrain train RECIPE [key=value ...]` runs it, and `moetrain init JOB
--model M --data D` writes a first one from a look into both. `moetrain recipe KEY` says in the
terminal what a key means; a name of another trainer's (`learning_rate`) leads to the key here. Any
key can be overridden on the command line by its dotted name, and the value is read as YAML:
`optim.lr=2e-5`, `data.eval=[a.jsonl,b.jsonl]`, `method={name: sft}`. Unknown keys are refused with
the nearest right name. Relative paths are relative to where the command is run. `moetrain train
RECIPE --dry-run` prints the resolved recipe, the ranks, bytes per GPU, and what the data comes to:
what would be rejected or cut, packs and steps of an epoch. It looks at 256 records of each set at
most, for 10 seconds at most, after the seconds that a tokenizer takes to load; the package's own
data it takes as it is, without a tokenizer or torch. What a run would read and is not there is
refused. Where the model itself is not on this machine and only known by its published config, it is
a plan for another machine, and `NOT HERE` lines name what is missing. Every run writes its recipe
to `<run_dir>/resolved.yaml`.

This page is written by `tools/recipe_docs.py` (`make fix`) from `moetrain/config/recipe.py`.
"""


def row(key: Key) -> str:
    """One line of a table."""
    text = key.text.replace("|", "\\|").replace("<", "\\<")
    return f"| `{key.name}` | {key.kind} | {key.default or '**required**'} | {text} |"


def table(rows: list[str]) -> list[str]:
    """A Markdown table."""
    return ["| key | value | default | |", "| --- | --- | --- | --- |", *rows, ""]


def text() -> str:
    """The whole page."""
    lines = [HEAD, *table([row(key) for key in plain_keys()])]
    before = ""
    for group in groups():
        if group.name not in (before, "options"):
            lines += [f"## {group.name}", ""]
        before = group.name
        if group.owner:
            title = "rewards" if group.name == "options" else group.name
            lines += [f"### {title}: {group.owner}", ""]
        if group.name != "options":
            lines += [group.text, ""]
        lines += table([row(key) for key in group.keys])
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Write the page, or compare it."""
    wanted = text()
    if "--check" not in sys.argv[1:]:
        DOC.write_text(wanted)
        return 0
    if DOC.is_file() and DOC.read_text() == wanted:
        print("docs/recipes.md is up to date")
        return 0
    print("docs/recipes.md does not match moetrain/config/recipe.py: run `make fix`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
