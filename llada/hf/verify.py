"""Compare the training model with an exported folder on the same tokens.

The training model is Megatron-Core's, loaded from the checkpoint by the engine. The folder is
loaded by plain transformers in its own process, which runs only the code in the folder. Both
compute in fp32 on the CPU.
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
from llada.errors import RunError, UserError, one_line
from llada.hf.config_mapping import LLADA
from llada.hf.folder import open_folder, read_model
from llada.noise import stream, uniforms
from llada.objectives import Batch, Key, MaskedDiffusion, NoiseGroups, Objective, Row, collate
from llada.objectives.autoregressive import Autoregressive
from llada.objectives.registry import start_id
from llada.tokenizer import Tokenizer

ROWS = 4
LENGTH = 128
TOLERANCE = 1e-5
"""Largest allowed difference of logits, relative to the largest logit, if no weight is rounded."""
_ROUNDED_TOLERANCE = 5e-2
"""The same if the folder's weights are rounded."""

# The program of the other process: FOLDER INPUTS OUT.
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


def training_logits(
    folders: Sequence[Path], masters: bool, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute logits with the training model, on random tokens (see `_random_batch`).

    Args:
        folders: Checkpoints. The mean of their weights is used.
        masters: Use the fp32 masters of the weights.
        is_causal: A token attends to those before it only.

    Returns:
        The tokens, int64 [4, 128], and the logits, fp32 [4, 128, vocab_size].
    """
    from llada.engine.megatron import MegatronEngine

    newest = folders[-1]
    trained = trained_config(read_state(newest))
    config = _single_process_config(trained.model)
    batch = _random_batch(load_tokenizer(newest), is_causal)
    engine = MegatronEngine(config, training=False)
    try:
        means: list[torch.Tensor] = []
        for folder in folders:
            engine.load_weights(folder / "model", masters)
            parts = [weight.detach() / len(folders) for weight in engine.parameters().values()]
            if means:
                parts = [mean + part for mean, part in zip(means, parts, strict=True)]
            means = parts
        with torch.no_grad():
            for parameter, mean in zip(engine.parameters().values(), means, strict=True):
                parameter.copy_(mean)
        return batch.inputs, engine.logits(batch)
    finally:
        engine.close()


def _random_batch(tokenizer: Tokenizer, is_causal: bool) -> Batch:
    """Rows of random tokens, the same for every run; half of them masked, or for a causal model
    shifted.
    """
    objective: Objective = MaskedDiffusion(tokenizer.mask_id, masking="fixed_count")
    if is_causal:
        objective = Autoregressive(start_id(tokenizer))
    span = np.array([[0, LENGTH]])
    corrupted = []
    for row in range(ROWS):
        draws = uniforms(stream(0, "verify", row), LENGTH)
        ids = np.floor(draws * tokenizer.vocab_size).astype(np.int64)
        groups = NoiseGroups.of_whole_samples(np.array([row]), span, np.array([0.5]))
        corrupted.append(objective.corrupt(Row(ids, span[0], groups), Key(seed=0)))
    return collate(corrupted)


def _single_process_config(model: ModelSection) -> RunConfig:
    """A run of this model in fp32 on one process.

    Settings that an engine without training does not read have arbitrary values.
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
    """Compute logits with plain transformers in another process.

    Args:
        folder: The export.
        input_ids: int64 [b, s].

    Returns:
        fp32 [b, s, vocab_size].

    Raises:
        RunError: The process failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs.safetensors"
        out = Path(scratch) / "logits.safetensors"
        save_file({"input_ids": input_ids}, inputs)
        environment = {
            **os.environ,
            # transformers copies the folder's code here; not into the user's cache.
            "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        arguments = [str(folder.resolve()), str(inputs), str(out)]
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _READER, *arguments],
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["no message"]
            raise RunError(f"--verify: transformers cannot load the folder: {lines[-1]}")
        return load_file(out)["logits"]


class Verification:
    """The checks of `llada convert to-hf --verify` and `--reference` on a finished folder.

    Args:
        compare: Load the folder and compare its logits with the training model's.
        reference: Safetensors file to write: input_ids int64 [4, 128], logits fp32 [4, 128,
            vocab_size]. None: no file.
        rounded: Whether the folder's weights are rounded.

    Attributes:
        line: The result of the comparison, once called.
    """

    def __init__(self, compare: bool, reference: str | None, rounded: bool) -> None:
        self.compare = compare
        self.reference = reference
        self.rounded = rounded
        self.line = ""

    def __call__(self, checkpoints: Sequence[Path], folder: Path, masters: bool = False) -> None:
        """Raise RunError if the two differ by more than the tolerance."""
        is_causal = read_model(folder).architecture != LLADA
        input_ids, expected = training_logits(checkpoints, masters, is_causal)
        if self.reference is not None:
            _write_reference(self.reference, input_ids, expected)
        if not self.compare:
            return
        try:
            open_folder(folder)
        except UserError as error:
            raise RunError(f"--verify: {error}") from None
        logits = exported_logits(folder, input_ids)
        newest = checkpoints[-1]
        if trained_config(read_state(newest)).subs:
            # The exported model rules [MASK] out; the other logits must be equal.
            mask_id = load_tokenizer(newest).mask_id
            logits[..., mask_id] = expected[..., mask_id]
        difference = float((logits - expected).abs().max())
        scale = float(expected.abs().max())
        allowed = _ROUNDED_TOLERANCE if self.rounded else TOLERANCE
        same_best = int((logits.argmax(-1) == expected.argmax(-1)).sum())
        self.line = (
            f"verified on {ROWS} x {LENGTH} tokens: max|difference| {difference:.3g}, max|logit|"
            f" {scale:.3g}, ratio {difference / scale:.2e} (allowed {allowed:g}), the same best"
            f" token at {same_best} of {ROWS * LENGTH} positions"
        )
        # Not `difference > ...`: a comparison with NaN is false.
        if not difference <= allowed * scale:
            raise RunError(f"--verify: the exported folder computes other logits; not {self.line}")


def _write_reference(path: str, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
    temporary = f"{path}.partial"
    try:
        save_file({"input_ids": input_ids, "logits": logits.contiguous()}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"--reference: {path} cannot be written ({one_line(error)})") from None
