"""The model for Hugging Face transformers. Every export carries a copy of the other files here:
they import torch and transformers only.
"""
