"""Pretraining, continued pretraining and fine-tuning: read packs, step, record, evaluate, save."""

import os
import time
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.data.loader import EvalPacks, Loader, build_eval, build_train, num_steps, prepare
from moetrain.engine import Engine, StepResult
from moetrain.engine.checkpoint import Checkpoints
from moetrain.engine.optim import learning_rate
from moetrain.loops.reference import reference_of
from moetrain.loops.run_dir import RunLock, check_recipe, check_schedule, write_run_files
from moetrain.loops.stop import EXIT_STOPPED, StopSignal
from moetrain.methods import METHODS
from moetrain.observe.reporter import Reporter
from moetrain.observe.sinks import check_sinks
from moetrain.plan.mesh import rank_table


def train(recipe: Recipe) -> int:
    """Run `recipe` on this rank, from its last checkpoint if it has one; every rank of the job
    calls it.

    Returns the exit code: 0 when the last step is done, 143 when a signal ended the run early (its
    checkpoint is saved). Raises MoetrainError (what, why, the way out) with nothing half-written.
    """
    is_first = int(os.environ.get("RANK", 0)) == 0
    check_sinks(recipe)
    lock = RunLock(recipe.run_dir)
    if is_first:
        lock.take()
    earlier = check_recipe(recipe)
    prepared = prepare(recipe)
    engine = Engine(recipe)
    engine.num_steps = prepared.num_steps
    rank, size = engine.mesh.dp_rank, engine.mesh.dp_size
    lines = list(prepared.lines)
    # The model is the reference until an earlier adapter or a checkpoint is put into it.
    train_reference = reference_of(recipe, engine, lines.append, held_out=False)
    eval_reference = reference_of(recipe, engine, lines.append, held_out=True)
    loader = build_train(recipe, rank, size, train_reference)
    held_out = build_eval(recipe, rank, size, eval_reference)
    engine.continue_adapter()
    checkpoints = Checkpoints(
        recipe.run_dir,
        keep=recipe.checkpoint.keep,
        best=recipe.checkpoint.best,
        optimizer=recipe.checkpoint.save_optimizer,
    )
    step = _resume(recipe, earlier, engine, loader, checkpoints)
    if is_first:
        write_run_files(recipe, rank_table(engine.mesh.plan), {"num_steps": prepared.num_steps})
        lock.take()
    with Reporter(recipe, prepared.num_steps, step, speaks=engine.mesh.is_main) as report:
        for line in lines:
            report.say(line)
        if step:
            report.say(f"resumed {recipe.run_dir} at step {step}")
        finished = _loop(recipe, engine, loader, held_out, checkpoints, report, step)
        if finished and recipe.adapter is not None:
            engine.export_peft(recipe.run_dir / "adapter")
        if finished and recipe.checkpoint.export_hf:
            engine.export_hf(recipe.run_dir / "hf")
        report.finish()
    engine.close()
    return 0 if finished else EXIT_STOPPED


def _loop(
    recipe: Recipe,
    engine: Engine,
    loader: Loader,
    held_out: EvalPacks | None,
    checkpoints: Checkpoints,
    report: Reporter,
    step: int,
) -> bool:
    """From `step` to the last one; False when a signal came before it."""
    method = METHODS[recipe.method.name]
    last = engine.num_steps
    with StopSignal(engine.device) as stop:
        while step < last:
            started = time.perf_counter()
            result = engine.step(loader.next(), method)
            step += 1
            report.step(_row(step, result, time.perf_counter() - started))

            stopped = stop.agreed()
            saves = step == last or _is_due(step, recipe.checkpoint.every)
            metric = None
            if held_out is not None and (
                step == last
                or _is_due(step, recipe.train.eval_every)
                or (saves and recipe.checkpoint.best is not None)
            ):
                started = time.perf_counter()
                found = {f"eval_{k}": v for k, v in engine.evaluate(held_out, method).items()}
                metric = found.get(recipe.checkpoint.best or "")
                report.held_out({"step": step, **found, "seconds": time.perf_counter() - started})
            if saves or stopped:
                checkpoints.save(
                    engine, step, {"step": step, "loader": loader.state_dict()}, metric
                )
            if stopped and step < last:
                report.say(f"stopped by a signal at step {step}; start again to resume")
                return False
    return True


def _resume(
    recipe: Recipe, earlier: Recipe | None, engine: Engine, loader: Loader, checkpoints: Checkpoints
) -> int:
    """Bring engine and loader to the latest checkpoint; the step it was taken at, 0 when there is
    none.
    """
    path = checkpoints.latest()
    if path is None:
        return 0
    assert earlier is not None, "a run_dir with checkpoints and without a recipe has been refused"
    state = checkpoints.restore(engine, path)
    check_schedule(earlier, recipe, state["step"], num_steps, learning_rate)
    loader.load_state_dict(state["loader"])
    return int(state["step"])


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _row(step: int, result: StepResult, seconds: float) -> dict[str, Any]:
    """A ledger row. `tokens` are those of the global batch without padding."""
    return {
        "step": step,
        "loss": result.loss,
        **result.metrics,
        "tokens": result.tokens,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens_per_s": result.tokens / seconds,
        "seconds": seconds,
        "memory_gib": result.memory_gib,
        **{f"router/{name}": value for name, value in result.router.items()},
    }
