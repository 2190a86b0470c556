"""The tables that tools write into the pages of docs/."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def write_table(
    page: Path,
    mark: str,
    columns: Sequence[str],
    found: Mapping[str, Sequence[object]],
    order: Iterable[str],
    lead: str = "",
) -> None:
    """Put rows, by their first column, into the page's table between `<!-- mark -->` and
    `<!-- end mark -->`; other rows of it stay, if `order` has them. `lead` goes above the table.
    """
    head, begin, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    old, end, tail = rest.partition(f"<!-- end {mark} -->\n")
    assert begin and end, f"{page} has no marks {mark}"
    lines = dict(re.findall(r"^\| ([^|]+?) (\|.*)$", old, re.MULTILINE))
    for name, cells in found.items():
        texts = (str(cell).replace("|", "/") for cell in cells)
        lines[name] = f"| {' | '.join(texts)} |"
    table = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    table += [f"| {name} {lines[name]}" for name in order if name in lines]
    above = [lead, ""] if lead else []
    page.write_text(head + begin + "\n".join([*above, *table]) + "\n" + end + tail)
