"""A model to sample from: an exported folder, or a training checkpoint through the weight map."""

from __future__ import annotations

from pathlib import Path

import torch

from llada.errors import UserError
from llada.hf.convert import model_config
from llada.model.stored import CheckpointWeights, StoredTensors, all_rows
from llada.sampling.diffusion import Specials
from llada.tokenizer import Tokenizer
from llada.training import checkpoint


class Sampler:
    """A mask predictor with its tokenizer.

    Attributes:
        tokenizer: of the model.
        specials: ids for the samplers.
        device: where it computes.
        longest: sequence it was trained on, in tokens.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Tokenizer, longest: int, device: torch.device) -> None:
        self._model, self.tokenizer, self.longest, self.device = model.to(device).eval(), tokenizer, longest, device
        self.specials = Specials(tokenizer.mask_id, tokenizer.eos_id, tokenizer.vocab_size)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [b, s, rows] of ids [b, s]."""
        with torch.no_grad():
            return self._model(tokens).logits


def load(path: str | Path) -> Sampler:
    """Open an exported folder, a checkpoint, or a run (its latest checkpoint), on the GPU where there is one.

    Raises:
        UserError: none of these; a folder without weights or whose tokenizer has no mask token.
    """
    folder = Path(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (folder / "config.json").is_file():
        return _exported(folder, device)
    if not folder.is_dir():
        raise UserError(f"MODEL: no folder '{path}'")
    try:
        source = checkpoint.resolve(folder)
    except UserError:
        raise UserError(
            f"MODEL: '{path}' is neither an exported folder (it has no config.json) nor a checkpoint or a run with one"
        ) from None
    return _trained(source, device)


def _exported(folder: Path, device: torch.device) -> Sampler:
    """Loaded as anyone would: plain transformers with the code in the folder."""
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"MODEL: '{folder}' has a config.json but no weights (*.safetensors)")
    tokenizer = Tokenizer.load(folder)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype="auto", local_files_only=True)
    except Exception as error:  # whatever a damaged folder makes of it
        raise UserError(f"MODEL: '{folder}' cannot be loaded: {' '.join(str(error).split())}") from None
    named = getattr(model.config, "mask_token_id", None)
    if named is not None and named != tokenizer.mask_id:
        raise UserError(f"MODEL: '{folder}': mask_token_id {named} in config.json is not the tokenizer's mask token, {tokenizer.mask_id}")
    return Sampler(model, tokenizer, int(model.config.max_position_embeddings), device)


def _trained(source: Path, device: torch.device) -> Sampler:
    from llada.hf.configuration_llada import LLaDAConfig
    from llada.hf.modeling_llada import LLaDAModelLM

    trained = checkpoint.trained(checkpoint.read_state(source))
    tokenizer = checkpoint.load_tokenizer(source)
    fields = model_config(trained, tokenizer, trained.precision)
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig(**{name: fields[name] for name in LLaDAConfig.published_fields()}))
    stored = CheckpointWeights(StoredTensors(source / "model"), trained.model)
    model.load_state_dict({name: all_rows(stored, name) for name in stored.shapes}, assign=True)
    return Sampler(model, tokenizer, trained.longest, device)
