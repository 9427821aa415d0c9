"""The start of a run: what it starts from, and which settings may differ from a checkpoint's."""
