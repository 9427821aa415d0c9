"""Find duplicate documents, and documents that overlap evaluation texts."""
