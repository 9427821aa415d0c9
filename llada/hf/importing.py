"""Hugging Face folder -> training checkpoint, from which a run of any layout can start.

The checkpoint is that of a run that has done no step; `run.init_from` takes it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from llada.checkpoint.format import STATE_FILE, CheckpointState, seal_checkpoint
from llada.checkpoint.names import MARKER
from llada.checkpoint.writing import write_model
from llada.config.sections import ModelSection
from llada.errors import UserError
from llada.files import flush_in_background, read_files
from llada.hf.folder import HfFolder, check_mask, open_folder
from llada.hf.sources import GrownVocabulary
from llada.hf.tensor_files import total_bytes
from llada.model.weights import EMBEDDING, Weights, num_parameters
from llada.outputs import new_folder, refuse_inside, require_space
from llada.tokenizer import MASK, SPECIAL_TOKENS, Tokenizer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ImportOptions:
    """How a folder becomes a checkpoint.

    Attributes:
        dtype: "fp32" or "bf16", of the stored weights. None: bf16 stays bf16, anything else becomes
            fp32.
        add_mask_token: Give a tokenizer without a mask token one, with its own row in embedding and
            head.
        add_special_tokens: Give it every special token of LLaDA that it lacks, the mask token
            included.
        tokenizer: Folder or file of the tokenizer; None: it is in the model's folder.
        allow_pickle: Read pytorch_model.bin if there are no safetensors.
        force: Replace an existing checkpoint.
    """

    dtype: str | None = None
    add_mask_token: bool = False
    add_special_tokens: bool = False
    tokenizer: str | None = None
    allow_pickle: bool = False
    force: bool = False


def from_hf(folder: str | Path, output: str | Path, options: ImportOptions | None = None) -> str:
    """Write the model of a Hugging Face folder as a checkpoint of a run that has done no step.

    Args:
        folder: Published LLaDA layout, or a Llama-architecture model.
        output: Checkpoint folder to make. It is written under a temporary name and renamed at the
            end.
        options: See ImportOptions.

    Returns:
        Lines that say what was written, new rows of the vocabulary included.

    Raises:
        UserError: A folder that cannot be read (see `llada.hf.folder.open_folder`); a tokenizer
            that does not match it; an output that may not be made; too little disk.
        RunError: The output cannot be written.
    """
    options = options or ImportOptions()
    if options.dtype not in (None, *PRECISIONS):
        raise UserError(
            f"--dtype: '{options.dtype}' is not allowed; one of {', '.join(PRECISIONS)}"
        )
    refuse_inside(output, Path(folder))
    source = open_folder(folder, options.allow_pickle)
    precision = options.dtype
    if precision is None:
        precision = "bf16" if source.dtype == torch.bfloat16 else "fp32"
    original = Tokenizer.load(options.tokenizer or folder, require_mask=False)
    tokenizer = _complete_tokenizer(original, source, options)
    weights, model, vocabulary = _grow_vocabulary(source, original, tokenizer)
    dtype = PRECISIONS[precision]
    require_space(output, total_bytes(weights.shapes, dtype), "OUT")
    state = _initial_state(source, model, precision, vocabulary, tokenizer)
    names = (MARKER, STATE_FILE, "model", "tokenizer")
    with (
        new_folder(output, options.force, "a checkpoint", names, setting="OUT") as partial,
        tempfile.TemporaryDirectory() as scratch,
    ):
        (partial / "model").mkdir()
        with flush_in_background(partial / "model"):
            write_model(partial / "model", weights, model, dtype)
        # The marker comes last: a checkpoint without it does not count.
        tokenizer.save(scratch)
        seal_checkpoint(partial, state, read_files(Path(scratch)), {})
    lines = [
        f"{output}: {num_parameters(model):,} parameters of {source.architecture} in {precision}",
        vocabulary,
        f"special tokens: {_special_tokens(tokenizer)}",
        "model section of a run that starts from it (may be left out):",
        _model_section(model),
    ]
    return "\n".join(line for line in lines if line)


def _complete_tokenizer(original: Tokenizer, source: HfFolder, options: ImportOptions) -> Tokenizer:
    """Add the special tokens that diffusion needs, as far as the options allow.

    Raises:
        UserError: A token is still missing, or the tokenizer does not match the folder's model.
    """
    added: Sequence[str] = ()
    if options.add_special_tokens:
        added = SPECIAL_TOKENS
    elif options.add_mask_token and original.mask_id < 0:
        added = (MASK,)
    tokenizer = original.with_special_tokens(added) if added else original
    if tokenizer.mask_id < 0:
        raise UserError(
            f"{tokenizer.name}: the tokenizer has no mask token, which diffusion needs; "
            "--add-mask-token gives it one, --add-special-tokens those of LLaDA's chat format too"
        )
    if tokenizer.eos_id < 0:
        raise UserError(
            f"{tokenizer.name}: the tokenizer has no EOS (end of document) token;"
            " --add-special-tokens gives it one"
        )
    check_mask(source, tokenizer)
    if original.vocab_size > source.model.vocab_size:
        raise UserError(
            f"{original.name}: the tokenizer has {original.vocab_size} ids, the embedding of"
            f" '{source.path}' {source.model.vocab_size} rows"
        )
    return tokenizer


def _grow_vocabulary(
    source: HfFolder, original: Tokenizer, tokenizer: Tokenizer
) -> tuple[Weights, ModelSection, str]:
    """Give the new tokens rows in embedding and head.

    Padding rows are taken first. If they do not suffice, the embedding grows to the next multiple
    of 128 rows. Example: 500 tokens in 512 rows leave room for 12 new ones; a 13th means 640 rows.

    Args:
        source: The model.
        original: Its tokenizer.
        tokenizer: The same with the new tokens.

    Returns:
        Weights, shape of the model, and a line that says which rows are new (empty if none are).
    """
    num_new = tokenizer.vocab_size - original.vocab_size
    if not num_new:
        return source.weights, source.model, ""
    rows = source.model.vocab_size
    if tokenizer.vocab_size <= rows:
        new_rows = rows
        room = f"in {rows} rows that were there"
    else:
        new_rows = tokenizer.padded_vocab_size
        padding = new_rows - max(rows, tokenizer.vocab_size)
        room = f"rows {rows} -> {new_rows}, {padding} of them padding"
    by_id = sorted(tokenizer.special_ids.items(), key=lambda pair: pair[1])
    names = ", ".join(f"{token} {i}" for token, i in by_id if i >= original.vocab_size)
    line = (
        f"vocabulary: {num_new} new tokens ({names}), {room}; a new row is the mean of the"
        f" {original.vocab_size} tokens' rows"
    )
    assert source.weights.shapes[EMBEDDING][0] == rows
    weights = GrownVocabulary(source.weights, original.vocab_size, num_new, new_rows)
    return weights, source.model.model_copy(update={"vocab_size": new_rows}), line


def _initial_state(
    source: HfFolder, model: ModelSection, precision: str, vocabulary: str, tokenizer: Tokenizer
) -> CheckpointState:
    """The state of a run before its first step."""
    return CheckpointState(
        step=0,
        samples=0,
        tokens=0,
        data="",
        config={
            "task": "import",
            "precision": precision,
            "data": {"sequence_length": source.max_sequence_length},
            "model": model.model_dump(),
            # What the weights were trained for, until a run trains them for something else.
            "objective": {"name": source.objective, "subs": source.subs},
        },
        versions={name: version(name) for name in ("torch", "safetensors")},
        lineage=[
            {
                "imported": source.path.resolve().name,
                "architecture": source.architecture,
                "vocabulary": vocabulary,
            }
        ],
        recent=[],
        tokenizer=tokenizer.fingerprint,
    )


def _special_tokens(tokenizer: Tokenizer) -> str:
    """The special tokens by role, for the user."""
    tokens = tokenizer.special_tokens()
    return ", ".join(f"{role} {token} ({i})" for role, (token, i) in tokens.items())


def _model_section(model: ModelSection) -> str:
    """The model section of a config, in YAML."""
    # The initialization does not matter to a run that starts from weights.
    fields = model.model_dump(exclude={"embedding_init_std"})
    return yaml.safe_dump({"model": fields}, sort_keys=False).rstrip()
