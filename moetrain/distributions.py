"""Which distribution a package comes from, without checking that its files exist. No torch.

When transformers 5 is imported it calls importlib.metadata.packages_distributions, and Python 3.12
checks there that each file of each distribution exists: 33,000 of them in this environment. That is
half a second of CPU in every rank and, on a cluster, as many requests to the file system's metadata
server.
"""

import csv
import importlib.metadata
import inspect
from collections import defaultdict


def skip_file_checks() -> None:
    """Put `packages_distributions` in the place of importlib.metadata's, in this process."""
    importlib.metadata.packages_distributions = packages_distributions


def packages_distributions() -> dict[str, list[str]]:
    """As importlib.metadata.packages_distributions: name of a package -> distributions that have
    it. A file that is listed but missing counts too.
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
