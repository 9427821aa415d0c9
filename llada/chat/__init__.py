"""Chat formats: conversations <-> token ids."""
