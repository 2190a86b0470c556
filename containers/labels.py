"""Prints an image's labels: `key value` lines for moetrain, its commit and its packages.

labels.py COMMIT [PACKAGE ...]: with names, only those packages.
"""

import re
import sys
from importlib import metadata

commit, *only = sys.argv[1:]
if not only:
    print("org.moetrain.version", metadata.version("moetrain"))
    print("org.moetrain.commit", commit)
packages: dict[str, str] = {}
for (
    found
) in metadata.distributions():  # in the order in which Python imports them: the first counts
    packages.setdefault(re.sub(r"[-_.]+", "-", found.name).lower(), found.version)
for name in sorted(packages):
    if not only or name in only:
        print(f"org.moetrain.package.{name}", packages[name])
