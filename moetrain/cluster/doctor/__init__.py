"""`moetrain doctor`: what would fail in the job, told before it, one line a check.

Alone it looks at this machine; as one of several ranks it also measures between them. Its exit code
is that of the worst line: 0, 1 with warnings, 2 with failures.
"""

import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.cluster.doctor import files, image, job, machine, traffic, versions
from moetrain.cluster.doctor.base import (
    EXIT_CODES,
    Finding,
    Level,
    Planned,
    Ranks,
    Subject,
    fail,
    skip,
)
from moetrain.errors import MoetrainError, plural

MEETING_SECONDS = 25.0  # for all ranks to be there; then the answer of one that waits
PATIENCE_SECONDS = 60.0  # for a rank that reads slowly, and for a collective
FIRST, NODE, ALL = "first", "node", "all"


@dataclass(frozen=True)
class Check:
    """`on`: the first rank alone, one rank of every node, or all, which then ask each other."""

    name: str
    look: Callable[[Subject], Finding]
    on: str
    needs_recipe: bool = False


CHECKS = (
    Check("versions", versions.check, ALL),
    Check("image", image.check, FIRST),
    Check("layout", job.layout, FIRST, needs_recipe=True),
    Check("step", job.step, FIRST, needs_recipe=True),
    Check("inputs", files.inputs, NODE, needs_recipe=True),
    Check("model", files.model, NODE, needs_recipe=True),
    Check("gpus", machine.gpus, NODE),
    Check("host memory", machine.memory, NODE),
    Check("ports", machine.ports, NODE),
    Check("link in a node", traffic.in_node, ALL),
    Check("link of nodes", traffic.across_nodes, ALL),
    Check("clocks", traffic.clocks, ALL),
    Check("shared folder", files.shared, ALL, needs_recipe=True),
    Check("free space", files.space, FIRST, needs_recipe=True),
    Check("tokenizer", files.tokenizer, FIRST, needs_recipe=True),
    Check("data", files.data, NODE, needs_recipe=True),
)
WORDS = {Level.OK: "ok", Level.SKIP: "skip", Level.WARN: "warn", Level.FAIL: "FAIL"}


def main(recipe: Path | None, overrides: Sequence[str], world_size: int | None) -> int:
    """Look, print, and return the exit code. `world_size`: that of the job this is a rank of."""
    from moetrain.config.load import load_recipe

    started = time.monotonic()
    loaded = load_recipe(recipe, overrides) if recipe else None
    subject = Subject(None, None, recipe)
    rank = 0
    if world_size is not None and world_size > 1:
        rank = int(os.environ["RANK"])
        subject.ranks, subject.meeting = meet(rank, world_size)
    if loaded is not None:
        subject.plan = Planned(loaded, world_size if subject.ranks is None else subject.ranks.job)
    findings = examine(subject)
    if subject.ranks is not None:
        gathered = subject.ranks.gather(findings)
        findings = merged(gathered, subject.ranks.nodes)
        subject.ranks.barrier()
    elif rank:
        print(f"moetrain: error: {subject.meeting}. {machine.MEETING}", file=sys.stderr)
        return 2
    if rank:
        return 0  # the first rank speaks for all
    for name, finding in findings.items():
        print(line(name, finding))
    levels = [finding.level for finding in findings.values()]
    failures, warnings = levels.count(Level.FAIL), levels.count(Level.WARN)
    seconds = time.monotonic() - started
    bad = f"{plural(failures, 'failure')}, {plural(warnings, 'warning')}"
    print(f"{bad}, {plural(len(levels), 'check')} in {seconds:.0f} s")
    return EXIT_CODES[max(levels)]


def line(name: str, finding: Finding) -> str:
    """One check's line, with its remedy where it has one."""
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    text = " ".join(f"{finding.text}{remedy}".split())
    return f"{WORDS[finding.level]:<5} {name:<15} {text}"


def meet(rank: int, world_size: int) -> tuple[Ranks | None, str]:
    """The ranks' groups; or None, and why they did not meet."""
    at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        import torch.distributed as dist

        from moetrain.engine import meeting

        meeting.join("gloo", rank, world_size, datetime.timedelta(seconds=MEETING_SECONDS))
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=PATIENCE_SECONDS))
        return Ranks(rank, world_size, PATIENCE_SECONDS), ""
    except Exception as error:  # torch raises several types, and an import may fail
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"rank {rank} of {world_size} did not meet the others at {at}: {reason}"


def examine(subject: Subject, checks: Sequence[Check] = CHECKS) -> dict[str, Finding]:
    """Every check that is this rank's to make: its name -> what it found."""
    ranks = subject.ranks
    findings: dict[str, Finding] = {}
    for check in checks:
        if check.needs_recipe and subject.plan is None:
            findings[check.name] = skip("no recipe was given")
            continue
        mine = ranks is None or ranks.rank == 0 or check.on == ALL
        if mine or (check.on == NODE and ranks is not None and ranks.leads):
            if ranks is not None and check.on == ALL:
                ranks.barrier()  # a rank that looked longer than others is waited for
            findings[check.name] = _once(_look(check, subject), findings)
    return findings


def _once(finding: Finding, found: Mapping[str, Finding]) -> Finding:
    """The finding; what another check has failed of already is not said again."""
    same = (name for name, one in found.items() if finding.level is Level.FAIL and one == finding)
    earlier = next(same, None)
    return finding if earlier is None else skip(f"{earlier} has to be mended first")


def _look(check: Check, subject: Subject) -> Finding:
    try:
        return check.look(subject)
    except MoetrainError as error:  # says its own way out
        return Finding(Level.FAIL, str(error))
    except Exception as error:  # one check that breaks may not silence the others
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        return fail(f"{type(error).__name__}: {reason}", "the check itself broke; report it")


def merged(found: Sequence[dict[str, Finding]], nodes: Sequence[str]) -> dict[str, Finding]:
    """The worst finding of each check over all ranks; a bad one says whose it is."""
    out: dict[str, Finding] = {}
    for name in found[0]:
        by_rank = [(rank, each[name]) for rank, each in enumerate(found) if name in each]
        worst = max(finding.level for _, finding in by_rank)
        if worst < Level.WARN:
            out[name] = found[0][name]
            continue
        bad = [(nodes[rank], finding) for rank, finding in by_rank if finding.level == worst]
        where = sorted({node for node, _ in bad})
        first = bad[0][1]
        shown = f"{', '.join(where[:3])}{f' and {len(where) - 3} more' * (len(where) > 3)}"
        prefix = f"{shown}: " if len(set(nodes)) > 1 else ""
        out[name] = Finding(first.level, prefix + first.text, first.remedy)
    return out
