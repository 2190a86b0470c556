"""Where figures and answers go besides the ledger: TensorBoard and Weights & Biases, both fed with
the ledger's rows, and with a few answers of an evaluation or a batch.
"""

import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moetrain import files
from moetrain.config.load import recipe_hash
from moetrain.config.recipe import Recipe
from moetrain.errors import MoetrainError
from moetrain.observe.answers import Answer, describe_reward, harmless, shortened

LONGEST, LINES = 2000, 60  # of a prompt or an answer in a table
Picked = Sequence[tuple[str, Answer]]


class Sink(Protocol):
    """Takes the numbers of a row, and tables of answers, and is closed once."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def answers(self, name: str, step: int, answers: Picked) -> None: ...

    def close(self) -> None: ...


def check_sinks(recipe: Recipe) -> None:
    """MoetrainError when a package that the recipe asks for is not installed; every rank finds out
    before it starts.
    """
    wanted = {"wandb": recipe.observe.wandb is not None, "tensorboard": recipe.observe.tensorboard}
    for package, is_wanted in wanted.items():
        # A folder of that name, such as W&B leaves in the current one, is found without an origin.
        if is_wanted and getattr(importlib.util.find_spec(package), "origin", None) is None:
            raise MoetrainError(
                f"observe.{package} is set but the package {package} is not installed."
                f" Run `pip install {package}`, or set observe.{package}={
                    'null' if package == 'wandb' else 'false'
                }."
            )


def open_sinks(recipe: Recipe, step: int) -> list[Sink]:
    """The sinks that the recipe asks for, continued from `step`."""
    sinks: list[Sink] = []
    if recipe.observe.tensorboard:
        sinks.append(TensorBoard(recipe.run_dir / "tensorboard", step))
    if recipe.observe.wandb is not None:
        sinks.append(WeightsAndBiases(recipe, recipe.observe.wandb))
    return sinks


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def as_markdown(answers: Picked) -> str:
    """A paragraph an answer; prompt and answer as code, of which nothing is a mark."""
    parts: list[str] = []
    for title, answer in answers:
        end = ", cut at the limit" if answer.was_cut else ""
        words = (
            f"**{title}**" if title else "",
            describe_reward(answer),
            f"{answer.tokens} tokens",
        )
        parts.append(" ".join(filter(None, words)) + end)
        for text in (answer.prompt, answer.text):
            parts.append("    " + _cell(text).replace("\n", "\n    "))
            parts.append("&nbsp;")  # else two blocks of code become one
    return "\n\n".join(parts)


def as_table(step: int, answers: Picked) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows): a row an answer, a column each part of the rewards."""
    parts = list(dict.fromkeys(name for _, answer in answers for name in answer.parts))
    columns = ["step", "which", "prompt", "answer", "tokens", "cut", "reward"]
    columns += [f"reward/{name}" for name in parts]
    rows = [
        [
            *(step, title, _cell(answer.prompt), _cell(answer.text), answer.tokens),
            *(answer.was_cut, answer.reward, *(answer.parts.get(name) for name in parts)),
        ]
        for title, answer in answers
    ]
    return columns, rows


def _cell(text: str) -> str:
    return harmless(shortened(text, LONGEST, LINES))


class TensorBoard:
    """Event files under `folder`; steps past `step`, left by an interrupted run, are hidden."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        threading.excepthook = _but_writers(threading.excepthook)
        with files.named(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add every number of the row under its name."""
        with files.named(self._folder):
            for name, value in _numbers(row).items():
                self._writer.add_scalar(name, value, int(row["step"]))

    def answers(self, name: str, step: int, answers: Picked) -> None:
        """Add the answers as one text."""
        with files.named(self._folder):
            self._writer.add_text(name, as_markdown(answers), step)

    def close(self) -> None:
        """Flush and close."""
        with files.named(self._folder):
            self._writer.close()


def _but_writers(
    say: Callable[[threading.ExceptHookArgs], Any],
) -> Callable[[threading.ExceptHookArgs], None]:
    """What is said of a thread that failed. TensorBoard's writer (2.21) is left out: it hands a
    full disk on to the next row, which stops the run in one line.
    """

    def hook(args: threading.ExceptHookArgs) -> None:
        is_writer = type(args.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and issubclass(args.exc_type, OSError)):
            say(args)

    return hook


def _wandb() -> Any:
    """The package, of which an interrupted pip leaves a half."""
    try:
        import wandb

        _ = wandb.init, wandb.errors.Error
    except (ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoetrainError(
            f"observe.wandb is set and the package wandb is not whole ({reason}). Run `pip install"
            " --force-reinstall wandb`, or set observe.wandb=null."
        ) from error
    return wandb


class WeightsAndBiases:
    """A W&B run that a resumed job continues. `settings` go to wandb.init and win over what is set
    here.
    """

    def __init__(self, recipe: Recipe, settings: Mapping[str, Any]):
        wandb = _wandb()
        # The same run_dir continues the same run; another one with an equal recipe is another run.
        identity = recipe_hash(recipe.model_copy(update={"run_dir": recipe.run_dir.resolve()}))[:16]
        note = recipe.run_dir / "wandb_id"
        if note.is_file():
            identity = note.read_text().strip()
        else:
            files.write_text(note, identity)
        defaults: dict[str, Any] = {
            "id": identity,
            "resume": "allow",
            "name": recipe.run_dir.name,
            "dir": str(recipe.run_dir),
            "config": recipe.model_dump(mode="json"),
        }
        try:
            self._run: Any = wandb.init(**(defaults | dict(settings)))
        except (wandb.errors.Error, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MoetrainError(
                f"observe.wandb: wandb.init refused ({reason}). Mend its settings or remove"
                " observe.wandb."
            ) from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Log every number of the row."""
        self._run.log(_numbers(row), step=int(row["step"]))

    def answers(self, name: str, step: int, answers: Picked) -> None:
        """Log the answers as a table."""
        import wandb

        columns, rows = as_table(step, answers)
        self._run.log({name: wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
