"""Which distribution a package is from, by the lists of files alone. No torch.

transformers 5 asks importlib.metadata for all of it when it is imported, and Python 3.12 then looks
whether each file of each distribution is there: 33,000 of them in this environment. That is half a
second of CPU in every rank and, on a cluster's file system, as many requests to the server of its
metadata from each.
"""

import csv
import importlib.metadata
import inspect
from collections import defaultdict


def read_lists_alone() -> None:
    """Let importlib.metadata.packages_distributions answer so in this process."""
    importlib.metadata.packages_distributions = packages_distributions


def packages_distributions() -> dict[str, list[str]]:
    """As importlib.metadata.packages_distributions: name of a package -> distributions that have
    it. A file that is listed and gone counts, too.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    for distribution in importlib.metadata.distributions():
        for package in _packages(distribution):
            found[package].append(distribution.metadata["Name"])
    return dict(found)


def _packages(distribution: importlib.metadata.Distribution) -> set[str]:
    """Those that it declares, else the folders and modules that its list of files begins with."""
    if declared := (distribution.read_text("top_level.txt") or "").split():
        return set(declared)
    if (listed := distribution.read_text("RECORD")) is None:
        paths = [str(path) for path in distribution.files or []]
    else:
        paths = [row[0] for row in csv.reader(listed.splitlines()) if row]
    folders = {path.split("/", 1)[0] for path in paths if "/" in path}
    modules = {inspect.getmodulename(path) for path in paths if "/" not in path}
    return {name for name in folders | modules if name and "." not in name}
