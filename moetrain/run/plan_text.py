"""What `moetrain plan` prints: a search's answer as a table, in words and as JSON."""

from collections.abc import Sequence
from typing import Any

from moetrain.errors import plural
from moetrain.layout.memory import GIB
from moetrain.planner.candidates import AXES, STAGES
from moetrain.planner.gpu import Gpu
from moetrain.planner.rl_step import Sampled, Split
from moetrain.planner.rl_step import as_json as rollout_json
from moetrain.planner.search import Planned, SearchResult

SHOWN = 8


def changes(planned: Planned) -> dict[str, dict[str, Any]]:
    """The keys of the recipe that make the layout."""
    parallel, train = planned.recipe.parallel, planned.recipe.train
    return {
        "parallel": {axis: getattr(parallel, axis) or 1 for axis in AXES}
        | {name: n for name in STAGES if (n := getattr(parallel, name)) is not None},
        "train": {"micro_batch": train.micro_batch, "recompute": train.recompute},
    } | ({"optim": {"offload": offload}} if (offload := planned.recipe.optim.offload) else {})


def as_json(result: SearchResult, sampled: Sampled | None = None) -> dict[str, Any]:
    """As docs/planning.md says."""
    rollout = {} if sampled is None else {"rollout": rollout_json(sampled)}
    return rollout | {
        "layouts": [_row(planned) for planned in result.layouts],
        "best": 0 if result.best.fits else None,
        "considered": result.considered,
        "seconds": round(result.seconds, 2),
    }


def _row(planned: Planned) -> dict[str, Any]:
    seconds = planned.seconds
    return (
        changes(planned)
        | {
            "peak_gib": round(planned.peak_gib, 3),
            "first_rank_gib": round(planned.first_rank_gib, 3),
            "memory": {name: round(gib, 3) for name, gib in planned.memory.items()},
            "step_s": planned.step_s,
            "tokens_per_s": seconds.tokens_per_s,
            "tflops_per_gpu": seconds.tflops,
            "bubble": seconds.bubble_share,
            "exposed_comm_s": seconds.exposed_s,
            "fits": planned.fits,
            "traced": True,
        }
        | ({"host_gib": round(planned.host_gib, 3)} if planned.host_gib else {})
    )


def as_text(result: SearchResult, gpu: Gpu, size: int, sampled: Sampled | None = None) -> str:
    """A table, and what it says in words."""
    shown = result.layouts[:SHOWN]
    uneven = [name for name in STAGES if any(getattr(p.recipe.parallel, name) for p in shown)]
    offload = ["offload"] * any(p.recipe.optim.offload for p in shown)
    head = [
        *AXES,
        *(name.partition("_")[0] for name in uneven),
        "micro",
        "recompute",
        *offload,
        "GiB",
        "s/step",
        "tok/s/GPU",
        "TFLOP/s",
        "bubble",
        "comm",
    ]
    rows = [head, *(_cells(planned, [*AXES, *uneven], offload) for planned in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines += ["", *_answer(result, gpu, size)]
    if sampled is not None:
        lines += ["", *_rollouts(sampled, gpu)]
    return "\n".join(lines)


def _cells(planned: Planned, axes: Sequence[str], offload: Sequence[str]) -> list[str]:
    seconds, layout = planned.seconds, changes(planned)
    return [
        *(str(layout["parallel"].get(axis, "")) for axis in axes),
        *(str(value) for value in layout["train"].values()),
        *(f"{planned.recipe.optim.offload:g}" for _ in offload),
        f"{planned.peak_gib:.1f}" + ("" if planned.fits else "!"),
        f"{planned.step_s:.2f}",
        f"{seconds.tokens_per_s:.0f}",
        f"{seconds.tflops:.0f}",
        f"{seconds.bubble_share:.0%}",
        f"{seconds.exposed_s / planned.step_s:.0%}",
    ]


def _answer(result: SearchResult, gpu: Gpu, size: int) -> list[str]:
    best, limit = result.best, gpu.memory_gib.value
    considered = plural(result.considered, "layout")
    lines = [
        f"{considered} of {size} {gpu.name} considered, {len(result.layouts)} traced,"
        f" {result.seconds:.0f} s."
    ]
    if not best.fits:
        more = "" if best.recipe.optim.offload else " optim.offload=1,"
        host = f" and {best.host_gib:.1f} of its host" if best.host_gib else ""
        lines.append(
            f"NOTHING FITS: the leanest layout needs {best.peak_gib:.1f} GiB of a GPU with"
            f" {limit:.1f}{host} (! above). More GPUs,{more} an adapter, or a smaller"
            " data.seq_len would help."
        )
        return lines
    biggest = sorted(best.memory.items(), key=lambda item: -item[1])[:4]
    held = ", ".join(f"{name} {gib:.1f}" for name, gib in biggest)
    lines.append(f"Best: {in_words(best)}: {best.peak_gib:.1f} of {limit:.1f} GiB ({held}).")
    lines.append(f"Its time: {_where(best)}.")
    others = [p for p in result.layouts[1:] if p.fits]
    if others:
        lines.append(f"Next: {in_words(others[0])}, {_why(best, others[0])}.")
    return lines


def in_words(planned: Planned) -> str:
    """Its layout."""
    layout = changes(planned)
    axes = " ".join(f"{axis}={n}" for axis, n in layout["parallel"].items() if n > 1) or "no split"
    others = {**layout["train"], **layout.get("optim", {})}
    words = (f"{value:g}" if isinstance(value, float) else value for value in others.values())
    return " ".join([axes, *(f"{name}={word}" for name, word in zip(others, words, strict=True))])


def _shares(planned: Planned) -> dict[str, float]:
    seconds = planned.seconds
    return {
        "computation": sum(seconds.compute.values()),
        "waiting for communication": seconds.exposed_s,
        "the pipeline's bubble": seconds.bubble,
        "waiting for the host": seconds.launch,
        "the optimizer": seconds.optimizer,
        "log-probs before the step": seconds.before,
    }


def _where(planned: Planned) -> str:
    shares = sorted(_shares(planned).items(), key=lambda item: -item[1])
    return ", ".join(
        f"{s / planned.step_s:.0%} {name}" for name, s in shares if s > 0.01 * planned.step_s
    )


def _why(best: Planned, other: Planned) -> str:
    """What the other loses by, in seconds."""
    if other.step_s <= best.step_s:
        return f"holds {other.peak_gib - best.peak_gib:.1f} GiB more"
    ours, theirs = _shares(best), _shares(other)
    name = max(ours, key=lambda name: theirs[name] - ours[name])
    return f"{other.step_s - best.step_s:.2f} s slower, most of it {name}"


def _rollouts(found: Sampled, gpu: Gpu) -> list[str]:
    """What sampling adds: a server, a step by phases, and the ways to share the GPUs."""
    server, lengths = found.server, found.lengths
    limit = "rollout.engine_args.max_num_seqs" if found.concurrent == server.most else "its cache"
    lines = [
        f"Rollouts: answers of {lengths.answer:.0f} tokens in the mean (--answer-tokens), prompts"
        f" of {lengths.prompt:.0f}; rewards are counted as no time.",
        f"A server of {plural(server.gpus, 'GPU')}: {server.weights / GIB:.1f} GiB of weights and"
        f" {server.kv_cache / GIB:.1f} of keys and values each ({server.kv_tokens:,} tokens);"
        f" {found.concurrent} answers at once, by {limit}; {found.tokens_per_s:,.0f} tokens/s.",
        "",
        *_splits(found),
    ]
    if found.better is not None:
        lines.append(
            f"{_sides(found.better)} would take {_seconds(found.better.step_s)} s a step instead of"
            f" {_seconds(found.split.step_s)}."
        )
    if found.colocated is not None:
        lines.append(
            "Colocated, were it here (rollout.push=ipc is for one GPU): all"
            f" {found.colocated.trainers} GPUs train and then serve,"
            f" {_seconds(found.colocated.step_s)} s a step."
        )
    return lines


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _sides(split: Split) -> str:
    return f"{split.trainers} GPUs that train and {plural(split.servers, 'server')}"


def _splits(found: Sampled) -> list[str]:
    """A table."""
    head = ["trainers", "servers", "sample", "log-probs", "train", "push", "s/step"]
    rows = [head]
    others = [split for split in found.splits if split.servers != found.split.servers]
    for split in sorted([found.split, *others], key=lambda split: split.servers):
        mark = "*" if split is found.split else ""
        values = [*vars(split.phases).values(), split.step_s]
        numbers = [str(split.trainers), str(split.servers) + mark]
        rows.append([*numbers, *(_seconds(value) for value in values)])
    lines = [
        "  ".join(c.rjust(max(len(h), 8)) for c, h in zip(row, head, strict=True)) for row in rows
    ]
    off = found.steps_off
    how = f"rollout.steps_off={off}: sampled beside learning" if off else "one after the other"
    return [*lines, f"* as planned, the others by formula; {how}."]
