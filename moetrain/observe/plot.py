"""Loss curves as a picture."""

from collections.abc import Mapping
from pathlib import Path

from moetrain import files
from moetrain.observe.ledger import read_ledger


def plot_losses(ledgers: Mapping[str, Path], out: Path) -> None:
    """Write a PNG with one panel a ledger: training loss, its running mean, and the held-out
    losses.
    """
    from matplotlib.figure import Figure  # without pyplot no display is looked for

    figure = Figure(figsize=(5.2 * max(len(ledgers), 1), 3.6), layout="constrained")
    for i, (title, path) in enumerate(ledgers.items()):
        rows = read_ledger(path)
        train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        axes = figure.add_subplot(1, len(ledgers), i + 1)
        if train:
            steps, losses = [s for s, _ in train], [loss for _, loss in train]
            axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
            axes.plot(
                steps, _running_mean(losses), color="tab:blue", linewidth=1.5, label="training"
            )
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True),
                "o-",
                color="tab:orange",
                markersize=3,
                label="held out",
            )
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        if train or held_out:
            axes.legend()
    with files.publish(out) as (part,):
        figure.savefig(part, dpi=130, format="png")


def _running_mean(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    out: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        out.append(total / weight)
    return out
