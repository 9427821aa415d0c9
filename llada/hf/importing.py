"""Hugging Face folder -> training checkpoint, which a run of any layout takes as its
`run.init_from`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from llada.checkpoint.format import MARKER, STATE_FILE, CheckpointState, seal_checkpoint
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
        dtype: "fp32" or "bf16" of the stored weights; None: bf16 stays bf16, anything else is fp32.
        add_mask_token: give a tokenizer that has no mask token one, with a row of its own in
            embedding and head.
        add_special_tokens: give it all of LLaDA's special tokens that it lacks, the mask token
            among them.
        tokenizer: folder or file of the tokenizer; None: it lies in the model's folder.
        allow_pickle: read pytorch_model.bin where there are no safetensors.
        force: replace a checkpoint that is there.
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
        folder: published LLaDA layout, or a Llama-architecture model.
        output: checkpoint folder to make; written beside it and renamed at the end.
        options: see ImportOptions.

    Returns:
        Lines that say what was written, new rows of the vocabulary included.

    Raises:
        UserError: a folder that cannot be read (see `llada.hf.folder.open_folder`), a tokenizer
            that does not fit it, an output that may not be made, too little disk.
        RunError: the output cannot be written.
    """
    options = options or ImportOptions()
    if options.dtype not in (None, *PRECISIONS):
        raise UserError(
            f"--dtype: '{options.dtype}' is not allowed; one of {', '.join(PRECISIONS)}"
        )
    refuse_inside(output, Path(folder))
    source = open_folder(folder, options.allow_pickle)
    precision = options.dtype or ("bf16" if source.dtype == torch.bfloat16 else "fp32")
    before = Tokenizer.load(options.tokenizer or folder, require_mask=False)
    tokenizer = _complete(before, source, options)
    weights, model, note = _grown(source, before, tokenizer)
    dtype = PRECISIONS[precision]
    require_space(output, total_bytes(weights.shapes, dtype), "OUT")
    state = CheckpointState(
        step=0,
        samples=0,
        tokens=0,
        data="",
        config={
            "task": "import",
            "precision": precision,
            "data": {"sequence_length": source.longest},
            "model": model.model_dump(),
        },
        versions={name: version(name) for name in ("torch", "safetensors")},
        lineage=[
            {
                "imported": source.path.resolve().name,
                "architecture": source.architecture,
                "vocabulary": note,
            }
        ],
        recent=[],
        tokenizer=tokenizer.fingerprint,
    )
    names = (MARKER, STATE_FILE, "model", "tokenizer")
    with (
        new_folder(output, options.force, "a checkpoint", names, setting="OUT") as partial,
        tempfile.TemporaryDirectory() as scratch,
    ):
        (partial / "model").mkdir()
        with flush_in_background(partial / "model"):
            write_model(partial / "model", weights, model, dtype)
        tokenizer.save(scratch)
        seal_checkpoint(partial, state, read_files(Path(scratch)), {})
    count = (
        f"{output}: {num_parameters(model):,} parameters of {source.architecture} in {precision}"
    )
    roles = ", ".join(
        f"{role} {token} ({i})" for role, (token, i) in tokenizer.special_tokens().items()
    )
    section = yaml.safe_dump(
        {"model": model.model_dump(exclude={"embedding_init_std"})}, sort_keys=False
    ).rstrip()
    lines = (
        count,
        note,
        f"special tokens: {roles}",
        f"model section of a run that starts from it (may be left out):\n{section}",
    )
    return "\n".join(filter(None, lines))


def _complete(before: Tokenizer, source: HfFolder, options: ImportOptions) -> Tokenizer:
    """The tokenizer with what a masked diffusion model needs, as far as the options allow."""
    added: Sequence[str] = (
        SPECIAL_TOKENS
        if options.add_special_tokens
        else (MASK,)
        if options.add_mask_token and before.mask_id < 0
        else ()
    )
    tokenizer = before.with_special_tokens(added) if added else before
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
    if before.vocab_size > source.model.vocab_size:
        raise UserError(
            f"{before.name}: the tokenizer has {before.vocab_size} ids, the embedding of"
            f" '{source.path}' {source.model.vocab_size} rows"
        )
    return tokenizer


def _grown(
    source: HfFolder, before: Tokenizer, after: Tokenizer
) -> tuple[Weights, ModelSection, str]:
    """Weights and shape with rows for the new tokens, and a line that says which rows are new."""
    new = after.vocab_size - before.vocab_size
    if not new:
        return source.weights, source.model, ""
    rows = source.model.vocab_size
    size = rows if after.vocab_size <= rows else after.padded_vocab_size
    names = ", ".join(
        f"{token} {i}"
        for token, i in sorted(after.special_ids.items(), key=lambda pair: pair[1])
        if i >= before.vocab_size
    )
    place = (
        f"in {rows} rows that were there"
        if size == rows
        else f"rows {rows} -> {size}, {size - max(rows, after.vocab_size)} of them padding"
    )
    note = (
        f"vocabulary: {new} new tokens ({names}), {place}; a new row is the mean of the"
        f" {before.vocab_size} tokens' rows"
    )
    assert source.weights.shapes[EMBEDDING][0] == rows
    return (
        GrownVocabulary(source.weights, before.vocab_size, new, size),
        source.model.model_copy(update={"vocab_size": size}),
        note,
    )
