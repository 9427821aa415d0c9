"""Training checkpoint -> Hugging Face folder in the published layout."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llada.chat.format import END_OF_TURN, TEMPLATE, ChatFormat
from llada.checkpoint.canonical import CheckpointWeights
from llada.checkpoint.format import (
    CheckpointState,
    TrainedConfig,
    load_tokenizer,
    read_state,
    resolve_checkpoint,
    trained_config,
)
from llada.checkpoint.names import committed_checkpoints
from llada.checkpoint.reading import StoredTensors
from llada.checkpoint.verification import verify_checkpoint
from llada.errors import UserError, did_you_mean
from llada.files import flush_in_background
from llada.formatting import first_of
from llada.hf.card import check_license, model_card
from llada.hf.llama_layout import llama_config, llama_name
from llada.hf.sources import Mean, Renamed
from llada.hf.tensor_files import total_bytes, write_safetensors
from llada.model.weights import Weights, num_parameters
from llada.objectives.registry import start_id
from llada.outputs import new_folder, refuse_inside, require_space, require_writable
from llada.tokenizer import Tokenizer
from llada.types import JsonObject

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("llada", "llama")
SHARD_SIZE = "5GB"
"""Default size of the largest safetensors file."""

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
# The modeling code that every export carries.
_CODE_FILES = ("configuration_llada.py", "generation_llada.py", "modeling_llada.py")
# Files of an export. `--force` refuses to replace a folder that contains any other.
_EXPORTED_FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "*.py",
    "chat_template.jinja",
    "README.md",
    "tokenizer*",
    "special_tokens_map.json",
    "added_special_tokens.json",
)

Check = Callable[[list[Path], Path, bool], None]
"""Inspects a finished folder: (checkpoints, folder, whether it holds the fp32 masters)."""


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint becomes a folder.

    Attributes:
        dtype: "fp32", "bf16" or "fp16"; None: the run's precision. fp32 and fp16 of a bf16 run are
            made from its fp32 masters.
        force: Replace an existing export.
        max_shard_size: Size of the largest weight file, such as 5GB or 500MiB.
        average: Export the mean of this many checkpoints of the run, up to and including the
            given one. For a bf16 run it is the mean of their fp32 masters.
        license: Identifier of the license, for the model card.
        checksums: Compare the checkpoint's files with its marker first.
        layout: "llada" for models of diffusion, "llama" for autoregressive ones; None: the one that
            fits the checkpoint.
    """

    dtype: str | None = None
    force: bool = False
    max_shard_size: str = SHARD_SIZE
    average: int = 1
    license: str = "unknown"
    checksums: bool = True
    layout: str | None = None


@dataclass(frozen=True)
class _OpenedCheckpoints:
    """The checkpoints of an export, opened.

    Attributes:
        folders: The checkpoints, oldest first; one unless they are averaged.
        state: State of the newest checkpoint.
        trained: Their model.
        tokenizer: Tokenizer of the newest checkpoint.
        weights: Weights of the one checkpoint, or their mean.
        masters: Whether `weights` are the optimizer's fp32 masters.
        dtype: Key of DTYPES for the exported weights.
    """

    folders: list[Path]
    state: CheckpointState
    trained: TrainedConfig
    tokenizer: Tokenizer
    weights: Weights
    masters: bool
    dtype: str


def export(
    source: str, output: str, verify: bool, reference: str | None, options: ExportOptions
) -> str:
    """Run `llada convert to-hf` and return its output.

    Args:
        source: See `to_hf`.
        output: See `to_hf`.
        verify: Compare the folder with the training model; see `llada.hf.verify.Verification`.
        reference: Safetensors file for the training model's tokens and logits, or None.
        options: See ExportOptions.
    """
    if not verify and reference is None:
        return to_hf(source, output, options)
    from llada.hf.verify import Verification

    if reference is not None:
        replaceable = options.force and os.path.isfile(reference)
        if os.path.exists(reference) and not replaceable:
            raise UserError(f"--reference: '{reference}' exists; --force replaces a file")
        require_writable(Path(reference), "--reference")
    trained = trained_config(read_state(resolve_checkpoint(source)))
    # Weights are rounded unless they are exported in fp32, or unchanged in the run's own precision.
    dtype = options.dtype or trained.precision
    exact = dtype == "fp32" or (dtype == trained.precision and options.average == 1)
    check = Verification(verify, reference, rounded=not exact)
    exported = to_hf(source, output, options, check)
    return f"{exported}\n{check.line}" if check.line else exported


def to_hf(
    source: str | Path,
    output: str | Path,
    options: ExportOptions | None = None,
    check: Check | None = None,
) -> str:
    """Write a folder that `from_pretrained(folder, trust_remote_code=True)` of transformers loads.

    Tensors are read and written a few rows at a time, so memory does not grow with the model. The
    same checkpoint and options give the same bytes.

    Args:
        source: Checkpoint folder, or a run, of which the latest checkpoint is exported.
        output: Folder to make. It is written under a temporary name and renamed at the end.
        options: See ExportOptions.
        check: Called with the finished folder before it gets its name. If it raises, nothing is
            left behind.

    Returns:
        A line that says what was written.

    Raises:
        UserError: No checkpoint; a damaged one; tensors that do not match its config; an output
            that may not be made; too little disk.
        RunError: The output cannot be written; weights that are not finite or too large for the
            dtype.
    """
    options = options or ExportOptions()
    max_bytes = parse_size(options.max_shard_size)
    check_license(options.license)
    opened = _open_source(source, output, options)
    opened = replace(opened, trained=_in_layout(options.layout, opened))
    dtype = DTYPES[opened.dtype]
    weights = opened.weights
    if opened.trained.is_causal:
        weights = Renamed(weights, {llama_name(name): name for name in weights.shapes})
    require_space(output, total_bytes(weights.shapes, dtype), "OUT")
    averaged: list[int] = []
    if options.average > 1:
        averaged = [read_state(folder).step for folder in opened.folders]
    with new_folder(
        output, options.force, "an exported model", _EXPORTED_FILES, setting="OUT"
    ) as partial:
        with flush_in_background(partial):
            num_files = write_safetensors(partial, weights, dtype, max_bytes)
        _write_configs(partial, opened)
        if not opened.trained.is_causal:
            # Plain transformers has Llama's code itself.
            for name in _CODE_FILES:
                shutil.copy(Path(__file__).with_name(name), partial)
        chat, has_template = _write_tokenizer(opened, partial)
        card = model_card(
            opened.state, opened.trained, opened.dtype, options.license, has_template, averaged
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        if check is not None:
            check(opened.folders, partial, opened.masters)
    origin = " from the run's fp32 masters" if opened.masters else ""
    line = (
        f"{output}: {num_parameters(opened.trained.model):,} parameters in {opened.dtype}{origin},"
        f" {num_files} weight files, {chat}"
    )
    if averaged:
        line += f", the mean of the checkpoints after steps {', '.join(map(str, averaged))}"
    return line


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MiB or 1000000. Raises UserError for anything else."""
    size = 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]I?)?B)?", text.strip().upper())
    if match is not None:
        number, unit = match.groups()
        exact = float(number) * _UNITS[unit or ""]
        if math.isfinite(exact):
            size = int(exact)
    if size < 1:
        raise UserError(f"--max-shard-size: '{text}' is not a size; write it as 5GB, 500MB or 2GiB")
    return size


def last_checkpoints(folder: Path, trained: TrainedConfig, count: int) -> list[Path]:
    """Return a checkpoint and the ones before it in its run, `count` in all, oldest first.

    Raises:
        UserError: The run has fewer checkpoints, or some are of another model.
    """
    if count < 1:
        raise UserError(f"--average: {count} is less than 1")
    if count == 1:
        return [folder]
    # Names sort by step.
    candidates = [path for path in committed_checkpoints(folder.parent) if path.name <= folder.name]
    if folder not in candidates or len(candidates) < count:
        raise UserError(
            f"--average: needs {count} checkpoints, but {folder.parent} has only"
            f" {len(candidates)} complete ones up to {folder.name}"
        )
    newest = candidates[-count:]
    for path in newest:
        if trained_config(read_state(path)).model != trained.model:
            raise UserError(f"--average: the model of {path} differs from that of {folder}")
    return newest


def model_config(trained: TrainedConfig, tokenizer: Tokenizer, dtype: str) -> JsonObject:
    """Return every field of the published config.json.

    Args:
        trained: The model.
        tokenizer: Its special tokens.
        dtype: Type of the weights, a key of DTYPES.
    """
    from llada.hf.configuration_llada import LLaDAConfig

    model = trained.model
    fields = LLaDAConfig(
        d_model=model.hidden_size,
        n_layers=model.num_layers,
        n_heads=model.num_attention_heads,
        n_kv_heads=model.kv_heads,
        mlp_hidden_size=model.ffn_hidden_size,
        vocab_size=model.vocab_size,
        max_sequence_length=trained.longest,
        rope_theta=model.rope_theta,
        rms_norm_eps=model.norm_eps,
        weight_tying=model.tie_embeddings,
        precision="amp_bf16" if trained.precision == "bf16" else "fp32",
        mask_token_id=tokenizer.mask_id,
        tokenizer_vocab_size=tokenizer.vocab_size,
        predicts_mask_token=not trained.subs,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id,
    ).to_diff_dict()
    # The version belongs to this machine; the same checkpoint must give the same bytes anywhere.
    del fields["transformers_version"]
    fields["torch_dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    return fields


def _open_source(
    source: str | Path, output: str | Path, options: ExportOptions
) -> _OpenedCheckpoints:
    """Open the checkpoints of an export. Raises UserError as `to_hf` does."""
    folder = resolve_checkpoint(source).resolve()
    refuse_inside(output, folder)
    state = read_state(folder)
    trained = trained_config(state)
    dtype = options.dtype or trained.precision
    if dtype not in DTYPES:
        raise UserError(f"--dtype: '{dtype}' is not allowed; one of {', '.join(DTYPES)}")
    folders = last_checkpoints(folder, trained, options.average)
    if options.checksums:
        _check_files(folders)
    tokenizer = load_tokenizer(folder)
    stored = [StoredTensors(path / "model") for path in folders]
    # Stored bf16 weights are their masters, rounded. A wider dtype, or a mean, needs the digits
    # that only the masters have.
    masters = (
        (dtype != "bf16" or options.average > 1)
        and trained.precision == "bf16"
        and all(tensors.has_masters for tensors in stored)
    )
    sources = [CheckpointWeights(tensors, trained.model, masters) for tensors in stored]
    weights = sources[0] if len(sources) == 1 else Mean(sources)
    return _OpenedCheckpoints(folders, state, trained, tokenizer, weights, masters, dtype)


def _in_layout(layout: str | None, opened: _OpenedCheckpoints) -> TrainedConfig:
    """Return the model as a layout describes it.

    Raises:
        UserError: the layout is not that of models trained like this one. Imported weights that
            have not been trained here may be written as a diffusion model, to start one elsewhere.
    """
    trained = opened.trained
    if layout not in (None, *LAYOUTS):
        raise UserError(
            f"--layout: '{layout}' is not one of {', '.join(LAYOUTS)}"
            f"{did_you_mean(str(layout), LAYOUTS)}"
        )
    fitting = "llama" if trained.is_causal else "llada"
    if layout == "llada" and trained.is_causal and opened.state.config["task"] == "import":
        return replace(trained, objective="masked")
    if layout not in (None, fitting):
        raise UserError(
            f"--layout: '{layout}' is not for a model of the objective '{trained.objective}'; use"
            f" {fitting}"
        )
    return trained


def _check_files(folders: list[Path]) -> None:
    problems: list[str] = []
    for folder in folders:
        problems += verify_checkpoint(folder)
    if problems:
        raise UserError(
            f"checkpoint: {first_of(problems)}; the checkpoint is damaged; use another one"
        )


def _write_configs(folder: Path, source: _OpenedCheckpoints) -> None:
    """Write config.json and generation_config.json."""
    tokenizer = source.tokenizer
    bos_id = tokenizer.bos_id
    if source.trained.is_causal:
        bos_id = start_id(tokenizer)
        pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        dtype = DTYPES[source.dtype]
        config = llama_config(source.trained, bos_id, tokenizer.eos_id, pad_id, dtype)
    else:
        config = model_config(source.trained, tokenizer, source.dtype)
    _write_json(folder / "config.json", config)
    end_of_turn = tokenizer.id_of(END_OF_TURN)
    special = {
        "bos_token_id": bos_id,
        "eos_token_id": tokenizer.eos_id
        if end_of_turn is None
        else [tokenizer.eos_id, end_of_turn],
        "pad_token_id": tokenizer.pad_id,
    }
    _write_json(
        folder / "generation_config.json",
        {name: value for name, value in special.items() if value is not None},
    )


def _write_tokenizer(opened: _OpenedCheckpoints, target: Path) -> tuple[str, bool]:
    """Copy the tokenizer, with its own chat template or LLaDA's.

    A tokenizer without a template gets LLaDA's if it has the special tokens for it.

    Returns:
        A description for the user, and whether there is a chat template.
    """
    tokenizer = opened.tokenizer
    source = opened.folders[-1] / "tokenizer"
    for path in sorted(source.iterdir()):
        shutil.copy(path, target)
    if not (source / "tokenizer.json").is_file():
        return (
            "its tokenizer is a SentencePiece model, which AutoTokenizer may not read",
            tokenizer.chat_template is not None,
        )
    if tokenizer.chat_template not in (None, TEMPLATE):
        return "its tokenizer's own chat template included", True
    try:
        ChatFormat(tokenizer)
    except UserError:
        return "no chat template (the tokenizer lacks its special tokens)", False
    # Older versions of transformers read the template from tokenizer_config.json, newer ones from a
    # file of its own.
    (target / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    path = target / "tokenizer_config.json"
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "chat_template": TEMPLATE})
    return "chat template included", True


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
