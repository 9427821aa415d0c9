"""A Hugging Face folder: its config.json as our model section, and its weights by canonical name.

Published LLaDA folders are read, and Llama-architecture models, from which diffusion training can
start. `llada.hf.config_mapping` maps the config; `llada.hf.tensor_files` reads the weight files.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from llada.checkpoint.canonical import shape_differences
from llada.config.sections import ModelSection
from llada.errors import UserError, did_you_mean
from llada.hf.config_mapping import LLADA, READERS, UnsupportedConfig, check_common_fields
from llada.hf.llama_layout import NAMES, llama_name
from llada.hf.sources import Renamed, equal
from llada.hf.tensor_files import TensorFiles, open_tensors
from llada.model.weights import EMBEDDING, HEAD, Weights, canonical_shapes
from llada.tokenizer import Tokenizer
from llada.types import JsonObject

# Endings of tensors that older files store although they follow from the config.
_COMPUTED_TENSORS = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class HfFolder:
    """An opened folder.

    Attributes:
        path: The folder.
        architecture: Class name of the model, from config.json.
        model: Its shape.
        weights: Its tensors by canonical name.
        max_sequence_length: Longest sequence that it was trained on, in tokens.
        mask_id: Id of [MASK] from config.json; None if it does not say.
        subs: Its softmax is without [MASK].
    """

    path: Path
    architecture: str
    model: ModelSection
    weights: Weights
    max_sequence_length: int
    mask_id: int | None
    subs: bool

    @property
    def objective(self) -> str:
        """Name of the objective that its weights were trained with, as far as the class tells."""
        return "masked" if self.architecture == LLADA else "autoregressive"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that represents every tensor exactly: that of all of them, or else fp32."""
        dtypes = {self.weights.dtype(name) for name in self.weights.shapes}
        if len(dtypes) == 1:
            return dtypes.pop()
        return torch.float32


class FolderConfig(NamedTuple):
    """What config.json says; see HfFolder."""

    architecture: str
    model: ModelSection
    max_sequence_length: int
    mask_id: int | None
    subs: bool


def is_folder(path: str | Path) -> bool:
    """Whether this is a Hugging Face folder, and not a checkpoint."""
    # os.path.isfile is also False for a string that cannot be a file name at all.
    return os.path.isfile(Path(path) / "config.json")


def check_mask(folder: HfFolder, tokenizer: Tokenizer) -> None:
    """Raise UserError if config.json and the tokenizer name different mask tokens.

    One of them then belongs to another model.
    """
    if folder.mask_id is not None and folder.mask_id != tokenizer.mask_id:
        raise UserError(
            f"{folder.path / 'config.json'}: mask_token_id {folder.mask_id} is not the tokenizer's"
            f" mask token, {tokenizer.mask_id}"
        )


def read_model(path: str | Path, setting: str = "FOLDER") -> FolderConfig:
    """Read config.json alone. Raises UserError as `open_folder` does."""
    if not is_folder(path):
        raise UserError(f"{setting}: '{path}' is not a Hugging Face folder (no config.json)")
    config_path = Path(path) / "config.json"
    config = _read_config(config_path)
    model_type = str(config.get("model_type"))
    if model_type not in READERS:
        raise UserError(
            f"{config_path}: model_type {model_type!r} is not"
            f" read{did_you_mean(model_type, READERS)}; one of {', '.join(READERS)}"
        )
    architecture, map_config = READERS[model_type]
    try:
        check_common_fields(config)
        architectures = config.get("architectures") or [architecture]
        if architectures != [architecture]:
            raise UnsupportedConfig(
                f"architectures {architectures!r} is not read with model_type {model_type!r};"
                f" {[architecture]!r} is"
            )
        model, max_sequence_length = map_config(config)
    except UnsupportedConfig as error:
        raise UserError(f"{config_path}: {error}") from None
    return FolderConfig(
        architecture,
        model,
        max_sequence_length,
        mask_id=config.get("mask_token_id"),
        subs=architecture == LLADA and config.get("predicts_mask_token") is False,
    )


def open_folder(path: str | Path, allow_pickle: bool = False, setting: str = "FOLDER") -> HfFolder:
    """Open a folder. Weights are read later, when they are used.

    Args:
        path: The folder.
        allow_pickle: Read pytorch_model.bin if there are no safetensors.
        setting: The user's name for `path`, for messages.

    Raises:
        UserError: No such folder; an architecture or field that is not computed here; weights that
            cannot be read (see `open_tensors`) or that do not match the config. Every missing,
            unexpected or misshapen tensor is named.
    """
    config = read_model(path, setting)
    folder = Path(path)
    files = open_tensors(folder, allow_pickle, setting)
    # Every layer has several tensors. Without this check a config with a huge number of layers
    # would list all of their names.
    if config.model.num_layers > len(files.shapes):
        raise UserError(
            f"{setting}: the weights in '{folder}' are not those of its config.json: "
            f"it has {config.model.num_layers} layers, and there are {len(files.shapes)} tensors"
        )
    names = {name: name for name in canonical_shapes(config.model)}
    if config.architecture != LLADA:
        names = {name: llama_name(name) for name in names}
    _check_tensors(folder, files, names, config.model, setting)
    return HfFolder(
        path=folder,
        architecture=config.architecture,
        model=config.model,
        weights=Renamed(files, names),
        max_sequence_length=config.max_sequence_length,
        mask_id=config.mask_id,
        subs=config.subs,
    )


def _read_config(path: Path) -> JsonObject:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _check_tensors(
    folder: Path, files: TensorFiles, names: dict[str, str], model: ModelSection, setting: str
) -> None:
    """Raise UserError unless names and shapes of the stored tensors are those of the model.

    Args:
        folder: Folder, for the message.
        files: The stored tensors.
        names: Canonical name -> name in the files.
        model: Shape from the config.
        setting: Setting, for the message.
    """
    expected = {names[canonical]: shape for canonical, shape in canonical_shapes(model).items()}
    stored = {
        name: shape for name, shape in files.shapes.items() if not name.endswith(_COMPUTED_TENSORS)
    }
    if model.tie_embeddings:
        # Some files of tied models store the shared tensor twice.
        for head, embedding in ((HEAD, EMBEDDING), (NAMES[HEAD], NAMES[EMBEDDING])):
            if head in stored and embedding in stored and equal(files, head, embedding):
                del stored[head]
    problems = shape_differences(stored, expected)
    if problems:
        raise UserError(
            f"{setting}: the weights in '{folder}' are not those of its config.json: {problems}"
        )
