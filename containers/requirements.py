"""Reads a report of `pip install --dry-run --no-deps` and tells what its packages ask for in vain.

requirements.py REPORT PYTHON [REQUIREMENT ...]: of the last, which the image builds, no report is
asked for. Exit code 1 when something is asked for in vain.
"""

import json
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# torch's parts of CUDA stay out of the cpu image, and come with the base of the gpu image.
EXPECTED = ("nvidia-", "cuda-", "torch", "triton")


def main(report: Path, python: str, built: list[str]) -> int:
    packages = {
        canonicalize_name(entry["metadata"]["name"]): entry["metadata"]
        for entry in json.loads(report.read_text())["install"]
    }
    environment = {"extra": "", "python_version": python, "python_full_version": f"{python}.3"}
    versions = {name: metadata["version"] for name, metadata in packages.items()}
    for name, _, version in (requirement.partition("==") for requirement in built):
        versions[canonicalize_name(name)] = version
    unmet: list[str] = []
    for name, metadata in packages.items():
        for asked in map(Requirement, metadata.get("requires_dist", [])):
            other = canonicalize_name(asked.name)
            if asked.marker is not None and not asked.marker.evaluate(environment):
                continue
            found = versions.get(other)
            if found is None and not other.startswith(EXPECTED):
                unmet.append(f"{name} asks for {asked}: not listed")
            elif found and not asked.specifier.contains(found, prereleases=True):
                unmet.append(f"{name} asks for {asked}: {found} is listed")
    print(f"{len(packages)} packages are in the index for Python {python}")
    print("\n".join(unmet) or "each has what it asks for")
    return 1 if unmet else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
