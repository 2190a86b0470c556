"""What every training loop does before its first step and after its last."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from moetrain import garbage
from moetrain.config.recipe import Recipe
from moetrain.engine import Engine, StepResult
from moetrain.engine.checkpoint_folder import Checkpoints
from moetrain.engine.optim import learning_rate
from moetrain.engine.snapshot import Weights
from moetrain.errors import ConfigError
from moetrain.layout.mesh import rank_table
from moetrain.observe.reporter import Reporter
from moetrain.observe.sinks import check_sinks
from moetrain.run.folder import (
    check_recipe,
    check_schedule,
    check_writable,
    write_run_files,
)
from moetrain.run.lock import RunLock
from moetrain.run.prediction import Prediction, has_gpus
from moetrain.run.starts import record_start
from moetrain.run.stop import EXIT_STOPPED


class Job:
    """A run_dir and this rank's part in the run that goes on there.

    Raises ConfigError when the folder is in use, or was started with another recipe.
    """

    def __init__(self, recipe: Recipe):
        garbage.keep_what_is_there()
        self.recipe = recipe
        self.is_first = int(os.environ.get("RANK", 0)) == 0
        check_sinks(recipe)
        self._lock = RunLock(recipe.run_dir)
        if self.is_first:
            if (recipe.run_dir / "checkpoints").is_dir():
                check_writable(recipe.run_dir)
            self._lock.take()
        self._earlier = check_recipe(recipe)
        self._damaged: list[str] = []
        self._prediction: Prediction | None = None
        if self.is_first:
            size = int(os.environ.get("WORLD_SIZE", 1))
            self._prediction = Prediction(recipe, size, on_gpu=has_gpus())
        self.checkpoints = Checkpoints(
            recipe.run_dir,
            keep=recipe.checkpoint.keep,
            best=recipe.checkpoint.best,
            more=recipe.best_is_more,
            optimizer=recipe.checkpoint.save_optimizer,
            background=recipe.checkpoint.background,
        )

    def resume(
        self,
        engine: Engine,
        num_steps: Callable[[Recipe], int],
        reference: Weights | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Bring the engine, and a reference that a run changes, to the newest checkpoint that is
        whole: (its step, its state); (0, {}) without one.

        `num_steps` is the loop's reading of a recipe's length. Raises ConfigError when learning
        rates of the steps that are done would be others now.
        """
        state, self._damaged = self.checkpoints.restore(engine, reference)
        if state is None:
            return 0, {}
        earlier = self._earlier
        assert earlier is not None, "a run_dir with checkpoints and without a recipe is refused"
        check_schedule(earlier, self.recipe, state["step"], num_steps, learning_rate)
        return int(state["step"]), state

    def run(
        self,
        engine: Engine,
        step: int,
        num_steps: int,
        lines: list[str],
        loop: Callable[[Reporter], bool],
        inner_steps: int = 1,
    ) -> int:
        """Report `lines`, run `loop` from `step` on, and export once it says that it has finished;
        the exit code: 0, or 143 when a signal ended it early.

        Raises ConfigError when the schedule leaves the last steps nothing to learn at.
        """
        with self._begin(engine, step, num_steps, lines, inner_steps) as report:
            finished = loop(report)
            if finished:
                self._export(engine)
            report.finish()
        self._lock.release()
        engine.close()
        return 0 if finished else EXIT_STOPPED

    def _begin(
        self, engine: Engine, step: int, num_steps: int, lines: list[str], inner_steps: int
    ) -> Reporter:
        """Write the run's own files; its reporter, which has reported `lines`."""
        recipe = self.recipe
        optim, last = recipe.optim, num_steps * inner_steps
        if optim.lr and learning_rate(last, optim, last) == 0:
            raise ConfigError(
                f"optim.decay_steps={optim.decay_steps} ends before the run: the learning rate of"
                f" step {last} is 0, and nothing moves. Give optim.min_lr, or leave"
                " optim.decay_steps out."
            )
        if self.is_first:
            check_writable(recipe.run_dir)
            self._lock.take()
            write_run_files(recipe, rank_table(engine.world.plan), {"num_steps": num_steps})
            lines = [*lines, record_start(recipe.run_dir, step, self._damaged), *self._damaged]
        predicted: dict[str, float] = {}
        if self._prediction is not None:
            predicted = self._prediction.figures(on_gpu=engine.world.kind == "nccl")
            lines = [*lines, *self._prediction.lines(predicted)]
        speaks = engine.world.is_first
        report = Reporter(recipe, num_steps, step, speaks=speaks, predicted=predicted)
        for line in lines:
            report.say(line)
        return report

    def due(self, step: int, last: int) -> tuple[bool, bool]:
        """Whether after `step` of `last` (a checkpoint is saved, held-out data is evaluated)."""
        recipe = self.recipe
        saves = step == last or _every(step, recipe.checkpoint.every)
        evaluates = step == last or _every(step, recipe.train.eval_every)
        return saves, evaluates or (saves and recipe.checkpoint.best is not None)

    def save(
        self,
        engine: Engine,
        state: dict[str, Any],
        held_out: Mapping[str, float],
        reference: Weights | None = None,
    ) -> None:
        """Save a checkpoint of `state`, which has its step, with the held-out metrics there are,
        and a reference that a run changes.
        """
        metric = held_out.get(self.recipe.checkpoint.best or "")
        self.checkpoints.save(engine, state["step"], state, metric, reference)

    def goes_on(
        self, engine: Engine, report: Reporter, step: int, last: int, *, stopped: bool
    ) -> bool:
        """Whether the loop goes on after `step`; what is still being saved is finished else."""
        if stopped or step == last:
            self.checkpoints.close(engine)
        if stopped and step < last:
            report.say(f"stopped by a signal at step {step}; start again to resume")
        return not stopped and step < last

    def _export(self, engine: Engine) -> None:
        """Write what the recipe asks for once the last step is done and saved."""
        if self.recipe.adapter is not None:
            engine.export_peft(self.recipe.run_dir / "adapter")
        if self.recipe.checkpoint.export_hf:
            engine.export_hf(self.recipe.run_dir / "hf")


def _every(step: int, every: int | None) -> bool:
    """Whether what happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def step_row(step: int, result: StepResult, seconds: float) -> dict[str, Any]:
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
