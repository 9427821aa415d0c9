"""llada: train masked diffusion language models, from text to a Hugging Face folder."""

__version__ = "0.1.0"
