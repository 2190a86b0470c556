"""Pretraining, continued pretraining, fine-tuning, preferences: read packs, step, record, evaluate,
save.
"""

import time

from moetrain.config.recipe import Recipe
from moetrain.data.loader import EvalPacks, Loader, RunData, num_steps
from moetrain.data.sample_prompts import read_sample_prompts
from moetrain.engine import Engine
from moetrain.loops.held_out import SamplePrompts
from moetrain.loops.reference import far_from_reference
from moetrain.loops.words import open_with_references
from moetrain.methods import METHODS
from moetrain.observe.reporter import Reporter
from moetrain.run.job import Job, step_row
from moetrain.run.stop import StopSignal


def train(recipe: Recipe) -> int:
    """Run `recipe` on this rank, from its last checkpoint if it has one; every rank of the job
    calls it.

    Returns the exit code: 0 when the last step is done, 143 when a signal ended the run early (its
    checkpoint is saved). Raises MoetrainError (what, why, the way out) with nothing half-written.
    """
    job = Job(recipe)
    prompts, notes = read_sample_prompts(recipe)
    data = RunData(recipe)
    prepared = data.prepare()
    lines = [*prepared.lines, *notes]
    engine, reference = open_with_references(data, lines.append)
    rank, size = engine.world.dp_rank, engine.world.dp_size
    loader = data.loader(rank, size, reference.train)
    held_out = data.eval_packs(rank, size, reference.held_out)
    step, state = job.resume(engine, lambda r: num_steps(r, prepared.num_packs))
    last = prepared.num_steps
    if step:
        loader.load_state_dict(state["loader"])
        # A run whose last step was a smaller one, prolonged, may need one more.
        last = max(last, step + (loader.steps_left() or 0))

    asked = SamplePrompts(recipe, engine, prompts, step) if prompts else None

    def loop(report: Reporter) -> bool:
        return _loop(job, engine, loader, held_out, asked, report, step, last)

    return job.run(engine, step, last, lines, loop)


def _loop(
    job: Job,
    engine: Engine,
    loader: Loader,
    held_out: EvalPacks | None,
    asked: SamplePrompts | None,
    report: Reporter,
    step: int,
    last: int,
) -> bool:
    """From `step` to the last one; False when a signal came before it."""
    recipe = job.recipe
    method = METHODS[recipe.method.name]
    with StopSignal(engine.world) as stop:
        if step == 0:
            _evaluate(engine, held_out, asked, report, step)
        while step < last:
            started = time.perf_counter()
            result = engine.step(loader.next(), method, last)
            step += 1
            row = step_row(step, result, time.perf_counter() - started)
            warning = far_from_reference(recipe, result.metrics) if step == 1 else None
            report.step(row if warning is None else row | {"warning": warning})
            if warning is not None:
                report.say(warning)

            job.checkpoints.tick(engine)
            stopped = stop.agreed()
            saves, evaluates = job.due(step, last)
            figures: dict[str, float] = {}
            if evaluates:
                figures = _evaluate(engine, held_out, asked, report, step)
            if saves or stopped:
                job.save(engine, {"step": step, "loader": loader.state_dict()}, figures)
            if not job.goes_on(engine, report, step, last, stopped=stopped):
                break
    return step >= last


def _evaluate(
    engine: Engine,
    held_out: EvalPacks | None,
    asked: SamplePrompts | None,
    report: Reporter,
    step: int,
) -> dict[str, float]:
    """What the weights after `step` make of held-out data and of the sample prompts."""
    if asked is not None:
        asked.answer(step)
        report.answers(step)
    if held_out is None:
        return {}
    started = time.perf_counter()
    method = METHODS[report.recipe.method.name]
    figures = {f"eval_{k}": v for k, v in engine.evaluate(held_out, method).items()}
    report.held_out({"step": step, **figures, "seconds": time.perf_counter() - started})
    return figures
