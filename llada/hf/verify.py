"""The training model and the exported folder on the same tokens, each in its own implementation.

The training model is Megatron-Core's, loaded from the checkpoint by the engine; the folder is
loaded by plain transformers in a process of its own that runs the folder's code only. Both compute
in fp32 on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llada.checkpoint.format import load_tokenizer, read_state, trained_config
from llada.config import RunConfig, build_config
from llada.config.sections import ModelSection
from llada.errors import RunError, UserError
from llada.hf.folder import open_folder
from llada.noise import stream, uniforms
from llada.objectives import MaskedDiffusion, Window, collate

ROWS, LENGTH = 4, 128
TOLERANCE = 1e-5
"""Largest difference allowed, over the largest logit, where nothing is rounded."""
_ROUNDED = 5e-2
"""The same where the folder's weights are rounded."""

_READER = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, inputs, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, torch_dtype=torch.float32
).eval()
with torch.no_grad():
    save_file({"logits": model(load_file(inputs)["input_ids"]).logits.contiguous()}, out)
"""


def training_logits(folders: Sequence[Path], masters: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, half of them masked, and what the training model makes of them: int64 [4, 128], fp32
    [4, 128, vocabulary].

    Of several checkpoints the mean of their weights computes them, of bf16 runs with `masters` the
    fp32 masters.
    """
    from llada.engine.megatron import MegatronEngine

    config = _alone(trained_config(read_state(folders[-1])).model)
    tokenizer = load_tokenizer(folders[-1])
    windows = []
    for row in range(ROWS):
        ids = np.floor(uniforms(stream(0, "verify", row), LENGTH) * tokenizer.vocab_size).astype(
            np.int64
        )
        windows.append(Window(row, ids, np.array([0, LENGTH]), np.array([0.5]), row))
    objective = MaskedDiffusion(0, tokenizer.mask_id)
    batch = collate(
        windows, [objective.corrupt(window, masking="fixed_count") for window in windows], 1.0
    )
    engine = MegatronEngine(config, training=False)
    try:
        means: list[torch.Tensor] = []
        for folder in folders:
            engine.load_weights(folder / "model", masters)
            parts = [
                parameter.detach() / len(folders) for parameter in engine.parameters().values()
            ]
            means = (
                parts
                if not means
                else [mean + part for mean, part in zip(means, parts, strict=True)]
            )
        with torch.no_grad():
            for parameter, mean in zip(engine.parameters().values(), means, strict=True):
                parameter.copy_(mean)
        return batch.inputs, engine.logits(batch)
    finally:
        engine.close()


def _alone(model: ModelSection) -> RunConfig:
    """A model in fp32 on one process; what an engine does not ask for without training is
    made up.
    """
    return build_config(
        {
            "precision": "fp32",
            "run": {"dir": "unused"},
            "train": {"steps": 1},
            "batch": {"global": ROWS, "micro": ROWS},
            "data": {"sequence_length": LENGTH, "mixture": [{"path": "unused"}]},
            "model": model.model_dump(),
            "schedule": {"stages": [{"shape": "constant", "start": 0.0}]},
        }
    )


def exported_logits(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """What plain transformers makes of the tokens, in a process of its own, fp32 [4, 128,
    vocabulary].

    Raises RunError with the process's last line when it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs, out = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"input_ids": input_ids}, inputs)
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                _READER,
                str(folder.resolve()),
                str(inputs),
                str(out),
            ],
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RunError(
                "--verify: transformers cannot load the folder:"
                f" {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
            )
        return load_file(out)["logits"]


class Verification:
    """What `llada convert to-hf --verify` and `--reference` do with a finished folder.

    Args:
        compare: load the folder and compare.
        reference: safetensors file to write: input_ids int64 [4, 128], logits fp32 [4, 128,
            vocabulary].
        rounded: the folder's weights are rounded.

    Attributes:
        line: what was found, once called.
    """

    def __init__(self, compare: bool, reference: str | None, rounded: bool) -> None:
        self.compare, self.reference, self.rounded = compare, reference, rounded
        self.line = ""

    def __call__(self, sources: Sequence[Path], folder: Path, masters: bool = False) -> None:
        """Raises RunError when the two differ by more than they may."""
        input_ids, wanted = training_logits(sources, masters)
        if self.reference is not None:
            temporary = f"{self.reference}.partial"
            try:
                save_file({"input_ids": input_ids, "logits": wanted.contiguous()}, temporary)
                os.replace(temporary, self.reference)
            except (OSError, SafetensorError) as error:
                raise RunError(
                    f"--reference: {self.reference} cannot be written"
                    f" ({' '.join(str(error).split())})"
                ) from None
        if not self.compare:
            return
        try:
            open_folder(folder)
        except UserError as error:
            raise RunError(f"--verify: {error}") from None
        found = exported_logits(folder, input_ids)
        largest, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
        allowed = _ROUNDED if self.rounded else TOLERANCE
        agree = int((found.argmax(-1) == wanted.argmax(-1)).sum())
        self.line = (
            f"verified on {ROWS} x {LENGTH} tokens: max|difference| {largest:.3g}, max|logit|"
            f" {scale:.3g}, ratio {largest / scale:.2e} (allowed {allowed:g}), the same best token"
            f" at {agree} of {ROWS * LENGTH} positions"
        )
        if not largest <= allowed * scale:  # also when it is not a number
            raise RunError(f"--verify: the exported folder computes other logits; not {self.line}")
