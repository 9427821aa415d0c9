"""Turn text into prepared corpora, which `llada.data` reads: its file format is defined there."""
