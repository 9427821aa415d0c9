"""Encoding text fast, and training tokenizers."""
