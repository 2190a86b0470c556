"""The image that a job will run in, by its labels, against the checkout that asks for it."""

import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import moetrain
from moetrain.cluster.doctor.base import Finding, Subject, fail, skip, warn, worst
from moetrain.cluster.doctor.versions import missing_extras, out_of_range

INSIDE = Path("/.singularity.d/labels.json")
# containers/*.def write these labels in %post.
VERSION, COMMIT, PACKAGE = "org.moetrain.version", "org.moetrain.commit", "org.moetrain.package."
REBUILD = "build one from this checkout with containers/build.sh, or point MOETRAIN_IMAGE at it"


def check(subject: Subject) -> Finding:
    """MOETRAIN_IMAGE from outside, or the image this process runs in."""
    named = os.environ.get("MOETRAIN_IMAGE", "")
    if INSIDE.is_file():
        labels, name = _labels(INSIDE.read_text()), os.environ.get("APPTAINER_CONTAINER", "this")
    elif not named:
        return skip("MOETRAIN_IMAGE is not set: jobs run in this environment")
    else:
        name = named
        if not Path(named).is_file():
            return fail(f"MOETRAIN_IMAGE={named} does not exist", REBUILD)
        program = shutil.which("apptainer") or shutil.which("singularity")
        if program is None:
            return warn(
                f"{named} cannot be looked into: no apptainer here",
                "load its module, or run this inside the image: apptainer run IMAGE doctor",
            )
        done = subprocess.run(
            [program, "inspect", "--labels", "--json", named],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            return fail(f"{named} is no image that apptainer reads: {reason}", REBUILD)
        labels = _labels(done.stdout)
    checkout = checkout_of(subject)
    findings = list(compare(labels, checkout, subject))
    commit = labels.get(COMMIT, "none")[:12]
    return worst(findings, f"{name}: moetrain {labels.get(VERSION)} of commit {commit}")


def _labels(text: str) -> dict[str, str]:
    """Of `apptainer inspect --json`, or of the file inside an image."""
    content = json.loads(text)
    return content.get("data", {}).get("attributes", {}).get("labels", content)


def checkout_of(subject: Subject) -> Path | None:
    """The checkout of moetrain that the recipe lies in, else the folder one stands in."""
    start = subject.recipe_path.absolute().parent if subject.recipe_path else Path.cwd()
    for folder in (start, *start.parents, Path.cwd(), *Path.cwd().parents):
        project = folder / "pyproject.toml"
        if project.is_file() and (folder / "moetrain").is_dir():
            if tomllib.loads(project.read_text())["project"]["name"] == "moetrain":
                return folder
    return None


def compare(
    labels: Mapping[str, str], checkout: Path | None, subject: Subject
) -> Iterator[Finding]:
    """What the image holds that the checkout, or the recipe, does not ask for."""
    if VERSION not in labels:
        yield fail("it has no moetrain labels", REBUILD)
        return
    ours = _version(checkout) if checkout else moetrain.__version__
    if labels[VERSION] != ours:
        yield fail(f"it holds moetrain {labels[VERSION]}, the checkout is {ours}", REBUILD)
    versions = {
        name.removeprefix(PACKAGE): version
        for name, version in labels.items()
        if name.startswith(PACKAGE)
    }
    for finding in (
        *out_of_range(versions, checkout),
        *missing_extras(versions, replace(subject, image=True)),
    ):
        yield fail(f"in it, {finding.text}", REBUILD)
    commit = _commit(checkout) if checkout else None
    if commit is not None and labels.get(COMMIT) != commit:
        yield warn(
            f"it was built from commit {labels.get(COMMIT, 'none')[:12]}, the checkout is at"
            f" {commit[:12]}",
            REBUILD + "; a job runs the code in the image",
        )


def _version(checkout: Path) -> str:
    text = (checkout / "moetrain" / "__init__.py").read_text()
    return text.partition("__version__ = ")[2].splitlines()[0].strip("\"' ")


def _commit(checkout: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):  # images have no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None
