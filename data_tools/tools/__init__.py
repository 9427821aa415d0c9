"""Commands on prepared corpora: inspect, verify, export, import, merge, split."""
