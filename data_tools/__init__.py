"""Turning text into prepared corpora: orchestration only, the format is llada.data.shard_format."""
