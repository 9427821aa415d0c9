"""llada: train masked diffusion language models, from text to a Hugging Face folder."""

from llada.device import hide_unwanted_gpus

__version__ = "0.2.0"

# Every import of ours passes through here, and this must run before torch is imported.
hide_unwanted_gpus()
