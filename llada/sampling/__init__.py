"""Sampling from a mask predictor: a callable from ids [b, s] to logits [b, s, vocab_size]."""

from llada.sampling.diffusion import DenoisingStep, SamplingOptions, SpecialIds, generate, infill

__all__ = ["DenoisingStep", "SamplingOptions", "SpecialIds", "generate", "infill"]
