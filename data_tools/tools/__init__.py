"""Commands on prepared corpora: inspect, verify, merge, split, export, import."""
