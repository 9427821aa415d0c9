"""RUN/loss.png: training loss and validation NELBO over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llada.config import Task
from llada.training.reporting import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_loss_curve(folder: Path, task: Task = "pretrain") -> Path | None:
    """Draw the loss curve of a run to RUN/loss.png.

    In fine-tuning the training loss is a mean over conversations, padding included, and the NELBO
    one over the tokens of replies. They are different quantities and have axes of their own.

    Args:
        folder: the run folder.
        task: the run's task.

    Returns:
        The picture; None if there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")  # writes files; others look for a display
    import matplotlib.pyplot as plt

    losses, validations = _read_curves(folder)
    if not losses:
        return None
    separate = task == "sft" and bool(validations)
    num_panels = 1 + separate
    figure, panels = plt.subplots(
        num_panels, sharex=True, squeeze=False, figsize=(8, 2 + 2.5 * num_panels), dpi=120
    )
    upper = panels[0, 0]
    lower = panels[-1, 0]  # the same one if there is only one
    _draw_losses(upper, losses)
    if validations:
        _draw_validations(lower, validations)
    upper.set_ylabel("nats per token")
    lower.set_ylabel("nats per token")
    if separate:
        upper.set_ylabel("nats per token, padded replies")
    lower.set_xlabel("optimizer step")
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.legend()
    picture = folder / "loss.png"
    figure.savefig(picture, bbox_inches="tight")
    plt.close(figure)
    return picture


def _draw_losses(axes: Axes, losses: list[tuple[int, float]]) -> None:
    steps, values = zip(*losses, strict=True)
    axes.plot(
        steps,
        values,
        color="tab:blue",
        alpha=0.25,
        linewidth=0.8,
        label="training loss, each step",
    )
    axes.plot(
        steps, _moving_average(values), color="tab:blue", label="training loss, moving average"
    )


def _draw_validations(axes: Axes, validations: list[tuple[int, float, float]]) -> None:
    steps, means, errors = zip(*validations, strict=True)
    axes.errorbar(
        steps,
        means,
        errors,
        fmt="o-",
        capsize=2,
        color="tab:red",
        label="validation NELBO ± standard error",
    )


def _read_curves(
    folder: Path,
) -> tuple[list[tuple[int, float]], list[tuple[int, float, float]]]:
    """Return (step, loss) of the steps, and (step, NELBO, standard error) of the validations."""
    losses = []
    validations = []
    for line in metrics.read(folder / metrics.FILE):
        # In the file a loss that is not finite is a string.
        if isinstance(line.get("loss"), float):
            losses.append((line["step"], line["loss"]))
        if isinstance(line.get("nelbo_per_token"), float):
            error = line.get("nelbo_per_token_se") or 0.0
            validations.append((line["step"], line["nelbo_per_token"], error))
    return losses, validations


def _moving_average(values: tuple[float, ...]) -> list[float]:
    """Average each value with those before it, over a thirtieth of the curve."""
    width = max(1, len(values) // 30)
    averages = []
    for i in range(len(values)):
        window = values[max(0, i - width + 1) : i + 1]
        averages.append(sum(window) / len(window))
    return averages
