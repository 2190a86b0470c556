"""`moetrain pairs`: preference pairs, or instruction data, from files of graded answers."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from moetrain import files as publishing
from moetrain.answers.file import AnswerRow, check_manifest, manifest_of
from moetrain.data.cache import cache_root, digest_files
from moetrain.data.formats import TEMPLATED
from moetrain.data.pairing import (
    AnsweredPrompt,
    Choice,
    Chosen,
    gather,
    num_tokens,
    pairs,
    right_answers,
)
from moetrain.data.samples import put_lines, read_lines
from moetrain.errors import DataError, plural
from moetrain.observe.progress import CountDisplay
from moetrain.run.folder import environment

LARGEST_COUNT = 2**31 - 1  # of tokens
LARGEST = 3.4028234663852886e38  # a float32's
OF_AN_ANSWER: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "finish": (str,),
    "tokens": (list, int),
    "parts": (dict,),
    "reward": (int, float, type(None)),
}


def choose(
    sources: Sequence[Path], out: Path, choice: Choice, *, sft: bool, held_out: float
) -> int:
    """Write pairs (or with `sft` right answers) of `sources`, files of `moetrain sample` or a run's
    rollouts folder, to `out`, and the share `held_out` of the prompts to `<out>.eval.jsonl`.

    Returns the exit code. Raises DataError when nothing comes of them, or `out` is of others.
    """
    _check(sources, choice, held_out)
    files = [_files(source) for source in sources]
    identity = {
        "sources": (
            [digest for inputs in files for _, digest in digest_files(inputs, cache_root())],
            ", ".join(map(str, sources)),
        ),
    }
    settings = {"sft": sft, "held_out": held_out, **asdict(choice)}
    identity |= {f"--{k.replace('_', '-')}": (v, str(v)) for k, v in settings.items()}
    check_manifest(out, identity)
    asked = gather(_rows(files), choice)
    chosen = (right_answers if sft else pairs)(asked, choice)
    if not chosen.records:
        raise DataError(f"{out}: nothing to write. {_summary(out, asked, chosen, sft)}")
    training, evaluated = _parted(chosen.records, held_out)
    counts = {"prompts": len(asked), "records": len(chosen.records), "no record": chosen.reasons}
    note = {"of": {k: list(v) for k, v in identity.items()}, "counts": counts} | environment()
    held_out_file = out.with_name(out.stem + ".eval.jsonl")
    # The manifest before what it is of: the same command then goes on after a kill between them.
    paths = [manifest_of(out), *([held_out_file] if held_out else []), out]
    with publishing.publish(*paths) as parts:
        parts[0].write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        put_lines(parts[-1], training)
        if held_out:
            put_lines(parts[1], evaluated)
    print(_summary(out, asked, chosen, sft))
    return 0


def _check(sources: Sequence[Path], choice: Choice, held_out: float) -> None:
    shares = choice.shares
    if shares is not None and len(shares) != len(sources):
        raise DataError(
            f"--shares has {len(shares)} numbers for {len(sources)} sources: one each, in their"
            " order."
        )
    if shares is not None and (min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-3)):
        raise DataError(f"--shares {', '.join(map(str, shares))} must be shares that sum to 1.")
    if choice.wrong >= choice.right:
        raise DataError(
            f"--wrong {choice.wrong} must be below --right {choice.right}: an answer is one or the"
            " other."
        )
    if not 0 <= held_out < 1:
        raise DataError(f"--held-out {held_out} must be a share, from 0 to below 1.")


def _files(source: Path) -> list[Path]:
    """A file of answers, or those of a run's steps."""
    if source.is_dir():
        # `N.partial.jsonl` and `N.held.jsonl` are of steps that are not whole.
        paths = sorted(path for path in source.glob("*.jsonl") if "." not in path.stem)
        if paths:
            return paths
    if not source.is_file():
        raise DataError(
            f"{source} is neither a file of `moetrain sample` nor a run's rollouts folder."
        )
    return [source]


def _rows(files: Sequence[Sequence[Path]]) -> Iterator[tuple[int, AnswerRow]]:
    display = CountDisplay("prompts", sum(_num_lines(path) for paths in files for path in paths))
    for source, paths in enumerate(files):
        for path in paths:
            has_rows = False
            for number, row in enumerate(read_lines(path), 1):
                display.advance()
                if "cursor" in row:  # the head of a step's rollouts
                    continue
                if wrong := _wrong(row):
                    raise DataError(
                        f"{path}:{number} is no prompt with answers; its keys are"
                        f" {', '.join(row)} ({wrong}). Give what `moetrain sample` wrote."
                    )
                if any(map(_has_turns, row["answers"])):
                    raise DataError(
                        f"{path}:{number} has answers of several turns; pairs and instruction data"
                        " are made of single ones. Sample with rollout.environment=single."
                    )
                has_rows = True
                yield source, row
            if not has_rows:
                raise DataError(f"{path} holds no whole prompt yet.")
    display.close()


def _has_turns(answer: AnswerRow) -> bool:
    messages = answer.get("messages")
    return isinstance(messages, list) and len(messages) > 1


def _wrong(row: AnswerRow) -> str:
    """What of a line is not as `moetrain sample` writes it; empty where nothing is."""
    try:
        messages, answers = row["prompt"]["columns"]["prompt"], row["answers"]
        if not isinstance(row["prompt"]["id"], str):
            return "prompt.id is no text"
        if not isinstance(row["prompt"].get("opened", ""), str):
            return "prompt.opened is no text"
        templated = row["prompt"]["columns"].get(TEMPLATED) and isinstance(messages, str)
        whole = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        if not whole and not templated:
            return "prompt.columns.prompt is no list of messages"
        for name, kinds in OF_AN_ANSWER.items():
            if not all(isinstance(answer[name], kinds) for answer in answers):
                return f"an answer's {name} is of another type"
        if not all(0 <= num_tokens(answer) <= LARGEST_COUNT for answer in answers):
            return "an answer's tokens are of no such number"
        rewards = [n for a in answers for n in (*a["parts"].values(), a["reward"]) if n is not None]
        logprobs = [
            n
            for answer in answers
            for n in ([answer["logp"]] if "logp" in answer else answer["logprobs"])
        ]
        if not all(isinstance(n, int | float) and abs(n) <= LARGEST for n in rewards + logprobs):
            return "a log-prob or reward is not a number"
    except (LookupError, TypeError, AttributeError) as error:
        return f"{type(error).__name__} {error}"
    return ""


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def _parted(
    records: list[dict[str, Any]], held_out: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """By prompt, so that none is on both sides; a prompt's side depends on itself alone."""

    def is_held_out(record: Mapping[str, Any]) -> bool:
        digest = hashlib.sha256(str(record["id"]).encode()).hexdigest()
        return int(digest[:8], 16) < held_out * 2**32

    return (
        [record for record in records if not is_held_out(record)],
        [record for record in records if is_held_out(record)],
    )


def _summary(out: Path, asked: Sequence[AnsweredPrompt], chosen: Chosen, sft: bool) -> str:
    """All of it in a line."""
    records = chosen.records
    unit = "right answers" if sft else "pairs"
    prompts = len({record["id"] for record in records})
    text = f"{out}: {len(records)} {unit} of {prompts} of {plural(len(asked), 'prompt')}"
    if len(chosen.per_source) > 1:
        text += f" ({' + '.join(map(str, chosen.per_source))} by source)"
    if records and not sft:
        lengths = [mean(r[f"{side}_tokens"] for r in records) for side in ("chosen", "rejected")]
        text += f", {lengths[0]:.1f} tokens chosen and {lengths[1]:.1f} rejected"
    nothing = [f"{n} {reason}" for reason, n in chosen.reasons.most_common()]
    dropped = [f"{n} {reason}" for reason, n in chosen.left_out.most_common() if n]
    without = plural(sum(chosen.reasons.values()), "prompt")
    text += f"; no {'right answer' if sft else 'pair'} from {without}"
    text += f" ({', '.join(nothing)})" if nothing else ""
    return text + (f"; left out: {', '.join(dropped)}." if dropped else ".")
