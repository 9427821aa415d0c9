"""Training checkpoint -> Hugging Face folder in the published layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llada.chat import TEMPLATE, ChatFormat
from llada.config import RunConfig, build_config
from llada.errors import UserError
from llada.files import new_folder
from llada.hf.stored import StoredTensors, canonical_weights
from llada.model import weights
from llada.tokenizer import Tokenizer
from llada.training import checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000
"""Largest safetensors file."""
_CODE = ("configuration_llada.py", "modeling_llada.py")
_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", "generation_config.json", "*.py", "chat_template.jinja")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_special_tokens.json")
Check = Callable[[Path, Path], None]


def convert(source: str, output: str, dtype: str | None, force: bool, verify: bool, reference: str | None) -> str:
    """`llada convert to-hf`: see `to_hf` and `llada.hf.verify.Verification`. Returns what was done, for the console."""
    if not verify and reference is None:
        return to_hf(source, output, dtype, force)
    from llada.hf.verify import Verification

    if reference is not None:
        path = Path(reference)
        if not path.parent.is_dir():
            raise UserError(f"--reference: no folder '{path.parent}' for the file")
        if path.exists() and not force:
            raise UserError(f"--reference: '{reference}' exists; --force replaces it")
    trained = build_config(checkpoint.read_state(checkpoint.resolve(source)).config).precision
    check = Verification(verify, reference, rounded=dtype == "bf16" and trained == "fp32")
    return "\n".join(filter(None, (to_hf(source, output, dtype, force, check), check.line)))


def to_hf(source: str | Path, output: str | Path, dtype: str | None = None, force: bool = False, check: Check | None = None) -> str:
    """Write a folder that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads.

    Args:
        source: checkpoint folder, or a run whose latest checkpoint is meant.
        output: folder to make; written beside it and renamed at the end.
        dtype: "fp32" or "bf16"; None: as the run computed.
        force: replace an export that is there.
        check: called with the checkpoint and the finished folder before it takes its name; what it raises leaves nothing behind.

    Returns:
        A line that says what was written.

    Raises:
        UserError: no checkpoint, a damaged one, an output that may not be made.
        RunError: the output cannot be written.
    """
    folder = checkpoint.resolve(source)
    state = checkpoint.read_state(folder)
    config = build_config(state.config)
    name = dtype or config.precision
    if name not in DTYPES:
        raise UserError(f"--dtype: '{name}' is not allowed; one of {', '.join(DTYPES)}")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    with new_folder(output, force, "an exported model", (*_FILES, *_TOKENIZER_FILES), setting="OUT") as partial:
        count = write_weights(partial, canonical_weights(StoredTensors(folder / "model"), config.model), config, DTYPES[name])
        _write_json(partial / "config.json", model_config(config, tokenizer, name, _longest(config, state)))
        special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        _write_json(partial / "generation_config.json", {key: value for key, value in special.items() if value is not None})
        for file in _CODE:
            shutil.copy(Path(__file__).with_name(file), partial)
        chat = _write_tokenizer(folder / "tokenizer", partial, tokenizer)
        if check is not None:
            check(folder, partial)
    return f"{output}: {weights.num_parameters(config.model):,} parameters in {name}, {count} weight files, {chat}"


def model_config(config: RunConfig, tokenizer: Tokenizer, dtype: str, longest: int) -> dict[str, Any]:
    """Every field of the published config.json.

    Args:
        config: of the run.
        tokenizer: whose ids it names.
        dtype: of the weights, "fp32" or "bf16".
        longest: sequence the model was trained on, in tokens.
    """
    from llada.hf.configuration_llada import LLaDAConfig

    model = config.model
    fields = LLaDAConfig(
        d_model=model.hidden_size,
        n_layers=model.num_layers,
        n_heads=model.num_attention_heads,
        n_kv_heads=model.kv_heads,
        mlp_hidden_size=model.ffn_hidden_size,
        vocab_size=model.vocab_size,
        max_sequence_length=longest,
        rope_theta=model.rope_theta,
        rms_norm_eps=model.norm_eps,
        weight_tying=model.tie_embeddings,
        precision="amp_bf16" if config.precision == "bf16" else "fp32",
        mask_token_id=tokenizer.mask_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id,
    ).to_diff_dict()
    return {**fields, "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}


def write_weights(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], config: RunConfig, dtype: torch.dtype, limit: int = SHARD_BYTES
) -> int:
    """Write safetensors files of at most `limit` bytes (a larger tensor gets its own), and their index if there are several.

    Returns how many files. One file is held in memory at a time.
    """
    from safetensors.torch import save_file

    files = _deal(weights.canonical_shapes(config.model), dtype, limit)
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape in weights.canonical_shapes(config.model).values())
    index: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        held: dict[str, torch.Tensor] = {}
        for wanted in names:
            name, tensor = next(tensors)
            if name != wanted:
                raise AssertionError(f"{name} comes before {wanted}")
            held[name] = tensor.to(dtype).contiguous()
            index[name] = file
        save_file(held, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library makes files for their owner only
    if len(files) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    return len(files)


def _deal(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Which tensors go into which file, in order."""
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if files[-1] and used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _longest(config: RunConfig, state: checkpoint.State) -> int:
    """The longest sequence that the weights were trained on, in this run or one before."""
    return max([config.data.sequence_length, *(entry.get("sequence_length", 0) for entry in state.lineage)])


def _write_tokenizer(source: Path, target: Path, tokenizer: Tokenizer) -> str:
    """Copy the tokenizer with its chat template, or with LLaDA's if it has none but has its special tokens. Returns what was done."""
    for path in sorted(source.iterdir()):
        shutil.copy(path, target)
    if tokenizer.chat_template not in (None, TEMPLATE):
        return "its tokenizer's own chat template included"
    try:
        ChatFormat(tokenizer)
    except UserError:
        return "no chat template (the tokenizer lacks its special tokens)"
    (target / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    path = target / "tokenizer_config.json"
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "chat_template": TEMPLATE})
    return "chat template included"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
