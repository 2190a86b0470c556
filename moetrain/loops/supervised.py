"""Pretraining, continued pretraining, fine-tuning, preferences: read packs, step, record, evaluate,
save.
"""

import time

from moetrain.config.recipe import Recipe
from moetrain.data.loader import EvalPacks, Loader, build_eval, build_train, num_steps, prepare
from moetrain.engine import Engine
from moetrain.loops.reference import far_from_reference, take_reference
from moetrain.methods import METHODS
from moetrain.observe.reporter import Reporter
from moetrain.run.job import Job, is_due, step_row
from moetrain.run.stop import EXIT_STOPPED, StopSignal


def train(recipe: Recipe) -> int:
    """Run `recipe` on this rank, from its last checkpoint if it has one; every rank of the job
    calls it.

    Returns the exit code: 0 when the last step is done, 143 when a signal ended the run early (its
    checkpoint is saved). Raises MoetrainError (what, why, the way out) with nothing half-written.
    """
    job = Job(recipe)
    prepared = prepare(recipe)
    lines = list(prepared.lines)
    engine, reference = take_reference(recipe, lines.append)
    rank, size = engine.world.dp_rank, engine.world.dp_size
    loader = build_train(recipe, rank, size, reference.train)
    held_out = build_eval(recipe, rank, size, reference.held_out)
    last = prepared.num_steps
    step, state = job.resume(engine, num_steps)
    if step:
        loader.load_state_dict(state["loader"])
        # A run whose last step was a smaller one, prolonged, may need one more.
        last = max(last, step + (loader.steps_left() or 0))
    with job.begin(engine, step, last, lines) as report:
        finished = _loop(job, engine, loader, held_out, report, step, last)
        if finished:
            job.end(engine)
        report.finish()
    job.close()
    engine.close()
    return 0 if finished else EXIT_STOPPED


def _loop(
    job: Job,
    engine: Engine,
    loader: Loader,
    held_out: EvalPacks | None,
    report: Reporter,
    step: int,
    last: int,
) -> bool:
    """From `step` to the last one; False when a signal came before it."""
    recipe = job.recipe
    method = METHODS[recipe.method.name]
    with StopSignal(engine.world) as stop:
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
            saves = step == last or is_due(step, recipe.checkpoint.every)
            metric = None
            if held_out is not None and (
                step == last
                or is_due(step, recipe.train.eval_every)
                or (saves and recipe.checkpoint.best is not None)
            ):
                started = time.perf_counter()
                found = {f"eval_{k}": v for k, v in engine.evaluate(held_out, method).items()}
                metric = found.get(recipe.checkpoint.best or "")
                report.held_out({"step": step, **found, "seconds": time.perf_counter() - started})
            if saves or stopped:
                state = {"step": step, "loader": loader.state_dict()}
                job.checkpoints.save(engine, step, state, metric)
            if stopped or step == last:
                job.checkpoints.close(engine)
            if stopped and step < last:
                report.say(f"stopped by a signal at step {step}; start again to resume")
                return False
    return True
