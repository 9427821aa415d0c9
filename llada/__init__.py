"""llada: train masked diffusion language models, from text to a Hugging Face folder."""

from llada.device import hide_unwanted_gpus

__version__ = "0.2.0"

hide_unwanted_gpus()
