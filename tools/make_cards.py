"""`make cards`: run the claims of the docs again, and write what they come to now.

    python tools/make_cards.py                  # all that can run here, each within its stated time
    python tools/make_cards.py --only NAME      # one
    python tools/make_cards.py --render         # run nothing; put the cards' figures into the pages

A figure out of its bound is one line and exit code 1, and nothing of its card is written. What is
within its bound is written into the card, with date, commit and versions, and into the pages; but a
card with times is checked alone where other work keeps the cores.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from card import FOLDER, ROOT, Card, Figure, all_cards, as_yaml, place_of, written_like
from tables import write_table

from moetrain.errors import MoetrainError, nearest, plural

COLUMNS = (
    "card",
    "claim",
    "figures",
    "status",
    "commit, date, beside",
    "machine",
    "peak GiB",
    "again",
)
VERSIONS = ("torch", "megatron-core", "transformers", "vllm")
DIGITS = 4
TIMES = ("s", "min", "1/s", "tokens/s")


class CardError(MoetrainError):
    """A claim that does not hold, or a command that does not run."""

    exit_code = 1


def rerun(name: str, card: Card) -> Card:
    """The card with what its command says now. Raises CardError."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="card-") as folder:
        code, said, peak = _said(card, Path(folder))
    seconds = time.monotonic() - start
    if code is None:
        raise CardError(f"{name}: not done in its {card.minutes:g} min")
    if code != card.exit_code:
        raise CardError(f"{name}: exit code {code}, not {card.exit_code}: {_last_line(said)}")
    figures = [_again(name, figure, said, seconds) for figure in card.figures]
    measured = {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "versions": _versions(),
        "beside": f"a load of {os.getloadavg()[1]:.0f}",
        "peak_gib": round(peak / 2**30, 2) or None,  # of none that is seen, nothing is said
    }
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": card.machine.gpu,
    }
    content = card.model_dump(by_alias=True, exclude_defaults=True)
    content |= {"measured": measured, "machine": machine}
    content["figures"] = [figure.model_dump(by_alias=True) for figure in figures]
    return Card.model_validate(content)


def _again(name: str, figure: Figure, said: str, seconds: float) -> Figure:
    """The figure as it is now; the old one where the output does not say it."""
    if not figure.is_read:
        return figure
    try:
        value = figure.read(said, seconds)
    except (ValueError, LookupError, TypeError) as error:
        raise CardError(f"{name}: {figure.what} is not in what the command said: {error}") from None
    value = float(f"{value:.{DIGITS}g}") if abs(value) < 1000 else round(value)
    if not figure.holds(value) and not figure.missed:
        raise CardError(f"{name}: {figure.what} is {value:g}, and its bound is {figure.bound}")
    missed = "" if figure.holds(value) else figure.missed
    return figure.model_copy(update={"value": value, "missed": missed})


def _said(card: Card, folder: Path) -> tuple[int | None, str, int]:
    """A command's exit code (None: out of time), all that it wrote, and its peak of bytes.

    It runs in an empty folder that has links to what the repository has, so that no run of before
    is gone on with.
    """
    assert card.minutes is not None
    for path in ROOT.iterdir():
        if path.name not in (".git", "runs"):
            (folder / path.name).symlink_to(path)
    (folder / "out").mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {"PATH": path, "OUT": str(folder / "out"), "COLUMNS": "200"}
    with (folder / "said.txt").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", card.command],
            cwd=folder,
            env=os.environ | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        held = _Memory(process.pid)
        held.start()
        try:
            process.wait(card.minutes * 60)
        except subprocess.TimeoutExpired:
            pass
        finally:
            code = process.poll()
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            held.over.set()
            held.join()
        log.seek(0)
        return code, log.read(), held.peak


class _Memory(threading.Thread):
    """Watches the anonymous memory of a session's processes, all together."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.session, self.peak, self.over = session, 0, threading.Event()

    def run(self) -> None:
        """Until `over` is set."""
        while not self.over.wait(0.1):
            self.peak = max(self.peak, sum(map(self._of, Path("/proc").glob("[0-9]*"))))

    def _of(self, process: Path) -> int:
        try:
            if os.getsid(int(process.name)) != self.session:
                return 0
            status = (process / "status").read_text()
        except (OSError, ValueError):  # it is gone
            return 0
        lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        return sum(int(line.split()[1]) << 10 for line in lines)


def _last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        raise CardError("cards are run in a clone, whose commit they name")
    # What it writes itself is no change of what is measured.
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ":!cards", ":!docs"]
    dirty = subprocess.run([*git, *changed], capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def render(cards: dict[str, Card], docs: Path = ROOT / "docs") -> None:
    """Put the figures into the pages that they stand in, and all cards into docs/cards.md."""
    for card in cards.values():
        for figure in card.figures:
            if figure.shown and figure.value is not None:
                _put(card, figure, figure.value, docs)
    found = {f"[{name}](../cards/{name}.yaml)": _row(card) for name, card in cards.items()}
    write_table(docs / "cards.md", "cards", COLUMNS, found, found)


def _put(card: Card, figure: Figure, value: float, docs: Path) -> None:
    """Where the page says another figure. Raises ConfigError where it is not there once."""
    path, section = docs / card.page.partition("#")[0], card.section(docs)
    place = place_of(figure, section)
    begin, end = place.span(1)
    said = written_like(value, place[1])
    if said != place[1]:
        text = path.read_text()
        assert text.count(section) == 1, f"docs/{card.page} is there twice"
        path.write_text(text.replace(section, section[:begin] + said + section[end:]))


def _row(card: Card) -> Sequence[str]:
    """Of the table, behind the card's name."""
    figures = [
        f"{figure.what}: "
        + ("?" if figure.value is None else f"**{figure.value:,.10g}**")
        + f"{' ' * bool(figure.unit)}{figure.unit}"
        + f" ({figure.bound}{f'; missed: {figure.missed}' * bool(figure.missed)})"
        for figure in card.figures
    ]
    done, machine = card.measured, card.machine
    when = "" if done is None else f"{done.commit or 'commit unknown'}, {done.date}"
    if done is not None and done.beside:
        when += f", beside {done.beside}"
    memory = "" if machine.memory_gib is None else f", {machine.memory_gib:g} GiB"
    what = f"{plural(machine.cores, 'core')}{memory}"
    if machine.gpu != "none":
        what += f", for {machine.gpu}" if card.status == "predicted" else f", {machine.gpu}"
    peak = "" if done is None or done.peak_gib is None else f"{done.peak_gib:.2f}"
    again = f"{card.minutes:g} min" if card.minutes is not None else f"needs {card.needs}"
    claim = f"[{card.claim}]({card.page})<br>`{' '.join(card.command.split())}`"
    return [claim, "<br>".join(figures), card.status, when, what, peak, again]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", metavar="NAME", help="one card")
    parser.add_argument("--render", action="store_true", help="run nothing, write the pages")
    args = parser.parse_args()
    failed = False
    try:
        cards = all_cards()
        for name in [] if args.render else _chosen(cards, args.only):
            failed |= not _run(name, cards)
        render(cards)
    except MoetrainError as error:
        return _say(error)
    return CardError.exit_code if failed else 0


def _say(error: Any) -> int:
    print(f"cards: {error}", file=sys.stderr)
    return error.exit_code


def _run(name: str, cards: dict[str, Card]) -> bool:
    """Whether the card still holds; what is found is in `cards` and in its file then."""
    busy = os.getloadavg()[0] > len(os.sched_getaffinity(0))
    try:
        card = rerun(name, cards[name])
    except CardError as error:
        _say(error)
        return False
    told = [f"{f.what} {f.value:g}{' ' * bool(f.unit)}{f.unit} ({f.bound})" for f in card.figures]
    if busy and _has_times(card):
        told.append("not written, since the machine has other work")
    else:
        cards[name] = card
        (FOLDER / f"{name}.yaml").write_text(as_yaml(card))
    print(f"{name}: {'; '.join(told)}", flush=True)
    return True


def _has_times(card: Card) -> bool:
    """Whether other work changes what it comes to; a prediction's seconds are of no clock."""
    read = [figure for figure in card.figures if figure.is_read]
    return any(f.clock or (f.unit in TIMES and card.status == "measured") for f in read)


def _chosen(cards: dict[str, Card], only: str | None) -> list[str]:
    if only is None:
        return [name for name, card in cards.items() if card.minutes is not None]
    if only not in cards:
        raise CardError(f"no card {only}.{nearest(only, cards)} Cards: {', '.join(cards)}")
    if cards[only].minutes is None:
        raise CardError(f"{only} cannot run here: it needs {cards[only].needs}")
    return [only]


if __name__ == "__main__":
    sys.exit(main())
