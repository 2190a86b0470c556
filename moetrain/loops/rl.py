"""Reinforcement learning: sample, grade, step, push the weights, prove the push."""

import math
import time
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.data.prompts import PromptSet, prepare_prompts, prompts_read
from moetrain.engine import Engine
from moetrain.environments import check_environment
from moetrain.loops.demonstrations import open_demonstrations
from moetrain.loops.learn import Lessons, readable, summary, totals
from moetrain.loops.rollouts import timed
from moetrain.loops.sampler import Sampler, open_sampler
from moetrain.loops.teacher import check_teacher_prompts, open_teacher
from moetrain.loops.teacher_servers import check_servers
from moetrain.methods import METHODS
from moetrain.observe.reporter import Reporter
from moetrain.rewards import check_columns, check_user_functions
from moetrain.rollout import check_engine
from moetrain.run.job import Job, step_row
from moetrain.run.stop import StopSignal


def train(recipe: Recipe) -> int:
    """Run `recipe` on this rank, from its last checkpoint if it has one; every rank of the job
    calls it. A step learns from one batch of rollouts, `method.num_iterations` times in
    `method.inner_steps` optimizer steps.

    Returns the exit code as `supervised.train` does. Raises MoetrainError; what has been sampled
    stays on disk.
    """
    method, _ = recipe.sampling
    job = Job(recipe)
    if job.is_first:
        check_engine(recipe)
        check_user_functions(recipe.rewards)
        check_environment(recipe)
        check_servers(recipe)
    prompts = prepare_prompts(recipe)
    check_teacher_prompts(recipe, [*prompts.train.prompts])
    note = check_columns(recipe.rewards, [*prompts.train.prompts, *prompts.held_out])
    lines = [*prompts.lines, *([note] if note else [])]
    engine = Engine(recipe)
    num_steps = length(recipe, len(prompts.train.prompts))
    # What the run starts from is the reference, until a checkpoint is put into it.
    reference = engine.snapshot() if method.beta else None
    moving = reference if method.ref_model_sync_steps else None
    teacher = open_teacher(recipe, engine)
    step, state = job.resume(engine, lambda r: length(r, len(prompts.train.prompts)), moving)
    shown = open_demonstrations(recipe, engine.world)
    lessons = Lessons(recipe, engine, reference, shown, teacher)
    lessons.demonstrations.load_state_dict(state.get("demonstrations", {}))
    lessons.carried = state.get("lessons", {})

    def loop(report: Reporter) -> bool:
        with (
            StopSignal(engine.world) as stop,
            open_sampler(recipe, engine, prompts, stop) as sampler,
        ):
            sampler.start(step, num_steps, state)
            return _loop(job, engine, prompts, lessons, sampler, stop, report, step, num_steps)

    return job.run(engine, step, num_steps, lines, loop, method.steps_of_batch)


def _loop(
    job: Job,
    engine: Engine,
    prompts: PromptSet,
    lessons: Lessons,
    sampler: Sampler,
    stop: StopSignal,
    report: Reporter,
    step: int,
    last: int,
) -> bool:
    """From `step` to the last one; False when a signal came before it."""
    recipe = job.recipe
    method = METHODS[recipe.method.name]
    state: dict[str, Any] = {}
    if step == 0 and prompts.held_out:
        _evaluate(sampler, report, step)
    num_prompts = prompts_read(recipe, len(prompts.train.prompts))
    saves, evaluates = True, True  # what `step` has had
    held_out: dict[str, float] = {}
    while step < last:
        started = time.perf_counter()
        given = sampler.take(step + 1)
        is_over = given is not None and num_prompts is not None and given.is_last(num_prompts)
        if given is not None and given.num_groups:
            saves, evaluates, held_out = False, False, {}
            seconds = dict(given.seconds)
            with timed(seconds, "train"):
                parts = lessons.packs(given)
                # A batch may have fewer parts: groups without signal are left out.
                num_steps = last * recipe.sampling[0].steps_of_batch
                results = [engine.step(packs, method, num_steps) for packs in parts]
            step += 1
            lessons.sync(step)
            with timed(seconds, "push"):
                proof = sampler.push(step)
            row = step_row(step, totals(results), time.perf_counter() - started)
            graded = bool(recipe.rewards) or recipe.method.needs_rewards
            row |= summary(given, step - 1, graded=graded) | lessons.shown | proof
            report.step(row | {f"seconds/{name}": value for name, value in seconds.items()})
            report.rollouts(step, readable(given))
            state = {"step": step, "prompts": sampler.state_dict(given)}
            state["demonstrations"] = lessons.demonstrations.state_dict()
            state["lessons"] = lessons.carried
        job.checkpoints.tick(engine)
        stopped = given is None or stop.agreed()
        if is_over:
            last = step
        due = job.due(step, last)
        saves, evaluates = due[0] and not saves, due[1] and not evaluates
        if evaluates and prompts.held_out and not stopped:
            held_out = _evaluate(sampler, report, step)
        if state and (stopped or saves):
            job.save(engine, state, held_out, lessons.moving)
        if not job.goes_on(engine, report, step, last, stopped=stopped):
            break
    return step >= last


def _evaluate(sampler: Sampler, report: Reporter, step: int) -> dict[str, float]:
    figures = sampler.evaluate(step)
    if figures:  # a replay answers nothing
        report.held_out({"step": step, **figures})
        report.answers(step)
    return figures


def length(recipe: Recipe, num_prompts: int) -> int:
    """Steps of the run: train.steps, or as many batches as train.epochs need, of which the last may
    be smaller.
    """
    if recipe.train.steps is not None:
        return recipe.train.steps
    _, rollout = recipe.sampling
    limit = prompts_read(recipe, num_prompts)
    assert limit is not None
    return math.ceil(limit / rollout.prompts_per_step)
