"""Shards, mixtures, plans and batches. Knows no model and no ranks."""
