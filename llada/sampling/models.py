"""A model to sample from: an exported folder, or a training checkpoint through the weight map."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from llada.chat.format import END_OF_TURN
from llada.checkpoint import format
from llada.checkpoint.format import TrainedConfig
from llada.checkpoint.reading import CheckpointWeights, StoredTensors, all_rows
from llada.errors import RunError, UserError
from llada.hf.exporting import model_config
from llada.hf.folder import LLADA, check_mask, is_folder, open_folder
from llada.model.weights import Weights
from llada.sampling.diffusion import Specials
from llada.tokenizer import Tokenizer


class Sampler:
    """A mask predictor with its tokenizer.

    Attributes:
        tokenizer: of the model.
        specials: ids for the samplers.
        end_ids: tokens that end a text or an answer: EOS, and the end of a turn where the tokenizer
            has one.
        device: where it computes.
        longest: sequence it was trained on, in tokens.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: Tokenizer, longest: int, device: torch.device
    ) -> None:
        self._model, self.tokenizer, self.longest, self.device = (
            model.to(device).eval(),
            tokenizer,
            longest,
            device,
        )
        self.specials = Specials(tokenizer.mask_id, tokenizer.eos_id, tokenizer.vocab_size)
        end_of_turn = tokenizer.id_of(END_OF_TURN)
        self.end_ids = (
            {tokenizer.eos_id} if end_of_turn is None else {tokenizer.eos_id, end_of_turn}
        )

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [b, s, rows] of ids [b, s]. Raises RunError if they are not finite: the best token
        of NaN would be the first.
        """
        with torch.no_grad():
            logits: torch.Tensor = self._model(tokens).logits
        if not logits.isfinite().all():
            raise RunError(
                "MODEL: its logits are not finite: the weights are damaged, or of a run that failed"
            )
        return logits


def load(path: str | Path) -> Sampler:
    """Open an exported folder, a checkpoint, or a run (its latest checkpoint), on the GPU where
    there is one.

    Code in a folder is not run: the weights go through the weight map into this package's own copy
    of the model.

    Raises:
        UserError: none of these; a folder of another architecture, whose tokenizer has no mask
            token, or whose weights are missing, damaged or not those of its config.json.
    """
    folder = Path(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_folder(folder):
        return _exported(folder, device)
    if not os.path.isdir(folder):  # False too for a name that no file can have
        raise UserError(f"MODEL: no folder '{path}'")
    try:
        source = format.resolve(folder)
    except UserError:
        raise UserError(
            f"MODEL: '{path}' is neither an exported folder (it has no config.json) nor a"
            " checkpoint or a run with one"
        ) from None
    trained = format.trained(format.read_state(source))
    weights = CheckpointWeights(StoredTensors(source / "model"), trained.model)
    return _sampler(trained, format.load_tokenizer(source), weights, device)


def _exported(path: Path, device: torch.device) -> Sampler:
    folder = open_folder(path, setting="MODEL")
    if folder.architecture != LLADA:
        raise UserError(
            f"MODEL: '{path}' is a {folder.architecture}, which writes from left to right; "
            "`llada convert from-hf` makes a checkpoint that a diffusion model is trained from"
        )
    tokenizer = Tokenizer.load(path)
    check_mask(folder, tokenizer)
    precision = "bf16" if folder.dtype == torch.bfloat16 else "fp32"
    return _sampler(
        TrainedConfig(folder.model, precision, folder.longest), tokenizer, folder.weights, device
    )


def _sampler(
    trained: TrainedConfig, tokenizer: Tokenizer, weights: Weights, device: torch.device
) -> Sampler:
    from llada.hf.configuration_llada import LLaDAConfig
    from llada.hf.modeling_llada import LLaDAModelLM

    if tokenizer.vocab_size > trained.model.vocab_size:
        raise UserError(
            f"MODEL: the tokenizer has {tokenizer.vocab_size} ids and the model only"
            f" {trained.model.vocab_size} rows; they are not of one model"
        )
    fields = model_config(trained, tokenizer, trained.precision)
    with torch.device("meta"):
        model = LLaDAModelLM(
            LLaDAConfig(**{name: fields[name] for name in LLaDAConfig.published_fields()})
        )
    dtypes = {weights.dtype(name) for name in weights.shapes}
    # of several the one that rounds none
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    model.load_state_dict(
        {name: all_rows(weights, name).to(dtype) for name in weights.shapes}, assign=True
    )
    return Sampler(model, tokenizer, trained.longest, device)
