"""Writing with a mask predictor: any callable from token ids [b, s] to logits [b, s, rows]."""

from llada.sampling.diffusion import Event, SamplingOptions, Specials, generate, infill

__all__ = ["Event", "SamplingOptions", "Specials", "generate", "infill"]
