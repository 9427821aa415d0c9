"""The pictures of the README, from runs on this machine.

    make demo
    python benchmarks/pictures.py loss docs/pictures/loss.svg
    python benchmarks/pictures.py denoising docs/pictures/denoising.svg
    python benchmarks/pictures.py layouts docs/pictures/layouts.svg

`loss` and `denoising` read what `make demo` left in runs/demo. `layouts` trains the demo's model
for a few steps on one process and under several layouts of four processes, and compares the losses
in their metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
DEMO = Path("runs/demo")
MASKED = "#c8c8c8"
WRITTEN = "#1f77b4"
NEW = "#2ca02c"
FONT_SIZE = 11
LABEL = 9
"""Columns left of the text, for the number of the step."""
# Letters as outlines, which look the same everywhere, and the same file for the same numbers.
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "llada", "font.size": 10}

LAYOUTS: dict[str, list[str]] = {
    "data 4": [],
    "tensor 2 x data 2": ["parallel.tensor=2"],
    "tensor 4, sequence": ["parallel.tensor=4", "parallel.sequence=true"],
    "pipeline 2 x data 2": ["parallel.pipeline=2"],
    "context 2 x data 2": ["parallel.context=2"],
    "tensor 2 x pipeline 2": ["parallel.tensor=2", "parallel.pipeline=2"],
}
RANKS = 4
STEPS = 40


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def save(figure: Any, output: Path) -> None:
    """Write the picture, without the date that would change the file every time."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    print(output)


# -- the loss of the demo --------------------------------------------------------------------------


def moving_average(values: list[float], width: int) -> list[float]:
    """The mean of the last `width` values at each point; of fewer at the start."""
    averages = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - width) : end]
        averages.append(sum(recent) / len(recent))
    return averages


def draw_loss(output: Path) -> None:
    """Training loss of every step, its moving average, and the validation NELBO with its error."""
    lines = metrics(DEMO / "pretrain")
    training = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "nelbo_per_token" in line]
    entropy = json.loads((DEMO / "report.json").read_text())["unigram_entropy_per_token"]
    steps = [line["step"] for line in training]
    losses = [line["loss"] for line in training]

    figure, axes = plt.subplots(figsize=(8, 3.6))
    axes.plot(steps, losses, color=WRITTEN, alpha=0.2, linewidth=0.6, rasterized=True)
    axes.plot(steps, moving_average(losses, 50), color=WRITTEN, label="training loss, mean of 50")
    axes.errorbar(
        [line["step"] for line in validations],
        [line["nelbo_per_token"] for line in validations],
        [line["nelbo_per_token_se"] for line in validations],
        fmt="o-",
        capsize=2,
        color="tab:red",
        label="validation NELBO ± standard error",
    )
    axes.axhline(entropy, color="gray", linestyle="--", label="unigram entropy of the text")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, output)


# -- a denoising -----------------------------------------------------------------------------------


def draw_denoising(output: Path, text: str, steps: int) -> None:
    """The text after every step of filling its gaps: gaps gray, new tokens green."""
    from llada.sampling import SamplingOptions, infill
    from llada.sampling.infilling import parse
    from llada.sampling.loading import load

    model = load(DEMO / "pretrain")
    gapped = parse(text, model.tokenizer)
    # One row a step: the ids after it, and which of them it wrote.
    rows: list[tuple[list[int], list[bool]]] = [
        (gapped.tokens[0].tolist(), [False] * gapped.tokens.shape[1])
    ]

    def keep(event: Any) -> None:
        rows.append((event.tokens[0].tolist(), event.committed[0].tolist()))

    infill(model, gapped.tokens, model.special_ids, SamplingOptions(steps=steps), keep)

    words = [
        [shown(token, model.special_ids.mask_id, model.tokenizer) for token in ids]
        for ids, _ in rows
    ]
    columns = LABEL + max(sum(map(len, line)) for line in words)
    # A character of a monospaced font is 0.6 times as wide as it is high; 72 points are an inch.
    width = columns * 0.6 * FONT_SIZE / 72
    figure = plt.figure(figsize=(width, 0.3 * len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set_xlim(0, columns)
    axes.set_ylim(-len(rows) + 0.5, 0.8)
    font = {"family": "monospace", "fontsize": FONT_SIZE}
    for number, ((ids, written), line) in enumerate(zip(rows, words, strict=True)):
        axes.text(0, -number, f"step {number}", color="gray", **font)
        column = LABEL
        for token, is_new, word in zip(ids, written, line, strict=True):
            color = "black"
            if token == model.special_ids.mask_id:
                color = MASKED
            elif is_new:
                color = NEW
            axes.text(column, -number, word, color=color, **font)
            column += len(word)
    save(figure, output)


def shown(token: int, mask_id: int, tokenizer: Any) -> str:
    """A token as it is drawn."""
    if token == mask_id:
        return "▒▒"
    return tokenizer.decode([token]).replace("\n", "⏎")


# -- layouts ---------------------------------------------------------------------------------------


def train(folder: Path, overrides: list[str], ranks: int) -> list[float]:
    """The losses of a short run of the demo's config, started as a user would."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [
        sys.executable,
        *(launcher if ranks > 1 else []),
        "-m",
        "llada",
        "pretrain",
        str(ROOT / "configs/demo/pretrain.yaml"),
        f"run.dir={folder}",
        "run.threads=1",
        f"train.steps={STEPS}",
        "batch.micro=8",
        "validation.every=1000000",
        *overrides,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def draw_layouts(output: Path) -> None:
    """Above the losses of all runs, below their relative differences from one process."""
    with tempfile.TemporaryDirectory() as scratch:
        alone = train(Path(scratch) / "alone", [], 1)
        losses = {
            name: train(Path(scratch) / str(number), overrides, RANKS)
            for number, (name, overrides) in enumerate(LAYOUTS.items())
        }
    steps = range(1, STEPS + 1)
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 4.6))
    above.plot(steps, alone, color="black", linewidth=3, alpha=0.3, label="one process")
    for name, values in losses.items():
        difference = [abs(a - b) / b for a, b in zip(values, alone, strict=True)]
        above.plot(steps, values, linewidth=0.8)
        # Equal losses have no logarithm: they are drawn at the bottom.
        below.semilogy(steps, [max(d, 1e-9) for d in difference], label=name, linewidth=0.9)
        print(f"{name}: largest relative difference {max(difference):.1e}")
    above.set_ylabel("loss, nats per token")
    above.legend()
    below.set_ylabel("relative difference")
    below.set_ylim(1e-9, 1e-3)
    below.set_xlabel("optimizer step")
    below.legend(ncol=3, fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    save(figure, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", choices=["loss", "denoising", "layouts"])
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--text", default="def __init__(self[MASK*6]):[MASK*5]self.name = name", help="gaps"
    )
    parser.add_argument("--steps", type=int, default=6, help="of the denoising")
    arguments = parser.parse_args()
    plt.rcParams.update(STYLE)
    if arguments.picture == "loss":
        draw_loss(arguments.output)
    elif arguments.picture == "denoising":
        draw_denoising(arguments.output, arguments.text, arguments.steps)
    else:
        draw_layouts(arguments.output)


if __name__ == "__main__":
    main()
