"""Training checkpoint -> Hugging Face folder in the published layout."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llada.chat.format import END_OF_TURN, TEMPLATE, ChatFormat
from llada.checkpoint.canonical import CheckpointWeights
from llada.checkpoint.format import (
    TrainedConfig,
    committed_checkpoints,
    load_tokenizer,
    read_state,
    resolve_checkpoint,
    trained_config,
)
from llada.checkpoint.reading import StoredTensors
from llada.checkpoint.verification import verify_checkpoint
from llada.config.sections import ModelSection
from llada.errors import UserError
from llada.files import flush_in_background
from llada.hf.card import check_license, model_card
from llada.hf.sources import Mean
from llada.hf.tensor_files import total_bytes, write_safetensors
from llada.model import weights
from llada.outputs import new_folder, refuse_inside, require_space, require_writable
from llada.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_SIZE = "5GB"
"""Largest safetensors file if nothing else is asked for."""
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_CODE = ("configuration_llada.py", "generation_llada.py", "modeling_llada.py")
_FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "*.py",
    "chat_template.jinja",
    "README.md",
)
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_special_tokens.json")
Check = Callable[[list[Path], Path, bool], None]


def convert(source: str, output: str, verify: bool, reference: str | None, **options: Any) -> str:
    """`llada convert to-hf`: see `to_hf` and `llada.hf.verify.Verification`. Returns what was done,
    for the console.
    """
    if not verify and reference is None:
        return to_hf(source, output, **options)
    from llada.hf.verify import Verification

    if reference is not None:
        path = Path(reference)
        if os.path.exists(path) and not (options.get("force") and os.path.isfile(path)):
            raise UserError(f"--reference: '{reference}' exists; --force replaces a file")
        require_writable(path, "--reference")
    trained = trained_config(read_state(resolve_checkpoint(source)))
    dtype = options.get("dtype") or trained.precision
    exact = dtype == "fp32" or (dtype == trained.precision and options.get("average", 1) == 1)
    check = Verification(verify, reference, rounded=not exact)
    return "\n".join(filter(None, (to_hf(source, output, check=check, **options), check.line)))


def to_hf(
    source: str | Path,
    output: str | Path,
    dtype: str | None = None,
    force: bool = False,
    check: Check | None = None,
    max_shard_size: str = SHARD_SIZE,
    average: int = 1,
    license_: str = "unknown",
    checksums: bool = True,
) -> str:
    """Write a folder that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`
    loads.

    Tensors are read and written some rows at a time: memory does not grow with the model. The same
    checkpoint and options give the same bytes.

    Args:
        source: checkpoint folder, or a run whose latest checkpoint is meant.
        output: folder to make; written beside it and renamed at the end.
        dtype: "fp32", "bf16" or "fp16"; None: as the run computed. Of a bf16 run fp32 and fp16 are
            made of its fp32 masters.
        force: replace an export that is there.
        check: called with the checkpoints, the finished folder before it takes its name, and
            whether it holds the masters; what it raises leaves nothing behind.
        max_shard_size: largest weight file, as 5GB or 500MiB.
        average: the mean of so many checkpoints of the run up to this one; of a bf16 run of their
            fp32 masters.
        license_: identifier of the licence for the model card.
        checksums: compare the checkpoint's files with its marker first.

    Returns:
        A line that says what was written.

    Raises:
        UserError: no checkpoint, a damaged one, tensors that are not its config's, an output that
            may not be made, too little disk.
        RunError: the output cannot be written, weights that are not finite or that the dtype cannot
            hold.
    """
    limit = parse_size(max_shard_size)
    check_license(license_)
    folder = resolve_checkpoint(source).resolve()
    refuse_inside(output, folder)
    state = read_state(folder)
    trained = trained_config(state)
    name = dtype or trained.precision
    if name not in DTYPES:
        raise UserError(f"--dtype: '{name}' is not allowed; one of {', '.join(DTYPES)}")
    folders = last_checkpoints(folder, trained, average)
    if checksums:
        _check_files(folders)
    tokenizer = load_tokenizer(folder)
    stored = [StoredTensors(each / "model") for each in folders]
    masters = (
        (name != "bf16" or average > 1)
        and trained.precision == "bf16"
        and all(each.has_masters for each in stored)
    )
    tensors = _open(stored, trained.model, masters)
    require_space(output, total_bytes(tensors.shapes, DTYPES[name]), "OUT")
    with new_folder(
        output, force, "an exported model", (*_FILES, *_TOKENIZER_FILES), setting="OUT"
    ) as partial:
        with flush_in_background(partial):
            count = write_safetensors(partial, tensors, DTYPES[name], limit)
        _write_json(partial / "config.json", model_config(trained, tokenizer, name))
        end_of_turn = tokenizer.id_of(END_OF_TURN)
        ends = tokenizer.eos_id if end_of_turn is None else [tokenizer.eos_id, end_of_turn]
        special = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": ends,
            "pad_token_id": tokenizer.pad_id,
        }
        _write_json(
            partial / "generation_config.json",
            {key: value for key, value in special.items() if value is not None},
        )
        for file in _CODE:
            shutil.copy(Path(__file__).with_name(file), partial)
        chat, has_chat = _write_tokenizer(folder / "tokenizer", partial, tokenizer)
        steps = [read_state(each).step for each in folders] if average > 1 else []
        card = model_card(state, trained, name, license_, has_chat, steps)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if check is not None:
            check(folders, partial, masters)
    origin = " from the run's fp32 masters" if masters else ""
    what = (
        f"{weights.num_parameters(trained.model):,} parameters in {name}{origin}, {count} weight"
        f" files, {chat}"
    )
    return f"{output}: {what}" + (
        f", the mean of the checkpoints after steps {', '.join(map(str, steps))}" if steps else ""
    )


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MiB or 1000000. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", text.strip().upper())
    unit = (match[2] or "").removesuffix("B") if match else None
    exact = float(match[1]) * _UNITS[f"{unit}B" if unit else ""] if match else 0.0
    size = int(exact) if math.isfinite(exact) else 0
    if size < 1:
        raise UserError(f"--max-shard-size: '{text}' is not a size; write it as 5GB, 500MB or 2GiB")
    return size


def last_checkpoints(folder: Path, trained: TrainedConfig, count: int) -> list[Path]:
    """A checkpoint and the ones before it in its run, `count` in all, oldest first.

    Raises:
        UserError: the run has not so many, or not of one model.
    """
    if count < 1:
        raise UserError(f"--average: {count} is less than 1")
    if count == 1:
        return [folder]
    found = [path for path in committed_checkpoints(folder.parent) if path.name <= folder.name]
    if folder not in found or len(found) < count:
        raise UserError(
            f"--average: {count} checkpoints are asked for, {folder.parent} has {len(found)}"
            f" complete ones up to {folder.name}"
        )
    for path in found[-count:]:
        if trained_config(read_state(path)).model != trained.model:
            raise UserError(f"--average: {path} holds another model than {folder}")
    return found[-count:]


def _open(stored: list[StoredTensors], model: ModelSection, masters: bool) -> weights.Weights:
    """The weights of one checkpoint, or the mean of several."""
    found = [CheckpointWeights(each, model, masters) for each in stored]
    return found[0] if len(found) == 1 else Mean(found)


def _check_files(folders: list[Path]) -> None:
    problems = [problem for folder in folders for problem in verify_checkpoint(folder)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"checkpoint: {problems[0]}{more}; it is damaged, take another one")


def model_config(trained: TrainedConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Every field of the published config.json.

    Args:
        trained: the model.
        tokenizer: whose ids it names.
        dtype: of the weights, one of DTYPES.
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
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id,
    ).to_diff_dict()
    del fields["transformers_version"]  # of this machine: the same checkpoint gives the same bytes
    return {**fields, "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}


def _write_tokenizer(source: Path, target: Path, tokenizer: Tokenizer) -> tuple[str, bool]:
    """Copy the tokenizer with its chat template, or with LLaDA's if it has none but has its special
    tokens. Returns what was done, and whether there is a template.
    """
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
    (target / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    path = target / "tokenizer_config.json"
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "chat_template": TEMPLATE})
    return "chat template included", True


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
