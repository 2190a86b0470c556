"""`moetrain eval`: a benchmark's questions answered and scored, and the scores where the report
finds them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from moetrain import files
from moetrain.answers.file import AnswerRow
from moetrain.answers.sample import (
    answer_all,
    answering_recipe,
    outcome,
    prompt_room,
)
from moetrain.config.answering import EVAL, keys_given
from moetrain.config.bench import BenchConfig, load_bench
from moetrain.config.rewards import RewardConfig
from moetrain.data.rejects import noted
from moetrain.data.run_tokenizer import chat_of
from moetrain.data.samples import read_lines
from moetrain.engine.on_disk import run_of
from moetrain.errors import ConfigError, DataError
from moetrain.evals.best_of import BestOf, best_of, content_of, ranking_reward, show
from moetrain.evals.questions import locate, read_questions
from moetrain.evals.scores import Score, majority, mean_of, pass_at_k, share, vote_of
from moetrain.observe.plot import plot_samples
from moetrain.rewards import check_columns
from moetrain.rewards.accuracy import final, said
from moetrain.run.folder import environment
from moetrain.run.stop import EXIT_STOPPED

OF_THE_RECIPE = ("model.", "data.", "parallel.", "adapter.")  # overrides


def evaluate(
    model: str,
    path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    num_best: int | None = None,
    by: str | None = None,
) -> int:
    """Answer the benchmark at `path` with `model` into `out` and write the scores beside it, and
    into the run's `evals` where the model is a run's; of the best of `num_best` answers as well, as
    the reward `by` ranks them. Returns the exit code.

    Overrides are the benchmark's keys, and of a recipe model, data, parallel and adapter.
    """
    bench_settings, others = _parted(overrides)
    EVAL.check(keys_given(others))
    bench = load_bench(path, bench_settings)
    if by is not None and num_best is None:
        raise ConfigError(f"--by {by} says how --best-of ranks. Give --best-of N too.")
    best = BestOf(num_best, ranking_reward(bench, num_best, by)) if num_best else None
    # On the command line: from where one stands.
    given = any(o.startswith("data=") for o in bench_settings)
    data = locate(bench, Path() if given else path.parent)
    recipe = answering_recipe(model, out, others, _sections(bench, data))
    chat, dropped = chat_of(recipe), Counter[str]()
    prompts = read_questions(bench, data, chat, prompt_room(recipe), dropped)
    note = check_columns(_rewards(bench), prompts)
    for line in [*noted(chat.notes(), dropped), *([note] if note else [])]:
        print(line)
    notes = {"model": model, "bench": bench.model_dump(mode="json")}
    temperature = bench.rollout.eval_temperature
    counts = answer_all(recipe, prompts, out, bench.samples, notes, bench.name, temperature)
    if counts is None:
        return EXIT_STOPPED
    wanted = {prompt.id for prompt in prompts}
    rows = (row for row in read_lines(out) if row["prompt"]["id"] in wanted)
    scores = scored(bench, rows, best)
    content = _content(bench, model, out, scores, len(prompts), dict(counts))
    curves = _curves(bench, best) if best is not None else {}
    if best is not None:
        content["best_of"] = content_of(best, curves)
    for place in _places(bench, model, out):
        files.write_text(place, json.dumps(content, indent=1) + "\n")
        print(f"{bench.name}: {place}")
    _show(bench, scores, len(prompts))
    if best is not None:
        _show_best(bench, best, curves, out)
    print(f"{counts['answers']} answers in {out}: {outcome(counts)}")
    return 0


def _sections(bench: BenchConfig, data: Path) -> dict[str, Any]:
    """Of a recipe."""
    return {
        "method": "grpo",
        "seed": bench.seed,
        "data": {"train": [str(data)]},
        "rollout": bench.rollout.model_dump(
            mode="json", exclude_unset=True, exclude={"eval_temperature"}
        ),
        "rewards": [one.model_dump(mode="json") for one in _rewards(bench)],
    }


def _parted(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(of the benchmark, of the recipe)."""
    others = [o for o in overrides if o.startswith(OF_THE_RECIPE)]
    return [o for o in overrides if o not in others], others


def _rewards(bench: BenchConfig) -> list[RewardConfig]:
    """All that an answer is given to; what ranks has no part in the score."""
    return [bench.scorer, *(one.model_copy(update={"weight": 0.0}) for one in bench.rewards)]


def _grade(bench: BenchConfig, answer: Mapping[str, Any]) -> float | None:
    """The scorer's alone: where what ranks failed, the answer has no reward, but a grade."""
    if not bench.rewards:
        return answer["reward"]
    grade = answer["parts"].get(bench.scorer.label)
    return None if grade is None else bench.scorer.weight * grade


def scored(
    bench: BenchConfig, rows: Iterable[AnswerRow], best: BestOf | None = None
) -> dict[str, Score]:
    """Name -> score over the questions. An answer that could not be graded is wrong, or left out
    with `ungraded: leave_out`. DataError when there are no others. `best` is told each question.
    """
    by_metric: dict[str, list[float]] = {}
    num_graded = 0
    for row in rows:
        answers = row["answers"][: bench.samples]
        if bench.ungraded == "leave_out":
            answers = [one for one in row["answers"] if _grade(bench, one) is not None]
            answers = answers[: bench.samples]
        num_graded += sum(_grade(bench, answer) is not None for answer in answers)
        if not answers:
            continue
        for name, value in _values(bench, answers, row["prompt"].get("opened", ""), best).items():
            by_metric.setdefault(name, []).append(value)
    if not num_graded:
        raise DataError(
            f"{bench.name}: no answer was graded. The scorer {bench.scorer.name} gave None for all:"
            " look at its columns (`answer`), or at the faults in the manifest."
        )
    if best is not None and best.num_unranked == best.num_answers:
        raise DataError(
            f"{bench.name}: no answer was ranked. The reward {best.by} gave None for all: look at"
            " its columns, or at the faults in the manifest."
        )
    return {name: _mean(bench, values) for name, values in by_metric.items()}


def _values(
    bench: BenchConfig, answers: Sequence[Mapping[str, Any]], opened: str, best: BestOf | None
) -> dict[str, float]:
    """The scores of one question; without a grade an answer has none of them."""
    grades = [_grade(bench, answer) for answer in answers]
    right = [grade is not None and grade >= bench.right for grade in grades]
    num, votes, values = len(right), None, dict[str, float]()
    if not bench.pass_at:
        worth = [grade or 0.0 for grade in grades]
        values["score"] = fmean(worth)
    else:
        worth = [float(one) for one in right]
        values |= {f"pass@{k}": pass_at_k(num, sum(right), k) for k in bench.pass_at if k <= num}
        if bench.vote and bench.samples > 1:
            votes = [vote_of(final(said(answer["text"], opened))) for answer in answers]
            values[f"maj@{bench.samples}"] = majority(votes, right)
    if best is not None:
        ranks = [answer["parts"].get(best.by) for answer in answers]
        best.add(ranks, worth, right if bench.pass_at else None, votes)
        if best.num <= num:
            values[f"best@{best.num}"] = best_of(ranks, worth, best.num)
    return values


def _curves(bench: BenchConfig, best: BestOf) -> dict[str, dict[int, Score]]:
    """Name -> samples -> score."""
    return {
        name: {k: _mean(bench, values) for k, values in own.items()}
        for name, own in best.values.items()
    }


def _show_best(
    bench: BenchConfig, best: BestOf, curves: Mapping[str, Mapping[int, Score]], out: Path
) -> None:
    """A table, and a picture beside the answers."""
    show(f"{bench.name}: score against samples", curves, Console(highlight=False))
    if best.num_unranked:
        print(f"{best.by} gave {best.num_unranked} of {best.num_answers} answers no rank: last")
    picture = out.with_suffix(".best_of.png")
    plot_samples(bench.name, {name: _points(own) for name, own in curves.items()}, picture)
    print(f"{bench.name}: {picture}")


def _points(curve: Mapping[int, Score]) -> dict[int, tuple[float, float, float]]:
    return {k: (score.low, score.value, score.high) for k, score in curve.items()}


def _mean(bench: BenchConfig, values: Sequence[float]) -> Score:
    bounded = all(0 <= value <= 1 for value in values)
    score = share(values) if bounded else mean_of(values)
    if bench.pass_at or bench.scale is None:
        return score
    low, high = bench.scale
    value, least, most = (low + (high - low) * x for x in (score.value, score.low, score.high))
    return Score(value, least, most, score.num)


def _content(
    bench: BenchConfig,
    model: str,
    out: Path,
    scores: Mapping[str, Score],
    num: int,
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """What `moetrain report` reads: `name` and `scores`, each with its 95 % interval."""
    return {
        "name": bench.name,
        "scores": {
            name: {"score": score.value, "interval": [score.low, score.high], "n": score.num}
            for name, score in scores.items()
        },
        "questions": num,
        "counts": counts,
        "model": model,
        "answers": str(out),
        "bench": bench.model_dump(mode="json"),
        **environment(),
    }


def _places(bench: BenchConfig, model: str, out: Path) -> list[Path]:
    """Beside the answers, and in the run that the model is of."""
    scores_file = out.with_suffix(".json")
    run = run_of(model)
    if run is None:
        return [scores_file]
    in_run = run / "evals" / f"{bench.name}.json"
    return [scores_file] if in_run.resolve() == scores_file.resolve() else [scores_file, in_run]


def _show(bench: BenchConfig, scores: Mapping[str, Score], num: int) -> None:
    table = Table(title=f"{bench.name}, {num} questions")
    for column in ("", "score", "95 % interval", "questions"):
        table.add_column(column, justify="right" if column else "left")
    for name, score in scores.items():
        interval = f"{score.low:.4f} to {score.high:.4f}"
        table.add_row(name, f"{score.value:.4f}", interval, str(score.num))
    Console(highlight=False).print(table)
