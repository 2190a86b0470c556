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
packages = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in metadata.distributions()}
for name in sorted(packages):
    if not only or name in only:
        print(f"org.moetrain.package.{name}", packages[name])
