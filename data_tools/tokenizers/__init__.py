"""Encode text fast, and train and describe tokenizers."""
