"""Loads a model to sample from: an exported folder, or a training checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from llada.chat.format import end_ids
from llada.checkpoint.canonical import CheckpointWeights, all_rows
from llada.checkpoint.format import (
    TrainedConfig,
    load_tokenizer,
    read_state,
    resolve_checkpoint,
    trained_config,
)
from llada.checkpoint.reading import StoredTensors
from llada.errors import RunError, UserError
from llada.hf.exporting import model_config
from llada.hf.folder import check_mask, is_folder, open_folder
from llada.model.weights import Weights
from llada.sampling.autoregressive import CausalModel
from llada.sampling.diffusion import SpecialIds
from llada.tokenizer import Tokenizer


class MaskPredictor:
    """A mask predictor with its tokenizer.

    Attributes:
        tokenizer: Tokenizer of the model.
        special_ids: Special ids for the sampler.
        end_ids: Tokens that end a text or an answer.
        device: Where the model computes.
        max_sequence_length: Longest sequence that it was trained on, in tokens.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        max_sequence_length: int,
        device: torch.device,
    ) -> None:
        self._model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length
        self.device = device
        self.special_ids = SpecialIds(tokenizer.mask_id, tokenizer.eos_id, tokenizer.vocab_size)
        self.end_ids = end_ids(tokenizer)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the logits [b, s, vocab_size] of ids [b, s].

        Raises:
            RunError: Logits that are not finite. The sampler would take token 0 as the best of NaN.
        """
        with torch.no_grad():
            logits: torch.Tensor = self._model(tokens).logits
        if not logits.isfinite().all():
            raise RunError(
                "MODEL: its logits are not finite: the weights are damaged, or from a failed run"
            )
        return logits


class _Opened(NamedTuple):
    """A model before it is built.

    Attributes:
        trained: Its shape and how it was trained.
        tokenizer: Its tokenizer.
        weights: Its weights by canonical name.
    """

    trained: TrainedConfig
    tokenizer: Tokenizer
    weights: Weights


def load(path: str | Path) -> MaskPredictor:
    """Load an exported folder, a checkpoint, or the latest checkpoint of a run.

    The model goes to the GPU if there is one. Code in a folder does not run: this package's own
    copy of the model computes.

    Raises:
        UserError: None of these; a model that writes from left to right; a folder of another
            architecture, without a mask token, or with weights that are missing, damaged or do not
            match its config.json.
    """
    opened = _open(path)
    if opened.trained.is_causal:
        raise UserError(
            f"MODEL: '{path}' writes from left to right, and cannot fill masks; `llada sample`"
            " continues a text with it"
        )
    return _build(*opened, _device())


def load_writer(path: str | Path) -> MaskPredictor | CausalModel:
    """As `load`, and also load a model that writes from left to right."""
    opened = _open(path)
    if opened.trained.is_causal:
        return CausalModel(*opened, _device())
    return _build(*opened, _device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _open(path: str | Path) -> _Opened:
    opened = _open_parts(path)
    num_ids = opened.tokenizer.vocab_size
    num_rows = opened.trained.model.vocab_size
    if num_ids > num_rows:
        raise UserError(
            f"MODEL: the tokenizer has {num_ids} ids and the model only {num_rows} rows; they are"
            " not of one model"
        )
    return opened


def _open_parts(path: str | Path) -> _Opened:
    folder = Path(path)
    if is_folder(folder):
        return _open_folder(folder)
    # os.path.isdir is also False for a string that cannot be a file name at all.
    if not os.path.isdir(folder):
        raise UserError(f"MODEL: no folder '{path}'")
    try:
        source = resolve_checkpoint(folder)
    except UserError:
        raise UserError(
            f"MODEL: '{path}' is neither an exported folder (it has no config.json) nor a"
            " checkpoint or a run with one"
        ) from None
    trained = trained_config(read_state(source))
    weights = CheckpointWeights(StoredTensors(source / "model"), trained.model)
    return _Opened(trained, load_tokenizer(source), weights)


def _open_folder(path: Path) -> _Opened:
    folder = open_folder(path, setting="MODEL")
    is_diffusion = folder.objective == "masked"
    tokenizer = Tokenizer.load(path, require_mask=is_diffusion)
    if is_diffusion:
        check_mask(folder, tokenizer)
    precision = "bf16" if folder.dtype == torch.bfloat16 else "fp32"
    trained = TrainedConfig(
        folder.model, precision, folder.max_sequence_length, folder.objective, folder.subs
    )
    return _Opened(trained, tokenizer, folder.weights)


def _build(
    trained: TrainedConfig, tokenizer: Tokenizer, weights: Weights, device: torch.device
) -> MaskPredictor:
    from llada.hf.configuration_llada import LLaDAConfig
    from llada.hf.modeling_llada import LLaDAModelLM

    fields = model_config(trained, tokenizer, trained.precision)
    published = {name: fields[name] for name in LLaDAConfig.published_fields()}
    config = LLaDAConfig(**published, predicts_mask_token=not trained.subs)
    # No memory and no time for initial weights, which are replaced at once.
    with torch.device("meta"):
        model = LLaDAModelLM(config)
    # If dtypes are mixed, fp32 holds every weight exactly.
    dtypes = {weights.dtype(name) for name in weights.shapes}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    tensors = {name: all_rows(weights, name).to(dtype) for name in weights.shapes}
    model.load_state_dict(tensors, assign=True)
    return MaskPredictor(model, tokenizer, trained.longest, device)
