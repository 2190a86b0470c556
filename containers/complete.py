"""Says what the packages of this Python's environment ask for in vain; exit code 1 when anything.

complete.py [PACKAGE ...]: but for what these ask for.

As `pip check`, but a base that the environment looks into is not asked, and has what it has: what
NVIDIA's packages ask of each other is theirs.
"""

import sys
import sysconfig
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

versions: dict[str, str] = {}
for found in metadata.distributions():  # the first is the one that Python imports
    versions.setdefault(canonicalize_name(found.name), found.version)
unmet: list[str] = []
for own in metadata.distributions(path=[sysconfig.get_path("purelib")]):
    if own.name in sys.argv[1:]:
        continue
    for asked in map(Requirement, own.requires or ()):
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        version = versions.get(canonicalize_name(asked.name))
        if version is None or not asked.specifier.contains(version, prereleases=True):
            unmet.append(f"{own.name} {own.version} asks for {asked}: {version or 'not there'}")
print("\n".join(sorted(unmet)) or f"{sys.prefix}: each package has what it asks for")
sys.exit(bool(unmet))
