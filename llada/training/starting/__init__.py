"""Where a run starts: its latest sound checkpoint, other weights, or random ones."""
