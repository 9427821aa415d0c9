"""The bidirectional transformer, built from Megatron-Core modules."""
