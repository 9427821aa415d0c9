"""Left-to-right sampling of a model that was trained with the autoregressive objective.

The weights are those of a LlamaForCausalLM, and transformers' own `generate` with its cache of keys
and values writes the text.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llada.chat.format import end_ids
from llada.checkpoint.canonical import all_rows
from llada.checkpoint.format import TrainedConfig
from llada.errors import RunError, UserError
from llada.hf.llama_layout import llama_config, llama_name
from llada.model.weights import Weights
from llada.objectives.registry import start_id
from llada.sampling.diffusion import SamplingOptions
from llada.tokenizer import Tokenizer

_COLDEST = 1e-6
"""Smallest temperature; logits divided by less than about 1e-37 are not finite in fp32."""


class CausalModel:
    """A model that writes from left to right, with its tokenizer.

    Args:
        trained: The model.
        tokenizer: Its tokenizer.
        weights: Its weights by canonical name.
        device: Where it computes.

    Attributes:
        tokenizer: Its tokenizer.
        end_ids: Tokens that end a text or an answer.
        max_sequence_length: Longest sequence that it was trained on, in tokens.
        device: Where it computes.
    """

    def __init__(
        self, trained: TrainedConfig, tokenizer: Tokenizer, weights: Weights, device: torch.device
    ) -> None:
        self.tokenizer = tokenizer
        self.max_sequence_length = trained.longest
        self.device = device
        self.end_ids = end_ids(tokenizer)
        self._start_id = start_id(tokenizer)
        # No token of a text: the mask token, and rows of the vocabulary without a token.
        self._never = [tokenizer.mask_id, *range(tokenizer.vocab_size, trained.model.vocab_size)]
        dtypes = {weights.dtype(name) for name in weights.shapes}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        fields = llama_config(trained, self._start_id, tokenizer.eos_id, tokenizer.eos_id, dtype)
        config = LlamaConfig(**fields)
        # No memory and no time for initial weights, which are replaced at once.
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        tensors = {llama_name(name): all_rows(weights, name).to(dtype) for name in weights.shapes}
        model.load_state_dict(tensors, assign=True, strict=False)
        model.tie_weights()
        # Its frequencies follow from the config and are in no file.
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
        self._model = model.to(device).eval()

    def write(self, prompt: list[int], options: SamplingOptions) -> list[int]:
        """Continue a prompt.

        Args:
            prompt: Token ids.
            options: Its length, temperature and seed are used.

        Returns:
            The new tokens, with the one that ended the text.

        Raises:
            RunError: Logits that are not finite.
        """
        # As in training: a chat format may have begun with the start token.
        if prompt[:1] != [self._start_id]:
            prompt = [self._start_id, *prompt]
        ids = torch.tensor([prompt], device=self.device)
        # Nothing in the model depends on it; transformers would remark on longer texts, as
        # `llada sample` has done already.
        self._model.config.max_position_embeddings = len(prompt) + options.length
        # generate draws from torch's global generator.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(options.seed)
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=options.length,
                do_sample=options.temperature > 0,
                temperature=options.temperature or None,
                top_k=0 if options.temperature > 0 else None,
                suppress_tokens=self._never,
                eos_token_id=sorted(self.end_ids),
                pad_token_id=self.tokenizer.eos_id,
                logits_processor=LogitsProcessorList([_FiniteLogits()]),
                use_cache=True,
            )
        response: list[int] = out[0, ids.shape[1] :].tolist()
        return response


def check_options(options: SamplingOptions) -> None:
    """Raise UserError for an option that has no meaning from left to right, or a bad value."""
    default = SamplingOptions()
    for name in ("steps", "block_length", "cfg", "remasking"):
        value = getattr(options, name)
        if value != getattr(default, name):
            raise UserError(
                f"--{name.replace('_', '-')}: {value} is for diffusion models, and this one writes"
                " from left to right; leave it out"
            )
    if 0 < options.temperature < _COLDEST:
        raise UserError(
            f"--temperature: {options.temperature:g} is too small to divide logits by; 0 takes the"
            " most likely token"
        )


class _FiniteLogits(LogitsProcessor):
    """Raises RunError for logits that are not finite, of which token 0 would count as the best."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # -inf is what other processors give to tokens that may not be written.
        if scores.isnan().any() or scores.isposinf().any():
            raise RunError(
                "MODEL: its logits are not finite: the weights are damaged, or from a failed run"
            )
        return scores
