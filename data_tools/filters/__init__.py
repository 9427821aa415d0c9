"""Find duplicates, and documents that repeat evaluation texts."""
